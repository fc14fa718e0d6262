"""Small stores of random rows, written shard by shard, for tests of their files."""

import dataclasses
import time
from pathlib import Path

import numpy as np
import torch

from megatron_moe_inject.host.errors import fail
from megatron_moe_inject.teachers.store.manifest import StoredData, StoredTeacher, StorePlan
from megatron_moe_inject.teachers.store.row_format import Rows, top_rows
from megatron_moe_inject.teachers.store.writer import StoreWriter, pieces

VOCABULARY = 300
LENGTHS = [np.random.default_rng(n).integers(0, 90, 60) for n in range(2)]
STARTS = [np.cumsum(lengths) - lengths for lengths in LENGTHS]
TEACHER = StoredTeacher("hf:/model", "Llama", 7, {"model.safetensors": "ab"}, "bf16", [1])


def failure(problem, remedy):
    return fail("--output", "store", problem, remedy)


def plan_of(mass=None, **changes) -> StorePlan:
    data = [
        StoredData(
            f"text{n}", f"{n}" * 64, 2 * int(lengths.sum()), "e" * 64, 60, int(lengths.sum()), 0, 60
        )
        for n, lengths in enumerate(LENGTHS)
    ]
    plan = StorePlan(
        TEACHER, {}, VOCABULARY, 12, mass, "packed", [1.0, 2.0], 64, 16, 400, data, {"torch": "2"}
    )
    return dataclasses.replace(plan, **changes)


def said(data: int, mass=None) -> Rows:
    """Of every token of a data set, also of the last of each document."""
    generator = torch.Generator().manual_seed(data)
    count = int(LENGTHS[data].sum())
    logits = torch.randn(count, VOCABULARY, generator=generator) * 3
    tokens = torch.randint(VOCABULARY, (count,), generator=generator)
    return top_rows(
        tokens,
        logits.log_softmax(-1),
        slots=12,
        mass=mass,
        temperatures=(1.0, 2.0),
        labels=tokens.roll(-1),
    )


def content_of(piece, layout, rows):
    tokens = np.arange(piece.first_token, piece.first_token + piece.lengths.sum())
    lasts = piece.first_token + np.cumsum(piece.lengths)[piece.lengths > 0] - 1
    own = np.setdiff1d(tokens, lasts)
    content, counts = layout.encode(rows.some(own))
    return content.numpy(), counts.numpy()


def write(folder, plan=None, rows=None, limit=10**9, wait=0.0):
    """Write what is missing, at most so many shards."""
    plan = plan or plan_of()
    rows = rows or [said(0, plan.mass), said(1, plan.mass)]
    writer = StoreWriter(folder, plan, pieces(plan, LENGTHS, STARTS), failure)
    for piece in writer.missing[:limit]:
        time.sleep(wait)
        writer.write(piece, content_of(piece, plan.row_format, rows[piece.data]))
    return writer.finish(lambda: ["c" * 64] * 2)


def key_file(folder: Path, key=None) -> Path:
    """A private key as a file, a new one of the right kind unless it is given."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ed25519

    key = key or ed25519.Ed25519PrivateKey.generate()
    path = folder / "key.pem"
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return path
