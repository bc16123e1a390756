"""Rows of the base's embeddings that came with an adapter: its vocabulary was extended, or its embeddings were trained.

PEFT writes such embeddings whole beside the adapter, and loading them changes the base for good. Here they belong to
the adapter that they came with: while it is live the rows that differ are in the base's weight, in place, so that a
tied head, a merge and every captured graph read them; otherwise the base's own rows are there, bit for bit.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from adaptc import distributed
from adaptc.errors import SiteError, UnexpectedKeyError, UnsupportedError


@dataclasses.dataclass
class Rows:
    """Rows of one parameter of the base.

    Attributes:
        path: the parameter's path in the model.
        index: (k,) int64, which rows.
        held: (k, ...) the adapter's rows, or the base's own while the adapter's are in the parameter.
        live: whether they are.
    """

    path: str
    index: torch.Tensor
    held: torch.Tensor
    live: bool = False

    @torch.no_grad()
    def put(self, model: nn.Module, live: bool) -> None:
        """Bring the adapter's rows into the parameter (``live``), or the base's own back."""
        if live == self.live:
            return
        weight = model.get_parameter(self.path).data
        index = self.index.to(weight.device)
        before = weight[index].clone()
        weight.index_copy_(0, index, self.held.to(weight))
        self.held, self.live = before, live


@contextlib.contextmanager
def base_alone(model: nn.Module, live: Sequence[Rows]) -> Iterator[None]:
    """A block in which the base has its own rows; ``live``: those of the live adapters, in order."""
    inside = [rows for rows in live if rows.live]
    for rows in reversed(inside):
        rows.put(model, False)
    try:
        yield
    finally:
        for rows in inside:
            rows.put(model, True)


@contextlib.contextmanager
def at_work(model: nn.Module, group: Sequence[Rows]) -> Iterator[None]:
    """A block in which the base, which has its own rows now, has those of ``group``."""
    for rows in group:
        rows.put(model, True)
    try:
        yield
    finally:
        for rows in reversed(group):
            rows.put(model, False)


def parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Path -> parameter, of the input embeddings and the output layer of a transformers model."""
    modules = []
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        if callable(get := getattr(model, getter, None)):
            with contextlib.suppress(NotImplementedError, AttributeError):  # how transformers says that there are none
                modules.append(get())
    paths: dict[int, str] = {id(module): path for path, module in model.named_modules()}
    return {
        f"{paths[id(module)]}.{name}": parameter
        for module in modules
        if isinstance(module, nn.Module) and id(module) in paths
        for name, parameter in module._parameters.items()
        if parameter is not None
    }


def rows_of(model: nn.Module, found: Mapping[str, torch.Tensor], source: str) -> list[Rows]:
    """The rows in which the parameters ``found`` (by path, of a file) differ from the model's, which has its own now.

    Raises:
        UnexpectedKeyError: two values of one tied parameter; UnsupportedError: the parameters are sharded.
    """
    if found and distributed.is_sharded(model):
        raise UnsupportedError(
            f"{source} holds embeddings, which cannot be loaded into a sharded model",
            do="load the adapter before the model is sharded",
        )
    seen: dict[int, str] = {}
    rows = []
    for path, tensor in found.items():
        own = model.get_parameter(path)
        if own.is_meta:
            raise UnsupportedError(
                f"{source} holds {path}, of which the model has no values", expected="a base with a weight of its own",
                do="give the base that the adapter was trained on",
            )  # fmt: skip
        values = tensor.to(own.dtype)
        if (other := seen.setdefault(id(own), path)) != path:
            if not torch.equal(values, found[other].to(own.dtype)):
                raise UnexpectedKeyError(
                    f"{source} holds other values for {other} than for {path}, which are one tied weight",
                    do="untie the base's embeddings (tie_word_embeddings=False), as they were in training",
                )
            continue
        differs = (values != own.detach().cpu()).reshape(len(values), -1).any(1)
        index = differs.nonzero().flatten()
        if len(index):
            rows.append(Rows(path, index, values[index].clone()))
    return rows


def check_together(model: nn.Module, groups: Mapping[str, list[Rows]]) -> None:
    """Raise unless the rows of the adapters that are to act together are equal where they overlap.

    ``groups``: adapter -> its rows; the base must have its own now.

    Raises:
        SiteError: two of them have other values for one row.
    """
    first: dict[int, tuple[str, dict[int, torch.Tensor]]] = {}
    for name, group in groups.items():
        for rows in group:
            values = dict(zip(rows.index.tolist(), rows.held, strict=True))
            known = first.setdefault(id(model.get_parameter(rows.path)), (name, {}))
            for i, value in values.items():
                if i in known[1] and not torch.equal(known[1][i].to(value), value):
                    raise SiteError(
                        f"{known[0]!r} and {name!r} have other values for row {i} of {rows.path}",
                        do="make one of them live: their vocabularies were extended or trained apart",
                    )
            known[1].update(values)


def to_save(model: nn.Module, rows: Iterable[Rows], wanted: bool | str) -> dict[str, torch.Tensor]:
    """The whole embeddings by path with ``rows`` in their places, where an adapter's file is to hold them.

    The base must have its own rows now. ``wanted``: as ``save_embedding_layers`` of PEFT.
    """
    group = list(rows)
    if wanted is False or (wanted == "auto" and not group and not vocabulary_changed(model)):
        return {}
    found = {path: distributed.whole(own.detach()).clone() for path, own in parameters(model).items()}
    owners = {path: id(own) for path, own in parameters(model).items()}
    for part in group:
        for path, tensor in found.items():
            if owners[path] == id(model.get_parameter(part.path)):
                tensor.index_copy_(0, part.index.to(tensor.device), part.held.to(tensor))
    return found


def vocabulary_changed(model: nn.Module) -> bool:
    """Whether the vocabulary has another size than in the files that the model was read from, where they are here."""
    config: Any = getattr(model, "config", None)
    name, size = getattr(model, "name_or_path", None), getattr(config, "vocab_size", None)
    if not name or size is None:
        return False
    try:
        then = type(config).from_pretrained(name, local_files_only=True)
    except (OSError, ValueError):
        return False
    return bool(getattr(then, "vocab_size", size) != size)
