"""The Triton kernels compile for a Hopper GPU, which takes no GPU: what the code looks like."""

import os
import re
import subprocess
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed")
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="Triton interprets"),
    pytest.mark.skipif(not (TOOLS / "ptxas").exists(), reason="Triton comes without ptxas"),
]

NUMBERS = {"x_stride": "i32", "y_stride": "i32", "out_stride": "i32", "columns": "i32",
           "first_id": "i32", "temperature": "fp32", "w": "fp32", "softcap": "fp32",
           "scale": "fp32"}  # fmt: skip
ALIGNED = ("x", "y", "x_stride", "y_stride", "columns")
STATISTICS = {"WEIGHTING": True, "UNIT": False, "LANES": 256, "WIDTH": 8}


def _compiled(name: str, logits: str, constants: dict, aligned: tuple[str, ...]):
    """What the launcher would compile for these types and constants."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from megatron_moe_inject.losses import triton_kernels

    kernel = getattr(triton_kernels, name)
    constants = {"temperatures": None, "PER_TOKEN": False, **constants}
    tensors = {"x": logits, "y": logits, "labels": "*i64"}
    tensors["out"] = logits if name == "gradient" else "*fp32"
    types = {
        argument: "constexpr" if argument in constants else
        NUMBERS.get(argument) or tensors.get(argument, "*fp32")
        for argument in kernel.arg_names
    }  # fmt: skip
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, argument in enumerate(kernel.arg_names)
        if argument in aligned and argument not in constants
    }
    return triton.compile(
        ASTSource(kernel, types, constexprs=constants, attrs=attributes),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": 8, "enable_fp_fusion": False},
    )


@pytest.mark.parametrize(
    ("name", "constants"),
    [
        ("statistics", {"KIND": "forward_kl", "CE": True, **STATISTICS}),
        ("mixture", {"KIND": "jsd", "LANES": 256, "WIDTH": 8}),
        (
            "gradient",
            {"KIND": "forward_kl", "CE": True, "UNIT": False, "CAPPED": True, "TILE": 2048},
        ),
    ],
)
def test_wide_accesses_and_no_spills(name, constants, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    gradient = name == "gradient"
    # A length that is not divisible by 16 must not narrow the loads of whole tiles.
    aligned = ("x", "y", "x_stride", "y_stride", *(("out", "out_stride") if gradient else ()))
    code = _compiled(name, "*bf16", constants, aligned)
    ptx = code.asm["ptx"]
    assert len(re.findall(r"ld\.global\.v4\.b32", ptx)) >= 2, "no 16-byte loads of x and y"
    assert bool(re.search(r"st\.global\.v4\.b32", ptx)) == gradient
    assert ".local" not in ptx
    binary = tmp_path / "kernel.cubin"
    binary.write_bytes(code.asm["cubin"])
    used = subprocess.run(
        [TOOLS / "cuobjdump", "-res-usage", binary], capture_output=True, text=True, check=True
    ).stdout
    registers, stack, local = (
        int(re.search(rf"{what}:(\d+)", used)[1]) for what in ("REG", "STACK", "LOCAL")
    )
    assert (stack, local) == (0, 0), "registers are spilled"
    assert registers <= 64, "fewer than 4 programs of 8 warps fit a multiprocessor"


def test_no_barrier_within_a_row(tmp_path, monkeypatch):
    """Lanes wait for each other only where the row ends, whatever its length."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    constants = {"KIND": "reverse_kl", "CE": True, **STATISTICS}
    ptx = _compiled("statistics", "*bf16", constants, ALIGNED).asm["ptx"]
    loops = [
        (ptx.index(f"\n{label}:"), jump.start())
        for jump in re.finditer(r"bra(?:\.uni)?\s+(\$\w+);", ptx)
        if 0 <= ptx.find(f"\n{(label := jump[1])}:") < jump.start()
    ]
    assert loops, "no loop over the tiles"
    assert "bar.sync" in ptx
    assert not any("bar.sync" in ptx[start:end] for start, end in loops)
