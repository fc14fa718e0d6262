"""Our entry that writes the logits of fixed tokens once Megatron has loaded the model, then trains.

Run by ``lane.run`` as a script. LOGITS names a folder with ``tokens.pt`` ``[b, s]``; the model is
whole on a pipeline rank. Rank 0 writes ``megatron_logits.pt`` ``[b, s, v]``, whole at any TP.
"""

import functools
import os
from pathlib import Path

import torch


def logits(chunk, tokens: torch.Tensor) -> torch.Tensor:
    """Of a model chunk in evaluation mode, which goes back to training."""
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    mask = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).triu(1)
    chunk.eval()
    with torch.no_grad():
        out = chunk(tokens, positions, mask[None, None], runtime_gather_output=True)
    chunk.train()
    return out.float().clone()


def main() -> None:
    from megatron.training import training

    from megatron_moe_inject.host import gpt_entry

    stock = training.train
    folder = Path(os.environ["LOGITS"])

    @functools.wraps(stock)
    def train(forward_step_func, model, *args, **kwargs):
        (chunk,) = model
        out = logits(chunk, torch.load(folder / "tokens.pt"))
        if torch.distributed.get_rank() == 0:
            torch.save(out, folder / "megatron_logits.pt")
        return stock(forward_step_func, model, *args, **kwargs)

    training.train = train
    gpt_entry.main()


if __name__ == "__main__":
    main()
