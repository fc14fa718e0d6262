"""What a teacher with another tokenizer costs by where it is: beside the student, stored, served.

    python examples/benchmarks/aligned_sources.py [--steps 12] [--latency 0.2]

Training steps of real Megatron on the CPU lane, from one random teacher with a tokenizer of
SentencePiece's kind: live, from a store of it, and from a server that takes ``--latency`` seconds
for an answer (a stand-in that has no model, so that it takes no time of the cores). With it the
bytes of the store, the requests and the bytes of an answer's JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
import threading
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent), str(ROOT / "examples" / "quickstart")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from aligned_study import make_tokenizer  # noqa: E402
from served_bench import Handler, Server, median_of, run  # noqa: E402

from megatron_moe_inject.host.text import table  # noqa: E402
from megatron_moe_inject.teachers.align.byte_tokenizer import read_tokenizer  # noqa: E402

STUDENT = ROOT / "examples" / "quickstart" / "tokenizer"
SEQUENCE, BATCH = 256, 8
PRETRAIN = "torch.distributed.run --standalone --nproc-per-node 1 -m megatron_moe_inject.pretrain"
RECIPE = """
domains:
  - {{name: domain, data: [0], teacher: other}}
teachers:
  other: {{source: "{source}", align: chunks, temperature: 10, {more}}}
objective: {{alpha: 0.7, beta: 0.3}}
train: {{experts: all}}
"""


class Counting(Handler):
    """Counts texts, and the bytes of what is said of them."""

    texts, tokens, sent = 0, 0, 0

    def _send(self, value: dict, status: int = 200) -> None:
        if "meta_info" in value:
            cls = type(self)
            cls.texts += 1
            cls.tokens += len(value["meta_info"]["input_token_logprobs"])
            cls.sent += len(json.dumps(value))
        super()._send(value, status)


def flags(data: str, *more: str) -> list[str]:
    """Of a student of text."""
    text = (
        "--cpu --num-layers 4 --hidden-size 128 --num-attention-heads 4 "
        f"--seq-length {SEQUENCE} --max-position-embeddings {SEQUENCE} --swiglu "
        "--position-embedding-type rope --normalization RMSNorm --disable-bias-linear "
        "--attention-dropout 0 --hidden-dropout 0 --tokenizer-type HuggingFaceTokenizer "
        f"--tokenizer-model {STUDENT} --num-workers 0 --untie-embeddings-and-output-weights "
        f"--micro-batch-size 2 --global-batch-size {BATCH} --lr 1e-4 --eval-interval 100000 "
        f"--eval-iters 0 --log-interval 1 --data-path {data} --split 100,0,0 "
    )
    return [*text.split(), *more]


def write_data(folder: Path) -> str:
    """Pages and modules of this repository as documents of a sample's length; their prefix."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    student = read_tokenizer(STUDENT)
    files = sorted((ROOT / "megatron_moe_inject").rglob("*.py"))
    texts = [path.read_text("utf-8") for path in files[:40]]
    builder = IndexedDatasetBuilder(f"{folder / 'text'}.bin", dtype=np.int32)
    for ids in student.encode(texts):
        for start in range(0, len(ids) - SEQUENCE, SEQUENCE - 1):
            own = [*ids[start : start + SEQUENCE - 1], student.end]
            builder.add_document(torch.tensor(own), [SEQUENCE])
    builder.finalize(f"{folder / 'text'}.idx")
    return str(folder / "text")


def make_teacher(folder: Path) -> None:
    """A random Llama of the other tokenizer."""
    import transformers

    make_tokenizer(folder)
    config = transformers.LlamaConfig(
        vocab_size=len(read_tokenizer(folder).pieces), hidden_size=64, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=4, intermediate_size=192,
        max_position_embeddings=4 * SEQUENCE, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(str(folder))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--latency", type=float, default=0.2, help="seconds for an answer")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        teacher, recipe = folder / "teacher", folder / "recipe.yaml"
        teacher.mkdir()
        make_teacher(teacher)
        data = write_data(folder)
        recipe.write_text(RECIPE.format(source=f"hf:{teacher}", more=""))
        told = run(
            "megatron_moe_inject.cli", "store-teacher", str(recipe), "--output", f"{folder}/store",
            "--cpu", "--verify", "20", "--", *flags(data)[1:],
        )  # fmt: skip
        print(*[line for line in told.splitlines() if re.search("bytes a tok|second|verif", line)],
              sep="\n", flush=True)  # fmt: skip
        server = Server(("127.0.0.1", 0), Counting)
        server.latency = options.latency
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"server:http://127.0.0.1:{server.server_address[1]}"
        asked = f"server: {{tokenizer: {teacher}, ahead: %d}}"
        cases = [
            ("live", f"hf:{teacher}", ""),
            ("store", f"store:{folder}/store", ""),
            *((f"server, {n} steps ahead", url, asked % n) for n in (0, 2)),
        ]
        rows = [("teacher", "a step, median", "server wait", "texts a step", "JSON a token")]
        for what, source, more in cases:
            recipe.write_text(RECIPE.format(source=source, more=more))
            moe = "--num-experts 4 --moe-router-topk 2 --moe-token-dispatcher-type alltoall "
            moe += f"--inject-recipe {recipe} --inject-from-scratch --train-iters {options.steps}"
            before = Counting.texts, Counting.tokens, Counting.sent
            told = run(PRETRAIN, *flags(data, *moe.split()))
            texts, tokens, sent = (
                now - then
                for now, then in zip(
                    (Counting.texts, Counting.tokens, Counting.sent), before, strict=True
                )
            )
            of_server = ("", "")
            if texts:  # two are of the start
                of_server = (f"{(texts - 2) / options.steps:.1f}", f"{sent / tokens:.0f} bytes")
            times = (median_of(told, "step"), median_of(told, "wait"))
            rows.append((what, *times, *of_server))
        print("\n".join(table(rows)), flush=True)


if __name__ == "__main__":
    main()
