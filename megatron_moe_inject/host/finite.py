"""Says where a step stopped being finite, when Megatron rejects it for a NaN or an infinity.

Megatron's checks (``--check-for-nan-in-loss-and-grad``) see the loss and the gradients and say no
more than that one of them is bad. ``FiniteWatch`` keeps one flag on the device for each thing
that it is shown, in the order in which it is computed, and reads them only when a step has failed:
no synchronisation, one pass over each tensor. In students that train in FP8 it is shown what each
decoder layer puts out as well.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable
from typing import Any

import torch

from megatron_moe_inject.host import compat
from megatron_moe_inject.host.megatron_types import Chunk, MegatronModule
from megatron_moe_inject.host.model_parts import (
    decoder_layers,
)
from megatron_moe_inject.host.step import Step, StepPart


class FiniteWatch(StepPart):
    """What is seen in a step, by name and micro-batch."""

    def __init__(self) -> None:
        self._iteration = 0
        self._said: int | None = None
        self._flags: dict[str, list[torch.Tensor]] = {}

    def begin(self, step: Step) -> None:
        """Forget the last step."""
        self._iteration = step.iteration
        self._flags = {}

    def failed(self, error: Exception) -> None:
        """Add to the error what was not finite in the step."""
        try:
            message = self.found()
        except RuntimeError:  # the device itself is gone
            return
        if message is not None:
            error.add_note(message)

    def end(self, step: Step, reports: Any) -> None:
        """Say what was not finite where Megatron's own check has rejected the step."""
        if compat.step_was_rejected():
            self.say()

    @torch.no_grad()
    def see(self, name: str, tensor: torch.Tensor) -> None:
        """Remember whether a tensor of any shape is finite. No synchronisation, no collective."""
        if tensor.numel() == 0:
            tensor = tensor.new_zeros(1)
        largest = torch.linalg.vector_norm(tensor.detach(), float("inf"))
        self._flags.setdefault(name, []).append(largest.isfinite())

    def see_gradient(self, name: str, tensor: torch.Tensor) -> None:
        """The same of the gradient that ``tensor`` gets."""
        if tensor.requires_grad:
            tensor.register_hook(functools.partial(self.see, name))

    def see_layers(self, chunks: Iterable[Chunk]) -> None:
        """From now on, what every decoder layer of the chunks puts out."""
        for chunk in chunks:
            for layer in decoder_layers(chunk):
                name = f"output of decoder layer {layer.layer_number - 1}"
                layer.register_forward_hook(functools.partial(self._layer_done, name))

    def _layer_done(self, name: str, module: MegatronModule, inputs: Any, output: Any) -> None:
        self.see(name, output[0] if isinstance(output, tuple) else output)

    def say(self) -> None:
        """Print what was found on standard error, once for a step that is repeated."""
        if self._said == self._iteration:
            return
        self._said = self._iteration
        message = self.found()
        if message is not None:
            print(message, file=sys.stderr, flush=True)

    def found(self) -> str | None:
        """What was not finite in this step, None if all was; waits for the device."""
        bad = []
        for name, flags in self._flags.items():
            where = [i for i, fine in enumerate(torch.stack(flags).tolist()) if not fine]
            if where:
                bad.append(f"{name} (micro-batch {', '.join(map(str, where))} of {len(flags)})")
        if not bad:
            return None
        seen = ", ".join(self._flags)
        return (
            f"megatron_moe_inject: not finite in step {self._iteration + 1} on this rank, first "
            f"things first: {'; '.join(bad)}. Looked at: {seen}"
        )
