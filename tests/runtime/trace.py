"""Random operations on a model with adapters, as a state machine, and what a simple oracle knows beside it: the base
as it was given, the adapters' values, and who acts. Outputs are those of a model made anew with the acting adapters."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import json
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

import adaptc
from adaptc.errors import (
    AdaptcError,
    AdaptcWarning,
    BatchError,
    CheckpointError,
    MergeError,
    NonFiniteError,
    UnsupportedError,
)
from adaptc.runtime.weights import keep, patch
from tests.runtime import rows
from tests.runtime.kinds import HEAD, KINDS, kinds_of
from tests.runtime.rows import logits
from tests.runtime.weights import cases

ROWS = 4
INPUTS = {"llama": cases.tokens, "qwen3_moe": cases.tokens, "vit": cases.images}
TOLERANCE = {torch.float32: 2e-4, torch.float64: 1e-9, torch.bfloat16: 0.15}
NUMBER = st.integers(0, 2**16)


class InjectedError(Exception):
    pass


@dataclasses.dataclass
class Known:
    """Of one adapter: what it was made by, and (path of the site, number there, name) -> value."""

    kind: str
    values: dict[tuple[str, int, str], torch.Tensor]


def tensors_of(model: nn.Module, name: str) -> dict[tuple[str, int, str], torch.Tensor]:
    """(path of the site, number there, name) -> tensor of an adapter."""
    found = {}
    for site in model.adaptc.sites:
        for number, adapter in enumerate(site.of(name)):
            named = itertools.chain(
                adapter.named_parameters(remove_duplicate=False), adapter.named_buffers(remove_duplicate=False)
            )
            found.update({(site.path, number, n): t for n, t in named if n != "site_id"})
    return found


def put(model: nn.Module, name: str, values: dict[tuple[str, int, str], torch.Tensor]) -> None:
    """Give an adapter values, in the dtypes that they have."""
    with torch.no_grad():
        for key, tensor in tensors_of(model, name).items():
            tensor.data = values[key].clone()


class Life(RuleBasedStateMachine):
    """``host``: a name of ``HOSTS``; the classes below say it."""

    host = ""
    #: Of how many steps which did something: tests ask whether all have.
    counts: dict[str, int]

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="trace-"))
        self.stack = contextlib.ExitStack()
        self.stack.enter_context(torch.compiler.set_stance("force_eager"))
        caught = warnings.catch_warnings()
        self.stack.enter_context(caught)
        warnings.simplefilter("ignore", AdaptcWarning)
        plain, self.inputs = rows.HOSTS[self.host][0](), INPUTS[self.host](ROWS)
        cases.odd_rows(plain, HEAD[self.host][0])
        plain.register_buffer("unused", cases.odd_tensor(torch.float32))
        self.plain = plain
        self.dtype = torch.float32
        self.known: dict[str, Known] = {}
        self.live: tuple[str, ...] = ()
        self.merged: tuple[str, ...] = ()
        self.numbers = itertools.count()
        self._fresh: dict[object, torch.Tensor] = {}
        self._version = 0

    # ------------------------------------------------------------------------------ what is known

    @initialize(kind=NUMBER)
    def start(self, kind: int) -> None:
        self.kinds = kinds_of(self.host)
        chosen = self.kinds[kind % len(self.kinds)]
        model = copy.deepcopy(self.plain)
        self.base = cases.base_of(model)
        self.flags = {n: p.requires_grad for n, p in model.named_parameters()}
        torch.manual_seed(0)
        self.model: Any = adaptc.compile(model, KINDS[chosen](self.host), name="a0", backend="eager")
        next(self.numbers)
        self.remember("a0", chosen)
        self.live = ("a0",)
        self.look()

    def look(self) -> None:
        """Remember the objects and the memory of the base, which nothing is to change from here on."""
        self.objects = {n: (id(t), t.data_ptr()) for n, t in self.model.named_parameters() if not cases.is_ours(n)}
        self.hooks = None if self.merged else self._hooks()

    def _hooks(self) -> int:
        modules = [m for n, m in self.model.named_modules() if not cases.is_ours(f"{n}.")]
        return sum(len(m._state_dict_hooks) + len(m._load_state_dict_pre_hooks) for m in modules)

    def remember(self, name: str, kind: str) -> None:
        """Give a new adapter values that are no initial ones, and keep them."""
        generator = torch.Generator().manual_seed(len(self.known) + 7)
        with torch.no_grad():
            for tensor in dict.fromkeys(self.model.adaptc.parameters(name)):
                noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
                tensor.add_(0.1 * noise.to(tensor.dtype))
        self.known[name] = Known(kind, {k: t.detach().clone() for k, t in tensors_of(self.model, name).items()})
        self.changed()

    def changed(self) -> None:
        self._version += 1

    @property
    def handle(self) -> Any:
        return self.model.adaptc

    @property
    def acting(self) -> tuple[str, ...]:
        return self.merged or self.live

    def some(self, number: int, most: int = 3, *, mergeable: bool = False) -> tuple[str, ...]:
        """Up to ``most`` names, in any order; mostly of such as can be merged, where that is asked for."""
        names, found = sorted(self.known), []
        if mergeable and number % 5:
            can = adaptc.methods()
            names = [n for n in names if can[self.known[n].kind.split()[0]].mergeable]
            number = number // 5 * (most + 1) + 1 + number % most
        for _ in range(number % (most + 1)):
            number //= most + 1
            if names:
                found.append(names.pop(number % len(names)))
        return tuple(found)

    def one(self, number: int) -> str:
        return sorted(self.known)[number % len(self.known)]

    def unmerged(self) -> None:
        """The oracle's side of a merge that is undone."""
        self.merged = ()

    def snapshot(self) -> dict[str, torch.Tensor]:
        own = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        return {n: t.detach().clone() for n, t in own.items()}

    def check_untouched(self, before: dict[str, torch.Tensor]) -> None:
        """Nothing has changed: not even what is merged."""
        now = self.snapshot()
        assert now.keys() == before.keys()
        assert [n for n, t in now.items() if not cases.same_bits(t, before[n])] == []

    # ------------------------------------------------------------------------------ outputs

    def fresh(self, names: tuple[str, ...]) -> torch.Tensor:
        """What a new model gives with these adapters alone."""
        key = (names, self._version)
        if key not in self._fresh:
            model: Any = copy.deepcopy(self.plain).to(self.dtype)
            for path, tensor in self.base.items():
                target = patch.tensor_at(model, path)
                assert target is not None
                target.data = tensor.clone()
            for i, name in enumerate(names):
                plan = KINDS[self.known[name].kind](self.host)
                if i == 0:
                    model = adaptc.compile(model, plan, name=name, backend="eager")
                else:
                    model.adaptc.add(name, plan)
                put(model, name, self.known[name].values)
            if len(names) > 1:
                model.adaptc.switch(names)
            self._fresh[key] = self.outputs(model)
        return self._fresh[key]

    def outputs(self, model: nn.Module) -> torch.Tensor:
        inputs = {
            n: t.to(self.dtype) if torch.is_tensor(t) and t.is_floating_point() else t for n, t in self.inputs.items()
        }
        with torch.no_grad():
            return logits(model(**inputs))

    def check_outputs(self) -> None:
        got, want = self.outputs(self.model), self.fresh(self.acting)
        if self.merged:
            self.check_near(got, want)
        else:
            assert cases.same_bits(got, want), f"{self.acting}: {float((got - want).abs().nan_to_num().max())}"

    def check_near(self, got: torch.Tensor, want: torch.Tensor) -> None:
        scale = max(1.0, float(want.double().nan_to_num(0, 0, 0).abs().max()))
        assert torch.equal(got.isnan(), want.isnan())
        difference = (got.double() - want.double()).nan_to_num(0, 0, 0).abs().max()
        assert float(difference) <= TOLERANCE[self.dtype] * scale, f"{self.acting}: {float(difference)} of {scale}"

    # ------------------------------------------------------------------------------ rules

    @rule(number=NUMBER)
    def switch(self, number: int) -> None:
        names = self.some(number)
        before = self.snapshot()
        try:
            self.handle.switch(names[0] if len(names) == 1 else names or None)
        except AdaptcError:
            self.note("refused switch")
            self.check_untouched(before)
            return
        self.unmerged()
        self.live = names
        self.note("switch")

    @rule(number=NUMBER, how=st.sampled_from(["memory", "memory", "disk"]))
    def merge(self, number: int, how: Any) -> None:
        self._merge(self.some(number, mergeable=True), how)

    def _merge(self, names: tuple[str, ...], how: Any = "memory") -> None:
        before = self.snapshot()
        live = self.live
        try:
            self.handle.merge(names or None, keep=how)
        except MergeError:
            raise
        except AdaptcError:
            self.note("refused merge")
            self.check_untouched(before)
            return
        chosen = names or self.acting
        if set(chosen) != set(self.merged):
            self.merged = tuple(sorted(chosen))
        self.live = live
        assert set(self.merged) == set(chosen)
        self.note("merge")

    @rule(number=NUMBER, position=st.integers(0, 12), error=st.sampled_from([InjectedError, KeyboardInterrupt]))
    def merge_fails(self, number: int, position: int, error: type[BaseException]) -> None:
        """A merge that fails while it writes, or while the base is being kept."""
        names = self.some(number, mergeable=True)
        written, own = itertools.count(), patch.put

        def fail(target: torch.Tensor, value: torch.Tensor) -> None:
            if next(written) == position:
                with torch.no_grad():
                    target.view(-1)[:2] = 3
                raise error
            own(target, value)

        with replaced(patch, "put", fail):
            self._fails(names, error)

    @rule(number=NUMBER, position=st.integers(0, 6), error=st.sampled_from([OSError, KeyboardInterrupt]))
    def keeping_fails(self, number: int, position: int, error: type[BaseException]) -> None:
        names = self.some(number, mergeable=True)
        copied, own = itertools.count(), keep._copy

        def fail(tensor: torch.Tensor) -> torch.Tensor:
            if next(copied) == position:
                raise error
            return own(tensor)

        with replaced(keep, "_copy", fail):
            self._fails(names, error)

    def _fails(self, names: tuple[str, ...], error: type[BaseException]) -> None:
        try:
            self._merge(names)
        except (MergeError, error):
            self.unmerged()
            self.note("failed merge")
            assert cases.differing(self.model, self.base) == []

    @rule(position=st.integers(0, 6))
    @precondition(lambda self: self.merged)
    def unmerge_is_interrupted(self, position: int) -> None:
        """What was interrupted while the base was written back is done by the next try."""
        written, own = itertools.count(), patch.put_back

        def fail(target: torch.Tensor, kept: torch.Tensor) -> None:
            if next(written) == position:
                raise KeyboardInterrupt
            own(target, kept)

        with replaced(patch, "put_back", fail), contextlib.suppress(KeyboardInterrupt):
            self.handle.unmerge()
        self.note("interrupted unmerge")
        self.unmerge()

    @rule()
    def unmerge(self) -> None:
        self.handle.unmerge()
        self.unmerged()
        assert cases.differing(self.model, self.base) == []

    @rule()
    def call(self) -> None:
        self.check_outputs()
        self.note("call")

    @rule(number=NUMBER, layer=NUMBER)
    def call_fails(self, number: int, layer: int) -> None:
        """A user's hook raises in the middle of a call, alone or in a batch."""
        modules = [m for n, m in self.model.named_modules() if not cases.is_ours(f"{n}.")]

        def fail(*_: Any) -> None:
            raise InjectedError

        names = [(None, *sorted(self.known))[(number >> 3 * i) % (len(self.known) + 1)] for i in range(ROWS)]
        in_batch = number % 2 == 0
        hook = modules[layer % len(modules)].register_forward_hook(fail)
        try:
            with self.handle.batch(names) if in_batch else contextlib.nullcontext():
                if in_batch:
                    self.unmerged()
                self.outputs(self.model)
        except (InjectedError, BatchError):
            self.note("failed call")
        except AdaptcError:
            assert in_batch
        finally:
            hook.remove()

    @rule(number=NUMBER)
    def batch(self, number: int) -> None:
        names = [(None, *sorted(self.known))[(number >> 4 * i) % (len(self.known) + 1)] for i in range(ROWS)]
        self._batch(names, None)

    @rule(number=NUMBER)
    @precondition(lambda self: self.host != "vit")
    def spans(self, number: int) -> None:
        """Tokens of a row have different adapters; rows that have one alone are compared."""
        names = [(None, *sorted(self.known))[(number >> 4 * i) % (len(self.known) + 1)] for i in range(ROWS)]
        ids = torch.arange(ROWS)[:, None].repeat(1, self.inputs["input_ids"].shape[1])
        ids[0, ::2] = 1
        self._batch(names, ids)

    def _batch(self, names: list[str | None], ids: torch.Tensor | None) -> None:
        before, ran = self.snapshot(), []

        def note(module: nn.Module, args: Any, kwargs: Any) -> None:
            if not any(isinstance(t, FakeTensor) for t in (*args, *kwargs.values())):  # the run that finds the rows
                ran.append(module)

        hook = self.model.register_forward_pre_hook(note, with_kwargs=True)
        try:
            with self.handle.batch(names, spans=ids):
                self.unmerged()
                found = self.outputs(self.model)
                assert self.handle.metrics()["merged"] == 0
        except AdaptcError as error:
            self.note("refused batch")
            self.note(f"refused batch: {str(error).splitlines()[0]}")
            assert ran == [], "refused before anything ran"
            if self.merged:
                self.check_untouched(before)
            return
        finally:
            hook.remove()
        with self.handle.batch([None] * ROWS):
            base = self.outputs(self.model)
        for i, name in enumerate(names):
            if ids is not None and len(set(ids[i].tolist())) > 1:
                continue
            if name is None:
                self.check_base_row(found[i], base[i])
            else:
                self.check_near(found[i], self.fresh((name,))[i])
        self.note("batch" if ids is None else "spans")

    def check_base_row(self, found: torch.Tensor, base: torch.Tensor) -> None:
        if self.host == "qwen3_moe":  # where tokens are sorted, the base may round by what other rows do
            self.check_near(found, base)
        else:
            assert cases.same_bits(found, base)

    @rule(number=NUMBER)
    @precondition(lambda self: len(self.known) < 5)
    def add(self, number: int) -> None:
        kind = self.kinds[number % len(self.kinds)]
        if self.merged and number % 2:  # what begins at the very weights that others are merged into
            kind = self.known[self.merged[0]].kind
        name = f"a{next(self.numbers)}"
        torch.manual_seed(number)
        self.handle.add(name, KINDS[kind](self.host))
        found = {k: t.detach().clone() for k, t in tensors_of(self.model, name).items()}
        plain = copy.deepcopy(self.plain).to(self.dtype)
        for path, tensor in self.base.items():
            patch.tensor_at(plain, path).data = tensor.clone()
        torch.manual_seed(number)
        twin = adaptc.compile(plain, KINDS[kind](self.host), name=name, backend="eager")
        for key, tensor in tensors_of(twin, name).items():
            assert cases.same_bits(found[key], tensor), f"{kind} starts from the base alone: {key}"
        self.remember(name, kind)
        self.note("add")

    @rule(number=NUMBER)
    @precondition(lambda self: len(self.known) > 1)
    def remove(self, number: int) -> None:
        name = self.one(number)
        self.handle.remove(name)
        del self.known[name]
        self.unmerged()
        self.live = tuple(n for n in self.live if n != name)
        self.note("remove")

    @rule(number=NUMBER)
    def write_values(self, number: int) -> None:
        """What an optimizer does to an adapter; merged weights are those of the values that were merged."""
        name = self.one(number)
        if name in self.merged:
            return
        with torch.no_grad():
            for tensor in dict.fromkeys(self.handle.parameters(name)):
                tensor.mul_(1 + (number % 5) / 16)
        self.known[name].values = {k: t.detach().clone() for k, t in tensors_of(self.model, name).items()}
        self.changed()
        self.note("write")

    @rule(number=NUMBER)
    def write_base(self, number: int) -> None:
        """A user writes to the base: of what is merged it is lost, anything else stays."""
        names = [n for n in self.base if self.base[n].is_floating_point() and n != "unused"]
        path = names[number % len(names)]
        slots = self.handle.adapters.merged.patch.slots if self.merged else []
        if any(path in slot.paths for slot in slots):
            return
        target = patch.tensor_at(self.model, path)
        with torch.no_grad():
            target.view(-1)[-1] += 0.125
        self.base = cases.base_of(self.model) | {p: self.base[p] for slot in slots for p in slot.paths}
        self.changed()
        self.note("write base")

    @rule(number=NUMBER, damage=st.sampled_from(["none", "shape", "missing", "truncated", "config", "nan"]))
    def load(self, number: int, damage: str) -> None:
        """An adapter's values from a folder, which may be bad."""
        name = self.one(number)
        if self.known[name].kind == "prefix projected":
            return  # a file has the table alone
        where = Path(tempfile.mkdtemp(dir=self.folder))
        try:
            self.handle.save(where, name)
        except NonFiniteError:  # a copy of the base's odd rows
            return
        file = next(where.glob("*.safetensors"))
        if damage != "none" and not spoil(file, damage):
            return
        before = self.snapshot()
        try:
            self.handle.load(where, name)
        except (AdaptcError, ValueError) as error:
            assert damage not in ("none",), error
            assert isinstance(error, CheckpointError | AdaptcError), error
            self.check_untouched(before)
            self.note("refused load")
        else:
            assert damage in ("none", "nan"), damage
            self.unmerged()
            if damage == "nan":
                put(self.model, name, self.known[name].values)
            else:
                for key, tensor in tensors_of(self.model, name).items():
                    assert cases.same_bits(tensor, self.known[name].values[key]), key
            self.note("load")
        finally:
            shutil.rmtree(where)

    @rule(dtype=st.sampled_from([torch.bfloat16, torch.float64, torch.float32]))
    def cast(self, dtype: torch.dtype) -> None:
        """``.to(dtype)``: of what is merged the base's own values are kept in the dtype that they had."""
        slots = self.handle.adapters.merged.patch.slots if self.merged else []
        self.kept = {p: slot.kept for slot in slots for p in slot.paths}
        self.model.to(dtype)
        self.plain.to(dtype)
        self.dtype = dtype
        self.base = {
            n: (self.kept.get(n, t)).to(dtype) if t.is_floating_point() else t
            for n, t in self.base.items()
        }
        for name, known in self.known.items():
            now = tensors_of(self.model, name)
            known.values = {k: t.to(now[k].dtype) for k, t in known.values.items()}
            assert all(cases.same_bits(t.detach(), known.values[k]) for k, t in now.items())
        self.changed()
        self.look()
        self.note("cast")

    @rule(way=st.sampled_from(["deepcopy", "pickle"]))
    def copy(self, way: str) -> None:
        """Go on with a copy; the model itself stays as it is."""
        before, other = self.snapshot(), self.model
        if way == "deepcopy":
            self.model = copy.deepcopy(other)
        else:
            torch.save(other, self.folder / "model.pt")
            self.model = torch.load(self.folder / "model.pt", weights_only=False)
        self.check_untouched(before)
        theirs = {t.data_ptr() for t in other.parameters() if t.numel()}
        assert not theirs & {t.data_ptr() for t in self.model.parameters() if t.numel()}
        self.look()
        other.adaptc.unmerge()
        assert cases.differing(other, self.base) == []
        self.note("copy")

    @rule(damage=st.sampled_from(["none", "missing", "shape"]))
    def load_state(self, damage: str) -> None:
        state = {n: t.clone() for n, t in self.model.state_dict().items()}
        last = next(reversed(state))
        if damage == "missing":
            del state[last]
        elif damage == "shape":
            state[last] = state[last][:-1]
        try:
            self.model.load_state_dict(state)
        except RuntimeError:
            assert damage != "none"
        else:
            assert damage == "none"
        self.unmerged()
        self.note("load_state_dict")

    @rule(number=NUMBER)
    def backward_waits(self, number: int) -> None:
        """While a loss is to be run backward, nothing is merged or unmerged."""
        with contextlib.ExitStack() as stack:
            if self.merged:
                return
            inputs = {
                n: t.to(self.dtype) if torch.is_tensor(t) and t.is_floating_point() else t
                for n, t in self.inputs.items()
            }
            stack.enter_context(torch.enable_grad())
            output = logits(self.model(**inputs))
            if output.grad_fn is None:
                return
            before = self.snapshot()
            try:
                self.handle.merge(self.some(number) or None)
            except UnsupportedError:
                self.check_untouched(before)
            except AdaptcError:
                pass
            else:
                raise AssertionError("merged while a backward was to come")
            output[..., :3].double().sum().backward()
            for parameter in self.model.parameters():
                parameter.grad = None
            self.note("backward")

    # ------------------------------------------------------------------------------ always

    @invariant()
    def the_oracle_agrees(self) -> None:
        if not hasattr(self, "model"):
            return
        assert self.handle.live == self.acting
        assert self.handle.metrics()["merged"] == len(self.merged)
        assert set(self.handle.records) == set(self.known)
        state = self.model.state_dict()
        for name, tensor in self.base.items():
            assert name not in state or cases.same_bits(state[name], tensor), f"state_dict: {name}"
        named = {n: t for n, t in self.model.named_parameters() if not cases.is_ours(n)}
        assert {n: (id(t), t.data_ptr()) for n, t in named.items()} == self.objects
        assert not any(t.requires_grad for t in named.values())
        if not self.merged:
            assert cases.differing(self.model, self.base) == []
            self.hooks = self._hooks() if self.hooks is None else self.hooks
            assert self._hooks() == self.hooks
            for name, known in self.known.items():
                for key, tensor in tensors_of(self.model, name).items():
                    assert cases.same_bits(tensor, known.values[key]), f"{name}: {key}"

    def teardown(self) -> None:
        try:
            if hasattr(self, "model"):
                self.handle.switch(None)
                self.unmerged()
                self.live = ()
                self.check_outputs()
                plain = self.handle.detach()
                assert not any(cases.is_ours(n) for n in plain.state_dict())
                assert cases.differing(plain, self.base) == []
                assert {n: p.requires_grad for n, p in plain.named_parameters()} == self.flags
        finally:
            self.stack.close()
            shutil.rmtree(self.folder)

    def note(self, what: str) -> None:
        type(self).counts[what] = type(self).counts.get(what, 0) + 1


@contextlib.contextmanager
def replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    own = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, own)


def spoil(file: Path, how: str) -> bool:
    """Make an adapter's folder bad; False where there is nothing to spoil."""
    from safetensors.torch import load_file, save_file

    if how == "truncated":
        file.write_bytes(file.read_bytes()[:-3])
        return True
    if how == "config":
        config = file.parent / "adapter_config.json"
        if config.exists():
            config.write_text(json.dumps({**json.loads(config.read_text()), "peft_type": "NONE_SUCH"}))
        return config.exists()
    tensors = load_file(file)
    last = sorted(tensors)[-1]
    if how == "missing":
        del tensors[last]
    elif how == "shape":
        tensors[last] = tensors[last].flatten()[:-1].clone()
    elif how == "nan":
        tensors[last] = torch.full_like(tensors[last], torch.nan)
    save_file(tensors, file, metadata={"format": "pt"})
    return True


class LlamaLife(Life):
    host, counts = "llama", {}


class MoeLife(Life):
    host, counts = "qwen3_moe", {}


class VitLife(Life):
    host, counts = "vit", {}


LIVES: tuple[type[Life], ...] = (LlamaLife, MoeLife, VitLife)
