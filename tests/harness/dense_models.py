"""Small dense models, trained for a moment, and the logits that Megatron gives for a checkpoint.

What conversions between dense models and mixtures of experts are compared by.
"""

import functools
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.harness import lane
from tests.harness.checkpoints import SAVE

LOGITS = (str(lane.HARNESS / "logits_gpt.py"),)
SIZES = (
    *("--num-layers", "4", "--tokenizer-type", "NullTokenizer", "--vocab-size", "61"),
    *("--make-vocab-size-divisible-by", "16", "--lr", "1e-2"),
)
MOE = ("--moe-token-dispatcher-type", "alltoall", "--moe-router-load-balancing-type", "none")
KINDS = {"gated": (), "biases": ("--no-bias-gelu-fusion",)}


@dataclass(frozen=True)
class Dense:
    """A dense model of one kind, and the logits of fixed tokens that it gives."""

    kind: str
    folder: Path
    logits: torch.Tensor


def flags(kind, *extra, **layout):
    """Of the dense model."""
    taken = {"--mock-data", *({"--swiglu", "--disable-bias-linear"} if kind == "biases" else ())}
    dense = [flag for flag in [*lane.dense(), *lane.layout(**layout)] if flag not in taken]
    return [*dense, *SIZES, *KINDS[kind], *extra]


def run_with_logits(material, folder, kind, *extra, then, nproc=1, pythonpath=(), **layout):
    """Train for a moment; logits of fixed tokens are in ``folder``."""
    folder.mkdir()
    torch.manual_seed(0)
    torch.save(torch.randint(61, (4, 32)), folder / "tokens.pt")
    data = ("--data-path", material.general, "--split", "90,5,5", "--train-iters", "2")
    return lane.run(
        flags(kind, *data, *extra, **layout),
        nproc=nproc,
        script=LOGITS,
        env={"LOGITS": str(folder), "LOGITS_THEN": then},
        pythonpath=pythonpath,
    )


@functools.cache
def dense_of(material, kind, folder):
    run_with_logits(material, folder / "l", kind, *SAVE, str(folder / "model"), then="again")
    return Dense(kind, folder / "model", torch.load(folder / "l" / "megatron_logits_after.pt"))


def start_at(folder):
    return ("--load", str(folder), "--finetune", "--no-load-optim", "--no-load-rng")
