# Versions: trl 1.16.0, peft 0.21.2, transformers 5.23.0, torch 2.13.0
# Guess: DPOTrainer without ref_model compares a PEFT model with what its trained adapter is at the start, so that the
#   first loss is ln 2 = 0.6931, whatever the adapters are called.
# Seen: TRL copies the adapter called "default". Where another one is active and trained beside it, the loss starts
#   elsewhere, and nothing is said; where there is none of this name, KeyError: 'default'. KTO, GRPO and RLOO have the
#   same lines.
# Matters: who trains the second adapter of a model by preferences: the reference is another policy.
# adaptc: the copy is that of the live adapter, and this state is refused (adaptc/integrations/trl.py;
#   tests/integrations/test_trl_reference.py, test_what_cannot_be_compared_with_is_refused).
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"

finding torch==2.13.0 transformers==5.23.0 peft==0.21.2 trl==1.16.0 <<'PROGRAM' | grep "starts at" | seen "default: starts at ln 2: True
second: starts at ln 2: False"
import datasets
import peft
import tokenizers
import torch
import transformers
import trl

words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, 40)}}
raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
raw.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
)
rows = [{"prompt": f"w{i} w3", "chosen": " w4 w5", "rejected": f" w{i + 1} w6"} for i in range(10, 18)]
torch.manual_seed(0)
llama = transformers.LlamaForCausalLM(
    transformers.LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
    )
)
lora = peft.LoraConfig(r=4, lora_alpha=32, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
for name in ("default", "second"):
    model = peft.get_peft_model(llama, lora) if name == "default" else model
    if name == "second":
        model.delete_adapter("ref")
        model.add_adapter("second", lora)
    model.set_adapter(name)
    arguments = trl.DPOConfig(
        output_dir="out", max_steps=1, logging_steps=1, report_to=[], save_strategy="no", use_cpu=True, bf16=False,
        gradient_checkpointing=False, disable_tqdm=True,
    )
    data = datasets.Dataset.from_list(rows)
    trainer = trl.DPOTrainer(model=model, args=arguments, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    loss = trainer.state.log_history[0]["loss"]
    print(f"{name}: starts at ln 2:", abs(loss - 0.6931) < 1e-3)
PROGRAM
