"""PEFT's file format for LoRA adapters: the config, read and written, and the tensor keys."""

from adaptc.runtime.peft_export import plan_to_config
from adaptc.runtime.peft_import import config_to_plan
from adaptc.runtime.peft_keys import decode, encode, tensors_of

__all__ = ["config_to_plan", "decode", "encode", "plan_to_config", "tensors_of"]
