"""Tensors in FP8 by blocks and in MXFP4: decoded as others decode them, encoded to what decodes."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from megatron_moe_inject.convert.published import GROUP, Fp8Blocks, Mxfp4, Plain
from megatron_moe_inject.experts.fp8 import blocks as fp8_blocks

FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
SCALES = [torch.float32, torch.bfloat16, torch.float8_e8m0fnu]


def _codes(leading, m, groups, seed=0, exponents=(100, 140)):
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (*leading, m, groups, 16), generator=generator)
    scales = torch.randint(*exponents, (*leading, m, groups), generator=generator)
    return {"_blocks": blocks.to(torch.uint8), "_scales": scales.to(torch.uint8)}


def _normal(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    spread = torch.exp2(4 * torch.randn(*shape[:-1], 1, generator=generator))
    return torch.randn(shape, generator=generator) * spread


def _bits(tensor):
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("exponents", [(1, 125), (118, 132), (125, 252)])
def test_mxfp4_is_decoded_as_transformers_does(dtype, exponents):
    pieces = _codes((3,), 10, 4, exponents=exponents)
    theirs = convert_moe_packed_tensors(pieces["_blocks"], pieces["_scales"], dtype=dtype)
    ours = Mxfp4().decode(pieces, dtype)
    assert Mxfp4().shape({k: v.shape for k, v in pieces.items()}) == ours.shape
    assert ours.shape == (3, 4 * GROUP, 10)
    assert torch.equal(_bits(ours), _bits(theirs))
    one = Mxfp4().decode({ending: piece[1] for ending, piece in pieces.items()}, dtype)
    assert torch.equal(one, ours[1]), "a slice of the leading axes"


def test_each_code_of_mxfp4_is_its_value():
    pieces = {
        "_blocks": torch.arange(256, dtype=torch.uint8).view(1, 16, 16),
        "_scales": torch.full((1, 16), 128, dtype=torch.uint8),
    }
    found = Mxfp4().decode(pieces, torch.float32).flatten().view(256, 2)
    signed = torch.cat([FP4, -FP4]) * 2
    assert torch.equal(found[:, 0], signed.repeat(16)), "the low half comes first"
    assert torch.equal(found[:, 1], signed.repeat_interleave(16))
    half = Mxfp4().decode(pieces, torch.float16)
    assert torch.equal(half.float().flatten().view(256, 2), found)


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.sampled_from([(), (2,), (2, 1)]), st.integers(1, 5))
def test_encoding_decoded_mxfp4_changes_no_value(seed, leading, m):
    """Also where nothing is known of the old codes."""
    pieces = _codes(leading, m, 2, seed, exponents=(10, 240))
    value = Mxfp4().decode(pieces, torch.bfloat16)
    unknown = {ending: torch.full_like(piece, 7) for ending, piece in pieces.items()}
    again = Mxfp4().encode(value, unknown)
    assert torch.equal(Mxfp4().decode(again, torch.bfloat16), value)
    kept = Mxfp4().encode(value, pieces)
    assert all(torch.equal(kept[ending], pieces[ending]) for ending in pieces), "bit for bit"


@settings(max_examples=40)
@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=GROUP, max_size=GROUP))
@example([0.0] * GROUP)
@example([2.0**-140] * GROUP)
@example([6.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0] * 4)
@example([6.000001, 1e-30] * 16)
def test_mxfp4_is_the_nearest_code_of_the_smallest_scale_that_holds_all(values):
    value = torch.tensor(values).view(GROUP, 1)
    old = {"_blocks": torch.zeros(1, 1, 16, dtype=torch.uint8)}
    old["_scales"] = torch.zeros(1, 1, dtype=torch.uint8)
    new = Mxfp4().encode(value, old)
    scale = 2.0 ** (int(new["_scales"]) - 127)
    top = float(value.abs().max())
    assert top <= 6 * scale * (1 + 1e-6)
    assert top > 3 * scale or scale in (2.0**-127, 1.0)
    found = Mxfp4().decode(new, torch.float32)
    off = (value.double().abs()[..., None] - FP4.double() * scale).abs().amin(-1)
    assert torch.equal((found.double() - value.double()).abs(), off)


def test_ties_of_mxfp4_go_to_the_even_code():
    value = torch.tensor([6.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0] * 4).view(GROUP, 1)
    old = {"_blocks": torch.zeros(1, 1, 16, dtype=torch.uint8)}
    old["_scales"] = torch.zeros(1, 1, dtype=torch.uint8)
    found = Mxfp4().decode(Mxfp4().encode(-value, old), torch.float32).flatten()
    assert found[:8].tolist() == [-6, 0, -1, -1, -2, -2, -4, -4]


def test_one_changed_group_of_mxfp4_leaves_the_others_alone():
    pieces = _codes((4,), 6, 3, exponents=(120, 130))
    value = Mxfp4().decode(pieces, torch.bfloat16)
    value[2, GROUP + 5, 4] += 100
    new = Mxfp4().encode(value, pieces)
    changed = [(new[e] != pieces[e]).view(4, 6, 3, -1).any(-1).nonzero().tolist() for e in new]
    assert changed == [[[2, 4, 1]], [[2, 4, 1]]]


def _fp8(shape, dtype, seed=0):
    """Codes and scales as somebody else may have made them."""
    generator = torch.Generator().manual_seed(seed)
    codes = (100 * torch.randn(shape, generator=generator)).to(fp8_blocks.CODES)
    blocks = (*shape[:-2], *fp8_blocks.block_shape(*shape[-2:]))
    scales = 2.0 ** torch.randint(-9, 3, blocks, generator=generator)
    if dtype != torch.float8_e8m0fnu:
        scales *= 1 + torch.rand(blocks, generator=generator)
    return {"": codes, "_scale_inv": scales.to(dtype)}


@pytest.mark.parametrize("shape", [(130, 300), (3, 128, 200)])
@pytest.mark.parametrize("scales", SCALES)
def test_fp8_is_decoded_by_its_definition(scales, shape):
    pieces = _fp8(shape, scales)
    assert Fp8Blocks().shape({e: tuple(p.shape) for e, p in pieces.items()}) == shape
    spread = pieces["_scale_inv"].float().repeat_interleave(128, -2).repeat_interleave(128, -1)
    expected = pieces[""].float() * spread[..., : shape[-2], : shape[-1]]
    assert torch.equal(Fp8Blocks().decode(pieces, torch.float32), expected)
    assert torch.equal(Fp8Blocks().decode(pieces, torch.bfloat16), expected.bfloat16())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scales", SCALES)
def test_fp8_that_did_not_change_keeps_its_codes(scales, dtype):
    pieces = _fp8((2, 300, 260), scales)
    value = Fp8Blocks().decode(pieces, dtype)
    again = Fp8Blocks().encode(value, pieces)
    assert all(torch.equal(_bits(again[e]), _bits(pieces[e])) for e in pieces)
    value[1, 140, 3] *= 3
    value[1, 299, 259] += 1
    again = Fp8Blocks().encode(value, pieces)
    for ending, block in (("", [1, 128, 128]), ("_scale_inv", [1, 1, 1])):
        places = (again[ending].float() != pieces[ending].float()).nonzero() // torch.tensor(block)
        assert {tuple(place) for place in places.tolist()} <= {(1, 1, 0), (1, 2, 2)}
    error = (Fp8Blocks().decode(again, torch.float32) - value.float()).abs()
    assert error.max() <= 2**-4 * value.float().abs().max()
    assert error[0].max() <= 2**-8 * value[0].float().abs().max(), "one rounding to bfloat16"


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("power_of_two", [False, True])
def test_new_fp8_values_are_within_three_mantissa_bits(scales, power_of_two):
    value = _normal((200, 300))
    old = _fp8((200, 300), scales)
    storage = Fp8Blocks(power_of_two)
    new = storage.encode(value, old)
    assert (new[""].dtype, new["_scale_inv"].dtype) == (fp8_blocks.CODES, scales)
    factors = new["_scale_inv"].float()
    if power_of_two or scales == torch.float8_e8m0fnu:
        assert torch.equal(torch.frexp(factors)[0], torch.full_like(factors, 0.5))
    found = storage.decode(new, torch.float32)
    ordinary = (
        value.abs()
        > 2**-6 * 448 * factors.repeat_interleave(128, 0)[:200].repeat_interleave(128, 1)[:, :300]
    )
    assert ordinary.any()
    assert ((found - value).abs() / value.abs())[ordinary].max() <= 2**-4 * 1.01


def test_plain_tensors_and_those_that_do_not_fit():
    tensor = _normal((3, 4))
    assert torch.equal(Plain().decode({"": tensor}, torch.bfloat16), tensor.bfloat16())
    assert Fp8Blocks().shape({"": (128, 129), "_scale_inv": (1, 1)}) is None
    assert Fp8Blocks().shape({"": (128,), "_scale_inv": (1,)}) is None
    assert Mxfp4().shape({"_blocks": (2, 4, 3, 16), "_scales": (2, 4, 2)}) is None
    assert Mxfp4().shape({"_blocks": (4, 3, 8), "_scales": (4, 3)}) is None
