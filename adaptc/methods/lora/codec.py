"""LoRA in PEFT's file format: the keys of its config, and what adaptc does with each."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from adaptc.errors import UnsupportedKindError
from adaptc.methods.base import Method
from adaptc.methods.codec import (
    EXCLUDE,
    LAYERS,
    Codec,
    Config,
    Option,
    Part,
    is_bool,
    is_names,
    is_number,
    is_probability,
    is_rank,
    is_tokens,
    optional,
    patterns,
)
from adaptc.methods.lora import initial
from adaptc.methods.lora.options import LoRAOptions

_BIASES = ("none", "all", "lora_only")

#: ``init_lora_weights`` -> ``LoRA.init``; None switches PEFT's own initialisation off, like false.
INITS: dict[Any, str] = {
    True: "default", False: "random", None: "random", "gaussian": "gaussian", "orthogonal": "orthogonal",
}  # fmt: skip
#: Initialisations that adaptc does not have but that leave the base alone, so that values can be loaded.
VALUES_ONLY = ("eva",)
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
#: CorDA's options that matter: what the user may set, and where PEFT would leave files.
_CORDA = {"cache_file", "covariance_file"}

OPTIONS: dict[str, Option] = {
    **EXCLUDE,
    **LAYERS,
    "r": Option(8, "used", "a positive integer", is_rank, field="r", pattern="rank_pattern"),
    "lora_alpha": Option(8, "used", "a number", is_number, field="alpha", pattern="alpha_pattern"),
    "rank_pattern": Option(
        {}, "used", "a map from regular expressions to positive integers", optional(patterns(is_rank))
    ),
    "alpha_pattern": Option(
        {}, "used", "a map from regular expressions to numbers", optional(patterns(is_number))
    ),
    "lora_dropout": Option(0.0, "used", "a number in [0, 1)", is_probability, field="dropout"),
    "use_rslora": Option(False, "used", "true or false", is_bool, field="rslora"),
    "use_dora": Option(False, "used", "true, false or null", optional(is_bool), field="dora"),
    "lora_bias": Option(False, "used", "true, false or null", optional(is_bool), field="lora_bias"),
    "bias": Option("none", "used", "none, all or lora_only", lambda v: v in _BIASES, field="bias"),
    "init_lora_weights": Option(
        True, "used", "true, false or a name", optional(lambda v: isinstance(v, bool | str)),
        field="init", values=INITS,
    ),
    "megatron_config": Option(None, "ignored", carried=True),
    "megatron_core": Option("megatron.core", "ignored", carried=True),
    "qalora_group_size": Option(16, "ignored"),
    "loftq_config": Option({}, "init"),
    "eva_config": Option(None, "init"),
    "corda_config": Option(None, "used", "an object or null", optional(lambda v: isinstance(v, Mapping))),
    "lora_ga_config": Option(None, "init"),
    "target_parameters": Option(None, "used", "a list of names or null", optional(is_names)),
    "trainable_token_indices": Option(
        None, "used", "a list of token ids, a map from modules to such lists, or null", optional(is_tokens)
    ),
    "layer_replication": Option(None, "refused"),
    "alora_invocation_tokens": Option(None, "refused"),
    "arrow_config": Option(None, "refused"),
    "kasa_config": Option(None, "refused"),
    "monteclora_config": Option(None, "refused"),
    "velora_config": Option(None, "refused"),
    "use_bdlora": Option(None, "refused"),
    "use_qalora": Option(False, "refused"),
    "ensure_weight_tying": Option(False, "refused"),
}  # fmt: skip

_OLDER = {
    "runtime_config": Option(None, "ignored"),
    "merge_weights": Option(False, "ignored"),
    "enable_lora": Option(None, "refused"),
}


def check(used: Config, loading: bool) -> None:
    """Refuse an initialisation that cannot be honoured."""
    init, corda = used["init_lora_weights"], used["corda_config"] or {}
    if corda and not loading and (init != "corda" or any(corda.get(key) is not None for key in _CORDA)):
        raise UnsupportedKindError(
            "PEFT's LoRA option corda_config is not in this version, but for corda_method",
            found=repr(corda), do="give adaptc.compile the calibration batches",
        )  # fmt: skip
    if init in INITS:
        return
    name = str(init)
    if (name in VALUES_ONLY and loading) or (initial.is_init(name) and not loading):
        return
    if name.startswith(_CHANGES_BASE):
        reason, do = (
            "it changes the base weights, which the adapter's files do not hold",
            "save it in PEFT with path_initial_model_for_weight_conversion, which makes a plain LoRA of it",
        )
    elif name in VALUES_ONLY:
        reason, do = "not in this version", 'use "gaussian" or true, or load an adapter that has its values'
    elif name == "mica":
        reason, do = "it freezes lora_B in training, which is not in this version", "load it with PEFT"
    else:
        reason, do = "not an initialisation of PEFT that adaptc knows", "load it with PEFT"
    known = ", ".join(f'"{init}"' for init in initial.INITS if init not in ("default", "random"))
    raise UnsupportedKindError(
        f"init_lora_weights = {name!r} is refused: {reason}", expected=f"true, false, {known}", do=do
    )


def parts(used: Config) -> list[Part]:
    init, corda = used["init_lora_weights"], used["corda_config"] or {}
    changes: dict[str, Any] = {"dora": bool(used["use_dora"]), "lora_bias": bool(used["lora_bias"])}
    if init not in INITS and initial.is_init(str(init)):
        changes["init"] = init
        if init == "corda":
            changes["corda_method"] = corda.get("corda_method", "ipm")
    return [Part(CODEC.method(used, **changes))]


def stored(method: Method) -> Method:
    """Trained from a part of the weight, the correction is a plain LoRA of rank 2r with the same scale.

    It is on the base as it was, so nobody who loads it has to find the initial factors again.
    """
    if not (isinstance(method, LoRAOptions) and initial.reads_weight(method.init)):
        return method
    factor = math.sqrt(2) if method.rslora else 2
    return dataclasses.replace(
        method, init="default", corda_method="ipm", r=2 * method.r, alpha=factor * method.alpha,
        rank_pattern={key: 2 * r for key, r in method.rank_pattern.items()},
        alpha_pattern={key: factor * alpha for key, alpha in method.alpha_pattern.items()},
    )  # fmt: skip


CODEC = Codec(
    peft_type="LORA", kind="lora", label="LoRA", options=OPTIONS, older=_OLDER, check=check, parts=parts, stored=stored
)
