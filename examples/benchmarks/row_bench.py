"""The elementwise work between the products of the loss alone: plain, compiled, as Triton kernels.

    python examples/benchmarks/row_bench.py [--rows 1024] [--columns 128256] [--json FILE]

A chunk of student and teacher logits is given. Statistics (all losses of the rows) and gradient (by
the student's logits) are timed apart; every way is compared with the plain one first. GB/s count
the bytes that have to move, not those that a way moves: both sides are read once for the statistics
(twice for jsd and skew_kl), and read once with one side written for the gradient. Their share of
the rate of a device copy says how far a way is from the limit. On a CPU the kernels cannot run.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from compiled_rows import CompiledRows
from torch import Tensor

from megatron_moe_inject.losses import KINDS, TritonRows
from megatron_moe_inject.losses.rows import LogitRows, logit_gradient, row_statistics
from megatron_moe_inject.losses.spec import Divergence, VocabShard

# The first is TritonRows' default.
SHAPES = ((8, 8), (4, 8), (16, 8), (4, 16), (8, 16))


def ways(device: str) -> dict:
    """Name -> kernels, or what raises where they cannot be had."""
    found = {"plain": lambda: None, "torch.compile": CompiledRows}
    if device == "cuda":
        for warps, width in SHAPES:
            found[f"Triton {warps} warps x {width}"] = lambda w=warps, c=width: TritonRows(w, c)
    return found


def timed(work, o: argparse.Namespace) -> float:
    """Median seconds of ``work`` after three calls that do not count."""
    samples = []
    for repeat in range(o.repeats + 3):
        wait(o)
        started = time.perf_counter()
        if o.device == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
        work()
        seconds = time.perf_counter() - started
        if o.device == "cuda":
            end.record()
            end.synchronize()
            seconds = begin.elapsed_time(end) / 1e3
        if repeat >= 3:
            samples.append(seconds)
    return statistics.median(samples)


def wait(o: argparse.Namespace) -> None:
    if o.device == "cuda":
        torch.cuda.synchronize()


def chunk(o: argparse.Namespace) -> LogitRows:
    """Logits of standard deviation 2, and labels."""
    generator = torch.Generator(o.device).manual_seed(0)
    x, y = (
        torch.empty(o.rows, o.columns, dtype=getattr(torch, o.dtype), device=o.device).normal_(
            0, 2, generator=generator
        )
        for _ in range(2)
    )
    labels = torch.arange(o.rows, device=o.device) * 7919 % o.columns
    return LogitRows(x, y, labels, o.temperature)


def measure(kernels, logits, divergence, expected, o: argparse.Namespace) -> dict:
    """Errors against ``expected``, seconds and peak extra bytes of both parts; the results."""
    logits = replace(logits, kernels=kernels)
    shard = VocabShard(0, o.columns, None, o.columns)
    weights = [torch.full((o.rows,), w, device=o.device) for w in (0.7, 0.3)]
    out = torch.empty_like(logits.x)

    def gradient():
        logit_gradient(logits, stats, divergence, shard, *weights, out)

    stats = row_statistics(logits, divergence, shard)
    gradient()
    result = {}
    if expected is not None:
        result["value_error"] = error(stats.divergence, expected[0])
        result["gradient_error"] = error(out, expected[1])
    if o.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    result["statistics"] = timed(lambda: row_statistics(logits, divergence, shard), o)
    result["gradient"] = timed(gradient, o)
    if o.device == "cuda":
        result["extra_bytes"] = torch.cuda.max_memory_allocated() - before
    return result | dict(results=(stats.divergence, out))


def error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm, by rows: no copy of a chunk in float32."""
    pairs = zip(actual.split(64), expected.split(64), strict=True)
    parts = [((a.float() - e.float()).norm() ** 2, e.float().norm() ** 2) for a, e in pairs]
    off, whole = (math.fsum(float(part[i]) for part in parts) for i in range(2))
    return math.sqrt(off / whole)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--rows", type=int, default=1024)
    add("--columns", type=int, default=128256)
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    add("--kind", choices=KINDS, nargs="+", default=["forward_kl", "jsd"])
    add("--temperature", type=float, default=2.0)
    add("--repeats", type=int, default=20)
    add("--skip", nargs="+", default=[], help="ways to leave out, by the beginning of their names")
    add("--json", metavar="FILE", help="write all figures")
    return parser.parse_args()


def copy_rate(logits: Tensor, o: argparse.Namespace) -> float:
    """Bytes per second that a device copy reads and writes."""
    target = torch.empty_like(logits)
    return 2 * logits.nbytes / timed(lambda: target.copy_(logits), o)


def measure_all(logits: LogitRows, o: argparse.Namespace) -> list[dict]:
    rows = []
    for kind in o.kind:
        divergence, expected = Divergence(kind), None
        sides = dict(statistics=4 if divergence.mixture else 2, gradient=3)
        for name, build in ways(o.device).items():
            if any(name.startswith(skipped) for skipped in o.skip):
                continue
            torch._dynamo.reset()
            row = dict(kind=kind, way=name)
            rows.append(row)
            try:
                row |= measure(build(), logits, divergence, expected, o)
            except Exception as failure:  # the others are still worth their figures
                row["failed"] = f"{type(failure).__name__}: {failure}"
                continue
            results = row.pop("results")
            expected = expected or results
            for part, count in sides.items():
                row[f"{part}_rate"] = count * logits.x.nbytes / row[part]
    return rows


def table(rows: list[dict], rate: float) -> list[str]:
    lines = [
        f"{'kind':<12}{'way':<22}{'value err':>10}{'grad err':>10}{'stat ms':>10}{'GB/s':>8}"
        f"{'share':>7}{'grad ms':>10}{'GB/s':>8}{'share':>7}{'extra MiB':>11}"
    ]
    for row in rows:
        line = f"{row['kind']:<12}{row['way']:<22}"
        if "failed" in row:
            lines.append(f"{line}  failed: {row['failed'].splitlines()[0]}")
            continue
        for key in ("value_error", "gradient_error"):
            line += f"{row[key]:>10.1e}" if key in row else f"{'-':>10}"
        for part in ("statistics", "gradient"):
            reached = row[f"{part}_rate"]
            line += f"{1e3 * row[part]:>10.3f}{reached / 1e9:>8,.0f}{reached / rate:>7.2f}"
        extra = row.get("extra_bytes")
        lines.append(line + (f"{'-':>11}" if extra is None else f"{extra / 2**20:>11,.0f}"))
    return lines


def main() -> None:
    o = parse()
    logits = chunk(o)
    rate = copy_rate(logits.x, o)
    rows = measure_all(logits, o)
    where = torch.cuda.get_device_name() if o.device == "cuda" else "CPU"
    command = shlex.join(["python", "examples/benchmarks/row_bench.py", *sys.argv[1:]])
    print(f"{command}\n{where}, torch {torch.__version__}")
    print(f"t {o.rows:,}, c {o.columns:,}, {o.dtype}, T {o.temperature:g}; medians of {o.repeats}")
    print(f"A device copy moves {rate / 1e9:,.0f} GB/s, read and written.\n")
    print("\n".join(table(rows, rate)))
    if o.json:
        figures = dict(command=command, machine=where, copy_rate=rate, rows=rows)
        Path(o.json).write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
