# Versions: peft 0.21.2, transformers 5.23.0, torch 2.13.0
# Guess: a string in target_modules is a regular expression on the whole path, so that r".*layers\.1\..*q_proj" adapts
#   q_proj of layer 1 alone, in Mixtral as in Llama.
# Seen: for Mixtral (and the other types of PEFT's table for mixtures of experts) the expression becomes the set of the
#   last names of all that it matches, and q_proj of every layer is adapted. Nothing is said.
# Matters: who adapts some layers by an expression trains and saves all of them.
# adaptc: a plan means what it says, and its file names paths that PEFT reads alike; a config of PEFT's is read as PEFT
#   reads it (adaptc/plan/peft/moe.py; tests/plan/peft/test_moe.py, test_plans_of_every_form,
#   test_a_config_is_read_as_peft_reads_it).
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"

finding torch==2.13.0 transformers==5.23.0 peft==0.21.2 <<'PROGRAM' | seen "llama: q_proj of layers 1
mixtral: q_proj of layers 0, 1, 2"
import peft
import transformers

for kind in (transformers.LlamaConfig, transformers.MixtralConfig):
    config = kind(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4,
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=r".*layers\.1\..*q_proj"))
    layers = [name.split(".")[4] for name, _ in model.named_parameters() if "q_proj.lora_A" in name]
    print(f"{kind.model_type}: q_proj of layers", ", ".join(layers))
PROGRAM
