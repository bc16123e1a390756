"""Rows of one batch with different adapters: every registered kind on real classes, each row as it is alone."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

import adaptc
from adaptc import methods
from adaptc.errors import AdaptcError, BatchError
from tests.runtime.kinds import KINDS, LINEAR, ONLY, TOKENS, kinds_of
from tests.runtime.rows import HOSTS, adapted, check, doubled, logits

pytestmark = pytest.mark.filterwarnings("ignore::adaptc.errors.NewSignatureWarning")


def test_every_registered_kind_is_tried():
    assert {name.partition(" ")[0] for name in KINDS} == set(adaptc.methods())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("host", HOSTS)
def test_each_row_is_what_it_is_alone(host, kind):
    if host not in ONLY.get(kind, HOSTS):
        return
    build, batch = HOSTS[host]
    plans = {"a": KINDS[kind](host), "b": KINDS[kind](host), "l": KINDS["lora"](host)}
    model = adapted(build().double(), plans, backend="eager")
    names = ["a", "b", "a", "b", "b"] if kind in TOKENS else ["b", None, "a", "l", "b"]
    with torch.compiler.set_stance("force_eager"):
        check(model, doubled(batch(5)), names)


def tried_as(kind, host):
    """Name -> plan of a registered kind; one without a row in ``KINDS`` as it is by itself, on linear layers."""
    known = {name: KINDS[name](host) for name in kinds_of(host) if name.split()[0] == kind}
    if not known and any(name.split()[0] == kind for name in KINDS):
        return {}  # for other classes
    return known or {kind: methods.get(kind)(targets=LINEAR[host])}


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("host", ["llama", "vit"])
@pytest.mark.parametrize("kind", adaptc.methods())
def test_rows_of_the_base_are_its_own_or_nothing_runs(kind, host, dtype):
    """Beside every other kind too; in training, where what is dropped for others is not to be dropped for the base."""
    build, inputs = HOSTS[host]
    plans = tried_as(kind, host)
    beside = {"l": adaptc.LoRA(r=2, dropout=0.3, targets=LINEAR[host])}
    names = [f"x{i}" for i in range(len(plans))]
    model = adapted(build().to(dtype), dict(zip(names, plans.values(), strict=True)) | beside, backend="eager")
    given = {n: t.to(dtype) if t.is_floating_point() else t for n, t in inputs(5).items()}
    ran = []
    with torch.compiler.set_stance("force_eager"):
        for training, name in ((t, n) for t in (False, True) for n in names):
            model.train(training)
            rows = [None, name, "l", None, name]
            with model.adaptc.batch([None] * 5):
                base = logits(model(**given)).detach()
            first = next(m for m in model.modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d))
            hook = first.register_forward_hook(lambda _, args, y: None if isinstance(y, FakeTensor) else ran.append(1))
            try:
                with model.adaptc.batch(rows):
                    found = logits(model(**given))
            except AdaptcError as error:
                assert isinstance(error, BatchError), f"{name}: {error}"
                assert ran == [], f"{name}: it ran before it was refused"
                continue
            finally:
                hook.remove()
                ran.clear()
            for i in (0, 3):
                assert torch.equal(found[i].view(torch.uint8), base[i].view(torch.uint8)), f"{name}, row {i}"
            assert not any(torch.equal(found[i], base[i]) for i in (1, 2, 4)), f"{name}: adapters act"
