"""Where the time of the fused loss goes on a GPU: its kernels, by the number of tokens in a chunk.

    python examples/benchmarks/gpu/loss_profile.py [--chunks 0 1024 2048] [--vocab 50257]

Forward and backward pass in bf16 of forward KL and cross-entropy, as in ``loss_bench.py``, with the
head frozen, trained, and trained without ``upstream_mask``. Milliseconds of the device under
torch's profiler, launches, the longest kernels, and the peak of memory with the inputs; a chunk of
0 is the default.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from freeze_worker import traced

from megatron_moe_inject.losses import Dense, FusedOptions, Student, TermWeights, fused_loss

SIZES = {"tokens": 4096, "hidden": 4096, "teacher-hidden": 2048, "vocab": 128256}
WAYS = {"frozen": (False, True), "trained": (True, True), "trained, no mask": (True, False)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, size in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--chunks", type=int, nargs="+", default=[0, 256, 512, 1024, 2048, 4096])
    parser.add_argument("--kernels", type=int, default=8, help="how many to list")
    o = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device; torch sees none")

    def normal(rows: int, columns: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16) * scale

    hidden, teacher = (
        normal(o.tokens, o.hidden).requires_grad_(),
        normal(o.tokens, o.teacher_hidden),
    )
    weight = normal(o.vocab, o.hidden, 2 / math.sqrt(o.hidden))
    head = normal(o.vocab, o.teacher_hidden, 2 / math.sqrt(o.teacher_hidden))
    labels = torch.arange(o.tokens, device="cuda") * 7919 % o.vocab

    def step(masked: bool, chunk: int) -> None:
        hidden.grad = weight.grad = None
        mask = torch.ones(o.tokens, device="cuda") if masked else None
        loss = fused_loss(
            Student(hidden, weight, labels),
            Dense(teacher, head),
            TermWeights(0.7, 0.3, temperature=2.0),
            FusedOptions(chunk_tokens=chunk or None, upstream_mask=mask),
        )
        loss.total.mean().backward()

    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {vars(o)}")
    for way, (trains, masked) in WAYS.items():
        weight.requires_grad_(trains)
        for chunk in o.chunks:
            step(masked, chunk)
            torch.cuda.reset_peak_memory_stats()
            _, found = traced(lambda masked=masked, chunk=chunk: step(masked, chunk))
            peak = torch.cuda.max_memory_allocated() / 2**30
            print(
                f"head {way}, chunk {chunk or 'default'}: {found['device_seconds'] * 1e3:.2f} ms, "
                f"{found['launches']} launches, {peak:.2f} GiB"
            )
            for name, milliseconds, count in found["kernels"][: o.kernels]:
                print(f"   {milliseconds:8.2f} {count:5d} {name[:90]}")


if __name__ == "__main__":
    main()
