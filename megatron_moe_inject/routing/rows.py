"""Routers of which only the target experts' rows train.

A row of a router's matrix gives one expert's logit. The rows that train are a parameter of their
own, so the rest has no gradient, no optimizer state and no decay: the stock matrix stays frozen,
and the trained rows' logits take the place of its columns. Whenever the state of the router is
read, the rows are written into the stock matrix first, so checkpoints hold the trained router under
the stock name; beside it, under a name that plain Megatron does not ask for, are the rows, because
the optimizer's state belongs to them.

Shapes: l this rank's part of the sequence, b samples, h hidden, E experts, r rows that train.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from megatron_moe_inject.experts.train.freeze import FreezePolicy
from megatron_moe_inject.host.errors import (
    RecipeError,
    listing,
)
from megatron_moe_inject.host.megatron_types import Chunk, MegatronModule
from megatron_moe_inject.host.model_parts import (
    ROWS,
    routers,
)
from megatron_moe_inject.host.own_keys import (
    with_own_keys,
)
from megatron_moe_inject.host.stored_checkpoint import checkpoint_to_load
from megatron_moe_inject.host.wrap import Call, wrap_method
from megatron_moe_inject.recipe.run_part import BuiltStudent, RunContext, RunPart
from megatron_moe_inject.routing.uses import ROWS_GATING, ROWS_SHARDED

_ROW_IDS = f"{ROWS}_ids"


class TrainedRows:
    """The rows of one router that train.

    Must be made before DDP and the optimizer, after the freezing policy was applied.

    Args:
        router: Megatron's, frozen; its start is what was built or is loaded.
        layer: 0-based global layer.
        experts: global ids of the rows.
        stored: whether the checkpoint to be loaded holds rows.
    """

    def __init__(
        self, router: MegatronModule, layer: int, experts: Collection[int], *, stored: bool
    ) -> None:
        self._router = router
        self._layer = layer
        self.stored = stored
        weight = router.weight
        ids = torch.tensor(sorted(experts), device=weight.device)
        rows: Any = torch.nn.Parameter(weight.detach()[ids].clone())
        rows.sequence_parallel = weight.sequence_parallel
        router.register_parameter(ROWS, rows)
        # A buffer, since Megatron moves the model to its device after this.
        router.register_buffer(_ROW_IDS, ids, persistent=False)
        router.trained_row_ids = sorted(experts)
        wrap_method(router, ROWS_GATING, self._gating)
        wrap_method(router, ROWS_SHARDED, self._sharded_state_dict)
        router.register_state_dict_pre_hook(self._write_rows)
        router.register_load_state_dict_post_hook(self._read_rows)

    @property
    def _rows(self) -> torch.nn.Parameter:
        return self._router._parameters[ROWS]

    @property
    def _ids(self) -> torch.Tensor:
        return self._router._buffers[_ROW_IDS]

    def _gating(self, call: Call) -> torch.Tensor:
        """``Router.gating``: states ``[l, b, h]`` to logits ``[l, b, E]``."""
        from megatron.core.transformer.moe.moe_utils import router_gating_linear

        logits = call()
        bias = None if self._router.bias is None else self._router.bias[self._ids]
        row_logits = router_gating_linear(call["input"], self._rows, bias, logits.dtype)
        return logits.index_copy(-1, self._ids, row_logits)

    @torch.no_grad()
    def _write_rows(self, *_: Any) -> None:
        self._router.weight.data[self._ids] = self._rows.data

    @torch.no_grad()
    def _read_rows(self, router: MegatronModule, incompatible: Any) -> None:
        self._rows.data.copy_(self._router.weight.data[self._ids])
        if not self.stored:
            keys = [key for key in incompatible.missing_keys if key.endswith(f"router.{ROWS}")]
            for key in keys:
                incompatible.missing_keys.remove(key)

    def _sharded_state_dict(self, call: Call) -> dict[str, Any]:
        """Stock's, with the rows under a key of their own, or without them."""
        self._write_rows()
        state, prefix = call(), call["prefix"]
        rows = state.pop(f"{prefix}{ROWS}")
        if self.stored:
            # Megatron's block renames its layers' keys by their prefix.
            key = f"{prefix}{ROWS}.{self._layer}"
            state[f"{prefix}{ROWS}"] = replace(with_own_keys(rows), key=key)
        return state


class RouterRows(RunPart):
    """The trained rows of a student.

    Raises:
        RecipeError: a checkpoint format that cannot hold them, or a checkpoint to resume with other
            rows.
    """

    def __init__(self, run: RunContext) -> None:
        self._experts = run.need(FreezePolicy).rows
        self._args = run.args
        self._all: list[TrainedRows] = []
        self._stored = self._found_in_checkpoint()

    def before_ddp(self, chunks: Sequence[Chunk]) -> None:
        """Give the routers of bare chunks their rows."""
        for chunk in chunks:
            for layer, router in routers(chunk):
                if layer in self._experts and not router.weight.requires_grad:
                    rows = TrainedRows(router, layer, self._experts[layer], stored=self._stored)
                    self._all.append(rows)

    def loaded(self, student: BuiltStudent) -> None:
        """From now on checkpoints hold the rows."""
        for rows in self._all:
            rows.stored = True

    def _found_in_checkpoint(self) -> bool:
        used = self._args.save or self._args.load
        if used and self._args.ckpt_format != "torch_dist":
            raise RecipeError(
                f"train.router_rows: --ckpt-format {self._args.ckpt_format} cannot leave rows out "
                "where plain Megatron loads the student; use torch_dist or train.router"
            )
        checkpoint = checkpoint_to_load(self._args)
        if checkpoint is None or not checkpoint.resumes:
            return False
        stored = checkpoint.shapes(f".router.{ROWS}.")
        by_layer = {int(name.rpartition(".")[2]): shape for name, shape in stored.items()}
        needed = {layer: (len(ids), self._args.hidden_size) for layer, ids in self._experts.items()}
        if not by_layer.items() <= needed.items():
            raise RecipeError(
                f"train.router_rows: {checkpoint.folder} holds {_described(by_layer)}, but now "
                f"{_described(needed)} train; keep what the run began with, or start an injection "
                "of its own with --finetune"
            )
        return bool(by_layer)


def _described(shapes: Mapping[int, tuple[int, ...]]) -> str:
    return listing((f"{shape[0]} rows of layer {layer}" for layer, shape in shapes.items()), 4)


def original_weight(
    router: MegatronModule, original: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """The original router's matrix ``[E, h]``, whatever of it trains.

    Args:
        router: Megatron's.
        original: gives the original value of a parameter.
    """
    weight = original(router.weight)
    if (rows := router._parameters.get(ROWS)) is not None:
        return weight.index_copy(0, router._buffers[_ROW_IDS], original(rows))
    return weight
