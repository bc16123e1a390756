"""``transformers.Trainer`` and its subclasses on a compiled model: checkpoints of adapters, resume, best model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from adaptc.files import save_pretrained
from adaptc.integrations import trl

if TYPE_CHECKING:
    from pathlib import Path

    from adaptc.handle import Handle


class AdapterTrainerMixin:
    """Put in front of a trainer class, it reads the adapters that the trainer's checkpoints hold::

        class MyTrainer(AdapterTrainerMixin, transformers.Trainer): ...

    A checkpoint has every adapter of the model (PEFT's format, see ``save_pretrained``) and the trainer's own state of
    optimizer, scheduler and random numbers, and no weight of the base. ``resume_from_checkpoint``,
    ``load_best_model_at_end``, ``save_model`` and ``save_total_limit`` work as they do on any model. Methods that act
    between optimizer steps do so. A model that is not compiled by adaptc is left to the trainer.

    Raises:
        ResumeError: on resuming, the model has other adapters, or others live, than the checkpoint.
        CheckpointError: the files of an adapter are malformed or do not fit.
    """

    model: Any
    args: Any
    state: Any
    accelerator: Any
    #: The optimizer after whose steps methods act.
    _adaptc_stepped: Any = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        trl.install()  # for a model that was unpickled, or compiled before transformers was imported
        super().__init__(*args, **kwargs)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        optimizer = super().create_optimizer(*args, **kwargs)  # type: ignore[misc]
        handle = self._handle()
        # In a second call of train() it is accelerate's wrapper of the first one's.
        inner = getattr(optimizer, "optimizer", optimizer)
        if handle is not None and self._adaptc_stepped is not inner:
            handle.on_step(inner)
            self._adaptc_stepped = inner
        return optimizer

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        handle = self._handle()
        if handle is None or not handle.records or save_pretrained.has_saver(handle.model):
            super()._save(output_dir, state_dict)  # type: ignore[misc]
            return
        # Of a model that has no save_pretrained the trainer writes what it is given, and its own files.
        directory = self.args.output_dir if output_dir is None else output_dir
        super()._save(directory, save_pretrained.guard(handle.model))  # type: ignore[misc]
        if self.args.should_save:
            save_pretrained.save_adapters(handle.adapters, directory)

    def _load_from_checkpoint(self, resume_from_checkpoint: str | Path, model: Any = None) -> None:
        handle = self._handle()
        if handle is None or not handle.records:
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
        else:
            save_pretrained.load_adapters(handle.adapters, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        handle = self._handle()
        if handle is None or not handle.records:
            super()._load_best_model()  # type: ignore[misc]
        else:
            save_pretrained.load_adapters(handle.adapters, self.state.best_model_checkpoint)

    def _handle(self) -> Handle | None:
        from adaptc.handle import Handle

        found = getattr(self.accelerator.unwrap_model(self.model), "adaptc", None)
        return found if isinstance(found, Handle) else None
