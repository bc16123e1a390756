# Versions: compressed-tensors 0.20.1, transformers 5.23.0, peft 0.21.2, torch 2.13.0
# Guess: a checkpoint in 4-bit codes (pack-quantized, weights alone) stays in 4-bit codes in memory, as one of
#   bitsandbytes does; its layers are of a class of their own, and have a `weight` of some kind.
# Seen: until the first forward a layer is a plain nn.Linear that has no `weight`, and PEFT fails on it with an
#   AttributeError. The first forward of the model writes all weights out in the dtype of the model and keeps them:
#   memory grows to that of the model that was not quantised.
# Matters: who adapts such a model before they have called it, and who plans memory by the size of the checkpoint.
# adaptc: such a layer is refused with what to do before its first forward and adapted after it (docs/quantised.md).
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"

finding compressed-tensors==0.20.1 transformers==5.23.0 peft==0.21.2 torch==2.13.0 accelerate==1.15.0 <<'PROGRAM' \
    | seen "before the first forward: a torch.nn.modules.linear.Linear without a weight, bytes over fp32: 0.16
peft: AttributeError: 'Linear' object has no attribute 'weight'
after it: float32, bytes over fp32: 1.03
peft: adapted"
import tempfile

import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationArgs, QuantizationConfig, QuantizationScheme, apply_quantization_config,
)
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

GROUP = 32


def layers(model):
    return {name: p for name, p in model.named_parameters() if "_proj." in name}


def size(model):
    return sum(p.numel() * p.element_size() for p in layers(model).values())


def adapt(model):
    try:
        get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
        return "adapted"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


torch.manual_seed(0)
model = LlamaForCausalLM(
    LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=128,
    )
)
whole = size(model)
weights = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=GROUP)
config = QuantizationConfig(
    config_groups={"all": QuantizationScheme(targets=["Linear"], weights=weights)}, ignore=["lm_head"],
    format="pack-quantized", quantization_status="frozen",
)
apply_quantization_config(model, config)
for module in model.modules():
    if hasattr(module, "weight_scale"):
        groups = module.weight.data.unflatten(1, (-1, GROUP))
        module.weight_scale.data = groups.abs().amax(-1) / 7
compressor = ModelCompressor.from_pretrained_model(model)
compressor.compress_model(model)
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    compressor.update_config(folder)
    read = AutoModelForCausalLM.from_pretrained(folder)
    again = AutoModelForCausalLM.from_pretrained(folder)

layer = read.model.layers[0].self_attn.q_proj
kind = f"{type(layer).__module__}.{type(layer).__qualname__}"
without = "with" if hasattr(layer, "weight") else "without"
print(f"before the first forward: a {kind} {without} a weight, bytes over fp32: {size(read) / whole:.2f}")
print("peft:", adapt(read))
with torch.no_grad():
    again(torch.arange(8)[None])
dtype = str(again.model.layers[0].self_attn.q_proj.weight.dtype).removeprefix("torch.")
print(f"after it: {dtype}, bytes over fp32: {size(again) / whole:.2f}")
print("peft:", adapt(again))
PROGRAM
