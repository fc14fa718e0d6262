"""Expert weights of a model that was published in FP8, as DeepSeek-V3 was.

A Hugging Face folder of safetensors files with E4M3 codes and, beside each weight, fp32 scales for
blocks of 128 x 128 (``weight_scale_inv``; DeepSeek-V3's README_WEIGHTS). Its layers are the blocks
of a GPT model, its experts are numbered as the student's. Read one tensor at a time; nothing but
safetensors is opened.

Shapes: h hidden, f width of an expert.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path

import torch

from megatron_moe_inject.experts.fp8 import blocks as fp8_blocks
from megatron_moe_inject.experts.fp8.weights import Fp8Weight
from megatron_moe_inject.host.errors import RecipeError, fail, listing
from megatron_moe_inject.host.layer_pattern import LayerPattern
from megatron_moe_inject.host.safetensors_file import DamagedFileError, SafetensorsFile
from megatron_moe_inject.host.safetensors_folder import read_json, weight_map

KEY = "train.fp8_source"
_INDEX = "model.safetensors.index.json"
_PROJECTIONS = {"linear_fc1": ("gate_proj", "up_proj"), "linear_fc2": ("down_proj",)}


class NativeFp8:
    """The published weights in a folder.

    Args:
        source: ``hf:/dir``.
        pattern: of a hybrid student, whose layers are those of the folder by its blocks.

    Raises:
        RecipeError: no such folder, or not a model in this form; or a pattern without blocks.
    """

    def __init__(self, source: str, pattern: LayerPattern | None = None) -> None:
        self.text = source
        self._pattern = pattern
        if pattern is not None and pattern.blocks is None:
            raise self._error(
                f"numbers the blocks of a GPT model, but {pattern.table()}",
                "leave fp8_source out to encode the loaded weights",
            )
        kind, _, path = source.partition(":")
        self._folder = Path(path.strip()).expanduser()
        if kind != "hf" or not path.strip():
            raise self._error("is no source", "write hf:/dir")
        if not self._folder.is_dir():
            raise self._error("is no directory on this machine", "name an existing directory")
        config = (
            read_json(self._folder, "config.json", self._error).get("quantization_config") or {}
        )
        blocks = config.get("weight_block_size")
        if config.get("quant_method") != "fp8" or blocks != [fp8_blocks.BLOCK] * 2:
            raise self._error(
                f"is not in FP8 by blocks of 128 x 128 (its quantization_config is {config})",
                "leave fp8_source out to encode the loaded weights",
            )
        self._files = weight_map(self._folder, self._error)

    def _error(self, problem: str, remedy: str) -> RecipeError:
        return fail(KEY, self.text, problem, remedy)

    def check(self, experts: Iterable[tuple[int, int]]) -> None:
        """RecipeError unless the folder names the weights of all these (layer, expert)."""
        missing = [
            name
            for layer, expert in experts
            for linear in _PROJECTIONS
            for name in self._names(layer, expert, linear)
            if name not in self._files
        ]
        if missing:
            raise self._error(f"lacks {listing(missing, 3)}", "name the folder of this student")

    def weight(self, layer: int, expert: int, linear: str) -> Fp8Weight:
        """``linear_fc1`` ``[2 f, h]`` (gate above up) or ``linear_fc2`` ``[h, f]``, on the host.

        Raises:
            RecipeError: a damaged file, or tensors of another form.
        """
        names = self._names(layer, expert, linear)
        codes, scales = (
            [self._tensor(n) for n in names[::2]],
            [self._tensor(n) for n in names[1::2]],
        )
        for name, code, scale in zip(names[::2], codes, scales, strict=True):
            fits = code.ndim == 2 and tuple(scale.shape) == fp8_blocks.block_shape(*code.shape)
            if code.dtype != fp8_blocks.CODES or not fits:
                raise self._error(
                    f"holds {name} as {code.dtype} {list(code.shape)} with scales "
                    f"{list(scale.shape)}", "codes are float8_e4m3fn, scales one for each block",
                )  # fmt: skip
        if len(codes) > 1 and codes[0].shape[0] % fp8_blocks.BLOCK:
            raise self._error(
                f"has experts of width {codes[0].shape[0]}, whose halves share blocks",
                "leave fp8_source out to encode the loaded weights",
            )
        # torch.cat has no kernel for FP8; bytes are bytes.
        whole = torch.cat([c.view(torch.uint8) for c in codes]).view(fp8_blocks.CODES)
        return Fp8Weight(whole, torch.cat(scales).float())

    def _names(self, layer: int, expert: int, linear: str) -> list[str]:
        """Each projection's weight and scales, in Megatron's order of rows."""
        block = layer if self._pattern is None else self._pattern.block_of(layer)
        base = f"model.layers.{block}.mlp.experts.{expert}"
        return [
            f"{base}.{projection}.{part}"
            for projection in _PROJECTIONS[linear]
            for part in ("weight", "weight_scale_inv")
        ]

    def _tensor(self, name: str) -> torch.Tensor:
        try:
            return self._open(self._files[name]).read(name)
        except (DamagedFileError, OSError, KeyError) as error:
            raise self._error(f"cannot give {name} ({error})", "complete the folder") from None

    @functools.lru_cache(maxsize=4)  # noqa: B019  one object a run
    def _open(self, file: str) -> SafetensorsFile:
        return SafetensorsFile.open(self._folder / file)

    def mismatch(self, layer: int, expert: int, linear: str) -> RecipeError:
        """The error for a checkpoint whose weights are not these, decoded."""
        return self._error(
            f"is not the model that --load holds: {linear} of expert {expert} in layer {layer} "
            "differs from its decoded codes",
            "name the folder that the checkpoint was converted from, or leave fp8_source out",
        )
