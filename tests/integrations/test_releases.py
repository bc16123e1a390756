"""One warning for releases that the tests have not run with."""

from __future__ import annotations

import sys
import warnings

import pytest
from torch import nn

import adaptc
from adaptc.errors import AdaptcWarning
from adaptc.integrations import releases


@pytest.fixture
def found(monkeypatch):
    """Sets the version of a loaded library; the process has not been warned yet."""
    releases.warn_of_untested.cache_clear()
    yield lambda name, version: monkeypatch.setattr(sys.modules[name], "__version__", version)
    releases.warn_of_untested.cache_clear()


def compile_one():
    return adaptc.compile(nn.Sequential(nn.Linear(2, 2)), adaptc.LoRA(r=1, targets=["0"]), backend="eager")


def test_a_release_in_the_table_is_silent(found):
    import peft  # noqa: F401
    import transformers  # noqa: F401

    assert releases.untested() == {}
    for version in ("2.13.0+cpu", "2.14.1", "2.11.2+cu126"):
        found("torch", version)
        assert releases.untested() == {}
    compile_one()


@pytest.mark.parametrize("version", ["5.18.1", "5.25.0", "6.0.0.dev0", "main"])
def test_one_warning_names_what_is_not(found, version):
    import transformers  # noqa: F401

    found("transformers", version)
    found("torch", "2.16.0+cu130")
    names = rf"not run with torch 2\.16\.0\+cu130, transformers {version}: .*5\.24"
    with pytest.warns(AdaptcWarning, match=names) as said:
        compile_one()
    assert len(said) == 1 and said[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compile_one()


def test_a_library_that_is_not_loaded_is_not_named(found, monkeypatch):
    monkeypatch.delitem(sys.modules, "peft", raising=False)
    assert "peft" not in releases.untested()
