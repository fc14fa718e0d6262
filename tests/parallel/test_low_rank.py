"""Adapters of divided matrices against dense autograd in float64: value and every gradient."""

from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from megatron_moe_inject.adapters.blocks import OfDomain
from megatron_moe_inject.adapters.grouped import GroupedLowRank, OfExpert
from megatron_moe_inject.adapters.low_rank import COLUMN, ROW, WHOLE, LowRank, Sharding, factors
from tests.harness import gloo

L, B, N, K, R, SCALE = 8, 2, 12, 16, 3, 0.5


def dense(name="some.weight"):
    """Weight, input and what arrives at the output, and the whole factors with values."""
    drawn = torch.Generator().manual_seed(5)
    random = lambda *shape: torch.randn(shape, generator=drawn, dtype=torch.float64)  # noqa: E731
    weight, x, upstream, b = random(K, N), random(L, B, N), random(L, B, K), random(K, R)
    alone = Sharding(WHOLE, dist.group.WORLD)
    a = factors(weight, R, alone, name)[0].detach()
    return weight, x, upstream, a, b


def expected():
    _, x, upstream, a, b = dense()
    x, a, b = (tensor.requires_grad_() for tensor in (x, a, b))
    (F.linear(F.linear(x, a), b) * SCALE).backward(upstream)
    return x.grad, a.grad, b.grad


def part(tensor, group, dim):
    return tensor.chunk(group.size(), dim)[group.rank()].contiguous()


def divided(kind, sequence):
    """One layer over all ranks, with Megatron's sum of what is marked ``sequence_parallel``."""
    group = dist.group.WORLD
    weight, x, upstream, a, b = dense()
    sharding = Sharding(kind, group, sequence)
    if kind != WHOLE:
        weight = part(weight, group, 0 if kind == COLUMN else 1)
    adapter = LowRank(weight, R, SCALE, sharding, "some.weight")
    begun = part(a, group, 1) if kind == ROW else a
    assert torch.equal(adapter.a, begun)
    assert not adapter.b.any()
    with torch.no_grad():
        adapter.b.copy_(part(b, group, 0) if kind == COLUMN else b)
    if sequence and kind != ROW:
        x = part(x, group, 0)
    if kind == ROW:
        x = part(x, group, 2)
    if kind == COLUMN:
        upstream = part(upstream, group, 2)
    elif sequence:
        upstream = part(upstream, group, 0)
    x.requires_grad_()
    with mock.patch.object(torch.cuda, "current_device", return_value="cpu"):
        adapter(x).backward(upstream)
    for parameter in adapter.parameters():
        if parameter.sequence_parallel:
            dist.all_reduce(parameter.grad, group=group)
    grads = expected()
    if kind == ROW:
        assert_close(x.grad, part(grads[0], group, 2))
        assert_close(adapter.a.grad, part(grads[1], group, 1))
        assert_close(adapter.b.grad, grads[2])
    else:
        assert_close(x.grad, part(grads[0], group, 0) if sequence else grads[0])
        assert_close(adapter.a.grad, grads[1])
        assert_close(adapter.b.grad, part(grads[2], group, 0) if kind == COLUMN else grads[2])
    duplicated = [not p.tensor_model_parallel for p in adapter.parameters()]
    whole = {COLUMN: [True, False], ROW: [False, True], WHOLE: [True, True]}[kind]
    assert duplicated == (whole if group.size() > 1 else [True, True])


def of_expert(kind):
    """A divided expert's output is a partial sum that the dispatcher adds up."""
    group = dist.group.WORLD
    weight, x, upstream, a, b = dense()
    weight = part(weight, group, 0 if kind == COLUMN else 1)
    weight.allreduce = False
    adapter = LowRank(weight, R, SCALE, Sharding(kind, group, expert=True), "some.weight")
    assert not any(parameter.allreduce for parameter in adapter.parameters())
    with torch.no_grad():
        adapter.b.copy_(part(b, group, 0) if kind == COLUMN else b)
    x = (part(x, group, 2) if kind == ROW else x).flatten(0, 1).requires_grad_()
    upstream = (part(upstream, group, 2) if kind == COLUMN else upstream).flatten(0, 1)
    output = adapter(x)
    output.backward(upstream)
    grads = expected()
    whole = F.linear(F.linear(dense()[1], a), b).flatten(0, 1) * SCALE
    if kind == COLUMN:
        assert_close(output, part(whole, group, 1))
        dist.all_reduce(x.grad, group=group)
        assert_close(x.grad, grads[0].flatten(0, 1))
        assert_close(adapter.a.grad, grads[1])
        assert_close(adapter.b.grad, part(grads[2], group, 0))
    else:
        total = output.detach().clone()
        dist.all_reduce(total, group=group)
        assert_close(total, whole)
        assert_close(x.grad, part(grads[0], group, 2).flatten(0, 1))
        assert_close(adapter.a.grad, part(grads[1], group, 1))
        assert_close(adapter.b.grad, grads[2])


def assert_close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("kind", [COLUMN, ROW, WHOLE])
@pytest.mark.parametrize("sequence", [False, True])
def test_a_layer(ranks, kind, sequence):
    gloo.pool(ranks).run(divided, kind, sequence)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("kind", [COLUMN, ROW])
def test_an_expert(ranks, kind):
    gloo.pool(ranks).run(of_expert, kind)


def grouped(kind):
    """Three of four experts, one of them without rows, of other ranks, against one by one."""
    group = dist.group.WORLD
    counts, sharding = [3, 0, 4, 2], Sharding(kind, group, expert=True)
    drawn = torch.Generator().manual_seed(1)
    weights = [torch.randn(K, N, generator=drawn, dtype=torch.float64) for _ in counts]
    chosen = [OfExpert(i, 4 + i, 2 + i, 0.5 + i, f"expert {i}") for i in (0, 1, 3)]
    layer = GroupedLowRank(weights, chosen, sharding)
    rows = torch.randn(sum(counts), N, generator=drawn, dtype=torch.float64, requires_grad=True)
    output = torch.randn(sum(counts), K, generator=drawn, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(sum(counts), K, generator=drawn, dtype=torch.float64)
    alone = [LowRank(weights[o.local], o.rank, o.scale, sharding, o.name) for o in chosen]
    for one, single in zip(chosen, alone, strict=True):
        with torch.no_grad():
            single.b.normal_(generator=drawn)
            layer.get_parameter(f"b{one.expert}").copy_(single.b)
    layer(rows, counts, output).backward(upstream)
    found = rows.grad.clone(), output.grad.clone()
    rows.grad = None
    starts = [0, 3, 3, 7]
    total = output.detach().clone()
    for one, single in zip(chosen, alone, strict=True):
        at = slice(starts[one.local], starts[one.local] + counts[one.local])
        total[at] = total[at] + single(rows[at])
    total.backward(upstream)
    assert_close(found[0], rows.grad)
    assert_close(found[1], upstream)
    for one, single in zip(chosen, alone, strict=True):
        for factor in "ab":
            parameter = layer.get_parameter(f"{factor}{one.expert}")
            assert_close(parameter.grad, single.get_parameter(factor).grad)
    assert not layer.get_parameter("b5").grad.any()


def test_grouped_experts():
    gloo.pool(1).run(grouped, COLUMN)


DOMAINS = (OfDomain(3, "code"), OfDomain(0, "html"))
LABELS = torch.tensor([[3, 0], [0, -1], [3, 3], [-1, 0], [0, 0], [2, 3], [-1, -1], [3, 0]])
"""Of ``[l, b]`` tokens; -1 is general text, 2 a domain without factors."""


def by_domain(kind, sequence):
    """Two domains' factors over all ranks, against dense ones with the tokens' masks."""
    group = dist.group.WORLD
    weight, x, upstream, _, b = dense()
    begun = [dense(f"some.weight:{name}")[3] for name in ("code", "html")]
    seconds = [b, b.flip(0) * 2]
    sharding, dim = Sharding(kind, group, sequence), {COLUMN: 0, ROW: 1}.get(kind)
    if dim is not None:
        weight = part(weight, group, dim)
    adapter = LowRank(weight, R, SCALE, sharding, "some.weight", DOMAINS)
    found = [[adapter.get_parameter(f"{factor}_{d.label}") for factor in "ab"] for d in DOMAINS]
    wanted, whole = [], x.clone().requires_grad_()
    for (first, second), a, values, domain in zip(found, begun, seconds, DOMAINS, strict=True):
        assert torch.equal(first, part(a, group, 1) if kind == ROW else a)
        with torch.no_grad():
            second.copy_(part(values, group, 0) if kind == COLUMN else values)
        own = (a.clone().requires_grad_(), values.clone().requires_grad_())
        mask = (domain.label == LABELS).unsqueeze(-1)
        (F.linear(F.linear(whole, own[0]), own[1]) * SCALE * mask).backward(upstream)
        wanted.append([factor.grad for factor in own])
    labels, grad = LABELS, whole.grad
    if sequence:
        labels = part(labels, group, 0)
    if sequence and kind != ROW:
        x, grad = part(x, group, 0), part(grad, group, 0)
    if kind == ROW:
        x, grad = part(x, group, 2), part(grad, group, 2)
    if kind == COLUMN:
        upstream = part(upstream, group, 2)
    elif sequence:
        upstream = part(upstream, group, 0)
    x = x.requires_grad_()
    with mock.patch.object(torch.cuda, "current_device", return_value="cpu"):
        change = adapter(x, labels)
        change.backward(upstream)
    if kind != COLUMN:
        assert not change[(labels == -1) | (labels == 2)].any()
    assert_close(x.grad, grad)
    for parameter in adapter.parameters():
        if parameter.sequence_parallel:
            dist.all_reduce(parameter.grad, group=group)
    for (first, second), (of_first, of_second) in zip(found, wanted, strict=True):
        assert_close(first.grad, part(of_first, group, 1) if kind == ROW else of_first)
        assert_close(second.grad, part(of_second, group, 0) if kind == COLUMN else of_second)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("kind", [COLUMN, ROW, WHOLE])
@pytest.mark.parametrize("sequence", [False, True])
def test_a_layer_by_domain(ranks, kind, sequence):
    gloo.pool(ranks).run(by_domain, kind, sequence)


def without_others(kind):
    """Tokens of one domain alone: the other's factors get a gradient of exactly zero, and its own
    get what they get where there is no other."""
    weight, x, upstream, _, b = dense()
    sharding = Sharding(kind, dist.group.WORLD)
    labels = torch.where(LABELS == 0, -1, LABELS)
    grads = []
    for domains in (DOMAINS, DOMAINS[:1]):
        adapter = LowRank(weight, R, SCALE, sharding, "some.weight", domains)
        for name, parameter in adapter.named_parameters():
            if name.startswith("b"):
                with torch.no_grad():
                    parameter.copy_(b)
        change = adapter(x, labels)
        change.backward(upstream)
        grads.append({name: p.grad for name, p in adapter.named_parameters()})
    both, alone = grads
    assert torch.equal(both["a_0"], torch.zeros_like(both["a_0"]))
    assert torch.equal(both["b_0"], torch.zeros_like(both["b_0"]))
    for name, gradient in alone.items():
        assert gradient.any()
        assert_close(both[name], gradient)


def test_a_domain_without_tokens():
    gloo.pool(1).run(without_others, COLUMN)


def grouped_by_domain():
    """Experts that have both domains, one or none, one padded, against one by one."""
    counts, padded, sharding = [3, 2, 4], [3, 2, 6], Sharding(COLUMN, dist.group.WORLD, expert=True)
    drawn = torch.Generator().manual_seed(1)
    weights = [torch.randn(K, N, generator=drawn, dtype=torch.float64) for _ in counts]
    domains = [DOMAINS, (), DOMAINS[:1]]
    chosen = [OfExpert(i, 4 + i, R, SCALE, f"expert {i}", domains[i]) for i in range(3)]
    layer = GroupedLowRank(weights, chosen, sharding)
    rows = torch.randn(sum(padded), N, generator=drawn, dtype=torch.float64)
    output, upstream = (torch.randn(len(rows), K, generator=drawn).double() for _ in range(2))
    by_row = torch.tensor([3, 0, -1, 0, 3, 3, 0, 2, 3]).split(counts)
    labels = dict(zip((4, 5, 6), by_row, strict=True))

    def row_labels(expert, count):
        return F.pad(labels[expert], (0, count - len(labels[expert])), value=-1)

    alone = []
    for one in chosen:
        single = LowRank(weights[one.local], R, SCALE, sharding, one.name, one.domains)
        for name, parameter in single.named_parameters():
            factor, _, label = name.partition("_")
            own = layer.get_parameter(f"{factor}{one.expert}{label and '_' + label}")
            assert torch.equal(own, parameter)
            if factor == "b":
                with torch.no_grad():
                    parameter.normal_(generator=drawn)
                    own.copy_(parameter)
        alone.append(single)
    found = layer(rows, padded, output, row_labels)
    found.backward(upstream)
    parts = []
    for one, single, x, base in zip(
        chosen, alone, rows.split(padded), output.split(padded), strict=True
    ):
        own = (row_labels(one.expert, len(x)),) if one.domains else ()
        parts.append(base + single(x, *own))
    torch.cat(parts).backward(upstream)
    assert torch.equal(found, torch.cat(parts))
    for one, single in zip(chosen, alone, strict=True):
        for name, parameter in single.named_parameters():
            factor, _, label = name.partition("_")
            own = layer.get_parameter(f"{factor}{one.expert}{label and '_' + label}")
            assert_close(own.grad, parameter.grad)


def test_grouped_experts_by_domain():
    gloo.pool(1).run(grouped_by_domain)
