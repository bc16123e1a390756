"""LoRA at every kind of site, and DoRA."""

from adaptc.methods.lora.method import LoRA, LoRAAdapter

__all__ = ["LoRA", "LoRAAdapter"]
