"""What a store of a teacher costs: bytes a token, rates of packing, writing, reading and unpacking,
and what precision of log-probabilities loses.

    python examples/benchmarks/store_bench.py [--vocabulary 131072] [--tokens 8192]

The teacher's logits are random: a head of a few likely ids on a long tail, whose entropy is that of
a language model's. Prints one table.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from megatron_moe_inject.host.errors import fail
from megatron_moe_inject.host.text import table
from megatron_moe_inject.teachers.store.manifest import StoredData, StoredTeacher, StorePlan
from megatron_moe_inject.teachers.store.reader import Store
from megatron_moe_inject.teachers.store.row_format import Rows, top_rows
from megatron_moe_inject.teachers.store.writer import StoreWriter, pieces

CASES = (
    (64, None, "packed"), (128, None, "packed"), (64, None, "bf16"), (128, None, "bf16"),
    (128, 0.99, "packed"), (64, None, "fp32"),
)  # fmt: skip
DOCUMENT, SAMPLE, CHUNK = 1024, 4096, 256


def failure(problem, remedy):
    return fail("store", "bench", problem, remedy)


def log_probs(tokens, vocabulary, seed):
    """[t, v]: of each token a ranking of its own, and a slope from steep (sure) to flat."""
    generator = torch.Generator().manual_seed(seed)
    ranks = torch.arange(1, vocabulary + 1).log()
    slopes = 1.0 + 2.5 * torch.rand(tokens, 1, generator=generator)
    logits = -slopes * ranks + 0.3 * torch.randn(tokens, vocabulary, generator=generator)
    order = torch.randperm(vocabulary, generator=generator)
    shifts = torch.randint(vocabulary, (tokens, 1), generator=generator)
    return logits.gather(1, (order + shifts) % vocabulary).log_softmax(-1)


def teacher(count, vocabulary, slots, mass):
    """Rows of ``count`` tokens, and their mean entropy."""
    parts, entropies = [], []
    for chunk in range(0, count, CHUNK):
        own = log_probs(CHUNK, vocabulary, chunk)
        entropies.append(torch.special.entr(own.exp()).sum(-1).mean())
        tokens = torch.randint(vocabulary, (CHUNK,))
        labels = torch.multinomial(own.exp(), 1).squeeze(1)
        rows = top_rows(tokens, own, slots=slots, mass=mass, temperatures=(1.0,), labels=labels)
        parts.append(rows)
    return Rows(*map(torch.cat, zip(*parts, strict=True))), torch.stack(entropies).mean().item()


def lost(rows, found):
    """KL from what was stored to what is read, over the ids and the rest; [t]."""
    used = rows.ids >= 0
    terms = rows.log_probs.exp() * (rows.log_probs - found.at(0, 1.0))
    rest = rows.log_rest[:, 0]
    rest = rest.exp() * (rest - found.log_rest[:, 0])
    return terms.masked_fill(~used, 0).sum(-1) + rest.nan_to_num()


def measure(folder, count, vocabulary, slots, mass, precision):
    rows, entropy = teacher(count, vocabulary, slots, mass)
    lengths = np.full(count // DOCUMENT, DOCUMENT)
    data = StoredData("text", "", 0, "", len(lengths), count, 0, len(lengths))
    said = StoredTeacher("bench", "random", 0, {}, "fp32", [])
    plan = StorePlan(
        said, {}, vocabulary, slots, mass, precision, [1.0], SAMPLE, 0, 1 << 20, [data]
    )
    shards = list(pieces(plan, [lengths], [np.cumsum(lengths) - lengths]))
    kept = np.arange(count).reshape(-1, DOCUMENT)[:, :-1].ravel()
    kept_rows = rows.some(kept)
    begin = time.perf_counter()
    content, counts = plan.row_format.encode(kept_rows)
    packing = time.perf_counter() - begin
    writer = StoreWriter(folder, plan, shards, failure)
    begin = time.perf_counter()
    (shard,) = shards
    writer.write(shard, (content.numpy(), counts.numpy()))
    writing = time.perf_counter() - begin
    manifest = writer.finish(lambda: [""])
    store, rng = Store(folder, failure), np.random.default_rng(0)
    reading = unpacking = 0.0
    reads = 8
    for place in rng.integers(count - SAMPLE + 1, size=reads):
        begin = time.perf_counter()
        read, numbers = store.read(0, np.arange(place, place + SAMPLE))
        reading += time.perf_counter() - begin
        begin = time.perf_counter()
        store.layout.decode(torch.from_numpy(read), torch.from_numpy(numbers)).at(0, 1.0)
        unpacking += time.perf_counter() - begin
    whole, numbers = store.read(0, kept)
    found = store.layout.decode(torch.from_numpy(whole), torch.from_numpy(numbers))
    kl = lost(kept_rows, found)
    ids = f"{slots}" if mass is None else f"{mass:g} of {slots}"
    return (
        f"{ids}, {precision}",
        f"{manifest.bytes / manifest.rows:.1f}",
        f"{len(kept) / packing:,.0f}",
        f"{manifest.bytes / writing / 1e6:,.0f} MB/s",
        f"{reads * SAMPLE / reading:,.0f}",
        f"{reads * SAMPLE / unpacking:,.0f}",
        f"{kl.mean():.1e}",
        f"{kl.max():.1e}",
    ), entropy


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocabulary", type=int, default=131072)
    parser.add_argument("--tokens", type=int, default=8192)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [("ids", "bytes a token", "packed/s", "written", "read/s", "unpacked/s",
             "mean nats lost", "most")]  # fmt: skip
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            row, entropy = measure(
                Path(folder) / "store", options.tokens, options.vocabulary, *case
            )
            rows.append(row)
    print("\n".join(table(rows)))
    print(f"mean entropy {entropy:.2f} nats, {options.vocabulary:,} ids, one thread")


if __name__ == "__main__":
    main()
