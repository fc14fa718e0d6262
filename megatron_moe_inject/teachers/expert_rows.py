"""Rows of routed experts, filled up to what FP8 can multiply.

Routers give each expert any number of tokens, of which a product in FP8 wants a multiple. Each
expert's rows are filled up with zeros just around the layer that holds the experts, and the rows
that filled them up are dropped behind it. Megatron has a padding of its own, which its ``fp8``
switches on together with a recipe, a state and paths of routers and attention; this one needs
nothing of it, and is the same for grouped experts and for one module each.

Zeros change nothing of the others' products: each row is multiplied by itself, and a scale that is
taken from the values at hand, of a tensor or of a block, is as large with them. An expert without a
token gets one multiple of zeros, so that no product is of nothing.

Shapes: t rows of tokens, one expert behind the other, h hidden (or the latent size), E experts of
this rank.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from megatron_moe_inject.host.megatron_types import Chunk
from megatron_moe_inject.host.model_parts import decoder_layers, grouped_linears, mlp_of
from megatron_moe_inject.host.to_device import to_device
from megatron_moe_inject.host.wrap import Call, wrap_method
from megatron_moe_inject.teachers.uses import FILLED_EXPERTS, FILLED_GROUPED_EXPERTS


def fill_up_experts(model: Chunk, multiple: int) -> None:
    """From now on each expert of ``model`` gets a multiple of so many rows, at least one.

    Args:
        model: a bare chunk that runs without gradients; one without experts stays as it is.
        multiple: rows.
    """
    for layer in decoder_layers(model):
        moe = mlp_of(layer)
        if getattr(moe, "token_dispatcher", None) is None:
            continue
        grouped = bool(grouped_linears(moe.experts))
        forward = FILLED_GROUPED_EXPERTS if grouped else FILLED_EXPERTS
        wrap_method(moe.experts, forward, functools.partial(_filled, multiple))


def _filled(multiple: int, call: Call) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The forward pass of a layer's experts: their rows ``[t, h]``, and a bias."""
    numbers: list[int] = call["tokens_per_expert"].tolist()
    filled = [max(1, -(-number // multiple)) * multiple for number in numbers]
    if filled == numbers:
        return call()
    rows, probs = call["permuted_local_hidden_states"], call["permuted_probs"]
    places = _places(numbers, filled, rows.device)
    output, bias = call(
        permuted_local_hidden_states=_spread(rows, places, sum(filled)),
        tokens_per_expert=torch.tensor(filled),
        permuted_probs=_spread(probs, places, sum(filled)),
    )
    return output.index_select(0, places), bias


def _places(numbers: Sequence[int], filled: Sequence[int], device: torch.device) -> torch.Tensor:
    """``[t]``, where each row of experts with so many of them stands among all that are filled up;
    no wait for the device."""
    before = torch.tensor([numbers, filled]).cumsum(1)
    shifts = (before[1] - before[0]).roll(1)
    shifts[0] = 0
    by_expert = to_device(torch.stack([shifts, torch.tensor(numbers)]), device)
    total = sum(numbers)
    shift = by_expert[0].repeat_interleave(by_expert[1], output_size=total)
    return torch.arange(total, device=device) + shift


def _spread(values: torch.Tensor, places: torch.Tensor, total: int) -> torch.Tensor:
    """Rows at their places among ``total``, zeros between them."""
    return values.new_zeros(total, *values.shape[1:]).index_copy_(0, places, values)
