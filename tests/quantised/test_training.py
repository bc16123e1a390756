"""LoRA and (IA)^3 on quantised bases: the graphs, and loss and every gradient beside the formula and beside PEFT."""

from __future__ import annotations

import copy
import re
import warnings

import peft
import pytest
import torch

import adaptc
from tests.methods.in_fp64 import errors_of, formula_step, randomise
from tests.models import hosts
from tests.quantised import bases
from tests.reference import check_all_rewritten, check_steps_agree, step

LORA = adaptc.LoRA(r=3, alpha=6, init="random", targets="all-linear")
IA3 = adaptc.Plan([adaptc.IA3(targets=["k_proj", "v_proj"]), adaptc.IA3(targets=["down_proj"], feedforward=True)])
#: Plan, and how many modules it adapts in a Llama of one layer.
PLANS = {"lora": (LORA, 7), "ia3": (IA3, 3)}


class Counting:
    """A Dynamo backend that counts and runs what it is given."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, gm, inputs):
        self.graphs += 1
        return gm


def after(tensors, module, x, y):
    """Both methods' formulas; LoRA's s is alpha / r = 2."""
    if "ia3_l" in tensors:
        return y * tensors["ia3_l"]
    return y + 2 * (x @ tensors["lora_A"].T) @ tensors["lora_B"].T


def before(tensors, module, x):
    return x * tensors["ia3_l"]


def peft_twin(base, model):
    """PEFT on the quantised ``base``, with the values of the compiled ``model``."""
    sites = {site.path: site.adapters["default"] for site in model.adaptc.sites}
    if "lora_A" in dict(next(iter(sites.values())).named_parameters()):
        config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=list(sites))
    else:
        inputs = [path for path, adapter in sites.items() if adapter.acts_before]
        config = peft.IA3Config(target_modules=list(sites), feedforward_modules=inputs)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*get_apply_tensor_subclass.*")
        twin = peft.get_peft_model(base, config)
    for path, adapter in sites.items():
        layer = twin.base_model.model.get_submodule(path)
        with torch.no_grad():
            for name, value in adapter.named_parameters():
                theirs = getattr(layer, name)["default"]
                theirs = getattr(theirs, "weight", theirs)
                theirs.copy_(value.view_as(theirs))
    return twin


def peft_step(twin, batch):
    """:func:`step` of PEFT's model, the gradients by adaptc's names and in its shapes."""
    loss, gradients = step(twin, batch)
    found = {}
    for name, gradient in gradients.items():
        path, kind = re.fullmatch(r"base_model\.model\.(.*)\.(\w+)\.default(?:\.weight)?", name).groups()
        found[f"{path}.adapters.default.{kind}"] = gradient.flatten() if kind == "ia3_l" else gradient
    return loss, found


QUICK = {("nf4", "lora"), ("int8", "ia3")}
CASES = [
    pytest.param(kind, method, marks=() if (kind, method) in QUICK else pytest.mark.slow)
    for kind in bases.KINDS for method in PLANS
]  # fmt: skip


@pytest.mark.parametrize("kind, method", CASES)
def test_a_step_is_the_formulas_and_pefts_in_one_graph(kind, method):
    plan, sites = PLANS[method]
    base = bases.build(kind, train=True, num_hidden_layers=1)
    batch = hosts.batch("llama")
    counting = Counting()
    alone = torch.compile(copy.deepcopy(base).requires_grad_(False), backend=counting)
    alone(**batch)
    torch.compiler.reset()

    model = adaptc.compile(copy.deepcopy(base), plan, backend="aot_eager")
    randomise(model, size=0.1)
    got = step(model, batch)

    want = formula_step(model, bases.dense(base), batch, after=after, before=before)
    assert len(want[1]) == len(list(model.adaptc.parameters())) > 0
    check_steps_agree(got, want)
    check_steps_agree(got, peft_step(peft_twin(base, model).train(), batch))
    check_all_rewritten(model, sites)
    assert len(model.adaptc.graphs) == counting.graphs


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_inference_is_pefts_in_one_graph(kind):
    """bitsandbytes' int8 rounds the inputs as well in eval mode: PEFT runs the same product."""
    base = bases.build(kind, num_hidden_layers=1)
    model = adaptc.compile(copy.deepcopy(base), LORA, backend="aot_eager")
    got = bases.logits(model)
    torch.testing.assert_close(got, bases.logits(peft_twin(base, model).eval()), rtol=1e-4, atol=1e-5)
    check_all_rewritten(model, 7)
    assert len(model.adaptc.graphs) == 1


@pytest.mark.parametrize("kind", bases.KINDS)
def test_every_rewrite_is_valid_in_fp64(kind):
    net = bases.quantise(torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 32)), kind)
    plan = adaptc.LoRA(r=2, dropout=0.1, targets="all-linear")
    model = adaptc.compile(net, plan, backend="aot_eager", verify="raise")
    model.train()(torch.randn(3, 64)).sum().backward()
    checked = [report.errors for report in model.adaptc.graphs[0].reports if report.result.applied]
    assert len(checked) == 6 and all(errors is not None for errors in checked)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nf4", "torchao"])
def test_sixteen_bit_arithmetic_is_as_exact_as_pefts(kind):
    base = bases.quantise(bases.plain(train=True, num_hidden_layers=1).to(torch.bfloat16), kind)
    model = adaptc.compile(copy.deepcopy(base), LORA, backend="aot_eager")
    assert {p.dtype for p in model.adaptc.parameters()} == {torch.float32}
    for parameter in model.adaptc.parameters():
        parameter.data.mul_(0.2)  # a correction that is smaller than the layer's own output, as adapters are
    batch = hosts.batch("llama", rows=4, length=12)
    want = formula_step(model, bases.dense(base), batch, after=after)
    theirs = peft_step(peft_twin(base, model).train(), batch)
    assert 0 < errors_of(*step(model, batch), want) <= 1.1 * errors_of(*theirs, want)
