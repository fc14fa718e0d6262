"""The Triton kernels as ``TritonRows`` launches them compile for a Hopper GPU, which takes no GPU.

The launches of calls on CPU tensors are recorded, compiled as the launcher would, and not run.
Shapes: t tokens (rows), c columns.
"""

import os
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_moe_inject.losses import TritonRows, triton_rows
from megatron_moe_inject.losses.rows import LogitRows, logit_gradient, row_statistics
from megatron_moe_inject.losses.spec import (
    Divergence,
    LogitTransform,
    TokenWeighting,
    VocabShard,
)

triton = pytest.importorskip("triton", reason="Triton is not installed")
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="Triton interprets"),
    pytest.mark.skipif(not (TOOLS / "ptxas").exists(), reason="Triton comes without ptxas"),
]

T, C = 6, 4096
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
TYPES = {BF16: "*bf16", FP16: "*fp16", FP32: "*fp32", torch.int64: "*i64"}


class _Recorder:
    """In the place of a kernel: keeps the arguments of its launches."""

    def __init__(self):
        self.launches = []

    def __getitem__(self, grid):
        assert grid == (T,)
        return lambda **arguments: self.launches.append(arguments)


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """Runs the row maths of a case and compiles its launches: kernel's name -> compiled kernel."""
    from megatron_moe_inject.losses import triton_kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    def build(kind, dtypes=(BF16, BF16), c=C, width=C, ce=True, weighting=None, **options):
        recorders = {name: _Recorder() for name in ("statistics", "mixture", "gradient")}
        stand_in = SimpleNamespace(
            **recorders, STATISTICS=triton_kernels.STATISTICS, INTERPRETED=True
        )
        with monkeypatch.context() as patch:
            patch.setattr(triton_rows, "_kernels", lambda: stand_in)
            x, y = (torch.zeros(T, width, dtype=dtype)[:, :c] for dtype in dtypes)
            labels, weight = torch.zeros(T, dtype=torch.int64) if ce else None, torch.ones(T)
            divergence, shard = Divergence(kind) if kind else None, VocabShard(7, c, None, C)
            rows = LogitRows(x, y, labels, **{"temperature": 2.0} | options, kernels=TritonRows())
            stats = row_statistics(rows, divergence, shard, weighting)
            weights = weight if kind else None, weight if ce else None
            logit_gradient(rows, stats, divergence, shard, *weights, out=x)
        return {
            name: _compile(getattr(triton_kernels, name), launch)
            for name, recorder in recorders.items()
            for launch in recorder.launches
        }

    return build


def _compile(kernel, launch: dict):
    """What the launcher compiles for these arguments."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = {key: launch.pop(key) for key in ("num_warps", "enable_fp_fusion")}
    assert set(launch) == set(kernel.arg_names)
    types, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        name, value = parameter.name, launch[parameter.name]
        special = not parameter.do_not_specialize and not isinstance(value, float)
        if (
            parameter.is_constexpr
            or value is None
            or (special and type(value) is int and value == 1)
        ):
            types[name], constants[name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            types[name], number = TYPES[value.dtype], value.data_ptr()
        else:
            types[name], number = ("fp32", 1) if isinstance(value, float) else ("i32", value)
        if special and number % 16 == 0:
            attributes[i,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, types, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def test_wide_accesses_and_no_spills(compiled, tmp_path):
    # Rows whose length is not divisible by 16, in memory whose rows are aligned.
    for name, kernel in compiled("jsd", c=C - 3).items():
        ptx = kernel.asm["ptx"]
        assert len(re.findall(r"ld\.global\.v4\.b32", ptx)) >= 2, f"{name}: no 16-byte loads"
        assert bool(re.search(r"st\.global\.v4\.b32", ptx)) == (name == "gradient")
        assert ".local" not in ptx
        binary = tmp_path / f"{name}.cubin"
        binary.write_bytes(kernel.asm["cubin"])
        used = subprocess.run(
            [TOOLS / "cuobjdump", "-res-usage", binary], capture_output=True, text=True, check=True
        ).stdout
        registers, stack, local = (
            int(re.search(rf"{what}:(\d+)", used)[1]) for what in ("REG", "STACK", "LOCAL")
        )
        assert (stack, local) == (0, 0), f"{name}: registers are spilled"
        assert registers <= 64, f"{name}: {registers} registers; 4 programs of 8 warps need 64"


def test_no_barrier_within_a_row(compiled):
    """Lanes wait for each other only where the row ends, whatever its length."""
    ptx = compiled("reverse_kl", weighting=TokenWeighting("label"))["statistics"].asm["ptx"]
    loops = [
        (ptx.index(f"\n{label}:"), jump.start())
        for jump in re.finditer(r"bra(?:\.uni)?\s+(\$\w+);", ptx)
        if 0 <= ptx.find(f"\n{(label := jump[1])}:") < jump.start()
    ]
    assert loops, "no loop over the tiles"
    assert "bar.sync" in ptx
    assert not any("bar.sync" in ptx[start:end] for start, end in loops)


PER_TOKEN = {"temperature": torch.ones(T)}
CAPPED = {"transform": LogitTransform(2.0, 30.0)}


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("", CAPPED),
        ("", PER_TOKEN),
        ("forward_kl", {"temperature": 1.0, "weighting": TokenWeighting("entropy")}),
        ("forward_kl", {"ce": False, "dtypes": (FP16, FP16), **PER_TOKEN}),
        ("reverse_kl", {"dtypes": (BF16, FP32), **CAPPED}),
        ("reverse_kl", {"c": 1, "width": 1, "temperature": 1.0}),
        ("jsd", {"weighting": TokenWeighting("label"), "temperature": 1.0, "dtypes": (FP32, FP32)}),
        ("skew_kl", {"c": C + 1, "width": C + 1, **PER_TOKEN, **CAPPED}),
    ],
)
def test_every_kind_compiles(compiled, kind, options):
    kernels = compiled(kind, **options)
    assert set(kernels) >= {"statistics", "gradient"}
    assert ("mixture" in kernels) == (kind in ("jsd", "skew_kl"))
