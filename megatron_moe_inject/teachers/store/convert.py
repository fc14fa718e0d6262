"""``moe-inject convert-store``: a store of what another program has kept of its teacher.

What is written is a store as any, and the text that it is about as a data set of Megatron's, each
sample a document: that is what a run trains on. The other program's teacher is not at hand, so the
manifest names the files that were converted in the place of weights, and of each token only what
they tell is known: probabilities at temperature 1, and not the label's where it is not among them.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, Protocol

from megatron_moe_inject.host.commands import Commands, add_command, must_not_exist
from megatron_moe_inject.host.errors import Failure, RecipeError, fail, listing
from megatron_moe_inject.host.text import memory_text

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from megatron_moe_inject.teachers.store.manifest import StorePlan
    from megatron_moe_inject.teachers.store.writer import Content, Piece

NAME = "convert-store"
PACKAGES = {"distillkit": "pyarrow", "megatron": "zstandard"}
"""Kinds of sources, and what reads them."""
_EXAMPLES = """examples:
  moe-inject convert-store distillkit:captured --output stores/coder --data data/captured \\
    --tokenizer Qwen3-30B-A3B
  moe-inject convert-store megatron:cache --trust-pickle --output stores/coder --data data/cached \
    --tokenizer Qwen3-30B-A3B -- --data-path text --seed 1 --seq-length 4096 --train-iters 1000 ...
  torchrun ... --data-path data/captured --inject-set teachers.coder.source=store:stores/coder
"""


class Kept(Protocol):
    """What another program has kept, sample by sample.

    Attributes:
        files: that are read.
    """

    files: list[Path]

    @property
    def vocab_size(self) -> int: ...

    @property
    def slots(self) -> int: ...

    def texts(self) -> Iterator[np.ndarray]: ...

    def said(self) -> Iterator[tuple[Tensor, Tensor]]: ...


def add_commands(commands: Commands) -> None:
    """Add the command to ``moe-inject``."""
    parser = add_command(
        commands,
        NAME,
        "make a store of what DistillKit or Megatron has kept of a teacher, and of its text",
        "Read the likely ids of a teacher that another program has kept, and write them as a store "
        "with the text that they are about, each sample a document.",
        _EXAMPLES,
        run=convert,
        takes_flags=True,
    )
    parser.add_argument(
        "source", metavar="SOURCE",
        help="distillkit:/dir, of sample_logits_vllm; megatron:/dir, of --logits-save-dir, with "
        "the flags of that run behind --",
    )  # fmt: skip
    parser.add_argument(
        "--trust-pickle", action="store_true",
        help="of megatron:/dir: read its pickles, tensors alone",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, required=True, help="the store's folder")
    parser.add_argument(
        "--data", metavar="PREFIX", type=Path, required=True, help="of the data set to write"
    )
    parser.add_argument(
        "--tokenizer", metavar="DIR", type=Path, help="of the teacher, to be compared in training"
    )
    parser.add_argument(
        "--vocab-size", metavar="N", type=int,
        help="ids of the tokenizer (default those of --tokenizer, or of the source)",
    )  # fmt: skip
    parser.add_argument(
        "--log-probs", choices=("packed", "bf16", "fp32"), default="packed",
        help="their precision: six bits (default), or as they are",
    )  # fmt: skip
    parser.add_argument("--shard-tokens", metavar="N", type=int, default=1 << 20)
    parser.add_argument(
        "--sign", metavar="KEY", type=Path, help="sign the store with this Ed25519 private key"
    )


def convert(options: argparse.Namespace) -> str:
    """Convert; what to print.

    Raises:
        RecipeError: a mistake, a source that cannot be read, or nothing that can be written.
    """
    from megatron_moe_inject.teachers.store.manifest import MANIFEST
    from megatron_moe_inject.teachers.store.signing import check_package, private_key, sign
    from megatron_moe_inject.teachers.store.writer import StoreWriter, pieces

    def failure(problem: str, remedy: str) -> RecipeError:
        return fail("SOURCE", options.source, problem, remedy)

    if options.shard_tokens < 1:
        raise fail("--shard-tokens", options.shard_tokens, "is not positive", "write 1 or more")
    key = None
    if options.sign is not None:
        check_package("--sign")
        key = private_key(options.sign)
    kept = _kept(options, failure)
    must_not_exist(options.output)
    vocab_size, tokenizer = _vocabulary(options, kept)
    lengths = _write_data(options.data, kept, vocab_size, failure)
    starts = lengths.cumsum() - lengths
    plan = _plan(options, kept, vocab_size, tokenizer, failure)

    def of_store(problem: str, remedy: str) -> RecipeError:
        return fail("--output", str(options.output), problem, remedy)

    writer = StoreWriter(options.output, plan, list(pieces(plan, [lengths], [starts])), of_store)
    _copy_tokenizer(options, tokenizer)
    samples = zip(kept.texts(), kept.said(), strict=True)
    for piece in writer.pieces:
        writer.write(piece, _content(piece, samples, plan, failure))
    manifest = writer.finish(lambda: [_bin_sha256(options.data)])
    assert manifest is not None, "all shards are written"
    lines = []
    if key is not None:
        signer = sign(options.output / MANIFEST, key)
        lines.append(f"signed; to have that checked: teachers.NAME.trusted: [{signer}]")
    return "\n".join(
        [
            *lines,
            f"{options.output}: {manifest.rows:,} tokens of {len(lengths):,} documents, "
            f"{memory_text(manifest.bytes)}, "
            f"{manifest.bytes / max(1, manifest.rows):.1f} bytes a token; at temperature 1, "
            "without the label's probability",
            f"its text: {options.data}",
        ]
    )


def _kept(options: argparse.Namespace, failure: Failure) -> Kept:
    kind, _, path = options.source.partition(":")
    if kind not in PACKAGES or not path:
        raise failure("is no source", f"write {' or '.join(f'{k}:/dir' for k in PACKAGES)}")
    if not Path(path).is_dir():
        raise failure("is no directory on this machine", "name an existing directory")
    if importlib.util.find_spec(PACKAGES[kind]) is None:
        raise failure(f"is read by {PACKAGES[kind]}", "pip install megatron-moe-inject[captured]")
    if kind == "distillkit":
        if options.flags:
            raise fail("--", " ".join(options.flags[:3]), "is for megatron:/dir", "leave it out")
        from megatron_moe_inject.teachers.store.distillkit import Capture

        return Capture(Path(path), failure)
    if not options.trust_pickle:
        raise failure(
            "holds pickles, which may come from anybody",
            "add --trust-pickle if you know who wrote them; only tensors are read from them",
        )
    from megatron_moe_inject.teachers.store.cached_logits import CachedLogits

    return CachedLogits(Path(path), _run_flags(options.flags), failure)


def _run_flags(flags: list[str]) -> argparse.Namespace:
    """Megatron's arguments of the run that saved a cache.

    Raises:
        RecipeError: none, or flags that are not Megatron's.
    """
    from megatron.training.arguments import add_megatron_arguments

    from megatron_moe_inject.host.help_texts import make_printable

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise RecipeError(f"Megatron flags: {message}")

    if not flags:
        raise RecipeError(
            f"{NAME}: put -- and the flags of the run that saved the cache behind the options: "
            "its order of samples follows from them"
        )
    parser = Parser(prog=f"moe-inject {NAME}", allow_abbrev=False)
    make_printable(add_megatron_arguments(parser))
    args, unknown = parser.parse_known_args(flags)
    own = [flag for flag in unknown if not flag.startswith("--logits-save")]
    if any(flag.startswith("--") for flag in own):
        raise RecipeError(f"{NAME}: {listing(own, 4)}: no flags of Megatron's")
    args.rank = 0  # asked for by Megatron's tokenizer
    return args


def _vocabulary(options: argparse.Namespace, kept: Kept) -> tuple[int, dict[str, str]]:
    """Ids of the tokenizer, and its files by SHA-256."""
    from megatron_moe_inject.teachers.store.kept import tokenizer_digests
    from megatron_moe_inject.teachers.vocabulary import vocabulary_of_files

    def failure(problem: str, remedy: str) -> RecipeError:
        return fail("--tokenizer", str(options.tokenizer), problem, remedy)

    if options.tokenizer is None:
        return options.vocab_size or kept.vocab_size, {}
    digests = tokenizer_digests(options.tokenizer, failure)
    if not digests:
        raise failure("has no files of a tokenizer", "name the teacher's folder")
    found = vocabulary_of_files(options.tokenizer, origin=str(options.tokenizer), rows=None)
    return options.vocab_size or found.size or kept.vocab_size, digests


def _copy_tokenizer(options: argparse.Namespace, digests: dict[str, str]) -> None:
    from megatron_moe_inject.teachers.store.job import copy_tokenizer

    if digests:
        copy_tokenizer(options.tokenizer, digests, options.output)


def _write_data(prefix: Path, kept: Kept, vocab_size: int, failure: Failure) -> np.ndarray:
    """Write the text, each sample a document; tokens of each.

    Raises:
        RecipeError: it is there already, cannot be written, or has an id that the tokenizer lacks.
    """
    import numpy as np
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    from megatron_moe_inject.host.files import new_files

    for ending in (".bin", ".idx"):
        if os.path.lexists(f"{prefix}{ending}"):
            raise fail("--data", str(prefix), f"{ending} is there already", "name another prefix")
    lengths = []
    with new_files(prefix, [".idx"]) as folder:
        dtype = DType.optimal_dtype(vocab_size)
        builder = IndexedDatasetBuilder(str(folder / f"{prefix.name}.bin"), dtype=dtype)
        for tokens in kept.texts():
            if len(tokens) and not 0 <= tokens.min() <= tokens.max() < vocab_size:
                raise failure(
                    f"holds id {tokens.max()}, and there are {vocab_size} ids",
                    "name the teacher's --tokenizer, or its --vocab-size",
                )
            builder.add_document(tokens, [len(tokens)])
            lengths.append(len(tokens))
        if not lengths:
            raise failure("has no sample", "capture some text")
        builder.finalize(str(folder / f"{prefix.name}.idx"))
    return np.array(lengths, np.int64)


def _plan(
    options: argparse.Namespace,
    kept: Kept,
    vocab_size: int,
    tokenizer: dict[str, str],
    failure: Failure,
) -> StorePlan:
    from megatron_moe_inject.host.version import VERSION
    from megatron_moe_inject.teachers.store.job import TextFiles, stored_data
    from megatron_moe_inject.teachers.store.kept import Choices
    from megatron_moe_inject.teachers.store.manifest import StoredTeacher, StorePlan
    from megatron_moe_inject.teachers.store.writer import file_sha256

    text, kind = TextFiles.open(str(options.data)), options.source.partition(":")[0]
    teacher = StoredTeacher(
        options.source,
        "what DistillKit captured" if kind == "distillkit" else "what Megatron cached",
        0,
        {path.name: file_sha256(path, failure) for path in kept.files},
        "unknown",
        [],
    )
    return StorePlan(
        teacher,
        tokenizer,
        vocab_size,
        min(kept.slots, vocab_size),
        1.0,
        options.log_probs,
        [1.0],
        int(text.lengths.max()),
        0,
        options.shard_tokens,
        [stored_data(text, Choices(options.output))],
        {"megatron_moe_inject": VERSION},
        labels=False,
    )


def _content(
    piece: Piece,
    samples: Iterator[tuple[np.ndarray, tuple[Tensor, Tensor]]],
    plan: StorePlan,
    failure: Failure,
) -> Content:
    """Rows of a shard's documents."""
    import numpy as np
    import torch

    from megatron_moe_inject.teachers.store.row_format import RowFormat, listed_rows

    layout = plan.row_format
    assert isinstance(layout, RowFormat), "it is of ids"
    contents, counts = [], []
    for number in range(len(piece.lengths)):
        tokens, (ids, log_probs) = next(samples)
        if not len(ids):
            continue
        rows = listed_rows(
            torch.from_numpy(tokens[:-1]), ids, log_probs, plan.slots, plan.vocab_size
        )
        try:
            packed, own = layout.encode(rows)
        except ValueError as error:
            raise failure(
                f"has sample {piece.first + number} with rows that are none ({error})",
                "capture that text again, or leave it out",
            ) from None
        contents.append(packed.numpy())
        counts.append(own.numpy())
    if not contents:
        return np.zeros((0, layout.widest), np.uint8), np.zeros(0, np.int64)
    return np.concatenate(contents), np.concatenate(counts)


def _bin_sha256(prefix: Path) -> str:
    from megatron_moe_inject.teachers.store.writer import file_sha256

    def failure(problem: str, remedy: str) -> RecipeError:
        return fail("--data", str(prefix), problem, remedy)

    return file_sha256(Path(f"{prefix}.bin"), failure)
