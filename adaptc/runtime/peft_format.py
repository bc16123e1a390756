"""PEFT's file format: the config, read and written, and the tensor keys; kinds are rows of ``methods.codec``."""

from adaptc.runtime.peft_export import codec_of_sites, comparable, plan_to_config
from adaptc.runtime.peft_import import config_to_plan, without_idle_keys
from adaptc.runtime.peft_keys import assign, decode, encode, tensors_of

__all__ = [
    "assign",
    "codec_of_sites",
    "comparable",
    "config_to_plan",
    "decode",
    "encode",
    "plan_to_config",
    "tensors_of",
    "without_idle_keys",
]
