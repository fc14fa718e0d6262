"""The door of new experts: routers choose them more and more as training goes on.

A value v multiplies a new expert's unnormalised probability, that is, log v is added to its logit,
where a router chooses and where it weighs what it chose: at 0 no token gets there, at 1 the router
is the stored one. Routers with an expert bias add it to the score to choose by; behind the door it
is v times itself and 1 - v times what no score makes up for. Losses on routers (steering,
retention) see the logits without the door, so that what is trained is what is stored.

Experts that ``add-experts`` closed by a bias get the bias of their donors, or the mean of their
layer, when the student is loaded: from then on the door alone keeps them shut, and it opens. Until
it is open Megatron's update leaves their bias alone and takes their count for the mean one.

Nothing waits for the device, no collective runs, and v follows from the iteration alone, so that
every layout does the same and a run that is resumed goes on.

Shapes: l this rank's part of the sequence, b samples, E experts.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_moe_inject.host.megatron_types import Chunk, MegatronModule
from megatron_moe_inject.host.model_parts import routers
from megatron_moe_inject.host.wrap import Call, wrap_method
from megatron_moe_inject.routing.uses import DOOR_ROUTING

_SHUT = -1e4
"""What is added to the logit of an expert that is not to be chosen, in any floating type."""
_SHUT_ROOT = -60.0
"""The same where the score is a root, whose gradient at 0 is none."""
_BELOW = 1.25
"""How far below the least bias of old experts a shut one has its own; see ``experts.grow.starts``.
"""
_CLOSED = 1.0
"""How far below it a bias closes an expert by itself: the highest score of a sigmoid."""


@dataclass(frozen=True)
class Behind:
    """New experts of one layer behind the door.

    Attributes:
        experts: their ids.
        old: ids of the layer's experts that are not new.
        donors: whose bias each gets where its own has closed it, in the order of ``experts``;
            empty = the mean of the old ones.
    """

    experts: Sequence[int]
    old: Sequence[int]
    donors: Sequence[int] = ()


class RouterDoor:
    """The door in one router.

    Must be made before the student is loaded.

    Args:
        router: Megatron's ``TopKRouter``.
        behind: its experts.
        unlock: whether biases that closed them are taken away when the router is loaded.
    """

    def __init__(self, router: MegatronModule, behind: Behind, *, unlock: bool) -> None:
        self._router = router
        self._behind = behind
        experts = router.config.num_moe_experts
        self._new, self._old = _mask(behind.experts, experts), _mask(behind.old, experts)
        self._open = 1.0
        self._shift: torch.Tensor | None = None
        self._bias: torch.Tensor | None = None
        self._held: torch.Tensor | None = None
        wrap_method(router, DOOR_ROUTING, self._routing)
        if unlock:
            router.register_load_state_dict_post_hook(self._unlock)

    def set(self, value: float) -> None:
        """Open the door so far, in [0, 1], for the passes to come."""
        self._open, self._shift, self._bias = value, None, None
        if value >= 1:
            return
        device = self._router.weight.device
        self._new, self._old = self._new.to(device), self._old.to(device)
        root = self._router.config.moe_router_score_function == "sqrtsoftplus"
        shut = _SHUT_ROOT if root else _SHUT
        log = max(math.log(value), shut) if value > 0 else shut
        self._shift = self._new * log
        if self._router.expert_bias is not None:
            bias = self._router.expert_bias.float()
            shut_bias = self._least(bias) - _BELOW
            self._bias = torch.where(self._new, value * bias + (1 - value) * shut_bias, bias)

    def hold(self) -> None:
        """Remember the bias of the experts behind a door that is not open."""
        bias = self._router.expert_bias
        self._held = None if bias is None or self._open >= 1 else bias.clone()

    @torch.no_grad()
    def restore(self) -> None:
        """Give them the bias back that ``hold`` remembered."""
        if self._held is not None:
            bias = self._router.expert_bias
            bias.copy_(torch.where(self._new, self._held.to(bias.dtype), bias))
            self._held = None

    def _least(self, bias: torch.Tensor) -> torch.Tensor:
        """The least bias ``[E]`` of an old expert, a scalar."""
        return bias.masked_fill(~self._old, math.inf).min()

    def _routing(self, call: Call) -> tuple[torch.Tensor, torch.Tensor]:
        """``TopKRouter.routing``: logits ``[l, b, E]`` to gates and choices ``[l b, E]``."""
        if self._shift is None:
            return call()
        logits = call["logits"]
        with self._with_its_bias():
            routed = call(logits=logits + self._shift.to(logits.dtype))
        self._count_as_mean()
        return routed

    @contextlib.contextmanager
    def _with_its_bias(self) -> Iterator[None]:
        stored = self._router.expert_bias
        if self._bias is None:
            yield
            return
        self._router.expert_bias = self._bias
        try:
            yield
        finally:
            self._router.expert_bias = stored

    @torch.no_grad()
    def _count_as_mean(self) -> None:
        """So that old experts are balanced among themselves."""
        counts = self._router.local_tokens_per_expert
        if counts is not None:
            mean = (counts * self._old).sum() / self._old.sum()
            counts.copy_(torch.where(self._new, mean, counts))

    @torch.no_grad()
    def _unlock(self, router: MegatronModule, incompatible: Any) -> None:
        """After loading: a bias that closed an expert becomes its donor's, or the mean."""
        for bias, closed_by in ((router.expert_bias, _CLOSED), (router.bias, -_SHUT / 2)):
            if bias is None:
                continue
            old = bias[list(self._behind.old)].float()
            bound = old.min() - closed_by
            for number, expert in enumerate(self._behind.experts):
                donors = self._behind.donors
                value = bias[donors[number]].float() if donors else old.mean()
                bias[expert] = torch.where(bias[expert] <= bound, value, bias[expert].float())


class NewExpertsDoor:
    """All doors of a rank, which open together.

    Args:
        behind: by 0-based global layer.
        opened: how far, after so many optimizer steps.
        unlock: see ``RouterDoor``.
    """

    def __init__(
        self, behind: Mapping[int, Behind], opened: Callable[[int], float], *, unlock: bool
    ) -> None:
        self._behind = behind
        self._unlock = unlock
        self.opened = opened
        self._value = opened(0)
        self._doors: list[RouterDoor] = []

    def put_in(self, chunks: Sequence[Chunk]) -> None:
        """Into the routers of bare chunks, under whatever else is to stand around them."""
        for chunk in chunks:
            for layer, router in routers(chunk):
                if layer in self._behind:
                    door = RouterDoor(router, self._behind[layer], unlock=self._unlock)
                    self._doors.append(door)

    def set(self, value: float) -> None:
        """Open all so far."""
        self._value = value
        for door in self._doors:
            door.set(value)

    def begin(self, iteration: int) -> None:
        """Before a step: open them as far as its iteration says."""
        self.set(self.opened(iteration))
        for door in self._doors:
            door.hold()

    def end(self, *, training: bool) -> None:
        """After it: what training does to a bias does not concern experts that are not open."""
        for door in self._doors:
            if training:
                door.restore()

    @contextlib.contextmanager
    def as_begun(self) -> Iterator[None]:
        """Inside, as open as at the beginning of training: the original model's pass."""
        value = self._value
        self.set(self.opened(0))
        try:
            yield
        finally:
            self.set(value)


def _mask(ids: Sequence[int], experts: int) -> torch.Tensor:
    mask = torch.zeros(experts, dtype=torch.bool)
    mask[list(ids)] = True
    return mask
