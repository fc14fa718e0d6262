"""Our GPT entry that publishes the student's experts in FP8, as DeepSeek-V3's are, and ends.

``TESTS_PUBLISH`` names the folder for codes and scales; the checkpoint that the run saves holds
what they decode to, as a conversion of the published model would.
"""

import functools
import json
import os
from pathlib import Path

import torch
from megatron.training import training
from safetensors.torch import save_file

from megatron_moe_inject.experts.fp8 import blocks as fp8_blocks
from megatron_moe_inject.host import compat, gpt_entry
from megatron_moe_inject.host.model_parts import (
    decoder_layers,
    local_weights,
)

PARTS = {"linear_fc1": ("gate_proj", "up_proj"), "linear_fc2": ("down_proj",)}


def publish(chunk: torch.nn.Module, folder: Path) -> None:
    """Replace every expert weight by what its codes mean, and write the codes."""
    tensors = {}
    for layer in decoder_layers(chunk):
        for linear, parts in PARTS.items():
            for expert, weight in enumerate(local_weights(getattr(layer.mlp.experts, linear))):
                # Scales that are no powers of two: encoded anew, the weights would be others.
                for name, rows in zip(parts, weight.detach().chunk(len(parts)), strict=True):
                    codes, scales = fp8_blocks.encode(rows, power_of_two=False)
                    rows.copy_(fp8_blocks.decode(codes, scales, rows.dtype))
                    base = f"model.layers.{layer.layer_number - 1}.mlp.experts.{expert}.{name}"
                    tensors |= {f"{base}.weight": codes, f"{base}.weight_scale_inv": scales}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "model.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    quantization = {"quant_method": "fp8", "weight_block_size": [fp8_blocks.BLOCK] * 2}
    (folder / "config.json").write_text(json.dumps({"quantization_config": quantization}))


def main() -> None:
    ends = training.train

    @functools.wraps(ends)
    def train(forward_step_func, model, *args, **kwargs):
        (chunk,) = compat.bare_chunks(model)
        publish(chunk, Path(os.environ["TESTS_PUBLISH"]))
        return ends(forward_step_func, model, *args, **kwargs)

    training.train = train
    gpt_entry.main()


if __name__ == "__main__":
    main()
