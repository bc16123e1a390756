# Versions: peft 0.21.2, transformers 5.24.0, torch 2.14.1
# Guess: generation with a tuned prompt is the same with and without a cache, as beside transformers 5.23.
# Seen: with a cache the prompt goes in again at every step, and nothing is said: transformers 5.24 calls the cache
#   "cache", and PEFT, which looks for "past_key_values", takes every step for the first one. By the logits, so that equal
#   tokens hide nothing; without a cache they are those of the formula.
# Matters: who generates with a prompt tuned by PEFT: the answers are another model's. A comparison with PEFT does not
#   show it where the compared library looks for the same name.
# adaptc: names of transformers are read from the class at hand, in one place (adaptc/transformers_names.py;
#   tests/methods/test_tokens.py, test_generation_is_the_formula_without_a_cache_and_counts_the_callers_tokens).
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"

finding torch==2.14.1 transformers==5.24.0 peft==0.21.2 <<'PROGRAM' | seen "without a cache the formula: True
with a cache the formula: False"
import peft
import torch
import transformers

torch.manual_seed(0)
config = transformers.LlamaConfig(
    vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
)
base = transformers.LlamaForCausalLM(config).eval()
model = peft.get_peft_model(base, peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")).eval()
prompt = model.prompt_encoder["default"].embedding.weight
ids, want = torch.tensor([[5, 6, 7]]), []
options = {
    "max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0,
    "return_dict_in_generate": True, "output_logits": True,
}
with torch.no_grad():
    start = ids
    for _ in range(3):
        embeds = torch.cat([prompt[None], base.get_input_embeddings()(ids)], 1)
        want.append(base(inputs_embeds=embeds, use_cache=False).logits[:, -1])
        ids = torch.cat([ids, want[-1].argmax(-1)[None]], 1)
    for use_cache in (False, True):
        got = model.generate(input_ids=start, attention_mask=torch.ones_like(start), use_cache=use_cache, **options)
        same = torch.allclose(torch.stack(got.logits), torch.stack(want), atol=1e-4)
        print(f"with{'' if use_cache else 'out'} a cache the formula:", same)
PROGRAM
