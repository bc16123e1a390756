"""(IA)^3: learned vectors that rescale activations (Liu et al. 2022, section 3.3).

    y' = l * y        l (N,), on keys and values
    y  = W (l * x)    l (K,), on the input of a feed-forward layer's second product (``feedforward``)

The product is made in the wider of the two dtypes and rounded once to the activation's, as in PEFT.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from adaptc.errors import ConfigTypeError
from adaptc.ir.derive import derive
from adaptc.ir.ops.lora import draw_tensor
from adaptc.methods import linear
from adaptc.methods.base import Adapter, Method, anchor_of
from adaptc.methods.codec import EXCLUDE, Codec, Config, Option, Part, Sites, is_bool, is_modules, optional
from adaptc.methods.scaled import storage_dtype


@dataclasses.dataclass(frozen=True, kw_only=True)
class IA3(Method):
    """Rescale the outputs of linear layers, or their inputs.

    Args:
        feedforward: the vector multiplies the input (PEFT's ``feedforward_modules``) instead of the output.
        init: "default" (ones: the identity) or "random" (normal values, PEFT's ``init_ia3_weights=False``).
    """

    kind: ClassVar[str] = "ia3"
    peft_kind: ClassVar[str | None] = "IA3"
    mergeable: ClassVar[bool] = True
    batchable: ClassVar[bool] = True
    bankable: ClassVar[bool] = True
    changes_input: ClassVar[bool] = True
    quantised: ClassVar[bool] = True

    feedforward: bool = False
    init: str = "default"

    def refusal(self, path: str, module: nn.Module) -> str | None:
        return linear.refusal(path, module)

    def build(self, path: str, module: nn.Module, *, dtype: torch.dtype | None, site_id: int) -> Adapter:
        kind = IA3BeforeAdapter if self.feedforward else IA3Adapter
        return kind(self, module, dtype=dtype, site_id=site_id)


class IA3Adapter(Adapter):
    """``ia3_l`` (N,) of one site."""

    #: Whether the vector is as long as the input.
    size_of: ClassVar[int] = 1

    def __init__(
        self, method: IA3, module: nn.Module, *, dtype: torch.dtype | None = None, site_id: int = 0
    ) -> None:
        super().__init__(method, site_id)
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        size = linear.features(module)[self.size_of]
        values = torch.ones(size, dtype=storage_dtype(weight, dtype), device=weight.device)
        self.ia3_l = nn.Parameter(values if method.init == "default" else torch.randn_like(values))

    def apply_to(self, module: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return ia3_site(self.site_id, y, self.ia3_l)

    def peft_tensors(self) -> Mapping[str, torch.Tensor]:
        return {"ia3_l": self.ia3_l.detach()[:, None]}


class IA3BeforeAdapter(IA3Adapter):
    """``ia3_l`` (K,) of a feed-forward site."""

    acts_before: ClassVar[bool] = True
    size_of: ClassVar[int] = 0

    def apply_before(self, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return ia3_site(self.site_id, x, self.ia3_l)

    def apply_to(self, module: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return y

    def peft_tensors(self) -> Mapping[str, torch.Tensor]:
        return {"ia3_l": self.ia3_l.detach()[None]}


def body(t: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """t (..., n) * scale (n,)."""
    return (t * scale).to(t.dtype)


def sample(draw: Any) -> tuple[Any, ...]:
    from hypothesis import strategies as st

    shape = draw(st.lists(st.integers(1, 5), min_size=2, max_size=3))
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
    wide = dtype if dtype.itemsize >= 4 else draw(st.sampled_from([dtype, torch.float32]))
    return draw_tensor(draw, tuple(shape), dtype), draw_tensor(draw, (shape[-1],), wide)


SCALE = derive("ia3_scale", "(Tensor t, Tensor scale) -> Tensor", body, sample=sample)
ANCHORS = (anchor_of(SCALE),)
ia3_site = ANCHORS[0].function


def _is_all(targets: object) -> bool:
    return isinstance(targets, str) and targets.lower() == "all-linear"


def _parts(used: Config) -> list[Part]:
    """The feed-forward modules and the others. PEFT takes any path that ends in a name for feed-forward."""
    targets, names = used["target_modules"], used["feedforward_modules"]
    init = "default" if used["init_ia3_weights"] else "random"
    rest = Part(IA3(init=init))
    if not names:
        return [rest]
    expression = names if isinstance(names, str) else f".*(?:{'|'.join(map(re.escape, names))})"
    both: str | list[str] = names
    if not _is_all(targets):
        listed = isinstance(targets, list)
        inside = rf"(?:.*\.)?(?:{'|'.join(map(re.escape, targets))})" if listed else targets
        both = rf"(?=(?:{inside})\Z)(?:{expression})"
        if listed and isinstance(names, list) and set(names) <= set(targets):
            both = [name for name in targets if name.endswith(tuple(names))]
            rest = dataclasses.replace(rest, targets=[name for name in targets if name not in both])
    first = Part(
        IA3(feedforward=True, init=init), both, lambda path: re.fullmatch(expression, path) is not None
    )  # fmt: skip
    return [first] if rest.targets == [] else [first, rest]


def _feedforward_modules(sites: Sites) -> dict[str, Any]:
    """``feedforward_modules`` that mean exactly the feed-forward sites among all; a list must be in the targets."""
    wanted = {path for path, method in sites.methods.items() if getattr(method, "feedforward", False)}
    targets = sites.config["target_modules"]
    for names in ([], sorted({path.rpartition(".")[2] for path in wanted}), sorted(wanted)):
        found = {path for path in sites.methods if path.endswith(tuple(names))}
        if found == wanted and (isinstance(targets, str) or set(names) <= set(targets)):
            return {"feedforward_modules": names}
    return {"feedforward_modules": "|".join(re.escape(path) for path in sorted(wanted))}


def _check(used: Config, loading: bool) -> None:
    names, targets = used["feedforward_modules"], used["target_modules"]
    if names is None:
        raise ConfigTypeError(
            "feedforward_modules is null: PEFT would choose the modules by the model's architecture",
            do="name the modules, or give an empty list",
        )
    # PEFT writes such a config itself, for "all-linear", and cannot load it.
    known = loading or isinstance(names, str) or isinstance(targets, str) or set(names) <= set(targets)
    if not known:
        raise ConfigTypeError(
            "feedforward_modules names modules that are not in target_modules",
            found=", ".join(sorted(set(names) - set(targets))), do="add them to target_modules",
        )  # fmt: skip


CODEC = Codec(
    peft_type="IA3", kind="ia3", label="(IA)^3",
    options={
        **EXCLUDE,
        "feedforward_modules": Option(
            None, "used", "a list of names, or a regular expression", optional(is_modules)
        ),
        "init_ia3_weights": Option(
            True, "used", "true or false", is_bool, field="init", values={True: "default", False: "random"}
        ),
    },
    parts=_parts, write=_feedforward_modules, check=_check,
)  # fmt: skip
