# Versions: peft 0.21.2, transformers 5.23.0, torch 2.13.0
# Guess: target_modules=["gate_proj", "up_proj", "down_proj"] adapts the linear layers of these names, on DeepSeek-V3
#   as on Llama: those of the dense layer and those of the shared expert. The routed experts are no layers.
# Seen: for DeepSeek-V3 (and the other types of PEFT's table for mixtures of experts) PEFT replaces the names by
#   target_parameters=["gate_up_proj", "down_proj"]. All routed experts get adapters, of twice the rank for gate_up_proj
#   (16 rows below are 4 experts of rank 4), the dense layer and the shared expert none, and nothing says so.
# Matters: who trains such a model by the usual names trains other weights than named, and an adapter of the dense or
#   shared layers cannot be named this way.
# adaptc: such a layer is written to a file as the parameter "<path>.weight", which PEFT leaves as it is, and a config
#   that loses its layers is warned of (adaptc/plan/peft/moe.py; tests/plan/peft/test_moe.py,
#   test_every_layer_of_the_mlps_in_one_file,
#   test_a_config_object_adapts_what_peft_adapts_and_names_what_it_leaves_out).
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"

finding torch==2.13.0 transformers==5.23.0 peft==0.21.2 <<'PROGRAM' | seen "llama: modules down_proj, gate_proj, up_proj; parameters
layers.0.mlp.gate_proj.lora_A (2, 32)
layers.0.mlp.up_proj.lora_A (2, 32)
layers.0.mlp.down_proj.lora_A (2, 48)
deepseek_v3: modules; parameters down_proj, gate_up_proj
layers.1.mlp.experts.base_layer.lora_A (16, 32)
layers.1.mlp.experts.lora_A (8, 16)"
import peft
import torch
import transformers

torch.manual_seed(0)
llama = transformers.LlamaConfig(
    vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
)
deepseek = transformers.DeepseekV3Config(
    vocab_size=40, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=4, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
    first_k_dense_replace=1, q_lora_rank=None, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8,
)
for config in (llama, deepseek):
    model = peft.get_peft_model(
        transformers.AutoModelForCausalLM.from_config(config),
        peft.LoraConfig(r=2, lora_alpha=4, target_modules=["gate_proj", "up_proj", "down_proj"]),
    )
    used = model.peft_config["default"]
    modules, parameters = (", ".join(sorted(names or ())) for names in (used.target_modules, used.target_parameters))
    print(f"{config.model_type}: modules {modules}".rstrip() + f"; parameters {parameters}".rstrip())
    for path, parameter in model.named_parameters():
        if "lora_A" in path:
            print(path.removeprefix("base_model.model.model.").removesuffix(".default.weight"), tuple(parameter.shape))
PROGRAM
