"""What a teacher reads of the student's text, through the real ``pretrain()``.

The student's tokenizer has a token ``<tool>`` that the teacher lacks; the teacher's has a ``<bos>``
that it was trained behind and the student lacks. Its states are those of transformers, alone.
"""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_moe_inject.evaluation.evaluation_file import read_evaluation, read_list
from megatron_moe_inject.losses import reference
from tests.harness import lane
from tests.harness.checksums import write_sums
from tests.harness.evaluating import BATCHES, plain
from tests.harness.injection import OTHER, PROVEN, inject, recipe_file
from tests.harness.material import make_material, student_flags

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

EOD, TOOL, BOS, IDS = 60, 61, 62, 62
RECIPE = """
domains:
  - name: code
    data: [1]
    teacher: coder
    experts: {{layers: {{2: [3], 3: [3]}}}}
teachers:
  coder: {{source: "hf:{teacher}", layers: {{3: 0}}}}
objective: {{alpha: 0.7, beta: 0.3, temperature: 2.0}}
imitation: {{hidden: 0.1}}
"""
MEASURED = RECIPE.replace(", layers: {{3: 0}}", "").replace("imitation: {{hidden: 0.1}}\n", "")
TERMS = ("lm loss", "kd loss", "imitation loss", "total loss", "grad norm")
RESETS = ("--reset-position-ids", "--reset-attention-mask", "--eod-mask-loss")


def write_tokenizer(folder: Path, added: dict[str, int], template: str = "$A") -> Path:
    vocab = {f"w{i}": i for i in range(EOD)} | {"<eod>": EOD}
    special = [(token, index) for token, index in added.items() if token in template]
    content = {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": t, "special": True, "single_word": False, "lstrip": False,
             "rstrip": False, "normalized": False}
            for t, i in (added | {"<eod>": EOD}).items()
        ],
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": json.loads(
            tokenizers.processors.TemplateProcessing(
                single=template, special_tokens=special
            ).__getstate__()
        ),
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "w0"},
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eod>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def write_domain(prefix: Path) -> str:
    """Short documents that end in <eod>, several to a window, one in five with a <tool>."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    rng = np.random.default_rng(1)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for i in range(600):
        tokens = (rng.integers(EOD) + 7 * np.arange(20)) % EOD
        if i % 5 == 0:
            tokens[rng.integers(20)] = TOOL
        tokens = np.append(tokens, EOD)
        builder.add_document(torch.from_numpy(tokens), [len(tokens)])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


@pytest.fixture(scope="module")
def text(material, tmp_path_factory):
    """The material with this test's domain and teacher; the tokenizer's flags; the teacher."""
    folder = tmp_path_factory.mktemp("reading")
    student = write_tokenizer(folder / "tokenizer", {"<tool>": TOOL})
    teacher = folder / "teacher"
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=66, hidden_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=48, max_position_embeddings=32,
        initializer_range=0.2,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(str(teacher))
    write_tokenizer(teacher, {"<bos>": BOS, "<pad>": 63}, "<bos> $A")
    changed = replace(
        material, folder=folder, domain=write_domain(folder / "domain"), teacher=str(teacher)
    )
    flags = ("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(student))
    return changed, flags, model


def read(model, tokens, labels, resets=False, prefix=(BOS,)):
    """Of each window: the teacher's cross-entropy, and where it can be asked."""
    lacking = tokens == TOOL
    asked = (lacking.cumsum(1) == 0) & (labels != TOOL)
    logits = torch.full((*tokens.shape, 64), 0.0)
    known = tokens.masked_fill(lacking, 0)
    for row, window in enumerate(known):
        ends = [*(window == EOD).nonzero().flatten().tolist(), len(window) - 1] if resets else []
        start = 0
        for end in dict.fromkeys(ends or [len(window) - 1]):
            part = torch.cat([torch.tensor(prefix, dtype=torch.int64), window[start : end + 1]])
            with torch.no_grad():
                found = model(part[None]).logits[0, len(prefix) :, :64]
            logits[row, start : end + 1] = found
            start = end + 1
    logits[..., TOOL] = -torch.inf
    return reference.cross_entropy(logits, labels, valid_vocab_size=IDS), asked


def evaluate(text, path, *extra, nproc=1, **layout):
    material, flags, _ = text
    recipe = recipe_file(material, MEASURED)
    run = lane.run(
        student_flags(
            *material.blend, *flags, "--load", material.student, "--skip-train",
            *("--eval-iters", str(BATCHES), "--inject-recipe", recipe),
            *("--inject-evaluate", str(path), *extra),
            **layout,
        ),
        nproc=nproc,
    )  # fmt: skip
    assert "evaluation: written to" in run.output, run.tail()
    return read_evaluation(path).classes["code"]


@pytest.fixture(scope="module")
def windows(text, tmp_path_factory):
    """The held-out windows of the domain, as plain Megatron reads them."""
    material, flags, _ = text
    found = plain(
        material, tmp_path_factory.mktemp("plain") / "s.pt",
        [*student_flags("--load", material.student), *flags],
    )  # fmt: skip
    return found["tokens"], found["labels"]


def total(values, asked, mask=None):
    counted = asked if mask is None else asked & mask
    return values[counted].double().sum().item(), int(counted.sum())


@pytest.mark.parametrize(
    "resets", [pytest.param((), id="windows"), pytest.param(RESETS, id="documents")]
)
def test_the_teacher_is_that_of_transformers(text, windows, tmp_path, resets):
    """Each window, or with resets each document, behind its <bos>, up to the first <tool>."""
    found = evaluate(text, tmp_path / "e.json", *resets)
    tokens, labels = windows
    domain = (tokens == EOD).any(1)  # documents of the domain are short, the others long
    tokens, labels = tokens[domain], labels[domain]
    assert (tokens == TOOL).any()
    losses, asked = read(text[2], tokens, labels, bool(resets))
    mask = tokens != EOD if resets else None
    assert len(found.sequences) == len(tokens)
    loss, count = total(losses, asked, mask)
    assert found.sums["taught_tokens"].sum() == count
    assert 0 < count < found.sums["tokens"].sum()
    assert found.sums["teacher_loss"].sum() == pytest.approx(loss, rel=1e-4)
    assert found.mean("teacher_loss") == pytest.approx(loss / count, rel=1e-4)


LAYOUTS = [
    pytest.param(dict(nproc=2, tp=2), id="tp2-sp"),
    pytest.param(dict(nproc=2, pp=2), id="pp2"),
    pytest.param(dict(nproc=2, cp=2), id="cp2"),
    pytest.param(dict(nproc=4, tp=2, pp=2), id="tp2-pp2", marks=pytest.mark.slow),
    pytest.param(dict(nproc=4, tp=2, cp=2), id="tp2-cp2", marks=pytest.mark.slow),
]


@pytest.fixture(scope="module")
def single(text):
    material, flags, _ = text
    return inject(material, RECIPE, extra=flags)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_curve_at_every_layout(text, single, layout):
    material, flags, _ = text
    run = inject(material, RECIPE, extra=flags, **layout)
    assert all(step["kd loss"] > 0 and step["imitation loss"] > 0 for step in single.iterations)
    for term in TERMS:
        assert run.losses(term) == pytest.approx(single.losses(term), rel=3e-5), term
    assert PROVEN.search(run.output)


def reads_its_prefix(material, path=()):
    losses = []
    for prefix in ("none", "[3]", "[3,5]"):
        extra = ("--inject-set", f"teachers.coder.prefix={prefix}", *RESETS)
        run = inject(material, extra=(*extra, "--train-iters", "1"), path=path)
        losses.append(run.losses("kd loss")[0])
        assert ("reads id 3" in run.output) == (prefix != "none")
    assert len({f"{loss:.5f}" for loss in losses}) == 3
    assert all(0 < loss < 10 for loss in losses)


def test_a_megatron_teacher_reads_its_prefix_too(material):
    """Also with positions and masks of documents; another prefix gives other losses."""
    reads_its_prefix(material)


@pytest.mark.slow
@pytest.mark.skipif(not OTHER, reason="MEGATRON_OTHER names no second Megatron-Core")
def test_a_teacher_of_the_other_megatron_reads_its_prefix_too(tmp_path):
    reads_its_prefix(make_material(tmp_path, [OTHER]), path=[OTHER])


def test_the_plan_says_what_the_teacher_lacks_and_reads(single):
    for line in (
        "teacher coder has the same 61 tokens as the student's; 2 tokens (62 '<bos>', 63 '<pad>') "
        "that the student lacks take no part; it lacks 1 tokens (61 '<tool>') of the student's",
        "teacher coder: nothing is taught from such a token on; in the first 1,048,576 tokens of "
        "each of its 1 texts (12,600 in all) occur 61 '<tool>' 120 times",
        "teacher coder reads id 62 in front of the text (as its tokenizer does)",
        "teacher coder has rotary positions for 32 tokens and reads 33: it may predict badly",
    ):
        assert line in single.output, line


@pytest.mark.parametrize("layout", [dict(), dict(nproc=2, pp=2)], ids=["one", "pp2"])
def test_the_gate_says_what_the_teacher_loses_without_its_prefix(text, windows, tmp_path, layout):
    """With two stages each reads some of the text, with the prefix and without."""
    material, flags, model = text
    keep = ("--save", str(tmp_path), "--save-interval", "100", "--eval-iters", str(BATCHES))
    write_sums(Path(material.teacher))
    keep += ("--inject-verify-inputs",)
    run = inject(
        material, MEASURED + "evaluation: {{}}\n", extra=(*flags, *keep), check=False, **layout
    )
    assert "verified inputs: teacher coder: 5 files" in run.output, run.tail()
    assert re.search(r"--load \S+iter_0000003: not checked, since it has no SHA256SUMS", run.output)
    tokens, labels = windows
    domain = (tokens == EOD).any(1)
    told = []
    for prefix in ((BOS,), ()):
        losses, asked = read(model, tokens[domain], labels[domain], prefix=prefix)
        loss, count = total(losses, asked)
        told.append(loss / count)
    found = re.search(r"teacher coder ([\d.]+) \(([\d.]+) without its prefix\)", run.output)
    assert found, run.tail()
    assert [float(number) for number in found.groups()] == pytest.approx(told, abs=2e-3)
    assert told[0] != pytest.approx(told[1], abs=1e-2)
    assert "of whose tokens the teacher can be asked about" in run.output
    (first,) = read_list(tmp_path / "inject_evaluation.jsonl")
    assert first.classes["code"].mean("teacher_loss_bare") == pytest.approx(told[1], rel=1e-4)
