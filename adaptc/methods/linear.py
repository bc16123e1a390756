"""What a linear site is: ``nn.Linear`` and the transposed ``Conv1D`` of transformers."""

from __future__ import annotations

from torch import nn

from adaptc.methods import quantised


def is_conv1d(module: nn.Module) -> bool:
    """True for transformers' ``Conv1D``: weight stored as (in, out), so its output is ``x @ weight + bias``."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and not isinstance(module, nn.Conv1d)


def is_linear(module: nn.Module) -> bool:
    """True for modules that compute a linear map of their input's last dimension."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def features(module: nn.Module) -> tuple[int, int]:
    """(in_features, out_features) of a linear site."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    weight = module.weight
    assert isinstance(weight, nn.Parameter)  # checked by is_linear
    return weight.shape[0], weight.shape[1]


def refusal(path: str, module: nn.Module) -> str | None:
    """Why ``module`` is not a linear site whose module is called, or None when it is one."""
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "nn.MultiheadAttention reads its out_proj weight without calling the module"
    if (how := quantised.describe(module)) is not None and quantised.packed_as(module) is not None:
        return f"{type(module).__name__} has no weight ({how}); nn.Linear on bitsandbytes or torchao can be adapted"
    if not is_linear(module):
        return f"{type(module).__name__} is not a linear layer (nn.Linear or transformers' Conv1D)"
    if not module.weight.is_floating_point() and how is None:  # type: ignore[operator]
        return f"its weight is {module.weight.dtype}, not a floating-point tensor"
    return None


def last_width(module: nn.Module) -> int | None:
    """Width that the last linear layer in ``module`` returns, and so a block; None without one."""
    products = [m for m in module.modules() if refusal("", m) is None]
    return features(products[-1])[1] if products else None


def unknown_width(module: nn.Module) -> str:
    """Why a network beside ``module`` is refused that has no ``features`` and finds none."""
    return f"the width of {type(module).__name__} is not known: say features=, the width of the activations"
