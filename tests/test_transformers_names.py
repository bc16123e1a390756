"""Names that differ between releases of transformers, in each form that a class or an output has them."""

from __future__ import annotations

import inspect

import pytest

from adaptc.transformers_names import (
    attention_cache_argument,
    cache_argument,
    cache_in_output,
    given_cache,
    rename_cache,
)

NAMES = ("cache", "past_key_values", "cache_params")


@pytest.mark.parametrize("own", NAMES)
@pytest.mark.parametrize("said", NAMES)
def test_a_call_names_its_cache_as_its_forward_does(own, said):
    assert cache_argument(("input_ids", own)) == own and cache_argument(("input_ids", "use_cache")) is None
    given = {"input_ids": 1, said: "filled", "use_cache": True}
    assert given_cache(given) == "filled"
    rename_cache(given, own)
    assert given == {"input_ids": 1, own: "filled", "use_cache": True}


def test_the_forwards_own_name_goes_before_an_older_one():
    given = {"cache": "new", "past_key_values": "old"}
    rename_cache(given, "cache")
    assert given == {"cache": "new"}
    untouched = {"past_key_values": "old"}
    rename_cache(untouched, None)
    assert untouched == {"past_key_values": "old"}


@pytest.mark.parametrize("name", NAMES)
def test_an_outputs_cache_is_found(name):
    assert cache_in_output({"logits": 0, name: "filled"}) == (name, "filled")
    assert cache_in_output({"logits": 0}) is None


def test_no_cache_is_given_where_all_are_none():
    assert given_cache({**dict.fromkeys(NAMES), "layer_past": None}) is None
    assert given_cache({"past_key_values": None, "layer_past": "filled"}) == "filled"


def test_a_dict_is_no_cache_of_keys_and_values():
    def new(self, input_ids, cache=None): ...
    def old(self, input_ids, past_key_values=None): ...
    def xlm(self, input_ids, cache: dict[str, int] | None = None): ...
    def neither(self, input_ids, cache_params=None): ...

    found = [attention_cache_argument(inspect.signature(f)) for f in (new, old, xlm, neither)]
    assert found == ["cache", "past_key_values", None, None]
