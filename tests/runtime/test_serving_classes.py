"""What docs/serving.md promises, on classes of transformers that adaptc does not name: merging gives what acting does
and the base back, rows of a batch are what they are alone in values and gradients, and in what is generated."""

from __future__ import annotations

import copy

import pytest
import torch

import adaptc
from adaptc.errors import UnsupportedError
from tests.models import zoo
from tests.runtime.rows import adapted, check, doubled, logits
from tests.runtime.weights import cases

pytestmark = pytest.mark.filterwarnings("ignore::adaptc.errors.AdaptcWarning")
CLASSES = [
    *(("causal", name) for name in (
        "gemma3_text", "mamba", "mistral", "gpt_neox", "mixtral", "falcon", "opt", "bloom", "phi", "qwen2_moe", "gptj",
        "mamba2", "gpt_oss",
    )),
    *(("masked", name) for name in ("bert", "deberta-v2")),
    ("seq2seq", "t5"), ("speech", "whisper"),
    *(("image", name) for name in ("swin", "clip", "convnext")),
]  # fmt: skip
#: In the default set: sliding windows, states in the place of keys, windows of images.
USUAL = ("gemma3_text", "mamba", "swin")
NAMES = ["b", None, "a", "c"]


@pytest.fixture(params=[
    pytest.param(row, id=row[1], marks=[] if row[1] in USUAL else [pytest.mark.slow]) for row in CLASSES
])  # fmt: skip
def served(request):
    """(model with three adapters in fp64, inputs of four rows), run op by op."""
    task, name = request.param
    base = zoo.build(task, name)
    inputs = zoo.batch(task, base, rows=4)
    if task not in ("seq2seq", "speech"):
        inputs.pop("labels")
    plain = copy.deepcopy(base).double()
    if name in ("mixtral", "qwen2_moe", "gpt_oss"):
        plain.set_experts_implementation("eager")  # torch's grouped product has no fp64
    layers = {"targets": "all-linear", **({"exclude": ["dt_proj"]} if name == "mamba" else {})}
    plans = {
        "a": adaptc.LoRA(r=2, init="random", **layers),
        "b": adaptc.LoRA(r=3, dora=True, **layers),
        "c": adaptc.IA3(**layers),
    }
    with torch.compiler.set_stance("force_eager"):
        yield adapted(plain, plans, backend="eager"), doubled(inputs)


def test_merged_weights_compute_what_the_adapters_did(served):
    model, inputs = served
    base = cases.base_of(model)
    for names in (["a"], ["b"], ["c"], ["a", "b"]):
        model.adaptc.switch(names)
        with torch.no_grad():
            want = logits(model(**inputs))
            model.adaptc.merge()
            torch.testing.assert_close(logits(model(**inputs)), want, rtol=1e-8, atol=1e-9)
        assert cases.differing(model, base)
    model.adaptc.switch(None)
    assert cases.differing(model, base) == []


def test_rows_are_what_they_are_alone(served):
    model, inputs = served
    check(model, inputs, NAMES, tolerance=1e-8)


@pytest.mark.parametrize("beams", [1, 3])
def test_sequences_are_what_they_are_alone(served, beams):
    model, inputs = served
    if not model.can_generate():
        pytest.skip("it does not generate")
    given = inputs[model.main_input_name]
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "num_beams": beams, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        with model.adaptc.batch(NAMES):
            found = model.generate(given, **options)
        for i, name in enumerate(NAMES):
            model.adaptc.switch(name)
            assert torch.equal(found[i], model.generate(given[i : i + 1], **options)[0]), name


def test_a_weight_that_is_read_past_its_call_takes_no_adapter_up():
    """Unmerged the adapter does nothing there; merged it would."""
    model = adapted(zoo.build("causal", "mamba"), {"a": adaptc.LoRA(r=2, targets=["dt_proj"])}, backend="eager")
    base = cases.base_of(model)
    with pytest.raises(UnsupportedError, match=r"dt_proj: the adapter cannot be merged") as found:
        model.adaptc.merge()
    assert "never calls it" in str(found.value) and cases.differing(model, base) == []
    with pytest.raises(UnsupportedError, match="never calls it"):
        model.adaptc.merge_and_unload()
