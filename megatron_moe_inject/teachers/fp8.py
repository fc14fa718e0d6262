"""A Megatron teacher's forward pass in FP8, with a recipe and state of its own.

Scales come from the tensors at hand, never from a history, so nothing is shared with the student's
FP8 state, whatever recipe that has. The teacher's weights are quantised in its first forward pass
and kept beside those of the parameters' dtype; embedding, norms, attention scores, routers and the
head are not of Transformer Engine's linear layers and stay in that dtype. Routed experts get rows
that FP8 can multiply (``expert_rows``).
"""

from __future__ import annotations

import contextlib
import functools
from argparse import Namespace
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from megatron_moe_inject.host.errors import (
    fail,
)
from megatron_moe_inject.teachers import megatron_args
from megatron_moe_inject.teachers.base import Source

_MULTIPLES = {"tensorwise": 16, "blockwise": 128}
"""What must divide the widths of layers, by kind of scaling."""
LENGTH_MULTIPLE = 16
"""What divides the length of sequences in FP8, so that it divides the tokens of every pass. Of the
rows of a product Transformer Engine asks for as many with either scaling, grouped or not."""


def fp8_context(
    source: Source, saved: Namespace, fp8: str, device: torch.device
) -> Callable[[], AbstractContextManager[Any]]:
    """Makes the context in which Transformer Engine's layers multiply in FP8.

    Args:
        saved: arguments stored in the teacher's checkpoint.
        fp8: ``TeacherSpec.fp8``.

    Raises:
        RecipeError: no Transformer Engine, no GPU with FP8, or widths that FP8 cannot multiply.
    """
    if fp8 == "none":
        return contextlib.nullcontext
    key = f"teachers.{source.name}.fp8"
    try:
        import transformer_engine.pytorch as te
        from transformer_engine.common import recipe
    except ImportError:
        te = None
    if te is None or device.type != "cuda":
        raise fail(key, fp8, "needs Transformer Engine and a GPU", "write none, or install it")
    supported, reason = te.is_fp8_available(return_reason=True)
    if not supported:
        raise fail(key, fp8, f"does not run on this GPU ({reason})", "write none")
    step = _MULTIPLES[fp8]
    widths = megatron_args.low_precision_widths(saved)
    uneven = {name: width for name, width in widths.items() if width % step}
    if uneven:
        raise fail(key, fp8, f"needs widths that {step} divides, not {uneven}", "write none")
    kind = recipe.Float8BlockScaling if fp8 == "blockwise" else recipe.Float8CurrentScaling
    return functools.partial(te.fp8_autocast, enabled=True, fp8_recipe=kind())
