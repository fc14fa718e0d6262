"""Megatron's arguments of a converted model, as its own parser makes them of the model's options.

A checkpoint carries them, so that ``--use-checkpoint-args`` and the plugin's teachers know the
architecture; ``flags.sh`` has the options for a launch script.
"""

from __future__ import annotations

import argparse
import shlex
from argparse import Namespace
from collections.abc import Mapping
from typing import Any, NoReturn

import torch

from megatron_moe_inject.convert.naming import PATTERN
from megatron_moe_inject.host.compat import megatron_version
from megatron_moe_inject.host.errors import RecipeError
from megatron_moe_inject.host.layer_pattern import LayerPattern


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise RecipeError(
            f"Megatron-Core {megatron_version()} does not take this model's options: {message}; "
            "use a later version"
        )


def option_words(flags: Mapping[str, Any]) -> list[str]:
    """Options as words of a command line."""
    words: list[str] = []
    for name, value in flags.items():
        words.append(name)
        if value is not True:
            words += map(str, value if isinstance(value, list | tuple) else [value])
    return words


def megatron_arguments(flags: Mapping[str, Any], rows: int, dtype: torch.dtype) -> Namespace:
    """Arguments of a run that would have trained the model on one rank.

    Args:
        flags: options of model and tokenizer.
        rows: of the embedding, with padding.
        dtype: of the weights.

    Raises:
        RecipeError: this Megatron lacks one of the options.
    """
    from megatron.training.arguments import add_megatron_arguments

    parser = add_megatron_arguments(_Parser(prog="moe-inject import-hf", allow_abbrev=False))
    args = parser.parse_args(option_words(flags))
    pattern = flags.get(PATTERN)
    if pattern:
        args.num_layers = LayerPattern(pattern).num_layers
    args.padded_vocab_size = rows
    args.params_dtype, args.bf16, args.fp16 = dtype, dtype == torch.bfloat16, False
    args.ckpt_format, args.use_dist_ckpt = "torch_dist", True
    args.rank, args.world_size, args.data_parallel_size = 0, 1, 1
    args.consumed_train_samples = args.consumed_valid_samples = args.skipped_train_samples = 0
    return args


def default_arguments() -> dict[str, Any]:
    """What Megatron's parser has where no option is given."""
    from megatron.training.arguments import add_megatron_arguments

    parser = add_megatron_arguments(_Parser(prog="moe-inject", allow_abbrev=False))
    return vars(parser.parse_args([]))


def shell_arrays(origin: str, arrays: Mapping[str, Mapping[str, Any]]) -> str:
    """A bash file that defines arrays of options, one option to a line."""
    lines = [f"# Megatron's options of {shlex.quote(origin)}", ""]
    for name, flags in arrays.items():
        lines.append(f"{name}=(")
        for flag, value in flags.items():
            lines.append("  " + " ".join(map(shlex.quote, option_words({flag: value}))))
        lines += [")", ""]
    return "\n".join(lines)
