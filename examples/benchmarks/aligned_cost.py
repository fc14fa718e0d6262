"""What a teacher with another tokenizer costs beside its forward pass: reading, and the loss.

    python examples/benchmarks/aligned_cost.py [--tokenizers STUDENT TEACHER] [--text FILE ...]

CPU seconds of one thread. Reading is bytes of ids, tokenising and aligning, by default between the
quickstart's tokenizer and one of SentencePiece's kind made on the spot; name two folders to measure
your own. The loss is forward and backward of cross-entropy, of chunks, and of KL to a teacher whose
logits are formed beside, on random states.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "examples" / "quickstart")]

import numpy as np  # noqa: E402
import torch  # noqa: E402

from megatron_moe_inject import losses  # noqa: E402
from megatron_moe_inject.teachers.align.byte_tokenizer import read_tokenizer  # noqa: E402
from megatron_moe_inject.teachers.align.reading import Reader  # noqa: E402

TOKENS, HIDDEN, OF_TEACHER, VOCABULARY, ROUNDS = 1024, 512, 256, 32768, 3
LENGTH, SAMPLES = 4096, 16


def reading(student_files: Path, teacher_files: Path, texts: list[str]) -> None:
    """Print tokens per second, and what can be told of."""
    student, teacher = read_tokenizer(student_files), read_tokenizer(teacher_files)
    prefix = () if teacher.begin is None else (teacher.begin,)
    stream: list[int] = []
    while len(stream) <= SAMPLES * LENGTH:
        for text in texts:
            stream += [*student.encode([text])[0], student.end]
    tokens = np.array(stream[: SAMPLES * LENGTH]).reshape(SAMPLES, LENGTH)
    following = np.array(stream[LENGTH : SAMPLES * LENGTH + 1 : LENGTH])
    counted = np.ones(tokens.shape, bool)
    pieces = [student.bytes_of(row.tolist()).decode("utf-8", "ignore") for row in tokens]
    begin = time.process_time()
    teacher.encode(pieces)
    encoding = time.process_time() - begin
    begin = time.process_time()
    found = Reader(student, teacher, prefix).read(tokens, following, counted)
    whole = time.process_time() - begin
    told = found.numbers < tokens.size
    chunks = len(np.unique(found.numbers[told]))
    covered = (found.places >= 0).sum()
    print(
        f"reading {tokens.size:,} tokens of the student in windows of {LENGTH}: "
        f"{tokens.size / whole:,.0f} tokens/s, of which {100 * encoding / whole:.0f} % of the time "
        f"is the tokenizer; {100 * covered / tokens.size:.2f} % told of, {covered / chunks:.2f} of "
        f"the student's and {told.sum() / chunks:.2f} of the teacher's tokens in a chunk"
    )


def loss(trained: bool) -> None:
    """Print CPU seconds of forward and backward."""
    torch.manual_seed(0)
    hidden, head = torch.randn(TOKENS, HIDDEN), torch.randn(VOCABULARY, HIDDEN) / HIDDEN**0.5
    of_teacher = torch.randn(TOKENS, OF_TEACHER), torch.randn(VOCABULARY, OF_TEACHER) / 16
    labels = torch.randint(0, VOCABULARY, (TOKENS,))
    chunk = torch.arange(TOKENS) // 2
    told = losses.Aligned(chunk, torch.full((TOKENS,), -3.0), torch.full((TOKENS,), 2.0), TOKENS)
    promised = losses.FusedOptions(upstream_mask=torch.ones(TOKENS) if trained else None)

    def run(kind: str) -> None:
        states = hidden.clone().requires_grad_()
        student = losses.Student(states, head.clone().requires_grad_(trained), labels)
        if kind == "chunks":
            found = losses.aligned_loss(student, told, losses.TermWeights(0.7, 0.3))
        elif kind == "KL":
            weights = losses.TermWeights(0.7, 0.3)
            found = losses.fused_loss(student, losses.Dense(*of_teacher), weights, promised)
        else:
            found = losses.fused_loss(student, None, losses.TermWeights(0.0, 1.0), promised)
        found.total.sum().backward()

    for kind in ("cross-entropy", "chunks", "KL"):
        seconds = []
        for _ in range(ROUNDS + 1):
            begin = time.process_time()
            run(kind)
            seconds.append(time.process_time() - begin)
        print(f"loss, head {'trained' if trained else 'frozen'}, {kind}: {min(seconds[1:]):.3f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizers", nargs=2, type=Path, metavar=("STUDENT", "TEACHER"))
    parser.add_argument("--text", nargs="+", type=Path, help="files; by default the package's own")
    given = parser.parse_args()
    torch.set_num_threads(1)
    package = sorted((ROOT / "megatron_moe_inject").rglob("*.py"))
    texts = [path.read_text("utf-8") for path in given.text or package]
    with tempfile.TemporaryDirectory() as folder:
        pair = given.tokenizers
        if pair is None:
            from aligned_study import make_tokenizer

            make_tokenizer(Path(folder))
            pair = (ROOT / "examples" / "quickstart" / "tokenizer", Path(folder))
        reading(*pair, texts)
    for trained in (False, True):
        loss(trained)


if __name__ == "__main__":
    main()
