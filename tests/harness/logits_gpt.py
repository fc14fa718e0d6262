"""Our entry that writes the logits of fixed tokens once Megatron has loaded the model, then trains.

Run by ``lane.run`` as a script. LOGITS names a folder with ``tokens.pt`` ``[b, s]``; a pipeline
rank has one chunk of the model. ``megatron_logits.pt`` ``[b, s, v]`` is written, whole at any
layout. LOGITS_THEN says what follows: ``train`` (default), ``end``, or ``again``, which trains and
writes ``megatron_logits_after.pt`` of the trained model too.
"""

import functools
import os
from pathlib import Path

import torch
from megatron.core import parallel_state


def logits(chunk, tokens: torch.Tensor) -> torch.Tensor | None:
    """Of a model chunk in evaluation mode, which goes back to training; ``None`` but on the last
    stage. Each stage sends its states to the next one."""
    from megatron.core.utils import unwrap_model

    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    mask = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).triu(1)
    first, last = parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage()
    chunk.eval()
    with torch.no_grad():
        if not first:
            states = _empty_states(tokens)
            torch.distributed.recv(states, parallel_state.get_pipeline_model_parallel_prev_rank())
            unwrap_model(chunk).set_input_tensor(states)
        out = chunk(tokens, positions, mask[None, None], runtime_gather_output=True)
        if not last:
            torch.distributed.send(out, parallel_state.get_pipeline_model_parallel_next_rank())
    chunk.train()
    return out.float().clone() if last else None


def _empty_states(tokens: torch.Tensor) -> torch.Tensor:
    """``[s, b, h]``, or a tensor-parallel rank's share of ``s``, as stages hand it on."""
    from megatron.training import get_args

    args = get_args()
    share = args.tensor_model_parallel_size if args.sequence_parallel else 1
    return torch.empty(
        tokens.shape[1] // share, tokens.shape[0], args.hidden_size, dtype=args.params_dtype
    )


def write(chunk, folder: Path, name: str) -> None:
    """The first rank that has logits writes them."""
    out = logits(chunk, torch.load(folder / "tokens.pt"))
    if out is not None and _is_writer():
        torch.save(out, folder / name)


def _is_writer() -> bool:
    """The first rank of the last stage."""
    ranks = (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_data_parallel_rank(with_context_parallel=True),
    )
    return ranks == (0, 0)


def main() -> None:
    from megatron.training import training

    from megatron_moe_inject.host import gpt_entry

    stock = training.train
    folder, then = Path(os.environ["LOGITS"]), os.environ.get("LOGITS_THEN", "train")

    @functools.wraps(stock)
    def train(forward_step_func, model, *args, **kwargs):
        (chunk,) = model
        write(chunk, folder, "megatron_logits.pt")
        if then == "end":
            torch.distributed.barrier()
            raise SystemExit(0)
        trained = stock(forward_step_func, model, *args, **kwargs)
        if then == "again":
            write(chunk, folder, "megatron_logits_after.pt")
        return trained

    training.train = train
    gpt_entry.main()


if __name__ == "__main__":
    main()
