"""What ``explain()`` and the counts say of a quantised base, and that its products are counted."""

from __future__ import annotations

import pytest

import adaptc
from tests.models import hosts
from tests.quantised import bases
from tests.quantised.test_training import LORA

#: Weights of the tiny Llama: embedding and head, then per layer q, k, v, o, gate, up, down and two norms; last norm.
LINEAR = 2 * (64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 96)
FROZEN = 2 * 99 * 64 + LINEAR + 2 * 2 * 64 + 64


@pytest.mark.parametrize("kind", bases.KINDS)
def test_the_report_says_what_the_base_is(kind):
    model = adaptc.compile(bases.build(kind, train=True), LORA, backend="aot_eager")
    model(**hosts.batch("llama")).loss.backward()
    report = model.adaptc.explain().to_dict()
    assert report["base"][0] == f"{bases.KINDS[kind]}: 14 modules"
    assert "  model.layers.{0..1}.self_attn.q_proj" in report["base"]
    assert f"beside {FROZEN:,} frozen" in report["trained parameters"][0]


def test_a_dense_base_has_no_section():
    model = adaptc.compile(hosts.build("llama"), LORA, backend="eager")
    assert "base" not in model.adaptc.explain().to_dict()
