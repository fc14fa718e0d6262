"""Hugging Face folders made of a few tensors, as a test wants them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from megatron_moe_inject.convert.published import Mxfp4
from megatron_moe_inject.experts.fp8 import blocks as fp8_blocks
from megatron_moe_inject.host.safetensors_file import header_of, stored_bytes

CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 32}
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}


def write_file(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """One safetensors file."""
    plan = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    header, places = header_of(plan, {"format": "pt"})
    path.write_bytes(header + b"".join(stored_bytes(tensors[name]) for name in places))


def write_folder(
    folder: Path, files: Mapping[str, Mapping[str, torch.Tensor]], **config: object
) -> Path:
    """A folder with these tensors by file; with an index where there is more than one file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    for name, tensors in files.items():
        write_file(folder / name, tensors)
    if len(files) > 1:
        weight_map = {tensor: name for name, tensors in files.items() for tensor in tensors}
        size = sum(t.nbytes for tensors in files.values() for t in tensors.values())
        content = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    return folder


def in_fp8(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """A matrix as codes and fp32 scales, by the names that FP8 models have."""
    codes, scales = fp8_blocks.encode(weight, power_of_two=False)
    return {name: codes, f"{name}_scale_inv": scales}


def in_mxfp4(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """``[..., k, m]`` as blocks and scales, by the names that gpt-oss has."""
    *leading, k, m = weight.shape
    empty = {
        "_blocks": torch.zeros(*leading, m, k // 32, 16, dtype=torch.uint8),
        "_scales": torch.zeros(*leading, m, k // 32, dtype=torch.uint8),
    }
    return {name + ending: piece for ending, piece in Mxfp4().encode(weight, empty).items()}
