"""What stands in front of a teacher's text: known from its tokenizer's files, read and dropped."""

import json
from pathlib import Path

import pytest
import torch

from megatron_moe_inject.host.errors import RecipeError
from megatron_moe_inject.teachers import load_teacher
from megatron_moe_inject.teachers.base import Source
from megatron_moe_inject.teachers.prefix import PrefixedTeacher, resolved_prefix, words
from megatron_moe_inject.teachers.tokenizer_files import read_token_ids
from tests.harness.huggingface import IDS, SIZES, check, save

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

WORDS = {f"w{i}": i for i in range(IDS - 4)}
SPECIAL = {"<bos>": IDS - 4, "<s>": IDS - 3, "</s>": IDS - 2}


def tokenizer(folder: Path, processor=None, *, kind="PreTrainedTokenizerFast", **config) -> Path:
    folder.mkdir(exist_ok=True)
    model = tokenizers.models.WordLevel(WORDS, unk_token="w0")
    built = tokenizers.Tokenizer(model)
    built.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    built.add_special_tokens([tokenizers.AddedToken(t, special=True) for t in SPECIAL])
    ids = {t: built.token_to_id(t) for t in SPECIAL}
    if processor is not None:
        built.post_processor = processor(ids)
    built.save(str(folder / "tokenizer.json"))
    content = {"tokenizer_class": kind, "bos_token": "<bos>", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(content))
    return folder


def template(text):
    def of(ids):
        special = [(t, i) for t, i in ids.items() if t in text]
        return tokenizers.processors.TemplateProcessing(single=text, special_tokens=special)

    return of


PROCESSORS = {
    "nothing": (lambda ids: tokenizers.processors.ByteLevel(), 0),
    "bos": (template("<bos> $A"), 1),
    "two, and one behind": (template("<bos> <s> $A </s>"), 2),
    "behind only": (template("$A </s>"), 0),
    "roberta": (
        lambda ids: tokenizers.processors.RobertaProcessing(
            ("</s>", ids["</s>"]), ("<s>", ids["<s>"])
        ),
        1,
    ),
    "sequence": (
        lambda ids: tokenizers.processors.Sequence(
            [tokenizers.processors.ByteLevel(), template("<bos> $A")(ids)]
        ),
        1,
    ),
}


def resolve(folder, written="auto", **more):
    source = Source("coder", f"hf:{folder}", "hf", folder)
    given = {"files": folder, "ids": read_token_ids(folder), "rows": IDS} | more
    return resolved_prefix(source, written, **given)


@pytest.mark.parametrize("name", PROCESSORS)
def test_auto_is_what_transformers_puts_in_front(tmp_path, name):
    processor, length = PROCESSORS[name]
    folder = tokenizer(tmp_path, processor)
    found, told = resolve(folder)
    real = transformers.AutoTokenizer.from_pretrained(str(folder))
    ids = real("w5 w6").input_ids
    assert ids[: len(found) + 2] == [*found, 5, 6]
    assert len(found) == length
    assert told == "as its tokenizer does"


def test_a_tokenizer_without_a_post_processor_says_it_in_its_config(tmp_path):
    bos = read_token_ids(tokenizer(tmp_path))["<bos>"]
    assert resolve(tmp_path)[0] == ()
    for kind, more, expected in (
        ("PreTrainedTokenizerFast", {"add_bos_token": True}, (bos,)),
        ("LlamaTokenizer", {}, (bos,)),
        ("GemmaTokenizerFast", {}, (bos,)),
        ("LlamaTokenizer", {"add_bos_token": False}, ()),
        ("LlamaTokenizer", {"bos_token": None}, ()),
    ):
        tokenizer(tmp_path, kind=kind, **more)
        assert resolve(tmp_path)[0] == expected, (kind, more)


def test_what_the_recipe_says(tmp_path):
    folder = tokenizer(tmp_path, template("<bos> $A"), bos_token={"content": "<s>"})
    ids = read_token_ids(folder)
    assert resolve(folder, "none") == ((), "as the recipe says")
    assert resolve(folder, "bos")[0] == (ids["<s>"],)
    assert resolve(folder, [3, 4])[0] == (3, 4)
    assert resolve(folder, adds=False)[0] == ()
    assert "cannot be read" in resolve(folder, ids=None)[1]
    (tmp_path / "config.json").write_text('{"bos_token_id": 7}')
    assert resolve(folder, "bos", ids=None)[0] == (7,)
    (tmp_path / "config.json").unlink()
    for written, more, message in (
        ("bos", {"ids": None}, "teachers.coder.prefix: 'bos' is not named by the files of hf:"),
        ([IDS], {}, f"holds the id {IDS}, and the embedding has {IDS} rows"),
        ("auto", {"rows": 8}, "teachers.coder.prefix: 'auto' holds the id"),
    ):
        with pytest.raises(RecipeError, match=message):
            resolve(folder, written, **more)
    content = json.loads((folder / "tokenizer.json").read_text())
    del content["post_processor"]["single"]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(RecipeError, match=r"teachers\.coder\.prefix: 'auto' cannot be known"):
        resolve(folder)
    assert words((2,), "x") == "reads id 2 in front of the text (x)"
    assert words((), "x") == "reads the text with nothing in front (x)"


MODELS = {
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=IDS, n_embd=32, n_layer=2, n_head=4, n_positions=64
    ),
}


def text(count=3, length=9):
    return torch.randint(IDS, (count, length), generator=torch.Generator().manual_seed(1))


def load(where, prefix, **more):
    return load_teacher(
        "coder", f"hf:{where}", params_dtype=torch.float32, device="cpu", prefix=prefix, **more
    )


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("prefix", [(5,), (5, 9)])
def test_states_are_those_behind_the_prefix(tmp_path, name, prefix):
    model = save(tmp_path, MODELS[name]())
    teacher = load(tmp_path, prefix)
    bare = load(tmp_path, (), resets_documents=True)
    assert isinstance(teacher, PrefixedTeacher)
    front = torch.tensor(prefix).expand(3, -1)
    with torch.no_grad():
        whole = model.base_model(torch.cat([front, text()], 1), output_hidden_states=True)
    last, middle = teacher.states(text(), layers=[0])
    ahead = len(prefix)
    torch.testing.assert_close(last, whole.last_hidden_state[:, ahead:])
    torch.testing.assert_close(middle, whole.hidden_states[1][:, ahead:])
    assert last.shape == (3, 9, teacher.hidden_size)
    assert torch.equal(teacher.head_weight(2, 9), bare.head_weight(2, 9))
    filled = PrefixedTeacher(bare, prefix, multiple=16)
    torch.testing.assert_close(filled.states(text())[0], last)


@pytest.mark.parametrize("name", MODELS)
def test_each_document_of_a_window_reads_its_own_prefix(tmp_path, name):
    """With positions and masks that start anew, each is as if it stood alone behind the prefix."""
    save(tmp_path, MODELS[name]())
    teacher = load(tmp_path, (5, 7), resets_documents=True)
    window, lengths = text(2, 9), (4, 3, 2)
    document = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
    positions = torch.cat([torch.arange(n) for n in lengths]).expand(2, -1)
    forbidden = (document[:, None] != document) | torch.ones(9, 9, dtype=torch.bool).triu(1)
    for multiple in (1, 16):
        own = PrefixedTeacher(teacher.bare, teacher.prefix, multiple)
        found = own.states(window, positions, forbidden[None, None])[0]
        start = 0
        for length in lengths:
            part = slice(start, start + length)
            alone = teacher.states(window[:, part])[0]
            torch.testing.assert_close(found[:, part], alone, rtol=1e-5, atol=1e-5)
            start += length


def test_a_folder_says_which_prefix_it_has(tmp_path):
    save(tmp_path, transformers.LlamaConfig(**SIZES))
    tokenizer(tmp_path, template("<bos> $A"))
    bos = read_token_ids(tmp_path)["<bos>"]
    info = check(tmp_path, student_of(tmp_path))
    assert (info.prefix, info.prefix_told) == ((bos,), "as its tokenizer does")
    assert info.trained_positions == 64


def student_of(folder):
    from megatron_moe_inject.teachers import StudentTokenizer

    return StudentTokenizer("HuggingFaceTokenizer", model=str(folder))
