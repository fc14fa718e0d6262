"""What runs with teachers of other tokenizers train from: text, a student, and random teachers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tests.harness import lane, own_tokenizers
from tests.harness.material import SEQUENCE


@dataclass(frozen=True)
class AlignedMaterial:
    """Paths, and flags of runs.

    Attributes:
        tokenizer: the student's, byte-level BPE.
        general, domain: prefixes of Megatron datasets of its ids.
        student: checkpoint of a 4-layer student with 4 experts.
        teacher: folder of a random Llama with SentencePiece's pieces and a ``<s>`` in front.
        same: folder of a random Llama with the student's tokenizer.
    """

    folder: Path
    tokenizer: Path
    general: str
    domain: str
    student: str
    teacher: Path
    same: Path

    @property
    def tokenizer_flags(self) -> tuple[str, ...]:
        """Of a student of that tokenizer."""
        return (
            "--tokenizer-type",
            "HuggingFaceTokenizer",
            "--tokenizer-model",
            str(self.tokenizer),
        )

    def flags(self, *extra: str, **layout: int) -> list[str]:
        """Of an injection run on a blend, entry 1 the domain; later ``extra`` flags win."""
        start = ("--load", self.student, "--finetune", "--no-load-optim", "--no-load-rng")
        data = ("--data-path", "0.4", self.general, "0.6", self.domain, "--split", "90,5,5")
        return [
            *_flags(self.tokenizer_flags, **layout), *data, *start, "--train-iters", "3", *extra,
        ]  # fmt: skip

    def make_student(self, pythonpath: Sequence[str] = ()) -> None:
        """Train the student on general text for three steps; see ``lane.run``."""
        data = ("--data-path", self.general, "--split", "90,5,5", "--train-iters", "3")
        save = ("--save", self.student, "--save-interval", "100")
        lane.run([*_flags(self.tokenizer_flags), *data, *save], pythonpath=pythonpath)


def without_tokenizer(flags: list[str]) -> list[str]:
    """Flags of ``lane`` without its data and the tokenizer of that."""
    flags = [flag for flag in flags if flag != "--mock-data"]
    for name in ("--tokenizer-type", "--vocab-size"):
        at = flags.index(name)
        del flags[at : at + 2]
    return flags


def _flags(tokenizer: tuple[str, ...], **layout: int) -> list[str]:
    small = ("--num-layers", "4", "--lr", "1e-2", "--weight-decay", "0.1", "--eval-iters", "0")
    padding = ("--make-vocab-size-divisible-by", "16")
    return [*without_tokenizer(lane.moe(**layout)), *small, *padding, *tokenizer]


def make_aligned_material(folder: Path) -> AlignedMaterial:
    """Train tokenizers, write text and make the models."""
    tokenizer = own_tokenizers.byte_level(folder / "tokenizer", 300)
    general, domain = (
        _write(folder / name, tokenizer, part) for part, name in enumerate(("general", "domain"))
    )
    other = own_tokenizers.sentencepiece(folder / "pieces", 450)
    made = AlignedMaterial(
        folder, tokenizer, general, domain, str(folder / "student"),
        llama(folder / "teacher", other, 450, seed=3), llama(folder / "same", tokenizer, 300, 4),
    )  # fmt: skip
    made.make_student()
    return made


def _write(prefix: Path, tokenizer: Path, part: int) -> str:
    """Every second of the texts, each a document with its end."""
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
    from tokenizers import Tokenizer

    encoder = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for text in own_tokenizers.texts()[part::2]:
        for start in range(0, len(text), 150):
            ids = [*encoder.encode(text[start : start + 150]).ids, 0]
            builder.add_document(torch.tensor(ids), [len(ids)])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def write_documents(folder: Path, tokenizer: Path, length: int) -> tuple[str, ...]:
    """Data flags of a blend of two sets whose documents have ``length`` tokens, an end included."""
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
    from tokenizers import Tokenizer

    encoder, prefixes = Tokenizer.from_file(str(tokenizer / "tokenizer.json")), []
    for part, name in enumerate(("general", "domain")):
        prefixes.append(str(folder / name))
        builder = IndexedDatasetBuilder(f"{prefixes[-1]}.bin", dtype=np.uint16)
        for text in own_tokenizers.texts()[part::2]:
            ids = encoder.encode(text).ids
            for start in range(0, len(ids) - length, length - 1):
                own = [*ids[start : start + length - 1], 0]
                builder.add_document(torch.tensor(own), [length])
        builder.finalize(f"{prefixes[-1]}.idx")
    general, domain = prefixes
    return ("--data-path", "0.4", general, "0.6", domain, "--split", "90,5,5", "--eod-mask-loss")


def llama(folder: Path, tokenizer: Path, size: int, seed: int) -> Path:
    """A random one with a tokenizer of so many ids, in a folder."""
    import shutil

    import torch
    import transformers

    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=size,
        hidden_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=4 * SEQUENCE,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(str(folder))
    for path in tokenizer.iterdir():
        shutil.copy(path, folder / path.name)
    return folder
