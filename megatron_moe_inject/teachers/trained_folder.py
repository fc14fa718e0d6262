"""Hugging Face folders as trainers leave them: whether one is a whole model, and its tokenizer.

A teacher that was trained elsewhere (TRL, NeMo-RL, Axolotl ...) comes as what that program has
saved, and not each of these is a model that can be loaded: an adapter that nobody has merged, a
folder of steps, shards of a sharded optimizer, a reward model. Each has an error with the way out.
Nothing here reads weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_moe_inject.host.errors import RecipeError, listing
from megatron_moe_inject.teachers.base import Source

_TOKENIZERS = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model")
_OTHER_PURPOSES = ("Classification", "QuestionAnswering", "RewardModel")
_MERGE = (
    "merge it and save the whole model in a folder of its own: peft's merge_and_unload(), then "
    "save_pretrained(OUT)"
)


def check_is_model(source: Source) -> None:
    """By the folder's files, whether it holds a model.

    Raises:
        RecipeError: it holds an adapter, or no ``config.json``; the remedy names the folder inside
            that has one.
    """
    if (source.path / "adapter_config.json").is_file():
        raise source.error("is an adapter, not a whole model", _MERGE)
    if not (source.path / "config.json").is_file():
        inside = _last_saved(source.path)
        raise source.error(
            "is no Hugging Face model folder: config.json is not there",
            f"name the one that was saved in it: hf:{source.path / inside}"
            if inside
            else "name a folder that save_pretrained() wrote",
        )


def _last_saved(folder: Path) -> str | None:
    """The subfolder with a model or adapter that has the highest number in its name."""

    def place(name: str) -> tuple[int, str]:
        number = re.search(r"(\d+)\D*$", name)
        return (int(number[1]) if number else -1, name)

    names = ("config.json", "adapter_config.json")
    saved = {path.parent.name for name in names for path in folder.glob(f"*/{name}")}
    return max(saved, key=place, default=None)


def check_purpose(source: Source, config: Any) -> None:
    """What the model was trained as, by ``architectures`` of its config.

    A reward model with a tied head would load: its words are those of the model that it began as.

    Raises:
        RecipeError: as a classifier or a reward model.
    """
    for name in config.architectures or ():
        if name.endswith(_OTHER_PURPOSES):
            raise source.error(
                f"is a {name}, which was not trained to predict text",
                "use the model that was trained as a causal language model, not its judge",
            )


def check_is_merged(source: Source, names: Iterable[str]) -> None:
    """By the names of stored tensors, whether a LoRA still stands beside the weights.

    Raises:
        RecipeError: it does.
    """
    unmerged = sorted(name for name in names if "lora_" in name)
    if unmerged:
        raise source.error(f"holds a LoRA beside its weights ({listing(unmerged, 2)})", _MERGE)


def without_safetensors(source: Source, name: str) -> RecipeError:
    """The error for a folder without ``name``: what it holds instead, and how to get it."""
    pickled = sorted(path.name for path in source.path.glob("pytorch_model*.bin"))
    if (source.path / "zero_to_fp32.py").is_file():
        return source.error(
            f"has no {name}, only what DeepSpeed keeps of a training run",
            f"python {source.path}/zero_to_fp32.py {source.path} OUT --safe_serialization, and "
            "copy config.json and the tokenizer's files to OUT",
        )
    return source.error(
        f"has no {name}{f', only {pickled[0]}' if pickled else ''}",
        "save the model with safetensors: from_pretrained(FOLDER), then save_pretrained(OUT)"
        if pickled
        else "save the model with safetensors: save_pretrained(folder)",
    )


def tokenizer_folder(folder: Path) -> Path:
    """Where the tokenizer of a model's folder stands.

    In the folder, or in ``tokenizer/`` inside it, where NeMo-RL's conversion to Hugging Face and
    diffusers put it; the folder itself where neither has one.
    """
    for place in (folder, folder / "tokenizer"):
        if any((place / name).is_file() for name in _TOKENIZERS):
            return place
    return folder
