"""The CPU lane's Mamba layers against the recurrence of the paper, one token after another."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from megatron_moe_inject.host.cpu_lane import mamba
from megatron_moe_inject.host.cpu_lane.axes import rearrange

BATCH, LENGTH, HEADS, CHANNELS, GROUPS, STATE, WIDTH = 2, 13, 4, 3, 2, 5, 4
INNER = HEADS * CHANNELS
CONV = INNER + 2 * GROUPS * STATE
DOCUMENTS = torch.tensor([0] * 5 + [1] * 2 + [2] * 6).expand(BATCH, LENGTH)


def naive(zxbcdt, weight, bias, dt_bias, A, D, documents):
    """Each token from the ones before it, with the state of each head written out."""
    rows = []
    for sample, document in zip(zxbcdt, documents, strict=True):
        state = [torch.zeros(CHANNELS, STATE, dtype=sample.dtype) for _ in range(HEADS)]
        tokens = []
        for t in range(LENGTH):
            z, _, dt = sample[t].split([INNER, CONV, HEADS])
            seen = bias.clone()
            for back in range(min(WIDTH, t + 1)):
                if document[t - back] == document[t]:
                    seen = seen + weight[:, -1 - back] * sample[t - back, INNER : INNER + CONV]
            x, B, C = F.silu(seen).split([INNER, GROUPS * STATE, GROUPS * STATE])
            out = []
            for head in range(HEADS):
                group = slice(head // 2 * STATE, (head // 2 + 1) * STATE)
                own = x[head * CHANNELS : (head + 1) * CHANNELS]
                step = F.softplus(dt[head] + dt_bias[head])
                before = state[head] if t and document[t - 1] == document[t] else 0.0
                state[head] = (step * A[head]).exp() * before + step * torch.outer(own, B[group])
                out.append(state[head] @ C[group] + D[head] * own)
            tokens.append(torch.cat(out) * F.silu(z))
        rows.append(torch.stack(tokens))
    return torch.stack(rows)


def inputs(dtype=torch.float64):
    generator = torch.Generator().manual_seed(2)
    shapes = ((BATCH, LENGTH, INNER + CONV + HEADS), (CONV, WIDTH), (CONV,), (HEADS,), (HEADS,))
    values = [torch.randn(shape, generator=generator, dtype=dtype) for shape in (*shapes, (HEADS,))]
    values[4] = -values[4].abs() - 0.1
    return [value.requires_grad_() for value in values]


@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize("chunk", [1, 4, 64])
def test_the_chunks_give_the_recurrence_and_its_gradients(chunk, packed):
    """Chunks smaller and larger than documents; the fused path works in fp32."""
    documents = DOCUMENTS if packed else torch.zeros_like(DOCUMENTS)
    exact, ours = inputs(), inputs(torch.float32)
    with torch.no_grad():
        for value, source in zip(ours, exact, strict=True):
            value.copy_(source)
    wanted = naive(*exact, documents)
    got = mamba.split_conv_scan(
        *ours, chunk, headdim=CHANNELS, ngroups=GROUPS, seq_idx=documents if packed else None
    )
    torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-4)
    weights = torch.linspace(-1, 1, wanted.numel(), dtype=torch.float64).view_as(wanted)
    (wanted * weights).sum().backward()
    (got * weights.float()).sum().backward()
    for value, source in zip(ours, exact, strict=True):
        scale = source.grad.abs().max().item()
        torch.testing.assert_close(value.grad.double(), source.grad, rtol=1e-4, atol=1e-4 * scale)


def test_a_state_goes_on_where_a_scan_ended():
    generator = torch.Generator().manual_seed(3)
    x, dt = torch.randn(1, 9, 2, 3, generator=generator), torch.rand(1, 9, 2, generator=generator)
    B, C = torch.randn(2, 1, 9, 1, 4, generator=generator)
    A = torch.tensor([-0.5, -1.5])
    whole, last = mamba.chunk_scan(x, dt, A, B, C, 4, return_final_states=True)
    first, state = mamba.chunk_scan(
        x[:, :5], dt[:, :5], A, B[:, :5], C[:, :5], 4, return_final_states=True
    )
    rest, end = mamba.chunk_scan(
        x[:, 5:], dt[:, 5:], A, B[:, 5:], C[:, 5:], 4,
        initial_states=state, return_final_states=True,
    )  # fmt: skip
    torch.testing.assert_close(torch.cat([first, rest], 1), whole)
    torch.testing.assert_close(end, last)


def test_the_gated_norm_is_an_rmsnorm_of_each_group():
    norm = mamba.GatedRMSNorm(12, 1e-5, 4, False, "cpu", torch.float32)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 1.5, 12))
    x, z = torch.randn(2, 3, 5, 12, generator=torch.Generator().manual_seed(4))
    gated = x * F.silu(z)
    groups = [F.rms_norm(part, (4,), eps=1e-5) for part in gated.split(4, dim=-1)]
    torch.testing.assert_close(norm(x, z), torch.cat(groups, -1) * norm.weight)
    torch.testing.assert_close(norm(gated), norm(x, z))


def test_axes_are_moved_as_a_pattern_says():
    x = torch.arange(2 * 3 * 8).view(2, 3, 8)
    assert torch.equal(rearrange(x, "b l d -> l b d"), x.transpose(0, 1))
    split = rearrange(x, "b l (h p) -> b l h p", p=4)
    assert torch.equal(split, x.view(2, 3, 2, 4))
    assert torch.equal(rearrange(split, "b l h p -> l b (h p)"), x.transpose(0, 1))
    assert torch.equal(rearrange(x[0].unsqueeze(1), "d 1 w -> d w"), x[0])
    assert torch.equal(rearrange(x[0], "d w -> d 1 w"), x[0].unsqueeze(1))
    repeated = rearrange(x, "l b (g n) -> l b (g r n)", g=2, n=4, r=3)
    for g, r in itertools.product(range(2), range(3)):
        at = slice((g * 3 + r) * 4, (g * 3 + r + 1) * 4)
        assert torch.equal(repeated[..., at], x[..., g * 4 : (g + 1) * 4])
    with pytest.raises(ValueError, match="zip"):
        rearrange(x, "l d -> d l")
