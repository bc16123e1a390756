# Versions: peft 0.21.2, transformers 5.23.0, torch 2.13.0
# Guess: PEFT reads an adapter that has one LoRA per expert (as transformers 4 made them) into the fused experts of
#   transformers 5 with the function that was trained, whether the scale was alpha / r or, of rsLoRA, alpha / sqrt(r).
# Seen: gate_proj and up_proj become one product of rank 2r, and r and alpha are doubled. This keeps alpha / r; the
#   scale of rsLoRA becomes 2 alpha / sqrt(2 r), which is sqrt(2) times the trained one. Nothing says so.
# Matters: whoever goes on with such an adapter under transformers 5: the model is another one than was trained.
# adaptc: the fused factors have the trained scale, and files of fused experts are written so that PEFT computes it
#   (adaptc/files/peft_experts.py; tests/files/test_peft_experts.py, test_where_experts_differ).
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"

finding torch==2.13.0 transformers==5.23.0 peft==0.21.2 <<'PROGRAM' | seen "use_rslora=False, gate_up_proj: 1.00 of the trained update
use_rslora=False, down_proj: 1.00 of the trained update
use_rslora=True, gate_up_proj: 1.41 of the trained update
use_rslora=True, down_proj: 1.00 of the trained update"
import json
import math
import os

import peft
import safetensors.torch
import torch
import transformers

R, ALPHA = 4, 8
torch.manual_seed(0)
config = transformers.Qwen3MoeConfig(
    vocab_size=40, hidden_size=32, moe_intermediate_size=16, num_hidden_layers=1, num_attention_heads=4,
    num_key_value_heads=4, num_experts=2, num_experts_per_tok=1,
)
base = transformers.Qwen3MoeForCausalLM(config).state_dict()
tensors, products = {}, {}
for expert in range(2):
    for name, rows, columns in (("gate_proj", 16, 32), ("up_proj", 16, 32), ("down_proj", 32, 16)):
        A, B = torch.randn(R, columns), torch.randn(rows, R)
        products[expert, name] = B @ A
        path = f"base_model.model.model.layers.0.mlp.experts.{expert}.{name}"
        tensors |= {f"{path}.lora_A.weight": A, f"{path}.lora_B.weight": B}
os.makedirs("adapter")
safetensors.torch.save_file(tensors, "adapter/adapter_model.safetensors")
for rslora in (False, True):
    with open("adapter/adapter_config.json", "w") as file:
        json.dump({
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": R, "lora_alpha": ALPHA, "use_rslora": rslora,
            "target_modules": ["gate_proj", "up_proj", "down_proj"],
        }, file)
    model = transformers.Qwen3MoeForCausalLM(config)
    model.load_state_dict(base)
    merged = peft.PeftModel.from_pretrained(model, "adapter").merge_and_unload().state_dict()
    for name, parts in (("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj", ("down_proj",))):
        key = f"model.layers.0.mlp.experts.{name}"
        found = (merged[key] - base[key])[1]
        product = torch.cat([products[1, part] for part in parts])
        scale = (found * product).sum() / product.square().sum()
        trained = ALPHA / (math.sqrt(R) if rslora else R)
        print(f"use_rslora={rslora}, {name}: {scale / trained:.2f} of the trained update")
PROGRAM
