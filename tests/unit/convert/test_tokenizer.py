"""An exported folder's tokenizer gives the ids that the checkpoint was trained with."""

import json
import shutil
from argparse import Namespace

import pytest
import torch

from megatron_moe_inject.cli import main
from megatron_moe_inject.convert.hf_folder import HfFolder
from megatron_moe_inject.convert.tokenizer import compare_tokenizers
from megatron_moe_inject.host.errors import RecipeError
from tests.harness.docs import ROOT
from tests.harness.hf_folder import write_folder
from tests.harness.tiny_folders import save_folder

QUICKSTART = ROOT / "examples" / "quickstart" / "tokenizer"


class Checkpoint:
    """As much of a stored checkpoint as is looked at."""

    def __init__(self, folder, model=None, kind="HuggingFaceTokenizer"):
        self.folder = folder
        args = Namespace(tokenizer_type=kind, tokenizer_model=str(model), vocab_size=60)
        self.common = {"args": args}


def _with_tokenizer(folder, change=lambda content: None):
    folder.mkdir(parents=True, exist_ok=True)
    content = json.loads((QUICKSTART / "tokenizer.json").read_text("utf-8"))
    change(content)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


def _swap(content):
    words = content["model"]["vocab"]
    one, other = [token for token, index in words.items() if index in (500, 700)]
    words[one], words[other] = words[other], words[one]


def _add(content):
    added = {"id": 2048, "content": "<new>", "special": True}
    content["added_tokens"].append({**content["added_tokens"][0], **added})


@pytest.fixture
def folder(tmp_path):
    write_folder(tmp_path / "hf", {"model.safetensors": {"a": torch.zeros(1)}})
    return HfFolder.open("--hf", _with_tokenizer(tmp_path / "hf"))


def test_the_same_tokenizer_says_nothing(folder, tmp_path):
    copy = _with_tokenizer(tmp_path / "copy")
    for path in (folder.path, copy):
        assert list(compare_tokenizers(folder, Checkpoint(tmp_path, path))) == []
    shutil.copytree(copy, tmp_path / "ck" / "tokenizer")
    assert list(compare_tokenizers(folder, Checkpoint(tmp_path / "ck", "/gone"))) == []


def test_an_id_of_another_text_is_refused(folder, tmp_path):
    other = _with_tokenizer(tmp_path / "other", _swap)
    with pytest.raises(RecipeError) as caught:
        list(compare_tokenizers(folder, Checkpoint(tmp_path, other)))
    text = str(caught.value)
    assert text.startswith(f"--hf: '{folder.path}' has another tokenizer than the run that wrote")
    assert f"(HuggingFaceTokenizer {other}); 2 ids differ: 500 is " in text
    assert text.endswith("name the folder that training began from")


def test_tokens_that_the_folder_lacks_are_told(folder, tmp_path):
    more = _with_tokenizer(tmp_path / "more", _add)
    (remark,) = compare_tokenizers(folder, Checkpoint(tmp_path, more))
    assert "1 tokens of training are not in the folder's tokenizer (2048 '<new>'); copy" in remark
    fewer = Checkpoint(tmp_path, folder.path)
    _with_tokenizer(folder.path, _add)
    assert list(compare_tokenizers(folder, fewer)) == []


def test_what_cannot_be_read_is_told(folder, tmp_path):
    for checkpoint, why in (
        (Checkpoint(tmp_path, "/gone"), "/gone is not there"),
        (Checkpoint(tmp_path, None, "NullTokenizer"), "NullTokenizer has no tokens"),
    ):
        (remark,) = compare_tokenizers(folder, checkpoint)
        assert remark.startswith("the tokenizer of training was not compared with the folder's: ")
        assert why in remark
    (folder.path / "tokenizer.json").write_text("{")
    (remark,) = compare_tokenizers(folder, Checkpoint(tmp_path, _with_tokenizer(tmp_path / "b")))
    assert "is damaged" in remark
    empty = Checkpoint(tmp_path)
    empty.common = {}
    assert list(compare_tokenizers(folder, empty)) == []


def _with_words(folder, words):
    vocabulary = {word: index for index, word in enumerate(words)}
    content = {"model": {"type": "WordLevel", "vocab": vocabulary}}
    (folder / "tokenizer.json").write_text(json.dumps(content))


def test_export_refuses_it(tmp_path, capsys):
    save_folder("qwen3_moe", tmp_path / "hf")
    _with_words(tmp_path / "hf", "abcdefgh")
    shutil.copytree(tmp_path / "hf", tmp_path / "other")
    _with_words(tmp_path / "other", "abcdefhg")
    assert main(["import-hf", str(tmp_path / "hf"), "--output", str(tmp_path / "ck")]) == 0
    command = ["export-hf", str(tmp_path / "ck"), "--output", str(tmp_path / "out"), "--hf"]
    assert main([*command, str(tmp_path / "other")]) == 2
    assert "has another tokenizer than the run that wrote" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([*command, str(tmp_path / "hf")]) == 0
