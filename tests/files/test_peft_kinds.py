"""PEFT's format of the other kinds, both ways, and adaptc's own for kinds that PEFT has not.

The oracle is PEFT 0.21.2 itself: its files are read, and its model reads ours, with equal outputs in fp64.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch

import adaptc
from adaptc import IA3, Bias, LoRA, Match, Plan, Rule, VeRA, errors
from adaptc.files import checkpoint, peft_keys
from adaptc.methods.codec import codec_of, codecs
from adaptc.plan.peft.writing import rules_to_config
from tests.files.peft_cases import Adapted, load, logits, peft_config, peft_load, peft_model, peft_save, randomise
from tests.files.peft_cases import plan_of as read
from tests.models import hosts

PREFIX = "base_model.model."
CLASSIFIER = Rule(Match("classifier"), train="full")


def ia3(targets: Any, feedforward: Any = (), **options: Any) -> dict[str, Any]:
    names = feedforward if isinstance(feedforward, str) else list(feedforward)
    return {"peft_type": "IA3", "target_modules": targets, "feedforward_modules": names, **options}


def vera(targets: Any, **options: Any) -> dict[str, Any]:
    return {"peft_type": "VERA", "target_modules": targets, "r": 5, **options}


# -- what PEFT writes -------------------------------------------------------------------------------------

#: name -> (host, PEFT's config)
WRITTEN_BY_PEFT: dict[str, tuple[str, dict[str, Any]]] = {
    "ia3 outputs": ("llama", ia3(["k_proj", "v_proj"])),
    "ia3 inputs": ("llama", ia3(["down_proj"], ["down_proj"])),
    "ia3 both": ("llama", ia3(["k_proj", "v_proj", "down_proj"], ["down_proj"])),
    "ia3 paths": ("llama", ia3(["q_proj", "layers.0.mlp.down_proj"], ["layers.0.mlp.down_proj"])),
    "ia3 expressions": ("llama", ia3(r".*\.1\..*(k|v|down|up)_proj", r".*mlp\..*")),
    "ia3 expression of inputs": ("llama", ia3(["k_proj", "o_proj"], r".*\.0\..*o_proj")),
    "ia3 expression and names": ("llama", ia3(r".*\.(0|1)\..*(q|v|down)_proj", ["down_proj", "up_proj"])),
    "ia3 all-linear": ("llama", ia3("all-linear", ["down_proj"])),
    "ia3 exclude": (
        "llama", ia3(["k_proj", "down_proj"], ["down_proj"], exclude_modules=["layers.1.mlp.down_proj"]),
    ),
    "ia3 a name that ends another": ("t5", ia3(["k", "o", "wo"], ["o"])),
    "ia3 the end of a name": ("llama", ia3(r".*\.(q|o|up)_proj", ["_proj", "q_proj"])),
    "ia3 conv1d": ("gpt2", ia3(["c_attn", "mlp.c_proj"], ["mlp.c_proj"], fan_in_fan_out=True)),
    "ia3 classifier": ("bert", ia3(["key", "value"], task_type="SEQ_CLS")),
    "ia3 modules_to_save": ("bert", ia3(["key", "output.dense"], ["output.dense"], modules_to_save=["classifier"])),
    "ia3 random": ("llama", ia3(["k_proj"], init_ia3_weights=False)),
    "ia3 shared layers": ("albert", ia3(["query", "ffn"], ["ffn"])),
    "vera": ("llama", vera(["q_proj", "down_proj"])),
    "vera layers": ("llama", vera(["q_proj", "v_proj"], layers_to_transform=[1], projection_prng_key=7)),
    "vera conv1d": ("gpt2", vera(["c_attn", "c_proj"], fan_in_fan_out=True)),
    "vera without projections": ("llama", vera(["q_proj", "down_proj"], save_projection=False)),
    "vera and a head": ("bert", vera(["query", "value"], modules_to_save=["classifier"])),
    "vera random": ("llama", vera(["o_proj"], init_weights=False, d_initial=0.3)),
    "ia3 t5": ("t5", ia3(["k", "v", "wo"], ["wo"])),
}  # fmt: skip


@pytest.fixture(params=sorted(WRITTEN_BY_PEFT))
def written(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path, torch.Tensor]:
    """host, folder that PEFT saved to, PEFT's output."""
    host, config = WRITTEN_BY_PEFT[request.param]
    model = peft_model(host, config)
    return host, peft_save(model, tmp_path / "peft"), logits(model, host)


def test_what_peft_writes_gives_the_same_outputs(written: Any) -> None:
    host, folder, expected = written
    torch.testing.assert_close(logits(load(host, folder), host), expected, rtol=1e-10, atol=1e-10)
    plain = logits(hosts.build(host).double(), host)
    assert (plain - expected).abs().max() > 1e-5, "the adapter does nothing, so this shows nothing"


def test_loading_and_saving_changes_no_byte(written: Any, tmp_path: Path) -> None:
    host, folder, _ = written
    load(host, folder).save(tmp_path / "ours", original=checkpoint.read_adapter(folder).config)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "ours" / name).read_bytes() == (folder / name).read_bytes(), name


def test_what_was_read_and_is_written_anew_is_read_by_peft(written: Any, tmp_path: Path) -> None:
    """The config is built from the plan and the sites, not copied; the tensors are bit for bit PEFT's."""
    host, folder, expected = written
    ours = load(host, folder).save(tmp_path / "ours")
    torch.testing.assert_close(logits(peft_load(host, ours), host), expected, rtol=1e-10, atol=1e-10)
    mine, theirs = (safetensors.torch.load_file(at / "adapter_model.safetensors") for at in (ours, folder))
    # A config made anew keeps VeRA's projections in the file.
    added = {"base_model.vera_A", "base_model.vera_B"} - theirs.keys()
    assert mine.keys() - added == theirs.keys()
    assert all(torch.equal(mine[key], value) and mine[key].dtype == value.dtype for key, value in theirs.items())


def test_the_plan_without_the_host_means_the_same(written: Any) -> None:
    host, folder, _ = written
    model = hosts.build(host)
    config = checkpoint.read_adapter(folder).config
    found = read(config, loading=True).resolve(model).sites
    expected = read(config, loading=True, model=model).resolve(model).sites
    assert {s.path: s.method for s in found} == {s.path: s.method for s in expected}


# -- what adaptc writes -----------------------------------------------------------------------------------

#: name -> (host, rules, what the config must say)
WRITTEN_BY_ADAPTC: dict[str, tuple[str, list[Any], dict[str, Any]]] = {
    "ia3 outputs": (
        "llama", [IA3(targets=["k_proj", "v_proj"])],
        {"target_modules": ["k_proj", "v_proj"], "feedforward_modules": []},
    ),
    "ia3 both": (
        "llama", [IA3(targets=["k_proj", "v_proj"]), IA3(targets=["down_proj"], feedforward=True)],
        {"target_modules": ["down_proj", "k_proj", "v_proj"], "feedforward_modules": ["down_proj"]},
    ),
    "ia3 one name both ways": (
        "llama", [IA3(targets=["o_proj"], layers="0", feedforward=True), IA3(targets=["o_proj", "v_proj"])],
        {
            "target_modules": ["o_proj", "v_proj"],
            "feedforward_modules": r"model\.layers\.0\.self_attn\.o_proj",
        },
    ),
    "ia3 in one layer": (
        "llama", [IA3(targets=["o_proj", "v_proj"], layers="1"),
                  IA3(targets=["down_proj"], layers="0", feedforward=True)],
        {"feedforward_modules": ["model.layers.0.mlp.down_proj"]},
    ),
    "ia3 names that end each other": (
        "t5", [IA3(targets=["o"]), IA3(targets=["wo"], feedforward=True)],
        {"target_modules": ["o", "wo"], "feedforward_modules": ["wo"]},
    ),
    "ia3 a name that ends another": (
        "t5", [IA3(targets=["wo"]), IA3(targets=["o"], feedforward=True)],
        {"target_modules": ["o", "wo"]},
    ),
    "ia3 expression": ("llama", [IA3(targets=[r"re:.*\.1\..*(q|v)_proj"])], {"target_modules": r".*\.1\..*(q|v)_proj"}),
    "ia3 exclude": (
        "llama", [IA3(targets=["q_proj"], exclude=["layers.0.self_attn.q_proj"])],
        {"exclude_modules": ["layers.0.self_attn.q_proj"]},
    ),
    "ia3 random": ("llama", [IA3(targets=["q_proj"], init="random")], {"init_ia3_weights": False}),
    "ia3 conv1d": ("gpt2", [IA3(targets=["c_attn"])], {"fan_in_fan_out": True}),
    "vera": (
        "llama", [VeRA(r=5, d_initial=0.2, projection_prng_key=3, targets=["q_proj", "up_proj"])],
        {"r": 5, "d_initial": 0.2, "projection_prng_key": 3, "save_projection": True,
         "target_modules": ["q_proj", "up_proj"]},
    ),
    "vera exclude": (
        "llama", [VeRA(r=5, targets=["q_proj"], exclude=["layers.0.self_attn.q_proj"])],
        {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    ),
    "ia3 and a head": ("bert", [CLASSIFIER, IA3(targets=["key"])], {"modules_to_save": ["classifier"]}),
}  # fmt: skip


@pytest.fixture(params=sorted(WRITTEN_BY_ADAPTC))
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Adapted, Path, dict[str, Any]]:
    host, rules, expected = WRITTEN_BY_ADAPTC[request.param]
    adapted = Adapted(host, Plan(rules))
    generator = torch.Generator().manual_seed(3)
    for adapter in adapted.adapters.values():
        for tensor in peft_keys.tensors_of(adapter).values():
            tensor.data.add_(0.1 * torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype))
    return host, adapted, adapted.save(tmp_path / "ours"), expected


def test_peft_reads_what_adaptc_writes(saved: Any) -> None:
    host, adapted, folder, expected = saved
    config = json.loads((folder / "adapter_config.json").read_text())
    assert {key: config[key] for key in expected} == expected
    model = peft_load(host, folder)
    assert type(model.peft_config["default"]) is type(peft_config({"peft_type": config["peft_type"]}))
    torch.testing.assert_close(logits(model, host), logits(adapted, host), rtol=1e-10, atol=1e-10)
    keys = peft.get_peft_model_state_dict(model).keys()
    assert keys == safetensors.torch.load_file(folder / "adapter_model.safetensors").keys()


def test_adaptc_reads_what_adaptc_writes(saved: Any) -> None:
    host, adapted, folder, _ = saved
    again = load(host, folder)
    assert again.adapters.keys() == adapted.adapters.keys()
    assert torch.equal(logits(again, host), logits(adapted, host))
    assert Plan.from_dict(checkpoint.read_adapter(folder).plan) == adapted.plan


# -- the config -------------------------------------------------------------------------------------------

#: kind -> the least that PEFT needs
LEAST: dict[str, dict[str, Any]] = {
    "IA3": ia3(["q"]),
    "VERA": {"peft_type": "VERA", "target_modules": ["q"]},
    "PROMPT_TUNING": {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 2},
    "PREFIX_TUNING": {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 2},
}
KINDS = sorted(codecs().keys() - {"LORA"})


@pytest.mark.parametrize("kind", KINDS)
def test_every_key_of_peft_is_known_with_its_default(kind: str) -> None:
    theirs = {
        field.name: field.default if field.default is not dataclasses.MISSING else field.default_factory()
        for field in dataclasses.fields(peft_config({"peft_type": kind}))
    }
    ours = {key: option.default for key, option in codecs()[kind].keys().items()}
    assert {**ours, "peft_type": None, "peft_version": None} == theirs


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"use_magic": 1}, errors.UnknownConfigKeyError, "unknown key 'use_magic'"),
        ({"target_modules": 3}, errors.ConfigTypeError, "target_modules in the adapter's config"),
        ({"target_modules": []}, errors.ConfigTypeError, "target_modules is empty"),
        ({"target_modules": [".*"]}, errors.ConfigTypeError, "'.*' in a list of modules is not a module's name"),
        ({"modules_to_save": "x"}, errors.ConfigTypeError, "modules_to_save in the adapter's config"),
        ({"fan_in_fan_out": "x"}, errors.ConfigTypeError, "fan_in_fan_out in the adapter's config"),
        ({"task_type": 3}, errors.ConfigTypeError, "task_type in the adapter's config"),
    ],
)
def test_configs_that_are_refused(kind: str, change: dict[str, Any], error: type[Exception], text: str) -> None:
    assert read(LEAST[kind]).rules[0].method.kind == codecs()[kind].kind
    (key,) = change
    known = codecs()[kind].keys()
    if codecs()[kind].on_model and key not in known:
        error, text = errors.UnknownConfigKeyError, f"unknown key {key!r}"
    with pytest.raises(error) as raised:
        read({**LEAST[kind], **change})
    assert text in str(raised.value)


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (ia3(["q"], feedforward=["k"]), "feedforward_modules names modules that are not in target_modules"),
        ({**ia3(["q"]), "feedforward_modules": None}, "feedforward_modules is null"),
        ({**ia3(["q"]), "feedforward_modules": 3}, "feedforward_modules in the adapter's config"),
        ({**ia3(["q"]), "feedforward_modules": "("}, "feedforward_modules in the adapter's config"),
        ({**ia3(["q"]), "init_ia3_weights": None}, "init_ia3_weights in the adapter's config"),
    ],
)
def test_ia3_configs_that_are_refused(config: dict[str, Any], text: str) -> None:
    with pytest.raises(errors.ConfigTypeError, match=text):
        read(config)


def test_the_rules_of_an_ia3_config() -> None:
    assert read(ia3(["k", "v", "wo"], ["wo"])) == Plan([IA3(targets=["wo"], feedforward=True), IA3(targets=["k", "v"])])
    assert read(ia3(["wo"], ["wo"])) == Plan(IA3(targets=["wo"], feedforward=True))
    assert read(ia3(["k"], init_ia3_weights=False)) == Plan(IA3(targets=["k"], init="random"))
    assert Plan.from_peft(peft.IA3Config(target_modules=["k"], feedforward_modules=[])) == Plan(IA3(targets=["k"]))


def test_names_of_inputs_that_the_host_has_not_are_left_out() -> None:
    with pytest.warns(errors.AdaptcWarning, match="modules that this model does not have"):
        plan = read(ia3(["k_proj", "w0", "down_proj"], ["w0", "down_proj"]), model=hosts.build("llama"))
    assert plan == Plan([IA3(targets=["down_proj"], feedforward=True), IA3(targets=["k_proj"])])
    with pytest.warns(errors.AdaptcWarning, match="which PEFT ignores: w0"):
        assert read(ia3(["k_proj", "w0"], ["w0"]), model=hosts.build("llama")) == Plan(IA3(targets=["k_proj"]))


def test_two_kinds_in_one_adapter_are_refused() -> None:
    model = hosts.build("llama")
    plan = Plan([IA3(targets=["k_proj"]), LoRA(targets=["v_proj"])])
    with pytest.raises(errors.UnsupportedError, match="no place for two kinds in one adapter") as error:
        rules_to_config(plan.rules, plan.resolve(model).sites, model=model)
    assert "ia3 at model.layers.0.self_attn.k_proj, lora at" in str(error.value)


# -- tensors ----------------------------------------------------------------------------------------------

BOTH = Plan([CLASSIFIER, IA3(targets=["key"]), IA3(targets=["intermediate.dense"], feedforward=True)])


def fresh() -> Adapted:
    return Adapted("bert", BOTH, double=False)


def other_values() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    tensors = peft_keys.encode(fresh().adapters)
    return {key: torch.randn(tensor.shape, generator=generator) for key, tensor in tensors.items()}


KEYS = sorted(other_values())


def refused(tensors: dict[str, torch.Tensor], kind: type[Exception], text: str) -> None:
    """Decode must raise, and the adapter must be what it was, bit for bit."""
    adapted = fresh()
    before = {key: tensor.clone() for key, tensor in peft_keys.encode(adapted.adapters).items()}
    with pytest.raises(kind) as error:
        adapted.load(tensors)
    assert type(error.value) is kind and text in str(error.value)
    after = peft_keys.encode(adapted.adapters)
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_the_keys_and_shapes_are_those_of_peft() -> None:
    config = ia3(["key", "intermediate.dense"], ["intermediate.dense"], modules_to_save=["classifier"])
    theirs = peft.get_peft_model_state_dict(peft_model("bert", config, double=False))
    ours = peft_keys.encode(fresh().adapters)
    assert {key: tensor.shape for key, tensor in theirs.items()} == {k: t.shape for k, t in ours.items()}
    assert len(KEYS) == 6


def test_good_values_are_loaded_into_the_parameters() -> None:
    adapted, values = fresh(), other_values()
    adapted.load(values)
    for path, adapter in adapted.adapters.items():
        if adapter.method.kind == "ia3":
            key = f"{PREFIX}{path}.ia3_l"
            assert values[key].shape in ((64, 1), (1, 64))
            assert torch.equal(adapter.ia3_l, values[key].flatten()) and adapter.ia3_l.dim() == 1


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize(
    "fault", ["missing", "misspelt", "longer", "transposed", "flat", "integers", "nan", "inf", "huge"]
)
def test_a_tensor_that_does_not_fit(key: str, fault: str) -> None:
    tensors = other_values()
    good = tensors[key]
    if fault == "missing":
        del tensors[key]
        return refused(tensors, errors.MissingKeyError, f"lacks 1 of 6 tensors, first {key}")
    if fault == "misspelt":
        tensors[key[:-1] + "x"] = tensors.pop(key)
        return refused(tensors, errors.UnexpectedKeyError, f"{key[:-1]}x; nearest: {key}")
    if fault in ("nan", "inf"):
        good.view(-1)[-1] = math.nan if fault == "nan" else math.inf
        return refused(tensors, errors.NonFiniteError, f"tensor {key} in the adapter holds NaN or infinity")
    if fault == "huge":
        tensors[key] = good.double()
        tensors[key].view(-1)[0] = 1e300
        return refused(tensors, errors.NonFiniteError, f"tensor {key} in the adapter holds numbers that are infinite")
    if fault == "longer":
        tensors[key] = torch.cat([good, good])
    elif fault == "transposed" and good.dim() == 2:
        tensors[key] = good.T.contiguous()
    elif fault == "flat":
        tensors[key] = good.flatten() if good.dim() == 2 else good[None]
    else:
        tensors[key] = torch.ones(good.shape, dtype=torch.int64)
    return refused(tensors, errors.TensorShapeError, f"tensor {key} in the adapter does not fit its site")


@pytest.mark.parametrize(
    "rename",
    [
        lambda key: key.replace("ia3_l", "ia3_l.default"),
        lambda key: key.replace(PREFIX, PREFIX + "_orig_mod."),
        lambda key: key.removeprefix(PREFIX),
    ],
)
def test_other_spellings_of_the_keys_are_read(rename: Any) -> None:
    adapted, values = fresh(), other_values()
    adapted.load({rename(key): value for key, value in values.items()})
    found = peft_keys.encode(adapted.adapters)
    assert all(torch.equal(found[key], values[key]) for key in KEYS)


def test_the_tensors_of_two_adapters() -> None:
    first, second = [key for key in KEYS if "ia3_l" in key][:2]
    tensors = other_values()
    tensors[first + ".one"] = tensors.pop(first)
    tensors[second + ".two"] = tensors.pop(second)
    refused(tensors, errors.UnexpectedKeyError, "holds the tensors of several adapters")


# -- through the handle -----------------------------------------------------------------------------------


def compiled(host: str, plan: Any, backend: str = "eager") -> Any:
    return adaptc.compile(hosts.build(host).double(), plan, backend=backend)


CONFIG = ia3(["key", "output.dense"], ["output.dense"], modules_to_save=["classifier"])


def test_compile_and_load_take_a_folder_of_peft(tmp_path: Path) -> None:
    theirs = peft_model("bert", CONFIG)
    folder = peft_save(theirs, tmp_path)
    expected = logits(theirs, "bert")
    ours = compiled("bert", folder, backend="aot_eager")
    torch.testing.assert_close(logits(ours, "bert"), expected, rtol=1e-10, atol=1e-10)
    plan = [CLASSIFIER, IA3(targets=["output.dense"], feedforward=True), IA3(targets=["key"])]
    model = compiled("bert", plan, backend="aot_eager")
    assert (logits(model, "bert") - expected).abs().max() > 1e-3
    graphs = model.adaptc.metrics()["graphs"]
    model.adaptc.load(folder)
    torch.testing.assert_close(logits(model, "bert"), expected, rtol=1e-10, atol=1e-10)
    assert model.adaptc.metrics()["graphs"] == graphs


def test_peft_reads_what_the_handle_saves(tmp_path: Path) -> None:
    model = compiled("bert", [IA3(targets=["key"]), IA3(targets=["intermediate.dense"], feedforward=True)]).eval()
    randomise(model)
    model.adaptc.save(tmp_path)
    found = logits(peft_load("bert", tmp_path), "bert")
    torch.testing.assert_close(found, logits(model, "bert"), rtol=1e-10, atol=1e-10)


def test_a_folder_with_other_inputs_is_not_loaded_into_an_adapter(tmp_path: Path) -> None:
    folder = peft_save(peft_model("bert", CONFIG), tmp_path)
    model = compiled("bert", [CLASSIFIER, IA3(targets=["key", "output.dense"])])
    before = [parameter.clone() for parameter in model.adaptc.parameters()]
    with pytest.raises(errors.ConfigError, match="has other sites than 'default': 4 differ"):
        model.adaptc.load(folder)
    assert all(map(torch.equal, before, model.adaptc.parameters()))


# -- LoRA from a part of the weight: a plain LoRA of rank 2r in the file ------------------------------------

SPLIT = [
    LoRA(r=3, alpha=5, init="pissa", targets=["value"]),
    LoRA(r=3, alpha=5, init="olora", targets=["value"]),
    LoRA(r=3, alpha=5, init="pissa", rslora=True, targets=["value"]),
    LoRA(r=3, alpha=5, init="pissa", dora=True, targets=["value"]),
    LoRA(r=3, alpha=5, init="pissa_niter_2", bias="lora_only", targets=["value", "key"], rank_pattern={"key": 2}),
]


@pytest.mark.parametrize("method", [
    pytest.param(m, id=f"{m.init} {i}", marks=[pytest.mark.slow] if i in (2, 3, 4) else []) for i, m in enumerate(SPLIT)
])  # fmt: skip
def test_a_part_of_the_weight_is_saved_as_a_plain_lora_of_twice_the_rank(method: LoRA, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = compiled("bert", method).eval()
    before = {name: value.clone() for name, value in hosts.build("bert").double().state_dict().items()}
    randomise(model)
    model.adaptc.save(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["init_lora_weights"]) == (6, True)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    expected = logits(model, "bert")
    assert (expected - logits(hosts.build("bert").double(), "bert")).abs().max() > 1e-4
    torch.testing.assert_close(logits(peft_load("bert", tmp_path), "bert"), expected, rtol=1e-10, atol=1e-10)
    # By the plan beside it, the same method again; by the config alone, a plain LoRA.
    again = compiled("bert", tmp_path)
    assert again.adaptc.records["default"].plan == Plan(method)
    torch.testing.assert_close(logits(again.eval(), "bert"), expected, rtol=1e-10, atol=1e-10)
    (tmp_path / "adaptc_plan.json").unlink()
    plain = compiled("bert", tmp_path)
    assert plain.adaptc.records["default"].plan.rules[0].method.init == "default"
    torch.testing.assert_close(logits(plain.eval(), "bert"), expected, rtol=1e-10, atol=1e-10)


def test_the_factors_of_a_part_of_the_weight_are_found_again(tmp_path: Path) -> None:
    """For training to go on: lora_A to the bit, lora_B to the rounding of one sum."""
    model = compiled("bert", SPLIT[0])
    randomise(model)
    model.adaptc.save(tmp_path)
    other = compiled("bert", LoRA(r=3, alpha=5, init="olora", targets=["value"]))
    other.adaptc.load(tmp_path)
    for (name, mine), (_, theirs) in zip(
        model.adaptc.named_parameters(), other.adaptc.named_parameters(), strict=True
    ):
        bound = 0 if name.endswith("lora_A") else torch.finfo(torch.float64).eps * mine.abs().max()
        assert (mine - theirs).abs().max() <= bound
    torch.testing.assert_close(logits(other, "bert"), logits(model, "bert"), rtol=1e-10, atol=1e-10)


def test_what_peft_converts_is_loaded_into_a_part_of_the_weight(tmp_path: Path) -> None:
    """PEFT decomposes in float32 only, and its residual weight is rounded to that."""
    base = hosts.build("bert")
    config = peft.LoraConfig(r=3, lora_alpha=5, init_lora_weights="pissa", target_modules=["value"])
    theirs = peft.get_peft_model(base, config)
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(tmp_path / "initial")
    theirs.peft_config["default"].init_lora_weights = "pissa"
    randomise(theirs)
    folder = tmp_path / "converted"
    theirs.save_pretrained(folder, path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    expected = logits(theirs.eval(), "bert").double()
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 6
    torch.testing.assert_close(logits(compiled("bert", folder), "bert"), expected, rtol=1e-5, atol=1e-6)
    ours = compiled("bert", SPLIT[0])
    ours.adaptc.load(folder)
    torch.testing.assert_close(logits(ours, "bert"), expected, rtol=1e-5, atol=1e-6)


def test_a_plain_lora_of_the_same_rank_is_not_loaded_into_a_part_of_the_weight(tmp_path: Path) -> None:
    folder = peft_save(peft_model("bert", {"target_modules": ["value"], "r": 3, "lora_alpha": 5}), tmp_path)
    model = compiled("bert", SPLIT[0])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(errors.ConfigError, match="has other sites than 'default'"):
        model.adaptc.load(folder)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


# -- adaptc's own format ----------------------------------------------------------------------------------

#: What PEFT has no place for.
OWN: dict[str, list[Any]] = {
    "biases alone": [Bias(targets=["re:.*LayerNorm", "query"])],
    "a head alone": [CLASSIFIER],
    "two kinds": [CLASSIFIER, IA3(targets=["key"]), LoRA(r=3, targets=["query"])],
}


@pytest.fixture(params=[
    pytest.param(name, marks=[pytest.mark.slow] if name == "two kinds" else []) for name in sorted(OWN)
])  # fmt: skip
def own(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Path]:
    model = compiled("bert", Plan(OWN[request.param])).eval()
    randomise(model)
    model.adaptc.save(tmp_path / "own")
    return model, tmp_path / "own"


def test_adaptcs_own_format_is_loaded_again(own: Any) -> None:
    model, folder = own
    assert sorted(p.name for p in folder.iterdir()) == ["adaptc_plan.json", "adapter_model.safetensors"]
    expected = logits(model, "bert")
    assert (expected - logits(hosts.build("bert").double(), "bert")).abs().max() > 1e-5
    again = compiled("bert", folder)
    assert torch.equal(logits(again.eval(), "bert"), expected)
    fresh_model = compiled("bert", model.adaptc.records["default"].plan).eval()
    fresh_model.adaptc.load(folder)
    assert torch.equal(logits(fresh_model, "bert"), expected)


def test_peft_finds_no_adapter_in_it(own: Any) -> None:
    _, folder = own
    with pytest.raises(ValueError, match=r"Can't find 'adapter_config\.json'"):
        peft.PeftModel.from_pretrained(hosts.build("bert"), folder)


def test_it_takes_the_place_of_an_adapter_in_pefts_format_and_back(own: Any) -> None:
    model, folder = own
    lora = compiled("bert", LoRA(r=3, targets=["query"]))
    lora.adaptc.save(folder)
    assert checkpoint.read_adapter(folder).config["peft_type"] == "LORA"
    assert torch.equal(logits(compiled("bert", folder), "bert"), logits(lora, "bert"))
    model.adaptc.save(folder)
    assert not (folder / "adapter_config.json").exists()
    assert torch.equal(logits(compiled("bert", folder).eval(), "bert"), logits(model, "bert"))


@pytest.mark.parametrize("fault", ["missing", "extra", "shape", "nan"])
def test_its_tensors_are_checked_at_every_position(own: Any, fault: str) -> None:
    model, folder = own
    file = folder / "adapter_model.safetensors"
    good = safetensors.torch.load_file(file)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    kinds = {
        "missing": errors.MissingKeyError, "extra": errors.UnexpectedKeyError,
        "shape": errors.TensorShapeError, "nan": errors.NonFiniteError,
    }  # fmt: skip
    for key in sorted(good):
        bad = {name: value.clone() for name, value in good.items()}
        if fault == "missing":
            del bad[key]
        elif fault == "extra":
            bad[f"{key}x"] = bad[key].clone()
        elif fault == "shape":
            bad[key] = bad[key][None]
        else:
            bad[key].view(-1)[-1] = math.nan
        safetensors.torch.save_file(bad, file)
        with pytest.raises(kinds[fault]):
            model.adaptc.load(folder)
        assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_a_plan_file_that_is_damaged(own: Any) -> None:
    _, folder = own
    file = folder / "adaptc_plan.json"
    saved = json.loads(file.read_text())
    for change, text in (
        ({"plan": None}, "holds no plan"),
        ({"plan": []}, "plan is not an object"),
        ({"format": 9}, "has a format that this version does not read"),
        ({"config_sha256": "x"}, "no adapter_config.json in"),
    ):
        file.write_text(json.dumps({**saved, **change}))
        with pytest.raises(errors.CheckpointError, match=text):
            checkpoint.read_adapter(folder)
    file.unlink()
    with pytest.raises(errors.CheckpointNotFoundError, match=r"no adapter_config\.json in"):
        checkpoint.read_adapter(folder)


def test_what_peft_has_no_place_for_is_named() -> None:
    model = hosts.build("bert")
    for rules, text in (
        (OWN["two kinds"], "no place for two kinds in one adapter"),
        (OWN["biases alone"], "needs at least one adapted site"),
    ):
        plan = Plan(rules)
        with pytest.raises(errors.UnsupportedError, match=text):
            rules_to_config(plan.rules, plan.resolve(model).sites, model=model)


def test_a_crash_at_any_step_of_the_change_of_format_leaves_one_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file operation of the commit fails in turn; what is read is the old adapter or the new one, whole."""
    lora = {"base_model.model.q.lora_A.weight": torch.ones(2, 3)}
    config = {"peft_type": "LORA", "target_modules": ["q"]}
    own_tensors = {"base_model.model.q.bias": torch.full((4,), 2.0)}
    seen = set()
    for step in range(8):
        folder = tmp_path / str(step)
        checkpoint.write_adapter(folder, config=config, tensors=lora, plan={"rules": [1]}, fingerprint=None)
        with monkeypatch.context() as patched:
            _fail_at(patched, step)
            try:
                checkpoint.write_adapter(
                    folder, config=None, tensors=own_tensors, plan={"rules": [2]}, fingerprint=None
                )
                seen.add("no crash")
            except RuntimeError:
                pass
        found = checkpoint.read_adapter(folder)
        new = found.plan == {"rules": [2]}
        assert found.config == (None if new else config)
        assert found.tensors.keys() == (own_tensors if new else lora).keys()
        seen.add(new)
    assert seen == {True, False, "no crash"}


def _fail_at(patched: pytest.MonkeyPatch, step: int) -> None:
    """Let the operation ``step`` of those that change names raise; not an OSError, which clears the staging."""
    calls = iter(range(100))

    def failing(function: Any) -> Any:
        def run(*args: Any, **options: Any) -> Any:
            if next(calls) == step:
                raise RuntimeError("power failed")
            return function(*args, **options)

        return run

    for owner, name in ((checkpoint.os, "rename"), (checkpoint.os, "replace"), (Path, "unlink"), (Path, "rmdir")):
        patched.setattr(owner, name, failing(getattr(owner, name)))


@pytest.mark.parametrize("kind", sorted(adaptc.methods()))
def test_the_registry_and_the_rows_agree(kind: str) -> None:
    row = codec_of(kind)
    assert (None if row is None else row.peft_type) == adaptc.methods()[kind].peft
    assert row is None or row.kind == kind
