"""The gradient of every op that has one, against finite differences in fp64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptc import methods
from adaptc.ir import dialect

#: Arguments that are never trained.
FROZEN = {"bias", "norm", "scale", "weight", "W"}
#: The paper holds the norm constant.
NONE = {"dora_row_norm"}
#: Options by which a gradient is another one than that of the function, and what they are without that.
PLAIN = {"lora_embedding": {"padding": -1, "by_frequency": False}}
methods.load_all()
NAMES = [name for name in dialect.names() if dialect.get(name).gradient is not None and name not in NONE]


def is_real(value):
    return isinstance(value, torch.Tensor) and value.is_floating_point()


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=5)
@given(data=st.data())
def test_gradients_are_those_of_finite_differences(name, data):
    op = dialect.get(name)
    arguments = list(op.sample(data.draw))
    trained = []
    for i, (argument, one) in enumerate(zip(op.overload._schema.arguments, arguments, strict=False)):
        arguments[i] = PLAIN.get(name, {}).get(argument.name, one)
        if is_real(one):
            arguments[i] = one.detach().double().clone()
            if argument.name not in FROZEN:
                trained.append(i)

    def output(*tensors):
        given_ = list(arguments)
        for i, tensor in zip(trained, tensors, strict=True):
            given_[i] = tensor
        found = op.overload(*given_)
        return tuple(t for t in (found if isinstance(found, list | tuple) else [found]) if t.requires_grad)

    inputs = [arguments[i].requires_grad_() for i in trained]
    assert inputs and torch.autograd.gradcheck(output, inputs)
