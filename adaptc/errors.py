"""Typed errors. Each one names what failed, what was expected, what was found and what to do."""

from __future__ import annotations


class AdaptcError(Exception):
    """Base of every error that adaptc raises on purpose.

    ``headline`` says what failed and where; ``facts`` are printed below it, one aligned line each, in the
    order given (by convention ``expected``, ``found``, ``do``).
    """

    def __init__(self, headline: str, **facts: object) -> None:
        self.headline = headline
        self.facts = {name: str(value) for name, value in facts.items() if value is not None}
        super().__init__(headline)

    def __str__(self) -> str:
        if not self.facts:
            return self.headline
        width = max(len(name) for name in self.facts)
        lines = [self.headline]
        for name, value in self.facts.items():
            first, *rest = value.split("\n")
            lines.append(f"  {name:<{width}}  {first}")
            lines.extend(f"  {'':<{width}}  {line}" for line in rest)
        return "\n".join(lines)

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild_error, (type(self), self.headline, self.facts)


def _rebuild_error(kind: type[AdaptcError], headline: str, facts: dict[str, str]) -> AdaptcError:
    return kind(headline, **facts)


class PlanError(AdaptcError, ValueError):
    """A plan that is malformed, or that does not fit the model."""


class SiteError(AdaptcError, ValueError):
    """A module that a rule matches but that cannot be adapted."""


class AdapterNameError(AdaptcError, LookupError):
    """An adapter name that is unknown, already taken, or not a legal name."""


class UnsupportedError(AdaptcError, NotImplementedError):
    """A request that this version does not implement; the message names what is missing."""


class BankError(AdaptcError, ValueError):
    """A bank that is malformed, or an adapter that does not fit into it."""


class MergeError(AdaptcError, RuntimeError):
    """A merge that failed half-way; the base has its own weights again."""


class PipelineError(AdaptcError, ValueError):
    """A pass list whose contracts do not hold, or that names an unknown pass."""


class VerifyError(AdaptcError, AssertionError):
    """A pass whose result is not equivalent to its input."""


class RecompileLimitWarning(UserWarning):
    """A frame ran eagerly because its recompile limit was reached."""


class AdaptcWarning(UserWarning):
    """Something the user should know that is not an error."""


class CheckpointError(AdaptcError, ValueError):
    """Base of the errors about adapter files. A failed load changes no state."""


class CheckpointNotFoundError(CheckpointError):
    """The directory, or one of the two files that an adapter needs, is not there."""


class PickleRefusedError(CheckpointError):
    """The weights are a pickle file (.bin, .pt, ...), which can run code when it is read."""


class TruncatedFileError(CheckpointError):
    """The weight file ends before its header says it does."""


class FileHeaderError(CheckpointError):
    """The header of the weight file is not a legal safetensors header."""


class ConfigError(CheckpointError):
    """``adapter_config.json`` is not JSON, lacks a needed key, or has a value of a wrong type."""


class UnknownConfigKeyError(ConfigError):
    """A config key that may change the mathematics and that adaptc does not know."""


class UnsupportedKindError(ConfigError):
    """A legal PEFT config of a kind, or with an option, that this version does not have."""


class MissingKeyError(CheckpointError):
    """A tensor that the model's sites need is not in the file."""


class UnexpectedKeyError(CheckpointError):
    """The file holds a tensor that belongs to no site of the model."""


class TensorShapeError(CheckpointError):
    """A tensor whose shape or dtype does not fit its site."""


class NonFiniteError(CheckpointError):
    """A tensor that holds NaN or infinity."""


class UnsafePathError(CheckpointError):
    """An adapter or file name that would leave its directory."""


class HeaderLengthError(FileHeaderError):
    """The length that a weight file declares for its header is not the header's length."""


class TensorLayoutError(FileHeaderError):
    """A tensor whose bytes overlap another's, leave a gap, or do not fit its shape and dtype."""


class UnknownDtypeError(FileHeaderError):
    """A tensor of a dtype that adaptc does not read."""


class ConfigSyntaxError(ConfigError):
    """A JSON file of an adapter that is not a JSON object."""


class ConfigTypeError(ConfigError):
    """A config value of a wrong type, or outside its range."""


class InterruptedSaveError(CheckpointError):
    """A save was interrupted and its files were changed afterwards: which ones count cannot be known."""


class NewSignatureWarning(AdaptcWarning):
    """A switch to adapters of kinds, shapes or dtypes not seen before: the next call compiles once."""


class NoGradientWarning(AdaptcWarning):
    """Parameters of an adapter that get no gradient: zero factors, a site that the loss does not depend on, or one
    that runs without gradients."""


class LiftedRegionWarning(AdaptcWarning):
    """A ``torch.no_grad`` region of the model records gradients, because its class takes for frozen what adapters train
    inside it."""


class ResumeError(CheckpointError):
    """A trainer that does not know of adapters was told to take up training from a checkpoint of adapters."""


class BatchError(AdaptcError, ValueError):
    """A batch of several adapters that does not fit the model, the adapters or the call."""
