"""``model.adaptc``: the handle of a compiled model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from adaptc.capture.graphs import CapturedGraph
from adaptc.errors import AdapterNameError, UnsupportedError
from adaptc.files import base_files, folder, save_pretrained
from adaptc.methods import quantised
from adaptc.runtime import merging, processes
from adaptc.runtime.acting import Acting
from adaptc.runtime.adapters import AdapterRecord, AdapterSet, Site
from adaptc.runtime.batch import opened
from adaptc.runtime.calls import prologue
from adaptc.runtime.calls.captures import Captures
from adaptc.runtime.options import CompileOptions, pipeline_of
from adaptc.runtime.weights.keep import Keep
from adaptc.runtime.weights.report import MergeReport

if TYPE_CHECKING:
    from adaptc.report.explain import Explanation

#: What the handle will do and this version does not: name -> what it is for.
_LATER = {
    "axes": "the dimension groups of the model",
    "report": "the HTML report",
    "permute_optimizer": "resuming an optimizer under co-permutation",
    "pin": "keeping adapters in device memory",
    "prefetch": "loading adapters ahead of use",
    "compose": "combining adapters",
    "convert": "converting an adapter to another kind",
    "export": "other file formats",
}


def _names(names: str | Sequence[str]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


class Handle:
    """What a compiled model can be asked and told; holds no tensors of its own."""

    def __init__(self, model: nn.Module, options: CompileOptions) -> None:
        self.model = model
        self.captures = Captures(AdapterSet(model, options.adapter_dtype), options)
        #: Entry points that bypass the model's forward and are captured beside it.
        self.entries: list[str] = []
        self._was_trainable: dict[str, bool] = {}
        #: Of the hook before the model's ``load_state_dict``.
        self.guard_handle: Any = None

    @property
    def options(self) -> CompileOptions:
        """The arguments of ``adaptc.compile`` that say how, not what."""
        return self.captures.options

    @property
    def adapters(self) -> AdapterSet:
        """The adapters with what changes them; captured graphs do not hear of it."""
        return self.captures.adapters

    @property
    def _acting(self) -> Acting:
        return Acting(self.captures, base_files.Finder(self.model))

    # -- reading ---------------------------------------------------------------------------------------

    @property
    def sites(self) -> list[Site]:
        """The adapted modules, in the order of the model."""
        return self.adapters.sites

    @property
    def records(self) -> dict[str, AdapterRecord]:
        """Adapter name -> its plan and origin."""
        return self.adapters.records

    @property
    def live(self) -> tuple[str, ...]:
        """The names of the adapters that act, in order: merged ones too."""
        return self.adapters.acting

    @property
    def graphs(self) -> list[CapturedGraph]:
        """The graphs captured since the set of sites last changed."""
        return list(self.captures.graphs)

    def explain(self) -> Explanation:
        """The report: sites, passes, graphs, trained parameters and costs; print it."""
        from adaptc.report.explain import explain

        return explain(self.captures, self.entries)

    def preview(self) -> list[CapturedGraph]:
        """The graphs of the example inputs, captured without compiling kernels; none when there are no inputs.

        Runs the model once, forward and backward, and leaves no trace.
        """
        return self.captures.preview()

    def metrics(self) -> dict[str, int]:
        """Counters. ``graphs`` and ``recompiles`` are those of this epoch (since the set of sites changed):
        a recompile is a graph of a frame that had been compiled before, for sites that it had been compiled for.
        ``kept_bytes``: what the kept base of a merge takes, in memory or on disk. ``bank_slots``, ``bank_used`` and
        ``bank_bytes``: of a bank, how many adapters it has room for, how many there are, and what they take."""
        merged = self.adapters.merged
        return {
            **self.captures.counts,
            "graphs": len(self.graphs),
            "recompiles": sum(g.is_recompile for g in self.graphs),
            "sites": len(self.sites),
            "eager_sites": len(self.eager_sites()),
            "merged": 0 if merged is None else len(merged.names),
            "kept_bytes": 0 if merged is None else merged.patch.bytes_kept,
            **self.adapters.bank_counts(),
        }

    def eager_sites(self) -> list[str]:
        """Sites whose adapter ran outside a captured graph: right values, but not rewritten."""
        return self.captures.eager_sites()

    def idle_sites(self) -> list[str]:
        """Sites of live adapters that no call has reached yet."""
        return self.captures.idle_sites()

    # -- training --------------------------------------------------------------------------------------

    def parameters(self, name: str | None = None) -> Iterator[nn.Parameter]:
        """The parameters of one adapter, or of all."""
        for _, parameter in self.adapters.named_parameters(name):
            yield parameter

    def named_parameters(self, name: str | None = None) -> Iterator[tuple[str, nn.Parameter]]:
        """(name in the model, parameter) of one adapter, or of all."""
        return self.adapters.named_parameters(name)

    def param_groups(
        self, name: str | None = None, *, lr: float | None = None, lr_ratio: float = 1.0, **options: Any
    ) -> list[dict[str, Any]]:
        """Optimizer groups; ``options`` go into each. ``lr_ratio`` is LoRA+'s lambda (Hayou et al. 2024):
        ``lora_B`` and every one-dimensional parameter learn at ``lr * lr_ratio``.

        Raises:
            ValueError: a ratio without ``lr``.
        """
        if lr_ratio != 1.0 and lr is None:
            raise ValueError("param_groups: lr_ratio needs lr")
        base: dict[str, Any] = options if lr is None else {**options, "lr": lr}
        groups: dict[bool, list[nn.Parameter]] = {False: [], True: []}
        for full_name, parameter in self.named_parameters(name):
            fast = lr_ratio != 1.0 and (full_name.endswith(".lora_B") or parameter.dim() == 1)
            groups[fast].append(parameter)
        chosen = [{"params": groups[False], **base}]
        if lr is not None and groups[True]:
            chosen.append({"params": groups[True], **base, "lr": lr * lr_ratio})
        return chosen

    def on_step(self, optimizer: torch.optim.Optimizer) -> Any:
        """Let methods that act between optimizer steps do so after each step; returns a removable handle."""

        def after_step(*_: Any) -> None:
            for site in self.sites:
                for adapter in site.adapters.values():
                    adapter.after_step(optimizer)

        return optimizer.register_step_post_hook(after_step)

    # -- adapters --------------------------------------------------------------------------------------

    def add(self, name: str, plan: Any, *, calibration: Iterable[Any] | None = None) -> None:
        """Add an adapter under ``name``: a plan (or what ``adaptc.compile`` accepts as one), or an adapter
        folder, whose values are loaded. It is not live until ``switch``. ``calibration``: as in ``adaptc.compile``.

        Raises:
            AdapterNameError: the name is taken.
            PlanError, SiteError, CheckpointError: nothing has changed then.
        """
        self.captures.batching.refuse("add")
        if folder.is_adapter_directory(plan):
            self._add_folder(name, plan)
        else:
            self.install(name, folder.plan_of(plan, self.model), calibration=calibration)
        self.captures.lint.check_values(name)

    def install(
        self, name: str, plan: Any, *, config: dict[str, Any] | None = None, calibration: Iterable[Any] | None = None
    ) -> None:
        """Attach fresh adapters of a ``Plan`` under ``name``."""
        plan = plan.lifting(self.options.lift_no_grad)
        pipeline_of(plan)  # refuses passes that cannot run, before anything changes
        processes.check_unwrapped(self.model)
        grew = self.adapters.install(name, plan, config=config, calibration=calibration)
        self._sites_changed(grew)

    def _add_folder(self, name: str, directory: Any) -> None:
        """Attach a folder's adapter under ``name``; nothing changes when it does not fit."""
        read = folder.read_new(self.adapters, directory)
        with torch.random.fork_rng(devices=[]):
            self.install(name, read.plan, config=read.files.config)
        folder.put(self.adapters, name, read)

    def _sites_changed(self, outdated: bool) -> None:
        """``outdated``: what was captured does not fit the adapters that there are now."""
        processes.note_constant_buffers(self.adapters)
        if outdated:
            self.captures.new_epoch()

    def remove(self, name: str) -> None:
        """Take the adapter ``name`` off the model.

        Raises:
            AdapterNameError: there is no such adapter.
        """
        self.captures.batching.refuse("remove")
        self._sites_changed(self.adapters.remove(name))

    def switch(self, names: str | Sequence[str] | None) -> None:
        """Make one adapter live, several together, or none. Recompiles nothing among adapters of one signature
        (kinds, shapes, dtypes, requires_grad per site); a new signature compiles at its first call, and
        is announced by a ``NewSignatureWarning``.

        Raises:
            AdapterNameError: an unknown name, or one given twice.
            SiteError: two of them replace one module.
        """
        self.captures.batching.refuse("switch")
        self._acting.switch(() if names is None else _names(names))

    # -- merging ---------------------------------------------------------------------------------------

    def merge(
        self, names: str | Sequence[str] | None = None, keep: Keep = "memory", *, example_inputs: Any = None
    ) -> MergeReport:
        """Fold adapters into the base's weights, in fp64 and rounded once, until ``unmerge``. They act by the weights
        alone then, and the model's graphs are those of no adapter.

        What the base had is kept, and comes back to the bit. Meanwhile parameters keep their names and objects and have
        the merged values; ``state_dict``, ``save`` and ``save_pretrained`` give the base and the adapters apart.
        ``switch``, ``batch``, ``load``, ``load_state_dict``, ``remove`` and ``detach`` unmerge first; merging others
        begins from the base again; merging the same ones does nothing.

        Args:
            names: which adapters, in any order; default: the live ones. They act in the order of their names.
            keep: where the base's own weights are kept: "memory" (on their devices), "disk" (a file in the directory
                for temporary files), or None: nowhere but in the safetensors files that the base was read from.
            example_inputs: if given, the model is run on them before and after.

        Returns:
            How far the rounded weights are from the exact ones, as an error of the output.

        Raises:
            AdapterNameError, SiteError: unknown names, or such as cannot act together.
            UnsupportedError: an adapter or a weight that cannot be merged, a backward that is still to come, training
                mode with gradients on, or not enough memory; nothing has changed then.
            MergeError: it failed half-way and was undone; none is merged then.
        """
        self.captures.batching.refuse("merge")
        chosen = self.live if names is None else _names(names)
        return self._acting.merge(chosen, keep, example_inputs)

    def unmerge(self) -> None:
        """Put the base's own weights back, bit for bit; the adapters that were live before the merge are live again.
        After ``.to(dtype)`` they are what it makes of the base's own. Without a merge nothing happens.

        Raises:
            UnsupportedError: a backward that is still to come, or a weight that has another shape now.
        """
        self.captures.batching.refuse("unmerge")
        self._acting.unmerge()

    @contextlib.contextmanager
    def batch(self, names: Sequence[str | None], spans: torch.Tensor | None = None) -> Iterator[None]:
        """Within the block the rows of every call use the adapters ``names``, one for each row (of dim 0 of the call's
        first input), None for the base; which adapters are live does not matter.

        In ``generate`` a row is a sequence: its beams, and what is drawn for it, use its adapter. A backward may run
        after the block. Other rows of other adapters compile nothing anew; other signatures do, once.

        Args:
            spans: whole numbers (B, S): token s of row b uses ``names[spans[b, s]]``, so that ``names`` has any length.

        Raises:
            AdapterNameError: an unknown name.
            BatchError: ids without a name, an adapter that cannot act on rows apart, a block inside of another; and
                of a call in the block: another number of rows, or a site whose tensors do not have the rows in front.
        """
        batching = self.captures.batching
        batching.refuse("batch")
        wanted = self.captures.batch(names, spans)
        self.unmerge()
        if self.adapters.bank is None:
            named = ", ".join(map(repr, wanted.names)) or "no adapter"
            self.captures.announce(wanted.signature, f"a batch of {named}", level=4)
        with opened(batching, wanted):
            yield

    def warmup(self, names: str | Sequence[str] | None = None, *, example_inputs: Any = None) -> None:
        """Compile ahead for each adapter in ``names`` (default: all): one forward, and a backward in training
        mode when the output has a gradient. Values, gradients, buffers and random state stay as they are.

        Calls with gradients and without have graphs of their own: within ``torch.no_grad()`` this compiles for calls
        without. With a bank and in evaluation mode it always does, once for all adapters.

        Raises:
            ValueError: no example inputs are known.
        """
        self.captures.batching.refuse("warmup")
        inputs = self.example_inputs(example_inputs)
        if inputs is None:
            raise ValueError(
                "no example inputs: pass example_inputs=, here or to adaptc.compile"
                f" ({type(self.model).__name__} has no dummy_inputs)"
            )
        with self._acting.as_before():
            if self.adapters.bank is not None and not self.model.training:
                with torch.no_grad():  # one graph serves them all
                    self.captures.run_ahead(inputs)
                return
            for name in self.records if names is None else _names(names):
                self.switch(name)
                self.captures.run_ahead(inputs)

    def example_inputs(self, given: Any = None) -> Any:
        """Inputs of one call: ``given``, those of ``adaptc.compile``, the model's ``dummy_inputs``, or None."""
        if given is None:
            given = self.options.example_inputs
        return getattr(self.model, "dummy_inputs", None) if given is None else given

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within the block the base model computes alone; afterwards the same adapters are live, or merged, again."""
        with self._acting.as_before():
            self.switch(None)
            yield

    def print_trainable_parameters(self) -> None:
        """Print how many parameters are trained, of how many, as PEFT does."""
        sizes = [(quantised.numel(p), p.requires_grad) for p in self.model.parameters()]
        trained, total = sum(n for n, trains in sizes if trains), sum(n for n, _ in sizes)
        share = 100 * trained / max(total, 1)
        print(f"trainable params: {trained:,d} || all params: {total:,d} || trainable%: {share:.4f}")

    def merge_and_unload(self) -> nn.Module:
        """Merge the live adapters, or those that are merged, and detach with the merged weights; cannot be undone.

        Adapters that do not act are dropped. Returns the model.

        Raises:
            UnsupportedError: as :meth:`merge`; nothing has changed then. MergeError: it failed half-way and was undone.
        """
        self.captures.batching.refuse("merge_and_unload")
        if self.live:
            merging.merge_for_good(self.adapters)
        return self.detach()

    # -- files -----------------------------------------------------------------------------------------

    def save(
        self, directory: Any, name: str | None = None, *, save_embedding_layers: bool | str = "auto"
    ) -> None:
        """Write an adapter in PEFT's format, with our plan beside it; atomic. ``name``: default the live one.

        ``save_embedding_layers``: whether the embeddings are written too, as in PEFT; "auto": where the adapter was
        loaded with others than the base has, or the vocabulary has another size than in the base's own files.

        Raises:
            AdapterNameError: no such adapter, or none given and not exactly one is live.
            UnsupportedError: PEFT's format cannot express the adapter.
        """
        if name is None and len(self.live) != 1:
            raise AdapterNameError("save: say which adapter", found=f"live: {', '.join(self.live) or 'none'}")
        folder.save(self.adapters, directory, self.live[0] if name is None else name, save_embedding_layers)

    def load(self, directory: Any, name: str | None = None) -> None:
        """Read an adapter folder into the adapter ``name`` (default: the live one): replaces its values, or adds
        it. Everything is checked before anything changes.

        Raises:
            CheckpointError: the files are malformed or do not fit; nothing has changed then.
        """
        self.captures.batching.refuse("load")
        if name is None and len(self.live) > 1:
            raise AdapterNameError("load: say into which adapter", found=f"live: {', '.join(self.live)}")
        chosen = name or (self.live[0] if self.live else "default")
        if chosen in self.records:
            folder.load(self.adapters, directory, chosen)
        else:
            self._add_folder(chosen, directory)
        self.captures.lint.check_values(chosen)

    # -- capture ---------------------------------------------------------------------------------------

    def open_bank(self) -> None:
        """Make the model ready for the bank of the options, if they have one; before it has adapters.

        Raises:
            BankError, PlanError, SiteError: the bank's sites do not fit the model; nothing has changed then.
        """
        if self.options.bank is not None:
            self.adapters.open_bank(self.options.bank)

    def attach_to_model(self) -> None:
        """Freeze the base, remembering which parameters were trainable, and install the prologue."""
        ours = {name for name, _ in self.named_parameters()}
        named = [(n, p) for n, p in self.model.named_parameters() if n not in ours]
        self._was_trainable = {n: p.requires_grad for n, p in named}
        for _, parameter in named:
            parameter.requires_grad_(False)
        self.model.adaptc = self  # type: ignore[assignment]
        self.entries = prologue.arm(self.captures)
        self.guard_handle = save_pretrained.arm(self.adapters, self)

    def detach(self) -> nn.Module:
        """Give the untouched model back: no adapters, hooks or attributes, and trainable flags as they were."""
        self.captures.batching.refuse("detach")
        model = self.model
        for name in list(self.records):
            self.adapters.remove(name)
        self.adapters.close_bank()
        processes.note_constant_buffers(self.adapters)
        prologue.disarm(model)
        save_pretrained.disarm(model)
        if self.guard_handle is not None:
            self.guard_handle.remove()
        for name, parameter in model.named_parameters():
            if name in self._was_trainable:
                parameter.requires_grad_(self._was_trainable[name])
        model.__dict__.pop("adaptc", None)
        self.captures.new_epoch()
        return model

    def __getattr__(self, name: str) -> Any:
        if name in _LATER:
            raise UnsupportedError(f"model.adaptc.{name} is not in this version", missing=_LATER[name])
        raise AttributeError(f"'Handle' object has no attribute {name!r}")

    def __repr__(self) -> str:
        return f"<adaptc handle of {type(self.model).__name__}: {len(self.sites)} sites, live {self.live}>"
