"""Would the teacher's forward hide behind the student's step on a stream of its own?

    python examples/benchmarks/gpu/overlap_bench.py [--json FILE]

One micro-batch of a student's MoE layers forward and backward, and a dense teacher's layers
forward, in Transformer Engine's modules: one after the other on one stream, and at once on two.
Both share the GPU's multiprocessors, so at best the sum shrinks by what either leaves idle.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from turns import tell

SIZES = {"layers": 4, "hidden": 2048, "ffn": 1408, "experts": 16, "topk": 4, "seq": 4096}
SIZES |= {"teacher-layers": 4, "teacher-hidden": 1024, "teacher-ffn": 2816}


class Student(torch.nn.Module):
    """Attention and grouped experts, each row already at its expert."""

    def __init__(self, o: argparse.Namespace) -> None:
        import transformer_engine.pytorch as te

        super().__init__()
        self.splits = [o.seq * o.topk // o.experts] * o.experts
        make = {"bias": False, "params_dtype": torch.bfloat16}
        self.attention = torch.nn.ModuleList(
            te.MultiheadAttention(
                o.hidden, o.hidden // 128, attention_dropout=0, params_dtype=torch.bfloat16
            )
            for _ in range(o.layers)
        )
        self.up = torch.nn.ModuleList(
            te.GroupedLinear(o.experts, o.hidden, 2 * o.ffn, **make) for _ in range(o.layers)
        )
        self.down = torch.nn.ModuleList(
            te.GroupedLinear(o.experts, o.ffn, o.hidden, **make) for _ in range(o.layers)
        )
        self.topk = o.topk

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for attention, up, down in zip(self.attention, self.up, self.down, strict=True):
            x = x + attention(x)
            rows = x.flatten(0, 1).repeat(self.topk, 1)
            gate, value = up(rows, self.splits).chunk(2, dim=-1)
            rows = down(torch.nn.functional.silu(gate) * value, self.splits)
            x = x + rows.view(self.topk, *x.shape).sum(0)
        return x


def teacher(o: argparse.Namespace) -> torch.nn.Module:
    import transformer_engine.pytorch as te

    layers = (
        te.TransformerLayer(
            o.teacher_hidden, o.teacher_ffn, o.teacher_hidden // 64, attention_dropout=0,
            hidden_dropout=0, params_dtype=torch.bfloat16, activation="swiglu",
        )
        for _ in range(o.teacher_layers)
    )  # fmt: skip
    return torch.nn.Sequential(*layers).requires_grad_(False)


def measure(o: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds of each way, in turns."""
    torch.manual_seed(0)
    student, dense = Student(o).cuda(), teacher(o).cuda()
    make = {"device": "cuda", "dtype": torch.bfloat16}
    x = torch.randn(o.seq, 1, o.hidden, requires_grad=True, **make)
    y = torch.randn(o.seq, 1, o.teacher_hidden, **make)
    beside = torch.cuda.Stream()

    def step() -> None:
        student(x).square().mean().backward()

    def taught() -> None:
        with torch.no_grad():
            dense(y)

    def after() -> None:
        taught()
        step()

    def at_once() -> None:
        here = torch.cuda.current_stream()
        beside.wait_stream(here)
        with torch.cuda.stream(beside):
            taught()
        step()
        here.wait_stream(beside)

    ways = {"student alone": step, "teacher alone": taught}
    ways |= {"one after the other": after, "on two streams": at_once}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(o.repeats + 3):
        for name, work in ways.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            begin.record()
            for _ in range(o.micro_batches):
                work()
            end.record()
            torch.cuda.synchronize()
            if repeat >= 3:
                seconds[name].append(begin.elapsed_time(end) / 1e3 / o.micro_batches)
    return [{"way": name, "seconds": found} for name, found in seconds.items()]


def render(result: dict[str, Any]) -> list[str]:
    median = {row["way"]: statistics.median(row["seconds"]) for row in result["rows"]}
    lines = [result["machine"], ", ".join(f"{k} {v}" for k, v in result["sizes"].items()), ""]
    lines += [f"{way:<22}{1e3 * found:8.2f} ms" for way, found in median.items()]
    hidden = median["one after the other"] - median["on two streams"]
    share = hidden / median["teacher alone"]
    return [*lines, f"Two streams hide {100 * share:.0f} % of the teacher's time."]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, size in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--micro-batches", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json", type=Path, help="write what was measured there")
    options = parser.parse_args()
    options.cpu, options.threads = False, 1
    tell("gpu/overlap_bench.py", options, SIZES, measure(options), render)


if __name__ == "__main__":
    main()
