"""The quickstart's parts: corpora, tokenizer, shipped models, log reading, report, environment."""

import json
import math
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moe_inject.recipe.load import load_recipe

ROOT = Path(__file__).parents[3]
QUICKSTART = ROOT / "examples" / "quickstart"
sys.path.insert(0, str(QUICKSTART))

import corpora  # noqa: E402
import figures  # noqa: E402
import models  # noqa: E402
import report  # noqa: E402

SOURCE = '''#!/usr/bin/env python
"""A module docstring that is long enough to count as prose: it runs on and on, well beyond
the hundred and twenty characters that are asked for, and so it is kept."""
import os  # trailing remark


# A block of comments that explains at some length, in more than one hundred
# and twenty characters, why the function below is written in the way it is.
def join(a, b):
    """Short."""
    return "# not a comment" + a + b  # remark
'''


def test_module_is_taken_apart_into_code_and_prose():
    code, prose = corpora.split_module(SOURCE)
    assert code == ("import os\n\n\ndef join(a, b):\n" + '    return "# not a comment" + a + b\n')
    assert [text.split()[:2] for text in prose] == [["A", "module"], ["A", "block"]]
    assert prose[1].startswith("A block of comments that explains at some length, in more")
    assert not any("#" in text or '"""' in text for text in prose)


@pytest.mark.parametrize("source", ["def (:\n", "x = '''never closed\n", "x = 1\0\n"])
def test_what_is_no_module_raises_what_the_reader_catches(source):
    with pytest.raises((SyntaxError, ValueError, corpora.tokenize.TokenError)):
        corpora.split_module(source)


def test_split_depends_on_the_name_alone():
    names = ("json.decoder", "asyncio.events", "topic:lambda")
    assert [corpora.position(n) for n in names] == [1466676479, 3527892721, 4071454845]
    many = [f"package.module{i}" for i in range(5000)]
    share = sum(map(corpora.is_held_out, many)) / len(many)
    assert share == pytest.approx(corpora.HELD_OUT_PERCENT / 100, abs=0.015)


def test_held_out_text_never_trains_even_under_another_name():
    held = next(n for n in map("m{}".format, range(100)) if corpora.is_held_out(n))
    kept = [n for n in map("m{}".format, range(100)) if not corpora.is_held_out(n)]
    documents = [
        corpora.Document(kept[0], "copied"),
        corpora.Document(held, "copied"),
        corpora.Document(kept[1], "own"),
        corpora.Document(kept[2], "own"),
    ]
    training, held_out = corpora.split(documents)
    assert [d.text for d in held_out] == ["copied"]
    assert [d.text for d in training] == ["own"]


def test_dataset_holds_the_documents_and_the_manifest_its_size(tmp_path):
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from tokenizers import Tokenizer

    texts = ["def f(x):\n    return x\n", "Größe: 3 µm\n"]
    size = corpora.write_dataset([corpora.Document("m", t) for t in texts], tmp_path / "set")
    dataset = IndexedDataset(str(tmp_path / "set"))
    tokenizer = Tokenizer.from_file(str(corpora.TOKENIZER / "tokenizer.json"))
    assert [tokenizer.decode(dataset[i][:-1].tolist()) for i in range(2)] == texts
    assert [dataset[i][-1] for i in range(2)] == [tokenizer.token_to_id("<|endoftext|>")] * 2
    assert size == {
        "documents": 2,
        "bytes": len("".join(texts).encode()),
        "tokens": sum(len(dataset[i]) for i in range(2)),
    }


@pytest.fixture(scope="module")
def megatron_tokenizer():
    from megatron.core.tokenizers import MegatronTokenizer

    return MegatronTokenizer.from_pretrained(
        tokenizer_path=str(corpora.TOKENIZER), metadata_path={"library": "huggingface"}
    )


def test_megatron_loads_the_tokenizer(megatron_tokenizer):
    assert megatron_tokenizer.vocab_size == 2048
    assert megatron_tokenizer.eod == 0
    code = "    for i in range(10):\n        print(i)\n"
    assert len(megatron_tokenizer.tokenize(code)) < len(code) / 2


@given(st.text(max_size=80))
@settings(max_examples=60)
def test_every_text_survives_the_tokenizer(text):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(corpora.TOKENIZER / "tokenizer.json"))
    if "<|endoftext|>" not in text:
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


LOG = """\
 [2026-01-01 10:00:00] iteration       10/      20 | consumed samples:          160 | \
elapsed time per iteration (ms): 500.0 | global batch size:    16 | lm loss: 2.500000E+00 | \
kd loss/code: 1.5E-01 | grad norm: 0.979 | number of nan iterations:   0 |
 validation loss at iteration 10 | lm loss/code value: 2.1E+00 | lm loss/code PPL: 8.1E+00 | \
lm loss/general value: 1.9E+00 | lm loss/general PPL: 6.6E+00 |
 validation-english loss at iteration 20 | lm loss value: 1.8E+00 | lm loss PPL: 6.0E+00 |
 validation-english loss at iteration 20 on validation set | lm loss value: 1.8E+00 | \
lm loss PPL: 6.0E+00 |
"""


def test_log_gives_every_term_and_each_evaluation_once(tmp_path):
    path = tmp_path / "log"
    path.write_text(LOG)
    run = figures.read_log(path)
    assert run.terms["lm loss"] == [(10, 2.5)]
    assert run.terms["kd loss/code"] == [(10, 0.15)]
    assert run.tokens_per_step(256) == 4096
    assert run.validation == {
        "lm loss/code": [(10, 2.1)],
        "lm loss/general": [(10, 1.9)],
        "lm loss/english": [(20, 1.8)],
    }


def test_bits_per_byte_of_a_uniform_guess_over_bytes():
    assert figures.bits_per_byte(math.log(256), {"tokens": 7, "bytes": 7}) == pytest.approx(8)
    assert figures.bits_per_byte(math.log(256), {"tokens": 7, "bytes": 14}) == pytest.approx(4)


def test_changes_are_counted_by_element():
    before = {"a": torch.zeros(2, 3), "b": torch.ones(4)}
    after = {"a": torch.tensor([[0.0, 1, 0], [0, 0, 2]]), "b": torch.ones(4)}
    assert report.compare(before, after) == report.Changes(2, 10, ("a",))
    adapted = after | {"x.inject_adapter.a.0.0": torch.zeros(5)}
    assert report.compare(before, adapted) == report.Changes(7, 15, ("a", "x.inject_adapter.a.0.0"))
    for other in ({"a": torch.zeros(2, 3)}, after | {"c": torch.zeros(5)}):
        with pytest.raises(ValueError, match="same model"):
            report.compare(before, other)


def test_recipe_file_is_valid_and_chooses_by_the_profile_that_the_quickstart_writes():
    (domain,) = load_recipe(QUICKSTART / "recipe.yaml").domains
    assert domain.experts.profile == "runs/quickstart/profile.json"
    assert (domain.experts.method, domain.experts.n, domain.experts.score) == (
        "top_n",
        2,
        "contrast",
    )


def test_shipped_models_are_whole_and_small():
    size = 0
    for name in ("student", "teacher"):
        path = models.MODELS / f"{name}.safetensors"
        description = json.loads(path.with_suffix(".json").read_text())
        assert models.checksum(path) == description["sha256"]
        size += path.stat().st_size
    assert size < 8_000_000


def test_damaged_model_is_refused(tmp_path, monkeypatch):
    for suffix in (".safetensors", ".json"):
        content = bytearray((models.MODELS / f"teacher{suffix}").read_bytes())
        if suffix == ".safetensors":
            content[-1] ^= 1
        (tmp_path / f"teacher{suffix}").write_bytes(content)
    monkeypatch.setattr(models, "MODELS", tmp_path)
    with pytest.raises(ValueError, match=r"checksum in teacher\.json"):
        models.load_shipped("teacher", torch.nn.Linear(1, 1))


OTHER = os.environ.get("MEGATRON_OTHER")


@pytest.mark.parametrize(
    ("name", "megatron"),
    [
        ("teacher", None),
        pytest.param(
            *("student", OTHER),
            marks=pytest.mark.skipif(not OTHER, reason="MEGATRON_OTHER names no second Megatron"),
        ),
    ],
)
def test_unpacked_checkpoint_is_megatrons_and_holds_the_shipped_weights(tmp_path, name, megatron):
    from safetensors.torch import load_file

    script = (
        f'source "{QUICKSTART}/flags.sh"; "$PYTHON" "$HERE/models.py" unpack {name} "$1"'
        f' -- "${{{name.upper()}[@]}}" "${{BOTH[@]}}"'
    )
    environment = os.environ | {
        "PYTHON": sys.executable,
        "PYTHONPATH": os.pathsep.join(map(str, filter(None, (megatron, ROOT)))),
        "OMP_NUM_THREADS": "1",
    }
    command = ["bash", "-c", script, "bash", str(tmp_path / name)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]
    stored = report.read_weights(tmp_path / name)
    shipped = load_file(models.MODELS / f"{name}.safetensors")
    assert sum(v.numel() for v in stored.values()) == sum(v.numel() for v in shipped.values())
    embedding = "embedding.word_embeddings.weight"
    found = next(v for k, v in stored.items() if k.endswith(embedding))
    torch.testing.assert_close(found, shipped[embedding].float(), rtol=0, atol=0)


def find_python(folder: Path, **variables: str) -> str:
    """What environment.sh would make .venv from, with only `folder` to search."""
    functions = (
        (ROOT / "examples" / "environment.sh").read_text().replace("\n_environment_main\n", "\n")
    )
    environment = {"PATH": str(folder), "HOME": str(folder), "PYENV_ROOT": str(folder / "pyenv")}
    done = subprocess.run(
        ["/bin/bash", "-c", functions + "\n_environment_find_python"],
        env=environment | variables,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip()


def make_command(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


GOOD = f'exec "{sys.executable}" "$@"'


def test_python_is_found_behind_a_shim_that_does_not_start(tmp_path):
    make_command(
        tmp_path / "python3.12", "echo 'pyenv: python3.12: command not found' >&2; exit 127"
    )
    make_command(tmp_path / "python3", "exit 1")
    expected = tmp_path / "pyenv" / "versions" / "3.12.9" / "bin" / "python"
    make_command(expected, GOOD)
    assert find_python(tmp_path) == str(expected)


def test_plain_python3_does_when_it_is_new_enough(tmp_path):
    make_command(tmp_path / "python3", GOOD)
    assert find_python(tmp_path) == "python3"


def test_named_python_wins_and_a_wrong_one_is_not_replaced(tmp_path):
    make_command(tmp_path / "python3", GOOD)
    make_command(tmp_path / "mine", GOOD)
    assert find_python(tmp_path, PYTHON=str(tmp_path / "mine")) == str(tmp_path / "mine")
    assert find_python(tmp_path, PYTHON=str(tmp_path / "absent")) == ""
