"""Cases of the losses on a CUDA device, for tests/gpu: fixtures to import, and helpers."""

import pytest
import torch

from megatron_moe_inject.losses import TritonRows
from tests.harness.losses_cases import FusedCase

T, V, VALID = 21, 5000, 4987


@pytest.fixture(autouse=True)
def whole_float32():
    """No TF32 in the products."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture(params=["plain", "triton"])
def kernels(request):
    if request.param == "plain":
        return None
    pytest.importorskip("triton", reason="Triton is not installed")
    return TritonRows()


def case_of(**options) -> FusedCase:
    """Logits of standard deviation 3 or less, whatever h."""
    case = FusedCase.make(**{"t": T, "h": 64, "h_t": 32, "v": V, "valid": VALID} | options)
    case.weight, case.teacher_weight = case.weight * 0.3, case.teacher_weight * 0.3
    return case


def on_gpu(case: FusedCase) -> FusedCase:
    def moved(value):
        return value.cuda() if isinstance(value, torch.Tensor) else value

    options = {name: moved(value) for name, value in case.options.items()}
    return FusedCase(**{name: moved(value) for name, value in vars(case).items()} | {
        "options": options
    })  # fmt: skip


def assert_waits_for_nothing(step):
    """A step that has run once runs again without the host waiting for the device."""
    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(result.isfinite().all() for result in results)
