"""Folders as trainers leave them: what is no whole model has one error with the way out."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_moe_inject.host.errors import RecipeError
from megatron_moe_inject.teachers import StudentTokenizer
from megatron_moe_inject.teachers.base import Source
from megatron_moe_inject.teachers.huggingface import read_files
from megatron_moe_inject.teachers.trained_folder import tokenizer_folder
from tests.harness.huggingface import IDS, SIZES, check, save

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tied")
    save(folder, transformers.LlamaConfig(**SIZES, tie_word_embeddings=True))
    return folder


@pytest.fixture
def copy(tied, tmp_path) -> Path:
    return Path(shutil.copytree(tied, tmp_path / "copy"))


def word_tokenizer(swapped: tuple[int, int] = (0, 0)):
    """A tokenizer of transformers with a word for each id, two of them in each other's place."""
    from tokenizers import Tokenizer, models

    words = [f"w{index}" for index in range(IDS)]
    first, second = swapped
    words[first], words[second] = words[second], words[first]
    vocab = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="w0"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w1")


def test_an_adapter_that_peft_saved_says_how_to_merge(tied, tmp_path):
    peft = pytest.importorskip("peft")
    model = transformers.AutoModelForCausalLM.from_pretrained(tied)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "config.json").exists()
    with pytest.raises(RecipeError, match=r"is an adapter.*folder of its own.*merge_and_unload"):
        check(tmp_path / "adapter")
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert check(tmp_path / "merged").num_layers == 2


def test_a_lora_beside_the_weights_is_no_merged_model(tied, copy):
    peft = pytest.importorskip("peft")
    model = transformers.AutoModelForCausalLM.from_pretrained(tied)
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["q_proj"]), model)
    stored = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    stored.pop("lm_head.weight")
    save_file(stored, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RecipeError, match=r"holds a LoRA beside its weights \(.*lora_A.*merge"):
        check(copy)


def test_a_folder_of_steps_names_its_last(copy):
    run = copy.parent / "run"
    for step in (20, 100, 80):
        shutil.copytree(copy, run / f"checkpoint-{step}")
    with pytest.raises(RecipeError, match=r"config\.json is not there; name .*run/checkpoint-100$"):
        check(run)
    assert check(run / "checkpoint-100").num_layers == 2


def test_a_reward_model_is_no_teacher(tmp_path):
    """With a tied head it would load: as the model that it began as, its body bent to judge."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, tie_word_embeddings=True, num_labels=1)
    judge = transformers.AutoModelForSequenceClassification.from_config(config)
    judge.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    with pytest.raises(RecipeError, match=r"is a LlamaForSequenceClassification, .*not its judge"):
        check(tmp_path)


def test_shards_of_deepspeed_say_how_to_join_them(copy):
    (copy / "model.safetensors").unlink()
    (copy / "global_step20").mkdir()
    (copy / "zero_to_fp32.py").write_text("")
    with pytest.raises(RecipeError, match=r"only what DeepSpeed keeps.*zero_to_fp32\.py .* OUT"):
        check(copy)


def test_what_a_trainer_keeps_beside_is_not_taken_for_weights(copy):
    """``training_args.bin`` is a pickle that every Trainer leaves; it is not opened."""
    (copy / "training_args.bin").write_bytes(b"no pickle")
    assert check(copy).num_layers == 2
    (copy / "model.safetensors").unlink()
    with pytest.raises(RecipeError, match=r"has no model\.safetensors; save the model with"):
        check(copy)


def test_a_tokenizer_in_a_folder_of_its_own_is_compared(copy, tmp_path):
    """NeMo-RL's documentation copies ``policy/tokenizer`` into the converted folder as it is."""
    word_tokenizer().save_pretrained(tmp_path / "student")
    student = StudentTokenizer("HuggingFaceTokenizer", str(tmp_path / "student"))
    assert tokenizer_folder(copy) == copy
    assert "tokens not compared" in check(copy, student).vocabulary
    word_tokenizer().save_pretrained(copy / "tokenizer")
    assert tokenizer_folder(copy) == copy / "tokenizer"
    assert f"the same {IDS} tokens" in check(copy, student).vocabulary
    read = read_files(Source("coder", f"hf:{copy}", "hf", copy))
    assert copy / "tokenizer" / "tokenizer.json" in read
    shutil.rmtree(copy / "tokenizer")
    word_tokenizer(swapped=(3, 5)).save_pretrained(copy / "tokenizer")
    with pytest.raises(RecipeError, match=r"has another tokenizer, 2 ids differ: id 3 is 'w3'"):
        check(copy, student)


def test_a_tokenizer_that_was_resaved_with_a_pad_token_is_the_same(copy, tmp_path):
    """TRL pads with the end of text, others add a token and a row; neither changes an id."""
    word_tokenizer().save_pretrained(tmp_path / "student")
    student = StudentTokenizer("HuggingFaceTokenizer", str(tmp_path / "student"))
    padded = transformers.AutoTokenizer.from_pretrained(tmp_path / "student")
    padded.pad_token = padded.eos_token
    padded.chat_template = "{{ messages }}"
    padded.save_pretrained(copy)
    assert f"the same {IDS} tokens" in check(copy, student).vocabulary
    padded.add_special_tokens({"pad_token": "<pad>"})
    padded.save_pretrained(copy)
    model = transformers.AutoModelForCausalLM.from_pretrained(copy)
    model.resize_token_embeddings(len(padded), pad_to_multiple_of=64)
    model.save_pretrained(copy)
    found = check(copy, student)
    assert found.vocab_rows == 128
    assert json.loads((copy / "config.json").read_text())["vocab_size"] == 128
    assert "'<pad>') that the student lacks take no part" in found.vocabulary
