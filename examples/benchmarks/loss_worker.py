"""The process in which ``loss_bench.py`` checks and measures one contender.

It reads one JSON command a line and answers with one: ``loss_bench.py`` holds all contenders alive
and lets them take turns, so that noise of the machine hits all alike.

    check                 relative errors at a small size, against ``losses/reference.py``, fp64
    inputs tokens vocab   makes what the next runs read
    run train_head        one forward and backward pass: seconds, CPU seconds, peak extra bytes
    product               the rate of a plain matrix product
"""

from __future__ import annotations

import ctypes
import gc
import json
import math
import os
import re
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from loss_contenders import CONTENDERS, Inputs, Loss, Settings
from torch import Tensor

CHECK = dict(tokens=96, hidden=64, teacher_hidden=32, vocab=1000, topk=16)


def normal(rows: int, columns: int, scale: float, seed: int, s: Settings) -> Tensor:
    made = torch.empty(rows, columns, dtype=getattr(torch, s.dtype), device=s.torch_device)
    generator = torch.Generator(s.torch_device).manual_seed(seed)
    return made.normal_(0, scale, generator=generator)


def shard(s: Settings, rank: int, vocab: int, width: int, seed: int) -> Tensor:
    """A rank's rows of a head that gives logits of standard deviation 2."""
    return normal(vocab // s.tp, width, 2 / math.sqrt(width), 10 * seed + rank, s)


def make_inputs(s: Settings, tokens: int, vocab: int) -> Inputs:
    """The same hidden states and labels on all ranks, and this rank's shards of the heads."""
    h, h_t = s.hidden, s.teacher_hidden
    labels = torch.arange(tokens, device=s.torch_device) * 7919 % vocab
    inputs = Inputs(
        normal(tokens, h, 1, 1, s), shard(s, s.rank, vocab, h, 2), normal(tokens, h_t, 1, 3, s),
        shard(s, s.rank, vocab, h_t, 4), labels,
    )  # fmt: skip
    if not CONTENDERS[s.contender].stored_teacher:
        return inputs
    head = torch.cat([shard(s, rank, vocab, h_t, 4) for rank in range(s.tp)])
    tops = [
        (rows @ head.t()).float().log_softmax(-1).topk(min(s.topk, vocab), dim=-1)
        for rows in inputs.teacher_hidden.split(64)
    ]
    ids, log_probs = (torch.cat(parts) for parts in zip(*((t[1], t[0]) for t in tops), strict=True))
    return inputs._replace(ids=ids, log_probs=log_probs)


def check(s: Settings) -> dict[str, float]:
    """Relative errors of the value and of both gradients at a small size."""
    small = {name: CHECK[name] for name in ("hidden", "teacher_hidden", "topk")}
    s = Settings(**(vars(s) | small))
    tokens, vocab = CHECK["tokens"], CHECK["vocab"]
    inputs = make_inputs(s, tokens, vocab)
    for leaf in inputs[:2]:
        leaf.requires_grad_(True)
    contender = CONTENDERS[s.contender]
    loss, value = contender.build(s)(inputs)
    loss.backward()

    heads = [
        torch.cat([shard(s, rank, vocab, width, seed) for rank in range(s.tp)]).double()
        for width, seed in ((s.hidden, 2), (s.teacher_hidden, 4))
    ]
    hidden, weight = inputs.hidden.detach().double().requires_grad_(), heads[0].requires_grad_()
    y = inputs.teacher_hidden.double() @ heads[1].t()
    expected = contender.dense(s, hidden @ weight.t(), y, inputs).mean()
    expected.backward()
    own = weight.grad.chunk(s.tp)[s.rank]
    norm = torch.linalg.vector_norm
    return {
        "value_error": float((value.double() - expected).abs() / expected.abs()),
        "gradient_error": float(norm(inputs.hidden.grad - hidden.grad) / norm(hidden.grad)),
        "head_gradient_error": float(norm(inputs.weight.grad - own) / norm(own)),
    }


class Memory:
    """Peak memory beyond what is held when it starts: of CUDA's allocator, or of the process."""

    def __init__(self, s: Settings):
        gc.collect()
        self.cuda = s.device == "cuda"
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
            return
        if hasattr(ctypes.CDLL(None), "malloc_trim"):
            ctypes.CDLL(None).malloc_trim(0)
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
            self.before = self._status("VmRSS")
        except OSError:
            self.before = None

    def extra(self) -> int | None:
        """Bytes, None where the system does not tell."""
        if self.cuda:
            return torch.cuda.max_memory_allocated() - self.before
        return None if self.before is None else max(0, self._status("VmHWM") - self.before)

    @staticmethod
    def _status(name: str) -> int:
        text = Path("/proc/self/status").read_text()
        return 1024 * int(re.search(rf"{name}:\s+(\d+) kB", text)[1])


def run(s: Settings, loss: Loss, inputs: Inputs, train_head: bool) -> dict:
    """One forward and backward pass: wall and CPU seconds, and bytes beyond the inputs."""
    inputs.hidden.requires_grad_(True)
    inputs.weight.requires_grad_(train_head)

    def once():
        inputs.hidden.grad = inputs.weight.grad = None
        loss(inputs)[0].backward()
        wait(s)

    if s.device == "cuda":
        once()  # the allocator gave its memory to the other contenders
    inputs.hidden.grad = inputs.weight.grad = None
    if s.group is not None:
        dist.barrier()
    memory = Memory(s)
    started, worked = time.perf_counter(), time.process_time()
    once()
    result = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - worked}
    result["extra_bytes"] = memory.extra()
    inputs.hidden.grad = inputs.weight.grad = None
    return result


def product(s: Settings, inputs: Inputs) -> dict:
    """Rate of the student's logits as a product alone, on up to 256 tokens (CPU), in FLOP/s."""
    hidden = inputs.hidden.detach()
    hidden = hidden if s.device == "cuda" else hidden[:256]
    with torch.no_grad():
        best = math.inf
        for _ in range(4):
            started = time.perf_counter()
            hidden @ inputs.weight.t()
            wait(s)
            best = min(best, time.perf_counter() - started)
    return {"rate": 2 * len(hidden) * inputs.weight.numel() / best}


def wait(s: Settings) -> None:
    if s.device == "cuda":
        torch.cuda.synchronize()


def serve(s: Settings, commands, answers) -> None:
    """Answer commands until the pipe closes."""
    if s.threads:
        torch.set_num_threads(s.threads)
    if s.device == "cuda":
        torch.cuda.set_device(s.rank)
    if s.tp > 1:
        backend = "nccl" if s.device == "cuda" else "gloo"
        dist.init_process_group(
            backend,
            init_method=f"file://{s.store}",
            rank=s.rank,
            world_size=s.tp,
            timeout=timedelta(minutes=10),
        )
    loss = inputs = sizes = None
    for line in commands:
        command = json.loads(line)
        name = command.pop("do")
        try:
            if name == "check":
                answer = check(s)
                loss = CONTENDERS[s.contender].build(s)
            elif name == "inputs":
                inputs, sizes = None, command
                if "torch._dynamo" in sys.modules:  # no kernel made for several sizes
                    torch._dynamo.reset()
                if s.device == "cpu":
                    inputs = make_inputs(s, **sizes)
                answer = {}
            else:
                if s.device == "cuda":  # the other contenders need the memory in between
                    inputs = make_inputs(s, **sizes)
                answer = {"run": run, "product": product}[name](
                    s, *([loss] if name == "run" else []), inputs, **command
                )
        except ImportError as error:
            answer = {"absent": str(error)}
        except Exception as error:  # told in the table, whatever a peer raises
            answer = {"failed": f"{type(error).__name__}: {error}"}
        if s.device == "cuda":
            inputs = None
            gc.collect()
            torch.cuda.empty_cache()
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what peers print must not get among the answers
    serve(Settings(**json.loads(sys.argv[1])), sys.stdin, channel)
