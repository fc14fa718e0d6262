"""A published model's folder, with small sizes and random weights; and a dense teacher for it.

``config.json`` is the published file (``tests/unit/convert/configs``) but for the sizes that a card
names, in the words that it was published in. Transformers makes the weights and names the tensors
as published ones are; what was published in FP8 or MXFP4 is so here.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from megatron_moe_inject.convert.hf_folder import HfFolder
from tests.harness.hf_folder import in_fp8, in_mxfp4, write_file

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "tests" / "unit" / "convert" / "configs"
TOKENIZER = ROOT / "examples" / "quickstart" / "tokenizer"
VOCABULARY = 2048
"""Pieces of that tokenizer."""
_WEIGHTS = "model.safetensors"
_READING = 40
"""Steps of a teacher on its text."""
_IN_FP8 = re.compile(r"\.(self_attn|mlp)\..*_proj(_with_mqa)?\.weight$|_a_proj|_b_proj")
_IN_MXFP4 = re.compile(r"\.experts\.(gate_up|down)_proj$")
"""Tensors that DeepSeek-V3 and gpt-oss were published with in FP8 and MXFP4."""
_COMMON = {
    "vocab_size": VOCABULARY,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
    "torch_dtype": "float32",
}
_TEACHER = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    **_COMMON,
}


def published(name: str) -> dict[str, Any]:
    """The published ``config.json`` of a model of ``examples/models``."""
    return json.loads((CONFIGS / f"{name}.json").read_text())


def make_student(name: str, folder: Path, sizes: Mapping[str, Any]) -> None:
    """Write a model of an architecture, ``sizes`` in the place of its own.

    Raises:
        AssertionError: one of the sizes is no key of the published file.
    """
    full = published(name)
    assert sizes.keys() <= full.keys(), sizes.keys() - full.keys()
    _make(folder, {**full, **_COMMON, **sizes})
    quantization = full.get("quantization_config")
    if quantization is not None:
        _quantise(folder, quantization["quant_method"])


def make_teacher(folder: Path, text: Path) -> None:
    """Write a dense model with the students' tokenizer that has read a little of a text.

    Args:
        text: prefix of Megatron's token files.
    """
    import transformers
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    _make(folder, _TEACHER)
    documents = IndexedDataset(str(text))
    windows = [torch.from_numpy(documents[i][:64].astype(int)) for i in range(len(documents))]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(_READING):
        batch = torch.stack(windows[8 * step % len(windows) :][:8])
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    save_file(
        {k: v.contiguous() for k, v in model.state_dict().items() if k != "lm_head.weight"},
        folder / _WEIGHTS,
        {"format": "pt"},
    )


def config_of(folder: Path):
    """Of a folder, as transformers reads it."""
    import transformers

    return transformers.AutoConfig.from_pretrained(folder, local_files_only=True)


def logits_of(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """``[b, s, v]`` of the model in a folder, by transformers in float32.

    A quantised folder's weights are decoded by this package, as transformers decodes them
    (``tests/unit/convert/test_in_transformers.py``) but for FP8, which it does in whole blocks of
    128 alone; a small model has none.
    """
    import transformers

    keys = json.loads((folder / "config.json").read_text())
    if keys.pop("quantization_config", None) is not None:
        stored = HfFolder.open("--hf", folder)
        tensors = {name: stored.read(name, dtype=torch.float32) for name in stored.names}
        with tempfile.TemporaryDirectory() as plain:
            write_file(Path(plain, _WEIGHTS), tensors)
            Path(plain, "config.json").write_text(json.dumps(keys))
            return logits_of(Path(plain), tokens)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        return model(tokens).logits


def _make(folder: Path, keys: Mapping[str, Any]) -> None:
    import transformers

    folder.mkdir(parents=True)
    for path in TOKENIZER.iterdir():
        shutil.copy(path, folder)
    content = json.dumps(keys, indent=1)
    (folder / "config.json").write_text(content)
    config = config_of(folder)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).float()
    _stir(model)
    model.save_pretrained(folder)
    (folder / "config.json").write_text(content)
    depths = keys.get("num_nextn_predict_layers", 0)
    if depths:
        stored = load_file(folder / _WEIGHTS)
        for depth in range(depths):
            stored |= _prediction(stored, keys["num_hidden_layers"], depth)
        save_file(stored, folder / _WEIGHTS, {"format": "pt"})


def _quantise(folder: Path, method: str) -> None:
    """Store as the published model does what that has in FP8 or MXFP4, and the rest in bfloat16."""
    stored = {}
    for name, tensor in load_file(folder / _WEIGHTS).items():
        if method == "fp8" and _IN_FP8.search(name):
            stored |= in_fp8(name, tensor)
        elif method == "mxfp4" and _IN_MXFP4.search(name):
            stored |= in_mxfp4(name, tensor)
        else:
            stored[name] = tensor if "correction_bias" in name else tensor.bfloat16()
    write_file(folder / _WEIGHTS, stored)


def _stir(model: torch.nn.Module) -> None:
    """Weights wide enough for every part to count, norms and biases of their own."""
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "inv_freq" in name:
                continue
            if tensor.dim() < 2:
                tensor.add_(0.1 * torch.randn_like(tensor))
            else:
                tensor.normal_(std=1 / math.sqrt(tensor.shape[-1]))


def _prediction(
    stored: Mapping[str, torch.Tensor], layers: int, depth: int
) -> dict[str, torch.Tensor]:
    """Tensors of a depth of multi-token prediction, which transformers leaves out, by DeepSeek's
    names: a layer like the last one, what stands around it, copies of embedding and head."""
    last, own = f"model.layers.{layers - 1}.", f"model.layers.{layers + depth}."
    (hidden,) = stored["model.norm.weight"].shape
    layer = {
        own + name.removeprefix(last): tensor + 0.1 * tensor.std() * torch.randn_like(tensor)
        for name, tensor in stored.items()
        if name.startswith(last)
    }
    around = {
        "enorm.weight": 1 + 0.1 * torch.randn(hidden),
        "hnorm.weight": 1 + 0.1 * torch.randn(hidden),
        "eh_proj.weight": torch.randn(hidden, 2 * hidden) / math.sqrt(2 * hidden),
        "shared_head.norm.weight": 1 + 0.1 * torch.randn(hidden),
        "embed_tokens.weight": stored["model.embed_tokens.weight"].clone(),
        "shared_head.head.weight": stored["lm_head.weight"].clone(),
    }
    return layer | {own + name: tensor for name, tensor in around.items()}
