"""PEFT's file format: the config, read and written, and the tensor keys; kinds are rows of ``methods.codec``."""

from adaptc.files.peft_keys import EMBEDDINGS, Decoded, assign, decode, embedding_keys, encode, tensors_of
from adaptc.plan.peft.reading import config_to_plan, without_idle_keys
from adaptc.plan.peft.writing import codec_of_sites, comparable, plan_to_config

__all__ = [
    "EMBEDDINGS",
    "Decoded",
    "assign",
    "codec_of_sites",
    "comparable",
    "config_to_plan",
    "decode",
    "embedding_keys",
    "encode",
    "plan_to_config",
    "tensors_of",
    "without_idle_keys",
]
