"""Our entry on a model whose weights stand in a file: its logits, its checkpoint, and it ends.

Run by ``lane.run`` as a script, in one process. ARCHITECTURE names a folder (``architectures.py``):
its ``weights.safetensors`` has every parameter and persistent buffer of the model by its global
name (``host.model_parts.places``), its ``tokens.pt`` a batch. What the model makes of that is
written to ``megatron_logits.pt``, the model itself to ``--save``.
"""

import os
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file


def fill(chunk, weights: dict[str, torch.Tensor]) -> None:
    """Put the weights into a bare model chunk, which is whole on this rank.

    Raises:
        AssertionError: names what the model lacks and what the file does, and other shapes.
    """
    from megatron_moe_inject.host.model_parts import places

    state = {place.global_name: parameter for place, parameter in places(chunk)}
    kept = set(chunk.state_dict())
    state |= {name: buffer for name, buffer in chunk.named_buffers() if name in kept}
    # The convolution has a module of its own before 0.19.
    state = {name.replace(".conv1d_", ".conv1d."): tensor for name, tensor in state.items()}
    lacking, left = sorted(set(state) - set(weights)), sorted(set(weights) - set(state))
    assert not lacking + left, f"no weights for {lacking}; nothing takes {left}"
    with torch.no_grad():
        for name, tensor in state.items():
            value = weights[name]
            if tensor.shape[1:] == value.shape[1:] and tensor.shape[:1] > value.shape[:1]:
                padding = tensor.shape[0] - value.shape[0]  # rows of the vocabulary
                value = torch.cat([value, value.new_zeros(padding, *value.shape[1:])])
            assert tensor.shape == value.shape, (name, tensor.shape, value.shape)
            tensor.copy_(value)


def logits_of(chunk, tokens: torch.Tensor) -> list[torch.Tensor]:
    """``[b, s, v]`` of the model and of each layer of multi-token prediction, in that order."""
    kept = []
    hook = chunk.output_layer.register_forward_hook(
        lambda module, args, output: kept.append(output[0].transpose(0, 1).clone())
    )
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    mask = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).triu(1)[None, None]
    chunk.eval()
    with torch.no_grad():
        chunk(tokens, positions, mask, labels=tokens, loss_mask=torch.ones_like(tokens).float())
    chunk.train()
    hook.remove()
    return kept[-1:] + kept[:-1]


def main() -> None:
    from megatron.core.utils import unwrap_model
    from megatron.training import training
    from megatron.training.checkpointing import save_checkpoint

    from megatron_moe_inject.host import gpt_entry

    folder = Path(os.environ["ARCHITECTURE"])
    stock = training.setup_model_and_optimizer

    def setup_model_and_optimizer(*args, **kwargs):
        model, _, _ = stock(*args, **kwargs)
        (chunk,) = unwrap_model(model)
        fill(chunk, load_file(folder / "weights.safetensors"))
        torch.save(
            logits_of(chunk, torch.load(folder / "tokens.pt")), folder / "megatron_logits.pt"
        )
        save_checkpoint(1, model, None, None, 0)
        sys.exit()

    training.setup_model_and_optimizer = setup_model_and_optimizer
    gpt_entry.main()


if __name__ == "__main__":
    main()
