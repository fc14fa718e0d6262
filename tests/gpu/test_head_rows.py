"""Heads with rows of their own, or a correction of low rank, on a CUDA device."""

import pytest
import torch

from tests.harness.gpu_losses import (
    V,
    assert_waits_for_nothing,
    case_of,
    kernels,
    on_gpu,
    whole_float32,
)
from tests.harness.losses_cases import FusedCase, assert_close
from tests.harness.losses_head_cases import CHANGES, ChangedHead

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
__all__ = ["kernels", "whole_float32"]
"""Fixtures."""


def _changed_step(case: FusedCase, change: str, head: str, kernels):
    """The changes, what computes losses and gradients on the device, and a rank's part of them."""
    changed = ChangedHead.make(case, change, ids=range(0, V, 7), scale=0.1)
    there = on_gpu(case)
    own = _on_gpu_changes(changed)
    hidden, weight = there.leaves(head_trains=False)
    leaves = {"hidden": hidden, **own.leaves}
    given = {"chunk_tokens": 8, "kernels": kernels, **own.options, **there.promise(head)}

    def step():
        loss = there.call(hidden, weight, **given)
        gradients = torch.autograd.grad(loss.total, list(leaves.values()), there.upstream)
        return {"total": loss.total.detach(), **dict(zip(leaves, gradients, strict=True))}

    return changed, step


def _on_gpu_changes(changed: ChangedHead):
    moved = {name: None if x is None else x.cuda() for name, x in vars(changed).items()}
    return ChangedHead(**moved).shard(0, 1, V)


@pytest.mark.parametrize("head", ["kept", "promised"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", ["forward_kl", "jsd"])
def test_a_head_with_rows_of_its_own(kernels, kind, change, head):
    case = case_of(kind=kind, dtype=torch.float32)
    changed, step = _changed_step(case, change, head, kernels)
    dense = changed.applied(case).dense()
    expected = {"total": dense["total"], "hidden": dense["hidden"]}
    expected |= changed.gradients(dense["weight"])
    for name, found in step().items():
        assert_close(found.cpu(), expected[name], name, 1e-5)


@pytest.mark.parametrize("head", ["kept", "promised"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_head_with_rows_of_its_own_waits_for_nothing(kernels, change, head):
    _, step = _changed_step(case_of(dtype=torch.bfloat16), change, head, kernels)
    assert_waits_for_nothing(lambda: step().values())
