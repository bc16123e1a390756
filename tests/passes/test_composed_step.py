"""A whole training step, through every pass and kernel, against the formula in fp64 with its masks written out.

    S = s (D.x) A^T      y = x W^T + S B^T + b      dS = s dy B      dA = dS^T (D.x)      dB = dy^T S
    dx = dy W + D.(dS A), summed over the sites that read x

D is the mask over 1 - p, or one where nothing is dropped.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools

import pytest
import torch
from torch import nn

import adaptc
from adaptc.ir.ops.dropout import keep_mask

#: What two sites read and make, and the other way about: no multiples of a tile or of a vector register, and one is
#: more than a kernel takes at once. Smaller than what other orders of the products are timed for.
WIDTHS = {False: (261, (29, 31)), True: (29, (261, 31))}
RANKS = (1, 8, 24, 48, 96, 128)
#: Number of rows -> the same as two dimensions. In fp32 without dropout kernels take over between 127 and 129.
ROWS = {1: (1, 1), 127: (127, 1), 129: (3, 43), 4097: (17, 241)}
P, SEED = 0.1, 3
#: With rsLoRA's scale an adapter makes a quarter of an output at least, and no scale is a power of two.
ALPHA = 5.2


@dataclasses.dataclass(frozen=True)
class Case:
    """Sites of one rank. ``frozen_factor``: A; ``shared``: two of them read one value; ``computed``: which is what a
    third makes of the input."""

    rank: int
    rows: int
    bf16: bool = False
    drops: bool = False
    bias: bool = False
    batched: bool = False
    strided: bool = False
    frozen_factor: bool = False
    frozen_x: bool = False
    shared: bool = False
    wide_output: bool = False
    computed: bool = False

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.bf16 else torch.float32

    @property
    def lead(self) -> tuple[int, ...]:
        return ROWS[self.rows] if self.batched else (self.rows,)

    @property
    def width(self) -> int:
        return WIDTHS[self.wide_output][0]

    @property
    def outputs(self) -> tuple[int, ...]:
        return WIDTHS[self.wide_output][1][: 1 + self.shared]

    def __str__(self) -> str:
        names = [field.name for field in dataclasses.fields(self)[2:] if getattr(self, field.name)]
        return "-".join([f"r{self.rank}", f"m{self.rows}", *names])


def case(rank: int, rows: int, options: str = "") -> Case:
    return Case(rank, rows, **dict.fromkeys(options.split(), True))


def covering(rank: int, rows: int, code: int) -> Case:
    """One of eight choices: all that bf16, dropout and a frozen input can be together, and any two options in all four
    ways."""
    a, b, c = (bool(code >> bit & 1) for bit in range(3))
    i, j = RANKS.index(rank), list(ROWS).index(rows)
    return Case(
        rank, rows, bf16=a, drops=b, frozen_x=c, bias=a ^ b, batched=a ^ b ^ c, strided=a ^ c, frozen_factor=b ^ c,
        shared=bool((j + code) % 2), wide_output=bool((i + code) % 2),
    )  # fmt: skip


def codes(rank: int, rows: int) -> list[int]:
    """The eight, beginning elsewhere for each rank and number of rows: the first two of each cover all options."""
    start = RANKS.index(rank) + 2 * list(ROWS).index(rows)
    return [(start + i) % 8 for i in range(8)]


CELLS = list(itertools.product(RANKS, ROWS))
COVER = [covering(*cell, code) for cell in CELLS for code in codes(*cell)[:2]]
OTHERS = [covering(*cell, code) for cell in CELLS for code in codes(*cell)[2:]]
#: What drops has a kernel at every rank, and so has what does not up to a rank of 64: in fp32 from 128 rows on, in bf16
#: where the CPU multiplies it.
COMPILED = [
    case(24, 129, "drops bias shared"),
    case(96, 4097, "bf16 drops batched strided"),
    case(128, 127, "drops bias frozen_factor shared wide_output"),
    case(48, 129, "bias batched wide_output"),
    case(24, 4097, "bf16 bias shared wide_output"),
    case(128, 4097, "drops shared strided batched frozen_x"),
    case(96, 129, "bias shared frozen_factor"),
]
BACKENDS = {"aot_eager": [], "inductor": [pytest.mark.inductor]}


def listed(backend: str, cases: list[Case], *marks) -> list:
    return [pytest.param(one, backend, marks=[*BACKENDS[backend], *marks], id=f"{one}-{backend}") for one in cases]


class Readers(nn.Module):
    """Layers that read one value, which is a result too where a layer makes it."""

    def __init__(self, one: Case):
        super().__init__()
        self.first = nn.Linear(one.width, one.width, one.bias) if one.computed else None
        self.layers = nn.ModuleList(nn.Linear(one.width, n, one.bias) for n in one.outputs)

    def forward(self, x):
        h = x if self.first is None else torch.tanh(self.first(x))
        return [layer(h) for layer in self.layers] + ([] if h is x else [h])


@dataclasses.dataclass(frozen=True)
class Site:
    """What the formula reads, with rows in one dimension; the bias is zero where there is none."""

    x: torch.Tensor
    dy: torch.Tensor
    W: torch.Tensor
    b: torch.Tensor
    A: torch.Tensor
    B: torch.Tensor
    D: torch.Tensor
    scale: float

    def to(self, dtype: torch.dtype) -> Site:
        """The same, but for the mask, whose numbers a dropout does not round."""
        return dataclasses.replace(self, **{name: getattr(self, name).to(dtype) for name in ("x", "dy", *"WbAB")})


def formula(site: Site) -> dict[str, torch.Tensor]:
    """In the dtype of ``site``."""

    def drop(t):
        return (site.D * t).to(t.dtype)

    x, dy, W, A, B = site.x, site.dy, site.W, site.A, site.B
    S, dS = site.scale * (drop(x) @ A.T), site.scale * (dy @ B)
    return {"y": x @ W.T + S @ B.T + site.b, "dA": dS.T @ drop(x), "dB": dy.T @ S, "dx": dy @ W + drop(dS @ A)}


def joined(results: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The results of all sites by name and number; the gradient of what they read is one."""
    found = {f"{name}{i}": one[name] for name in ("y", "dA", "dB") for i, one in enumerate(results)}
    return {**found, "dx": functools.reduce(torch.add, [one["dx"] for one in results])}


def reference(sites: list[Site]) -> dict[str, torch.Tensor]:
    return joined([formula(site) for site in sites])


def bits(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Copies that are equal where every bit is: zeros of both signs are not."""
    return [t.detach().contiguous().view({2: torch.int16, 4: torch.int32}[t.itemsize]).clone() for t in tensors]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def drawn(lead: tuple[int, ...], width: int, one: Case) -> torch.Tensor:
    """Where it is to be strided, a matrix by columns, or a batch of rows whose numbers lie apart."""
    if one.strided and len(lead) == 1:
        return torch.randn(width, *lead).to(one.dtype).t()
    wide = torch.randn(*lead, width * (1 + one.strided)).to(one.dtype)
    return wide[..., :: 1 + one.strided]


class Step:
    """The forward of a model, and its backwards."""

    def __init__(self, one: Case, backend: str):
        self.case, self.backend = one, backend
        base, dropout = Readers(one).to(one.dtype), P if one.drops else 0.0
        plan = adaptc.LoRA(r=one.rank, alpha=ALPHA, rslora=True, dropout=dropout, init="random", targets="all-linear")
        self.model = adaptc.compile(base, plan, backend=backend)
        self.adapters = [layer.adapters["default"] for layer in self.model.layers]
        for adapter in self.adapters:
            adapter.lora_A.requires_grad_(not one.frozen_factor)
        self.x = drawn(one.lead, one.width, one).requires_grad_(not one.frozen_x)
        self.dy = [drawn(one.lead, n, one) for n in (*one.outputs, *[one.width] * one.computed)]
        self.given = bits(self.x, *self.dy)
        torch.manual_seed(SEED)
        self.results = self.model(self.x)

    def backward(self, **options) -> dict[str, torch.Tensor]:
        """The gradients by the formula's names, and those of a layer in front of the sites."""
        self.x.grad = None
        self.model.zero_grad()
        torch.autograd.backward(self.results, self.dy, **options)
        found = {"dx": self.x.grad}
        for i, adapter in enumerate(self.adapters):
            found |= {f"dA{i}": adapter.lora_A.grad, f"dB{i}": adapter.lora_B.grad}
        if self.case.computed:
            found |= {name: p.grad for name, p in self.model.first.adapters["default"].named_parameters()}
        return {name: grad for name, grad in found.items() if grad is not None}

    def masks(self) -> list[torch.Tensor]:
        count, shape = len(self.adapters), (self.case.rows, self.case.width)
        if not self.case.drops:
            return [torch.ones(shape, dtype=torch.float64)] * count

        def draw():
            return torch.randint(2**62, (count,))

        torch.manual_seed(SEED)
        # Inductor's code draws other numbers of a seed than torch does.
        seeds = torch.compile(draw, backend="inductor")() if self.backend == "inductor" else draw()
        return [keep_mask(torch.empty(shape), seed, P).double() / (1 - P) for seed in seeds.split(1)]

    @functools.cached_property
    def sites(self) -> list[Site]:
        """In fp64."""
        found = []
        for layer, adapter, dy, D in zip(self.model.layers, self.adapters, self.dy, self.masks(), strict=True):
            b = torch.zeros(()) if layer.bias is None else layer.bias
            x, dy = (t.reshape(self.case.rows, -1) for t in (self.x, dy))
            tensors = [t.detach().double() for t in (x, dy, layer.weight, b, adapter.lora_A, adapter.lora_B)]
            found.append(Site(*tensors, D=D, scale=ALPHA / self.case.rank**0.5))
        return found

    @functools.cached_property
    def found(self) -> dict[str, torch.Tensor]:
        """The outputs, and the gradients of one backward."""
        return {**{f"y{i}": y.detach() for i, y in enumerate(self.results)}, **self.backward()}


def size(t: torch.Tensor) -> tuple[float, float]:
    """The largest number, and the root of the mean square."""
    return float(t.abs().max()), float(t.square().mean().sqrt())


def limits(exact: torch.Tensor, own: torch.Tensor, rows: int) -> list[float]:
    """How large the error of a result may be, by :func:`size`; ``own`` is the formula's in the dtype of the step."""
    if own.dtype == torch.float32:
        return [1e-5 * one for one in size(exact)]
    # The largest error is that of one number, and hangs on which way that is rounded: by 2^-8 of it at most. The mean
    # of many is no matter of luck. A single row shares one bottleneck, of one number at rank 1: the formula's own error
    # may be next to none there, and two roundings are allowed beside it.
    luck = (2.0**-7, 2.0**-8) if rows == 1 else (2.0**-8, 2.0**-11)
    return [1.1 * e + part * one for e, part, one in zip(size(own.double() - exact), luck, size(exact), strict=True)]


def check(step: Step, expected=reference) -> None:
    """What the step found is ``expected`` of its sites in fp64, with no larger an error than that in the step's own
    dtype has."""
    one, found = step.case, step.found
    exact, own = expected(step.sites), expected([site.to(one.dtype) for site in step.sites])
    frozen = {"dA0", "dA1"} if one.frozen_factor else set()
    assert found.keys() == exact.keys() - frozen - ({"dx"} if one.frozen_x else set())
    wrong = []
    for name, got in found.items():
        error = size(got.double().reshape(exact[name].shape) - exact[name])
        if not all(e <= most for e, most in zip(error, limits(exact[name], own[name], one.rows), strict=True)):
            wrong.append(name)
    assert not wrong, f"wrong: {' '.join(sorted(wrong))}"


@pytest.mark.parametrize("one, backend", [
    *listed("aot_eager", COVER), *listed("inductor", COMPILED),
    *listed("aot_eager", OTHERS, pytest.mark.slow), *listed("inductor", COVER[::4], pytest.mark.slow),
    *listed("inductor", [one for i, one in enumerate(COVER) if i % 4], pytest.mark.long),
])  # fmt: skip
def test_a_step_is_the_formula(one, backend):
    step = Step(one, backend)
    check(step)
    assert [y.shape for y in step.results] == [(*one.lead, n) for n in one.outputs]
    assert {y.dtype for y in step.results} == {one.dtype}
    assert {adapter.lora_B.grad.dtype for adapter in step.adapters} == {torch.float32}
    assert one.frozen_x or (step.x.grad.shape, step.x.grad.dtype) == (step.x.shape, one.dtype)
    assert same(bits(step.x, *step.dy), step.given)


def test_every_option_occurs_with_every_rank_and_number_of_rows():
    names = [field.name for field in dataclasses.fields(Case)[2:] if field.name != "computed"]
    for part, values in (("rank", RANKS), ("rows", ROWS)):
        options = {(getattr(one, part), name, getattr(one, name)) for one in COVER for name in names}
        assert options == set(itertools.product(values, names, (False, True)))
        # What chooses the kernels.
        kinds = {(getattr(one, part), one.bf16, one.drops) for one in COVER}
        assert kinds == set(itertools.product(values, (False, True), (False, True)))
    for together in [*itertools.combinations(names, 2), ("bf16", "drops", "frozen_x", "shared", "wide_output")]:
        found = {tuple(getattr(one, name) for name in together) for one in COVER}
        assert len(found) == 2 ** len(together), together
    assert len(set(COVER + OTHERS)) == 8 * len(CELLS)


def test_the_formulas_gradients_are_those_of_its_output():
    def draw(*shape):
        return torch.randn(shape, dtype=torch.float64).requires_grad_()

    D = keep_mask(torch.empty(9, 5), torch.tensor([SEED]), 0.4).double() / 0.6
    site = Site(draw(9, 5), draw(9, 4), draw(4, 5), draw(4), draw(3, 5), draw(4, 3), D, 1.3)
    assert 0 < int((D == 0).sum()) < D.numel()
    found = formula(site)
    wanted = torch.autograd.grad(found["y"], (site.A, site.B, site.x), site.dy)
    torch.testing.assert_close([found["dA"], found["dB"], found["dx"]], list(wanted))


REPEATED = [
    case(24, 129, "drops shared"),
    case(24, 127, "bf16 drops bias batched shared"),
    case(8, 129, "drops bias shared computed"),
    case(24, 129, "bias shared computed"),
    case(24, 4097, "bf16 drops strided shared"),
    case(8, 129, "bias batched strided"),
]


@pytest.mark.parametrize("one, backend", [
    *listed("aot_eager", REPEATED), *listed("inductor", REPEATED[1:2]),
    *listed("inductor", REPEATED[2:4], pytest.mark.slow),
    *listed("inductor", REPEATED[:1] + REPEATED[4:], pytest.mark.long),
])  # fmt: skip
def test_a_backward_again_finds_the_same_and_changes_nothing_that_it_reads(one, backend):
    """To the bit. Inductor's code adds up the gradient of what the sites read in the memory of one of its parts."""
    step = Step(one, backend)
    results = bits(*step.results)
    found = []
    for options in ({"retain_graph": True}, {"retain_graph": True}, {}):
        grads = step.backward(**options)
        found.append(dict(zip(grads, bits(*grads.values()), strict=True)))
        assert same(bits(step.x, *step.dy), step.given) and same(bits(*step.results), results)
    assert len(found[0]) == 1 + 2 * (len(step.adapters) + one.computed)
    for other in found[1:]:
        assert other.keys() == found[0].keys() and same(list(other.values()), list(found[0].values()))
    if backend == "inductor" and not one.strided:  # the gradient of such an input has its layout, which is a copy
        (graph,) = step.model.adaptc.graphs
        # The output of every site, and the gradient of what each site or group of them reads.
        assert graph.in_place >= len(step.adapters) + 1


# -- what the comparison would not let pass -------------------------------------------------------------


def each(wrong):
    """``wrong`` at every site."""
    return lambda sites: joined([wrong(site) for site in sites])


def with_other(**changes):
    """The formula with another operand, which the changes make of the site."""
    return each(lambda site: formula(dataclasses.replace(site, **{k: f(site) for k, f in changes.items()})))


def in_backward(**changes):
    """The same, of what the backward computes: it has the forward's bottleneck."""

    def wrong(site):
        other = formula(dataclasses.replace(site, **{k: f(site) for k, f in changes.items()}))
        return {**formula(site), "dA": other["dA"], "dx": other["dx"]}

    return each(wrong)


def dropped_for_both(site):
    only_base = (site.D - 1).to(site.x.dtype)
    right = formula(site)
    dx = right["dx"] + only_base * (site.dy @ site.W)
    return {**right, "y": right["y"] + (only_base * site.x) @ site.W.T, "dx": dx}


def kept_of_token(site):
    kept = (site.D > 0).double()
    return kept * kept.shape[1] / kept.sum(1, keepdim=True)


def with_masks(choose):
    """The formula with the masks that ``choose`` makes of those of all sites."""

    def wrong(sites):
        masks = choose([site.D for site in sites])
        return reference([dataclasses.replace(site, D=D) for site, D in zip(sites, masks, strict=True)])

    return wrong


def another_mask(site):
    return keep_mask(torch.empty(site.D.shape), torch.tensor([SEED]), P).double() / (1 - P)


ALL = "dA0 dA1 dB0 dB1 dx y0 y1"
#: Name -> a wrong reference, and the results that differ from it.
WRONG = {
    "the base drops too": (each(dropped_for_both), "dx y0 y1"),
    "no scale": (with_other(scale=lambda site: 1.0), ALL),
    "alpha for the scale": (with_other(scale=lambda site: ALPHA), ALL),
    "no scale in the backward": (in_backward(scale=lambda site: 1.0), "dA0 dA1 dx"),
    "the scale twice in the backward": (in_backward(scale=lambda site: site.scale**2), "dA0 dA1 dx"),
    "other masks in the backward": (in_backward(D=another_mask), "dA0 dA1 dx"),
    "no masks in the backward": (in_backward(D=lambda site: torch.ones_like(site.D)), "dA0 dA1 dx"),
    "no masks": (with_other(D=lambda site: torch.ones_like(site.D)), ALL),
    "kept numbers are as they were": (with_other(D=lambda site: (site.D > 0).double()), ALL),
    "a scale of each token": (with_other(D=kept_of_token), ALL),
    "masks one row further": (with_other(D=lambda site: site.D.roll(1, 0)), ALL),
    "one mask for all sites": (with_masks(lambda masks: masks[:1] * 2), "dA1 dB1 dx y1"),
    "each other's masks": (with_masks(lambda masks: masks[::-1]), ALL),
    "no bias": (with_other(b=lambda site: torch.zeros_like(site.b)), "y0 y1"),
    "a scale in bf16": (with_other(scale=lambda site: float(torch.tensor(site.scale).bfloat16())), ALL),
}


@functools.cache
def compared(bf16: bool) -> Step:
    step = Step(Case(24, 129, bf16=bf16, drops=True, bias=True, shared=True), "aot_eager")
    check(step)
    return step


@pytest.mark.parametrize("bf16, name", [
    # One rounding of a scale is as large as that of each result in bf16.
    (bf16, name) for bf16 in (False, True) for name in WRONG if not (bf16 and name == "a scale in bf16")
])  # fmt: skip
def test_another_formula_is_told_from_this_one(bf16, name):
    wrong, differ = WRONG[name]
    with pytest.raises(AssertionError, match=f"(?m)^wrong: {differ}$"):
        check(compared(bf16), wrong)
