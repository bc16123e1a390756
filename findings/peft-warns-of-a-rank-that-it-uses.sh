# Versions: peft 0.21.2, transformers 5.23.0, torch 2.13.0
# Guess: a key of rank_pattern that fits a parameter of target_parameters sets its rank, and nothing is said.
# Seen: it sets the rank, and PEFT warns that the key "did not match any targeted module" and was ignored: the check
#   looks at modules only.
# Matters: whoever believes the warning and takes the key out trains another rank than before.
# adaptc: such a key counts as used, and the warning is about keys that change nothing
#   (adaptc/plan/peft/matching.py; tests/plan/peft/test_matching.py,
#   test_what_selects_nothing_is_left_out_with_a_warning).
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"

finding torch==2.13.0 transformers==5.23.0 peft==0.21.2 <<'PROGRAM' | seen "rank_pattern={}: rank 4, a warning: False
rank_pattern={'.*down_proj': 2}: rank 2, a warning: True"
import warnings

import peft
import transformers

config = transformers.MixtralConfig(
    vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
    num_key_value_heads=4, num_local_experts=2,
)
for pattern in ({}, {".*down_proj": 2}):
    lora = peft.LoraConfig(r=4, target_modules=[], target_parameters=["experts.down_proj"], rank_pattern=pattern)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = peft.get_peft_model(transformers.MixtralForCausalLM(config), lora)
    (rank,) = (module.r["default"] for module in model.modules() if hasattr(module, "lora_A"))
    warned = any("did not match any targeted module and were ignored" in str(one.message) for one in caught)
    print(f"rank_pattern={pattern}: rank {rank}, a warning: {warned}")
PROGRAM
