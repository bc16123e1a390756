"""LoRA at every kind of site, and DoRA."""

from adaptc.methods.lora.linear import LoRAAdapter
from adaptc.methods.lora.method import LoRA

__all__ = ["LoRA", "LoRAAdapter"]
