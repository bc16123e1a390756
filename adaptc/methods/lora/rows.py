"""The anchor of LoRA at a linear layer where each row of a batch has an adapter of its own, or none (``lora_rows``)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import fx

from adaptc.ir import dialect
from adaptc.ir.edit import Edit
from adaptc.ir.ops.lora import rows
from adaptc.ir.ops.lora_rows import LORA_ROWS
from adaptc.methods.base import Anchor
from adaptc.torch_internals import node_value


@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]
def lora_rows_site(
    site_id: torch.Tensor, x: torch.Tensor, y: torch.Tensor, A: Sequence[torch.Tensor], B: Sequence[torch.Tensor],
    scale: Sequence[torch.Tensor], ids: torch.Tensor, numbers: Sequence[int], dropout: float, training: bool,
) -> torch.Tensor:  # fmt: skip
    """y (..., N) with the corrections of the rows that have the adapters ``numbers`` by ``ids`` (all leading dimensions
    of y in one), whose inputs are dropped apart from each other."""
    with torch.autocast(x.device.type, enabled=False):
        dropped = F.dropout(x.to(y.dtype), dropout, training)
        out = LORA_ROWS.overload(rows(dropped), rows(y), list(A), list(B), list(scale), ids, list(numbers))[0]
        return out.view_as(y)  # type: ignore[no-any-return]


def expand_site(
    edit: Edit, site_id: fx.Node, x: fx.Node, y: fx.Node, A: Sequence[fx.Node], B: Sequence[fx.Node],
    scale: Sequence[fx.Node], ids: fx.Node, numbers: Sequence[int], dropout: float, training: bool,
) -> fx.Node:  # fmt: skip
    """The anchor's body in the dialect, with its casts written out."""
    dropped = edit.call(F.dropout, edit.cast(x, node_value(y).dtype), dropout, training)
    flat = [edit.call("reshape", t, (-1, node_value(t).shape[-1])) for t in (dropped, y)]
    found = edit.call(dialect.get("lora_rows").overload, *flat, list(A), list(B), list(scale), ids, list(numbers))
    return edit.call("view_as", edit.item(found, 0), y)


ANCHORS = (Anchor(lora_rows_site, expand_site),)
