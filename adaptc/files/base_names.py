"""Which tensors of a base's files become which of its model's, as transformers reads them.

Most keep their name, or get another one: ``backbone.h.0.weight`` for ``h.0.weight``. Some are made of several: where a
file has a weight for every expert, the model has one of all experts. What makes it only moves numbers (it stacks,
joins, cuts, transposes), so that it is undone by sending the place of each number through it.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from adaptc.errors import CheckpointError


@dataclasses.dataclass(frozen=True)
class Group:
    """Tensors of the files from which transformers makes others.

    Attributes:
        first: the path in the model of the first that is made.
        sources: names in the files, each with the converter's pattern for it, in the order in which they are taken.
    """

    model: nn.Module
    converter: Any
    first: str
    sources: list[tuple[str, str]]

    def made(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Path in the model -> the tensor that is made; ``tensors``: the sources by their names.

        Raises:
            CheckpointError: transformers cannot make it of these.
        """
        converter = copy.deepcopy(self.converter)
        for name, pattern in self.sources:
            converter.add_tensor(self.first, name, pattern, tensors[name])
        try:
            found = converter.convert(self.first, model=self.model, config=self.model.config)
        except Exception as error:
            raise CheckpointError(
                f"{self.first} cannot be made of the base's {len(self.sources)} tensors for it",
                expected="what transformers reads", found=f"{type(error).__name__}: {error}",
                do="read the base with transformers and write it with save_pretrained() first",
            ) from error  # fmt: skip
        return {path: value[0] if isinstance(value, list) else value for path, value in found.items()}

    def unmake(self, path: str, value: torch.Tensor, sources: Mapping[str, torch.Tensor]) -> None:
        """Write ``value``, which is one of the tensors that are made, into those of the ``sources`` that it is made of.

        Raises:
            CheckpointError: what makes it does not only move numbers.
        """
        ends, places = 0, {}
        for name, _ in self.sources:
            count = sources[name].numel()
            places[name] = torch.arange(ends, ends + count).view(sources[name].shape)
            ends += count
        index = self.made(places)[path].reshape(-1)
        del places
        seen = torch.zeros(ends, dtype=torch.bool)
        if index.dtype == torch.int64 and len(index) == value.numel():
            seen[index.clamp(0, ends - 1)] = True
        # As many places as numbers, and none outside.
        if int(seen.sum()) != value.numel() or int(index.max()) >= ends or int(index.min()) < 0:
            raise CheckpointError(
                f"{path} is made of the base's tensors by more than moving their numbers",
                expected="stacking, joining, cutting or transposing", found=type(self.converter).__name__,
                do="read the base with transformers, merge there, and write it with save_pretrained(merge=True)",
            )  # fmt: skip
        flat = torch.cat([sources[name].reshape(-1) for name, _ in self.sources])
        flat[index] = value.reshape(-1)
        begin = 0
        for name, _ in self.sources:
            source = sources[name]
            source.copy_(flat[begin : begin + source.numel()].view(source.shape))
            begin += source.numel()


@dataclasses.dataclass
class BaseNames:
    """Attributes:
    plain: path in the model -> the names that the tensor has in the files.
    groups: path in the model -> what it is made of; the first of those that are made of these.
    """

    plain: dict[str, list[str]]
    groups: dict[str, Group]


def names_in(model: nn.Module, names: Iterable[str]) -> BaseNames:
    """Where the tensors called ``names`` in files go in ``model`` (of transformers). What belongs nowhere is left out,
    as transformers leaves it out.

    As ``transformers.core_model_loading`` finds them (5.19 to 5.24).
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    state = model.state_dict()
    prefix = getattr(model, "base_model_prefix", "")
    mapping: Sequence[Any] = get_model_conversion_mapping(model) or []
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    found = BaseNames({}, {})
    for name in sorted(names, key=dot_natural_key):
        path, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if path not in state and name in state:
            path, pattern = rename_source_key(name, [], [], prefix, state)
        if path not in state:
            continue
        if pattern is None:
            found.plain.setdefault(path, []).append(name)
        else:
            group = found.groups.setdefault(path, Group(model, by_pattern[pattern], path, []))
            group.sources.append((name, pattern))
    return found


__all__ = ["BaseNames", "Group", "names_in"]
