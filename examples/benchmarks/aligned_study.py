"""What a teacher with another tokenizer is worth on the quickstart: gain by arm, in bits per byte.

    python examples/benchmarks/aligned_study.py runs/aligned [--steps 50] [--finetune 150]
    python examples/benchmarks/aligned_study.py runs/aligned --report       what is done so far

Makes what it needs in the folder: text, the shipped student and teacher, and a second teacher with
a tokenizer of its own. That one is the shipped teacher with new rows of embedding and head, each
the mean of the old rows of the same text, trained further on code in its own tokens (SentencePiece
pieces with byte fallback and a space in front, where the student has byte-level BPE). A third one,
weaker, has the student's tokenizer and rows that went there and back, trained as long. Each arm
injects into two experts of each layer, on one process, and is measured before and after on held-out
text. A run that is done is not repeated.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
QUICKSTART = HERE.parent / "quickstart"
sys.path.insert(0, str(QUICKSTART))

import corpora  # noqa: E402
from runner import flags, logged, megatron  # noqa: E402

from megatron_moe_inject.teachers.align.byte_tokenizer import (  # noqa: E402
    ByteTokenizer,
    read_tokenizer,
)

VOCABULARY = 2048
BATCH = ("--micro-batch-size", "8", "--global-batch-size", "8")
RECIPE = """
domains:
  - name: code
    data: [0]
    teacher: coder
    experts: {layers: {0: [0, 1], 1: [0, 1], 2: [0, 1], 3: [0, 1]}}
teachers:
  coder: {source: "megatron:%s"}
objective: {alpha: 1.0, beta: 0.0}
evaluation: {gate: false}
"""
CHUNKS = ("teachers.coder.align=chunks",)
ARMS = {
    "weaker, same tokenizer, KL": ("weaker", ()),
    "weaker, same tokenizer, chunks, T 1": ("weaker", CHUNKS),
    "same tokenizer, KL": ("teacher", ()),
    "same tokenizer, chunks, T 1": ("teacher", CHUNKS),
    "other tokenizer, chunks, T 1": ("other", CHUNKS),
    "other tokenizer, chunks, T 10": ("other", (*CHUNKS, "objective.temperature=10")),
    "text alone": ("teacher", ("objective.alpha=0", "objective.beta=1")),
    "other tokenizer, chunks, T 100": ("other", (*CHUNKS, "objective.temperature=100")),
    "other tokenizer, chunks, T 10, and text": (
        "other",
        (*CHUNKS, "objective.temperature=10", "objective.beta=0.3"),
    ),
}


def make_tokenizer(folder: Path) -> None:
    """SentencePiece-like BPE with byte fallback, trained on code alone."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    _, code, _ = corpora.read_documents(with_tests=False)
    texts = [document.text for document in corpora.take_bytes(corpora.split(code)[0], 1_500_000)]
    every_byte = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[corpora_end(), "<unk>", *every_byte],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    content = json.loads(tokenizer.to_str())
    added = content["added_tokens"]
    content["added_tokens"] = [entry for entry in added if entry["content"] not in every_byte]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), "utf-8")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": corpora_end()}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def corpora_end() -> str:
    """The end of a document, of both tokenizers."""
    settings = json.loads((corpora.TOKENIZER / "tokenizer_config.json").read_text())
    return settings["eos_token"]


def with_other_rows(tokenizer: Path, folder: Path, back: bool) -> None:
    """The shipped teacher's tensors with rows for another tokenizer's ids, or with ``back`` those
    of its own ids made of these in the same way, which loses as much."""
    from safetensors.numpy import load_file, save_file

    old, new = read_tokenizer(corpora.TOKENIZER), read_tokenizer(tokenizer)
    tensors = load_file(QUICKSTART / "models" / "teacher.safetensors")
    named = ("embedding.word_embeddings.weight", "output_layer.weight")
    for name in (name for name in named if name in tensors):  # tied, or two
        rows = tensors[name].astype(np.float32)
        made = means(rows, old, new)
        tensors[name] = (means(made, new, old) if back else made).astype(np.float16)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "teacher.safetensors"
    save_file(tensors, path)
    about = json.loads((QUICKSTART / "models" / "teacher.json").read_text())
    about["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    path.with_suffix(".json").write_text(json.dumps(about))


def means(rows: np.ndarray, old: ByteTokenizer, new: ByteTokenizer) -> np.ndarray:
    """Rows for the ids of ``new``, each the mean of those that ``old`` cuts the same text into."""
    made = np.zeros_like(rows) + rows.mean(0)
    for index, piece in enumerate(new.pieces):
        text = None if piece is None else piece.decode("utf-8", "ignore")
        if text:
            made[index] = rows[list(old.encode([text])[0])].mean(0)
    made[new.end] = rows[old.end]
    return made


def of_tokenizer(names: tuple[str, ...], tokenizer: Path) -> list[str]:
    """The quickstart's flags with another tokenizer."""
    found = flags(*names)
    found[found.index("--tokenizer-model") + 1] = str(tokenizer)
    return found


def prepare(folder: Path, steps: int) -> None:
    """Text, student and teachers."""
    data, tokenizer = folder / "data", folder / "tokenizer"
    models = str(QUICKSTART / "models.py")
    if not (data / "manifest.json").exists():
        logged(folder / "corpora.log", str(QUICKSTART / "corpora.py"), str(data))
    for name in ("student", "teacher"):
        if not (folder / name).exists():
            given = (name, str(folder / name), "--", *flags(name.upper(), "BOTH"))
            logged(folder / f"{name}.log", models, "unpack", *given)
    if not tokenizer.exists():
        make_tokenizer(tokenizer)
    make_teacher(folder, "other", tokenizer, steps)
    make_teacher(folder, "weaker", corpora.TOKENIZER, steps)


def make_teacher(folder: Path, name: str, tokenizer: Path, steps: int) -> None:
    """The shipped teacher with other rows, trained further on code in this tokenizer's tokens."""
    work, models = folder / f"{name}-rows", str(QUICKSTART / "models.py")
    if (folder / name).exists():
        return
    with_other_rows(folder / "tokenizer", work, back=name == "weaker")
    begin, architecture = work / "checkpoint", of_tokenizer(("TEACHER", "BOTH"), tokenizer)
    given = ("teacher", str(begin), "--models", str(work), "--", *architecture)
    logged(work / "unpack.log", models, "unpack", *given)
    _, code, _ = corpora.read_documents(with_tests=False)
    training, held_out = corpora.split(code)
    sets = {"code_train": training, "code_held_out": corpora.take_bytes(held_out, 160_000)}
    own, corpora.TOKENIZER = corpora.TOKENIZER, tokenizer
    corpora.write_sets(sets, work / "data")
    corpora.TOKENIZER = own
    megatron(
        folder / f"{name}.log",
        *of_tokenizer(("TEACHER", "BOTH", "TRAINING"), tokenizer),
        *BATCH,
        *("--train-data-path", str(work / "data" / "code_train")),
        *("--valid-data-path", str(work / "data" / "code_held_out")),
        *("--data-cache-path", str(work / "cache"), "--train-iters", str(steps)),
        *("--lr", "2e-3", "--min-lr", "1e-4", "--eval-interval", str(steps), "--eval-iters", "10"),
        *("--load", str(begin), "--finetune", "--no-load-optim", "--no-load-rng"),
        "--no-save-optim",
        *("--save", str(folder / name), "--save-interval", str(steps)),
    )


def run_arm(folder: Path, arm: str, steps: int) -> None:
    """Inject and measure, unless it is done."""
    teacher, sets = ARMS[arm]
    work = folder / "arms" / arm.replace(" ", "-").replace(",", "")
    lines = work / "evaluation.jsonl"
    if lines.exists() and len(lines.read_text().splitlines()) == 2:
        return
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    (work / "recipe.yaml").write_text(RECIPE % (folder / teacher).resolve())
    data = folder / "data"
    megatron(
        work / "inject.log",
        *flags("STUDENT", "BOTH", "TRAINING"),
        *BATCH,
        *("--inject-recipe", str(work / "recipe.yaml"), "--inject-set", *sets),
        f"evaluation.file={lines}",
        *("--train-data-path", "0.9", f"{data}/code_slice", "0.1", f"{data}/english_slice"),
        *("--valid-data-path", "0.5", f"{data}/code_held_out", "0.5", f"{data}/english_held_out"),
        *("--data-cache-path", str(folder / "cache"), "--train-iters", str(steps)),
        *("--lr", "1e-3", "--min-lr", "1e-4", "--eval-interval", str(steps), "--eval-iters", "30"),
        *("--load", str(folder / "student"), "--finetune", "--no-load-optim", "--no-load-rng"),
    )


def report(folder: Path) -> None:
    """A line for each arm that is done."""
    print("arm | code before | after | gain | English | teacher (on its part of the text)")
    for arm in ARMS:
        lines = folder / "arms" / arm.replace(" ", "-").replace(",", "") / "evaluation.jsonl"
        if not lines.exists():
            continue
        first, last = (
            {name: sums(found) for name, found in json.loads(line)["classes"].items()}
            for line in lines.read_text().splitlines()
        )
        bits = [bits_per_byte(when[name]) for name in ("code", "general") for when in (first, last)]
        own = last["code"]
        lead = ""
        if "teacher_loss" in own and arm != "text alone":
            tokens = own.get("taught_tokens", own["tokens"])
            per_token = own["bytes"] / own["tokens"]
            lead = f"{own['teacher_loss'] / tokens / per_token / math.log(2):.4f}"
            lead += f" ({100 * tokens / own['tokens']:.1f} %)"
        print(
            f"{arm} | {bits[0]:.4f} | {bits[1]:.4f} | {bits[0] - bits[1]:+.4f} | "
            f"{bits[3] - bits[2]:+.4f} | {lead}"
        )


def sums(found: dict) -> dict[str, float]:
    """Of a class."""
    return {name: float(np.sum(values)) for name, values in found["sums"].items()}


def bits_per_byte(of_class: dict[str, float]) -> float:
    """The student's."""
    return of_class["loss"] / of_class["bytes"] / math.log(2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=50, help="of each arm, 2,048 tokens each")
    parser.add_argument("--finetune", type=int, default=150, help="of the other teacher, likewise")
    parser.add_argument("--report", action="store_true", help="only print what is done")
    given = parser.parse_args()
    if not given.report:
        given.folder.mkdir(parents=True, exist_ok=True)
        prepare(given.folder, given.finetune)
        for arm in ARMS:
            run_arm(given.folder, arm, given.steps)
    report(given.folder)


if __name__ == "__main__":
    main()
