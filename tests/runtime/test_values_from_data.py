"""Values at places, and of sizes, that only data say: masked writes and reads, `nonzero`, `item`, loops over experts.

torch captures them in pieces, or whole with ``fullgraph``; the gradients are the formula's either way.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import adaptc
from adaptc.torch_internals import reset_dynamo
from tests.reference import check_against_reference

WIDTH = 8
LORA = adaptc.LoRA(r=2, init="random", targets=["proj", "mid", "out"])


class Net(nn.Module):
    def __init__(self, act):
        super().__init__()
        self.emb, self.proj = nn.Embedding(20, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mid, self.out, self.act = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4), act

    def forward(self, ids, y, mask):
        return self.out(self.act(self, self.emb(ids), y, mask))


def written(net, h, y, mask):
    h[mask] = net.proj(net.mid(y)).view(-1, WIDTH)
    return h


def written_to_what_an_adapter_returned(net, h, y, mask):
    h = net.mid(h)
    h[mask] = net.proj(y).view(-1, WIDTH)
    return h


def written_in_some_columns(net, h, y, mask):
    h = net.mid(h)
    h[mask, 2:5] = net.proj(y).view(-1, WIDTH)[:, :3]
    return h


def one_row_written_to_all(net, h, y, mask):
    h = net.mid(h)
    h[mask] = net.proj(y)[0, 0]
    return h


def added_where_it_was_read(net, h, y, mask):
    h = net.mid(h)
    h[mask] += net.proj(h[mask])
    return h


def read(net, h, y, mask):
    return net.proj(net.mid(h))[mask]


def read_before_the_layers(net, h, y, mask):
    return net.proj(net.mid(torch.masked_select(h, mask[..., None]).view(-1, WIDTH)))


def scattered(net, h, y, mask):
    return net.mid(h).masked_scatter(mask[..., None], net.proj(y).view(-1, WIDTH))


def scattered_in_place(net, h, y, mask):
    return net.mid(h).masked_scatter_(mask[..., None], net.proj(y))


def put(net, h, y, mask):
    return net.mid(h).index_put_((mask,), net.proj(y).view(-1, WIDTH), accumulate=True)


def at_nonzero(net, h, y, mask):
    h = net.mid(h)
    where = mask.nonzero(as_tuple=True)
    h[where] = net.proj(h[where])
    return h


def cut_at_an_item(net, h, y, mask):
    count = int(mask.sum().item())
    return net.proj(net.mid(h.view(-1, WIDTH)[:count]))


def split_by_a_list(net, h, y, mask):
    sizes = mask.sum(1).tolist()
    return torch.cat([net.proj(net.mid(part)) for part in torch.split(h.view(-1, WIDTH)[: sum(sizes)], sizes)])


def experts_in_a_loop(net, h, y, mask):
    h = h.view(-1, WIDTH)
    total = torch.zeros_like(h)
    for number, expert in enumerate((net.proj, net.mid)):
        (where,) = torch.where(mask.view(-1) == number)
        total.index_add_(0, where, expert(h[where]))
    return total


def an_expert_of_no_token(net, h, y, mask):
    h = h.view(-1, WIDTH)
    total = net.proj(net.mid(h))
    (where,) = torch.where(mask.view(-1).int() == 7)
    return total.index_add_(0, where, net.mid(h[where]))


ACTS = [
    written, written_to_what_an_adapter_returned, written_in_some_columns, one_row_written_to_all,
    added_where_it_was_read, read, read_before_the_layers, scattered, scattered_in_place, put, at_nonzero,
    cut_at_an_item, split_by_a_list, experts_in_a_loop, an_expert_of_no_token,
]  # fmt: skip


def batches():
    for first in (1, 2):
        mask = torch.zeros(2, 6, dtype=torch.bool)
        mask[:, first:4] = True
        y = torch.randn(2, 4 - first, WIDTH, generator=torch.Generator().manual_seed(first))
        yield {"ids": torch.arange(12).view(2, 6), "y": y, "mask": mask}


def check(act, backend, **options):
    reset_dynamo()
    base = Net(act)
    model = adaptc.compile(copy.deepcopy(base), LORA, backend=backend, **options)
    for batch in batches():
        check_against_reference(model, base, batch)
    assert model.adaptc.metrics()["eager_sites"] == 0
    return model


def test_values_are_written_to_masked_places():
    model = check(written_to_what_an_adapter_returned, "aot_eager")
    assert "only data say" in str(model.adaptc.explain())


@pytest.mark.parametrize("act", ACTS, ids=lambda act: act.__name__)
@pytest.mark.parametrize("backend, options", [
    pytest.param("eager", {}, marks=pytest.mark.long), pytest.param("aot_eager", {}, marks=pytest.mark.slow),
    pytest.param("aot_eager", {"fullgraph": True}, marks=pytest.mark.long),
])  # fmt: skip
def test_sizes_that_only_data_say(act, backend, options):
    check(act, backend, **options)


@pytest.mark.parametrize("act", [
    pytest.param(written, marks=pytest.mark.slow),
    *(pytest.param(act, marks=pytest.mark.long) for act in (added_where_it_was_read, experts_in_a_loop)),
], ids=lambda act: act.__name__)  # fmt: skip
def test_under_inductor(act):
    check(act, "inductor")


@torch.compiler.allow_in_graph
def doubled(t):
    return 2 * t


def test_beside_a_users_own_function_in_the_graph_the_error_names_it():
    def act(net, h, y, mask):
        h[mask] = doubled(net.proj(y)).view(-1, WIDTH)
        return h

    model = adaptc.compile(Net(act), LORA, backend="aot_eager")
    with pytest.raises(Exception, match="doubled cannot be compiled"):
        model(**next(batches()))
