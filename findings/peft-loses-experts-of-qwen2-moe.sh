# Versions: peft 0.21.2, transformers 5.23.0, torch 2.13.0
# Guess: PEFT reads an adapter that has one LoRA per expert (as transformers 4 made them) into the fused experts of
#   transformers 5 for Qwen2-MoE as it does for Qwen3-MoE: its table calls the layout itself "qwen2_moe".
# Seen: the table has only types that are mapped to the layout, and not the type qwen2_moe. The adapters of the
#   attention and of the shared expert act, those of the experts are lost, and nothing is said.
# Matters: whoever goes on with an adapter of Qwen1.5-MoE or Qwen2-MoE under transformers 5: the experts are untrained.
# adaptc: the layout is told by the model's modules (adaptc/files/peft_experts.py; tests/files/test_peft_experts.py,
#   test_every_expert_of_every_layer).
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"

finding torch==2.13.0 transformers==5.23.0 peft==0.21.2 <<'PROGRAM' | seen "qwen3_moe changes: mlp.experts.down_proj, mlp.experts.gate_up_proj, self_attn.q_proj.weight
qwen2_moe changes: mlp.shared_expert.down_proj.weight, mlp.shared_expert.gate_proj.weight, mlp.shared_expert.up_proj.weight, self_attn.q_proj.weight"
import json
import os

import peft
import safetensors.torch
import torch
import transformers

torch.manual_seed(0)
os.makedirs("adapter")
with open("adapter/adapter_config.json", "w") as file:
    json.dump({
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8,
        "target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj"],
    }, file)
for kind, shared in (("qwen3_moe", ()), ("qwen2_moe", ("shared_expert",))):
    shapes = {"self_attn.q_proj": (32, 32)}
    for mlp in ("experts.0", "experts.1", *shared):
        shapes |= {f"mlp.{mlp}.{name}": (16, 32) for name in ("gate_proj", "up_proj")}
        shapes[f"mlp.{mlp}.down_proj"] = (32, 16)
    tensors = {}
    for name, (rows, columns) in shapes.items():
        path = f"base_model.model.model.layers.0.{name}"
        tensors |= {f"{path}.lora_A.weight": torch.randn(4, columns), f"{path}.lora_B.weight": torch.randn(rows, 4)}
    safetensors.torch.save_file(tensors, "adapter/adapter_model.safetensors")
    config = transformers.AutoConfig.for_model(
        kind, vocab_size=40, hidden_size=32, moe_intermediate_size=16, shared_expert_intermediate_size=16,
        num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4, num_experts=2, num_experts_per_tok=1,
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    merged = peft.PeftModel.from_pretrained(model, "adapter").merge_and_unload().state_dict()
    changed = sorted(name.rpartition("layers.0.")[2] for name in base if not torch.equal(base[name], merged[name]))
    print(f"{kind} changes:", ", ".join(changed))
PROGRAM
