"""Time and memory of the fused loss with rows of a frozen head that train.

    python examples/benchmarks/head_rows_bench.py [--tokens 1024] [--vocab 32768]

One student, one teacher, one process of one thread on a CPU; forward and backward pass. Ways take
turns. Rows are drawn at random, as ids that a domain uses stand anywhere. Memory is what the
process holds at most beyond its inputs, gradients that are handed out among it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from loss_worker import Memory

from megatron_moe_inject import losses

WAYS = ("frozen", "10 % of the rows", "30 % of the rows", "all rows, as rows", "rank 16", "trained")


def rows_of(way: str, head: torch.Tensor) -> losses.HeadRows | None:
    """Those that train apart."""
    share = {"10 % of the rows": 0.1, "30 % of the rows": 0.3, "all rows, as rows": 1.0}.get(way)
    if share is None:
        return None
    drawn = torch.randperm(len(head), generator=torch.Generator().manual_seed(0))
    columns = drawn[: int(share * len(head))].sort().values.to(head.device)
    return losses.HeadRows(columns, head[columns].clone().requires_grad_())


def correction_of(way: str, head: torch.Tensor) -> losses.LowRankHead | None:
    """One of rank 16."""
    if way != "rank 16":
        return None
    a = torch.randn(16, head.shape[1], dtype=head.dtype, device=head.device)
    b = torch.zeros(len(head), 16, dtype=head.dtype, device=head.device)
    return losses.LowRankHead(a.requires_grad_(), b.requires_grad_(), 1.0)


def prepared(way: str, o: argparse.Namespace) -> Callable[[], int]:
    """What makes one pass, and tells the bytes of the gradients that came of it."""
    made = {"dtype": getattr(torch, o.dtype), "device": o.device}
    generator = torch.Generator(o.device).manual_seed(1)
    hidden = torch.randn(o.tokens, o.hidden, generator=generator, **made)
    head = torch.randn(o.vocab, o.hidden, generator=generator, **made) / o.hidden**0.5
    states = torch.randn(o.tokens, o.teacher_hidden, generator=generator, **made)
    teacher = torch.randn(o.vocab, o.teacher_hidden, generator=generator, **made)
    target = losses.Dense(states, teacher / o.teacher_hidden**0.5)
    labels = torch.arange(o.tokens, device=o.device) * 7919 % o.vocab
    hidden.requires_grad_(True)
    head.requires_grad_(way == "trained")
    rows, low_rank = rows_of(way, head), correction_of(way, head)
    student = losses.Student(hidden, head, labels, head_rows=rows, head_low_rank=low_rank)
    mask = torch.ones(o.tokens, device=o.device) if o.masked_sum else None
    options = losses.FusedOptions(upstream_mask=mask)
    weights = losses.TermWeights(0.7, 0.3, temperature=2.0)
    leaves = [hidden, head] + ([] if rows is None else [rows.values])
    leaves += [] if low_rank is None else [low_rank.a, low_rank.b]

    def once() -> int:
        for leaf in leaves:
            leaf.grad = None
        losses.fused_loss(student, target, weights, options).total.mean().backward()
        if o.device == "cuda":
            torch.cuda.synchronize()
        return sum(leaf.grad.nbytes for leaf in leaves if leaf.grad is not None)

    return once


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--dtype", default="float32")
    sizes = {"tokens": 1024, "hidden": 512, "teacher-hidden": 512, "vocab": 32768, "repeats": 9}
    for name, default in sizes.items():
        add(f"--{name}", type=int, default=default)
    add("--no-masked-sum", dest="masked_sum", action="store_false", help="no upstream_mask")
    o = parser.parse_args()
    torch.set_num_threads(1)
    passes = {way: prepared(way, o) for way in WAYS}
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    peaks: dict[str, list[float]] = {way: [] for way in WAYS}
    gradients: dict[str, float] = {}
    for repeat in range(o.repeats + 1):
        for way, once in passes.items():
            memory = Memory(o)
            began = time.perf_counter() if o.device == "cuda" else time.process_time()
            handed_out = once()
            ended = time.perf_counter() if o.device == "cuda" else time.process_time()
            extra = memory.extra()
            if repeat:  # the first pass of each is to warm up
                seconds[way].append(ended - began)
                peaks[way] += [] if extra is None else [extra / 2**20]
                gradients[way] = handed_out / 2**20
    first = statistics.median(seconds["frozen"])
    clock = "time" if o.device == "cuda" else "CPU time"
    print(f"| head | {clock} | of a frozen head's | memory | gradients |")
    print("|---|---|---|---|---|")
    for way in WAYS:
        took = statistics.median(seconds[way])
        peak = f"{statistics.median(peaks[way]):.0f} MiB" if peaks[way] else "not known"
        handed_out = f"{gradients[way]:.0f} MiB"
        print(f"| {way} | {1e3 * took:.0f} ms | {took / first:.2f} | {peak} | {handed_out} |")


if __name__ == "__main__":
    main()
