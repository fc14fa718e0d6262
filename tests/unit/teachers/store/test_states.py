"""States in a store: bytes there and back, their head, and what is wrong with either."""

import re

import pytest
import torch

from megatron_moe_inject.host.errors import RecipeError
from megatron_moe_inject.losses.spec import LogitTransform
from megatron_moe_inject.teachers.store.head import HEAD, read_head, write_head
from megatron_moe_inject.teachers.store.state_format import FP8, NATIVE, StateFormat
from megatron_moe_inject.teachers.store.writer import file_sha256
from tests.harness.stores import failure


def states_of(count, width, dtype):
    """Of very different sizes by token, one of them zero."""
    states = torch.randn(count, width, generator=torch.Generator().manual_seed(width))
    states = states * torch.logspace(-5, 3, count)[:, None]
    states[count // 2] = 0
    return states.to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("width", [1, 5, 128, 300])
def test_states_come_back(width, dtype):
    states, tokens = states_of(9, width, dtype), torch.arange(9) * 99_999
    layout = StateFormat(10**6, width, NATIVE, dtype)
    content = layout.encode(tokens, states)
    assert content.shape == (9, layout.widest)
    assert layout.widest == 4 + width * dtype.itemsize
    for rows in (slice(None), slice(3, 4), slice(0, 0)):
        assert torch.equal(layout.tokens(content[rows]), tokens[rows])
        assert torch.equal(layout.states(content[rows]), states[rows])


@pytest.mark.parametrize("width", [1, 128, 300])
def test_fp8_rounds_to_four_bits_of_each_blocks_scale(width):
    states = states_of(9, width, torch.float32)
    layout = StateFormat(100, width, FP8, torch.float32)
    assert layout.widest == 4 + width + 2 * -(-width // 128)
    back = layout.states(layout.encode(torch.zeros(9).long(), states))
    largest = torch.nn.functional.pad(states.abs(), (0, -width % 128)).view(9, -1, 128).amax(-1)
    largest = largest.repeat_interleave(128, 1)[:, :width]
    # Half a step of a normal code, or of the smallest there is.
    bound = states.abs() * 2.0**-4 + largest / 448 * 2.0**-10 * 1.02
    assert ((back - states).abs() <= bound).all()
    assert (back.abs() <= largest * 1.01).all()


def test_states_that_are_none():
    layout = StateFormat(100, 4, NATIVE, torch.float32)
    tokens = torch.zeros(2).long()
    with pytest.raises(ValueError, match="not finite"):
        layout.encode(tokens, torch.tensor([[1.0, 2, 3, 4], [1, torch.inf, 2, 3]]))
    for other in (torch.zeros(2, 5), torch.zeros(2, 4).bfloat16()):
        with pytest.raises(ValueError, match="are not StateFormat"):
            layout.encode(tokens, other)
    with pytest.raises(ValueError, match="use one of native, fp8"):
        StateFormat(100, 4, "int4", torch.float32)


def test_a_head_by_rows(tmp_path):
    head = torch.randn(11, 3).bfloat16()
    write_head(tmp_path, head, LogitTransform(0.25, 30.0))
    digest = file_sha256(tmp_path / HEAD, failure)
    padded = torch.cat([head, torch.zeros(5, 3).bfloat16()])
    for rows in (slice(0, 8), slice(8, 16), slice(12, 16)):
        found, transform = read_head(tmp_path, digest, (11, 3), torch.bfloat16, rows, failure)
        assert torch.equal(found, padded[rows])
        assert transform == LogitTransform(0.25, 30.0)
    content = bytearray((tmp_path / HEAD).read_bytes())
    content[-1] ^= 1
    (tmp_path / HEAD).write_bytes(content)
    for wrong, message in (
        ((digest, (11, 3)), "is not the file that the manifest names; copy it again"),
        ((file_sha256(tmp_path / HEAD, failure), (11, 4)), "is no head of such states"),
    ):
        with pytest.raises(RecipeError, match=re.escape(message)):
            read_head(tmp_path, *wrong, torch.bfloat16, slice(0, 8), failure)
    (tmp_path / HEAD).unlink()
    with pytest.raises(RecipeError, match="cannot be read"):
        read_head(tmp_path, digest, (11, 3), torch.bfloat16, slice(0, 8), failure)
