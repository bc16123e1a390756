"""Where published bottleneck adapters sit, as plans.

    plan = bottleneck_plan("houlsby", model)      model: of transformers, its class decides on the modules
    model = adaptc.compile(model, plan)

``houlsby``   (Houlsby et al. 2019) after attention and after the feed-forward network, before the residual sum.
``pfeiffer``  (Pfeiffer et al. 2021) after the feed-forward network only, before the residual sum.
``series``    (LLM-Adapters, Hu et al. 2023) before the first feed-forward products and after the last.
``series_last``  the last only (LLM-Adapters' AdapterP).
``parallel``  (LLM-Adapters) beside the query, key and value products.

    plan = petl_ast_plan("pfeiffer", r=24)        adapters of PETL-AST on an Audio Spectrogram Transformer or a ViT
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from adaptc.errors import PlanError
from adaptc.methods.bottleneck import Bottleneck
from adaptc.methods.conv_adapter import ConvAdapter
from adaptc.plan.match import Match
from adaptc.plan.plan import Plan
from adaptc.plan.rules import Rule

#: The options of each publication; ``r`` and everything else can be given.
STYLES: dict[str, dict[str, Any]] = {
    "houlsby": {"r": 64, "activation": "gelu", "init": "houlsby"},
    "pfeiffer": {"r": 48, "activation": "relu", "init": "bert"},
    "series": {"r": 256, "activation": "tanh", "init": "bert", "bias": False},
    "series_last": {"r": 256, "activation": "tanh", "init": "bert", "bias": False},
    "parallel": {"r": 256, "activation": "tanh", "init": "bert", "bias": False},
}


@dataclasses.dataclass(frozen=True)
class Layout:
    """The modules of a model type.

    Attributes:
        attention, feedforward: what computes the last value before the residual sum of each half of a block.
        first, last: the feed-forward products; projections: query, key and value.
    """

    attention: str
    feedforward: str
    first: tuple[str, ...]
    last: str
    projections: tuple[str, ...]


_LLAMA = Layout(
    "self_attn.o_proj", "mlp.down_proj", ("gate_proj", "up_proj"), "down_proj", ("q_proj", "k_proj", "v_proj")
)
_BERT = Layout(
    "attention.output.dropout", r"re:.*layer\.\d+\.output\.dropout", ("intermediate.dense",),
    r"re:.*layer\.\d+\.output\.dense", ("query", "key", "value"),
)  # fmt: skip
_OPT = Layout("self_attn.out_proj", "fc2", ("fc1",), "fc2", ("q_proj", "k_proj", "v_proj"))
LAYOUTS = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "bert": _BERT,
    "roberta": _BERT,
    "opt": _OPT,
    "gpt2": Layout("attn.resid_dropout", "mlp.dropout", ("c_fc",), r"re:.*mlp\.c_proj", ("c_attn",)),
    "gptj": Layout("attn.resid_dropout", "mlp.dropout", ("fc_in",), "fc_out", ("q_proj", "k_proj", "v_proj")),
    "bloom": Layout(
        "self_attention.dense", "mlp.dense_4h_to_h", ("dense_h_to_4h",), "dense_4h_to_h", ("query_key_value",)
    ),
}  # fmt: skip


def bottleneck_plan(style: str, model: nn.Module, **options: Any) -> Plan:
    """The plan that puts bottlenecks where ``style`` has them in ``model``; ``options``: of :class:`Bottleneck`.

    Raises:
        PlanError: an unknown style, or a model type whose modules are not known.
    """
    if style not in STYLES:
        raise PlanError("no such placement of bottlenecks", expected=", ".join(STYLES), found=repr(style))
    config: Any = getattr(model, "config", None)
    model_type = getattr(config, "model_type", type(model).__name__)
    layout = LAYOUTS.get(model_type)
    if layout is None:
        raise PlanError(
            f"the places of {style} adapters in a model of type {model_type!r} are not known",
            expected=", ".join(LAYOUTS), do="name the modules: Bottleneck(targets=[...])",
        )  # fmt: skip
    chosen = {**STYLES[style], **options}
    after: dict[str, Any] = {**chosen, "placement": "series_out"}
    if style in ("houlsby", "pfeiffer"):
        places = (layout.attention, layout.feedforward) if style == "houlsby" else (layout.feedforward,)
        # A dropout does not know how wide it is; a linear layer before the residual sum is as wide as the model.
        return Plan([Bottleneck(targets=places, features=config.hidden_size, **after)])
    if style == "parallel":
        return Plan([Bottleneck(targets=layout.projections, placement="parallel", **chosen)])
    last = Bottleneck(targets=(layout.last,), **after)
    first = Bottleneck(targets=layout.first, placement="series_in", **chosen)
    return Plan([last] if style == "series_last" else [first, last])


def petl_ast_plan(placement: str = "pfeiffer", **options: Any) -> Plan:
    """PETL-AST's adapters (Cappellazzo et al. 2024, section 3): after or beside the feed-forward half of each block
    ("pfeiffer"), or both halves ("houlsby"); with the norms in front of them, the last norm and the head trained.

    ``options``: of :class:`ConvAdapter`. Modules are named as in transformers' AST and ViT.

    Raises:
        PlanError: an unknown placement.
    """
    if placement not in ("pfeiffer", "houlsby"):
        raise PlanError("no such placement of PETL-AST", expected="pfeiffer, houlsby", found=repr(placement))
    both = placement == "houlsby"
    norms = ("layernorm_before", "layernorm_after") if both else ("layernorm_after",)
    halves = ("attention", "mlp") if both else ("mlp",)
    trained = Match((*norms, "layernorm", "classifier"))
    return Plan([Rule(trained, train="full"), ConvAdapter(targets=halves, **options)])
