"""Which inputs of a captured graph are tensors of adapters, or of modules that a plan names."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from adaptc.torch_internals import fake_of

#: (tensor, path of the site that it belongs to)
Owned = tuple[torch.Tensor, str]


@dataclasses.dataclass(frozen=True)
class AdapterTensors:
    """The tensors of a model's adapters as they are now: ``.to()`` and sharding replace them."""

    #: The site-id buffer of every adapter.
    site_ids: Sequence[Owned]
    #: Every parameter that is trained.
    trained: Sequence[Owned]
    #: Every tensor of the modules whose regions without gradients are to record them, with the module's path.
    asked: Sequence[Owned] = ()
    #: Paths of sites whose regions are lifted without being asked for.
    own: frozenset[str] = frozenset()


def positions(inputs: Sequence[Any], owned: Sequence[Owned]) -> dict[int, str]:
    """Position in ``inputs`` -> site path, of those that are one of ``owned`` or stand for it in a trace."""
    paths: dict[int, str] = {}
    for tensor, path in owned:
        paths[id(tensor)] = path
        fake = fake_of(inputs, tensor)
        if fake is not None:
            paths[id(fake)] = path
    return {i: paths[id(value)] for i, value in enumerate(inputs) if id(value) in paths}
