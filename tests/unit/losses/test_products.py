"""Products with heads whose number of ids is odd."""

import pytest
import torch

from megatron_moe_inject.losses import products
from megatron_moe_inject.losses.products import head_logits, hidden_gradient, pieces, whole
from megatron_moe_inject.losses.rows import maths_dtype

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
COLUMNS = [0, 1, 3, 7, 8, 16, 17, 31, 40, 101]


def normal(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", COLUMNS)
def test_logits_are_the_product_with_rows_at_multiples_of_16_bytes(columns, dtype):
    hidden, head = normal(5, 12, dtype=dtype, seed=1), normal(columns, 12, dtype=dtype, seed=2)
    logits = head_logits(hidden, head)
    torch.testing.assert_close(logits, hidden @ head.t())
    assert logits.shape == (5, columns)
    assert logits.stride(1) == 1
    if columns:
        assert logits.stride(0) * dtype.itemsize % 16 == 0
        assert logits.stride(0) >= columns


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", COLUMNS)
def test_the_gradient_is_the_product_whatever_lies_between_rows(columns, dtype):
    hidden, head = normal(5, 12, dtype=dtype, seed=1), normal(columns, 12, dtype=dtype, seed=2)
    gradient = head_logits(hidden, head)
    room = (5 if columns else 0, gradient.stride(0))
    apart = gradient.as_strided(room, gradient.stride())
    apart[:, columns:] = float("nan")
    out = torch.full((5, 12), float("nan"), dtype=maths_dtype(dtype))
    hidden_gradient(gradient, head, out)
    expected = gradient.double() @ head.double()
    atol = 1e-12 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(out.double(), expected, rtol=1e-6, atol=atol)


def test_the_gradient_of_bf16_is_not_rounded_between_pieces(monkeypatch):
    monkeypatch.setattr(products, "_TERMS", 64)
    gradient = normal(64, 327, dtype=torch.bfloat16, seed=3)
    head = normal(327, 16, dtype=torch.bfloat16, seed=4)
    out = torch.empty(64, 16)
    hidden_gradient(gradient, head, out)
    exact = gradient.double() @ head.double()
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("columns", COLUMNS)
def test_pieces_cover_all_columns_and_only_the_last_is_odd(columns):
    found = pieces(columns, 16, torch.bfloat16)
    assert [i for piece in found for i in range(piece.start, piece.stop)] == list(range(columns))
    assert all(0 < piece.stop - piece.start <= 16 for piece in found)
    assert all(piece.start % 8 == 0 for piece in found)
    assert all((piece.stop - piece.start) % 8 == 0 for piece in found[:-1])
    assert whole(columns, torch.bfloat16) == columns // 8 * 8
