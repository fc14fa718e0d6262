"""What of a checkpoint has an axis, or a number in its name, for a layer's experts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from megatron_moe_inject.host.model_parts import is_own

_OPTIMIZER = re.compile(r"^(chained_\d+\.)?optimizer\.")
_STATE = re.compile(r"^(?:chained_\d+\.)?optimizer\.state\.(\w+)\.(.*)$")
_EXPERT = re.compile(r"^(.*\.mlp\.experts\.experts\.)(?:(\d+)\.)?(linear_fc[12]\..*)$")
_ROUTER = re.compile(r"^(.*)\.mlp\.router\.(weight|bias|expert_bias)$")
_OBJECT = re.compile(r"^(.*)/shard_([\d.]+)_([\d.]+)$")
_LAYER = re.compile(r"(^|\.)layers\.(\d+)\.")
_STACKED = re.compile(r"(^|\.)layers\.(?!\d)")
_OTHER = re.compile(r"\.mlp\.(experts|router)\.")
PREDICTION = "mtp."

Layer = tuple[bool, int]
"""Whether a layer is one of multi-token prediction, and its 0-based number there."""


@dataclass(frozen=True)
class ExpertName:
    """A stored tensor, or object, that belongs to experts or their router.

    Attributes:
        name: under which it is stored; of an object without its place.
        key: the model tensor that it is, or is the optimizer's state of.
        state: of the optimizer, such as ``exp_avg``; ``None`` of the model.
        kind: ``expert``, or the router's ``weight``, ``bias`` or ``expert_bias``.
        expert: the id in the name, where Megatron stores each expert alone.
    """

    name: str
    key: str
    state: str | None
    kind: str
    expert: int | None

    @property
    def of_prediction(self) -> bool:
        """Whether it is of layers of multi-token prediction."""
        return self.key.startswith(PREDICTION)

    @property
    def layers_axis(self) -> bool:
        """Whether the first axis numbers layers."""
        return bool(_STACKED.search(self.key))

    @property
    def axis(self) -> int | None:
        """The axis that numbers experts; ``None`` where the name does."""
        return None if self.expert is not None else int(self.layers_axis)

    def layer(self, index: int = 0) -> Layer:
        """The layer of a slice: that of the name, or the index on the first axis."""
        number = _LAYER.search(self.key)
        return self.of_prediction, index if number is None else int(number[2])

    def of(self, expert: int) -> str:
        """The name of another expert's, where names have ids."""
        if self.expert is None:
            return self.name
        before, _, behind = self.name.rpartition(f".experts.experts.{self.expert}.")
        return f"{before}.experts.experts.{expert}.{behind}"


def is_of_optimizer(name: str) -> bool:
    """Whether something stored is the optimizer's."""
    return bool(_OPTIMIZER.match(name))


def state_of(name: str) -> tuple[str, str] | None:
    """Which state of which of the model's tensors a stored tensor of the optimizer is; ``None`` of
    others."""
    match = _STATE.match(name)
    return None if match is None else (match[1], match[2])


def expert_name(name: str) -> ExpertName | None:
    """What a stored tensor is of experts or routers, ``None`` of anything else."""
    state, key = state_of(name) or (None, name)
    expert = _EXPERT.match(key)
    if expert is not None:
        number = None if expert[2] is None else int(expert[2])
        return ExpertName(name, key, state, "expert", number)
    router = _ROUTER.match(key)
    return None if router is None else ExpertName(name, key, state, router[2], None)


@dataclass(frozen=True)
class ExpertObject:
    """An object of one expert, such as ``_extra_state``, with its place in its name.

    Attributes:
        of: whose.
        place, sizes: indices and sizes of the axes that number layers and experts.
    """

    of: ExpertName
    place: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def layer(self) -> Layer:
        """Its layer."""
        return self.of.layer(self.place[0])

    @property
    def expert(self) -> int:
        """Its expert."""
        return self.place[-1] if self.of.expert is None else self.of.expert

    @property
    def name(self) -> str:
        """The stored name."""
        return self._named(self.of.name, self.place, self.sizes)

    def moved(self, expert: int, experts: int) -> str:
        """The stored name for another expert of a layer of ``experts``."""
        if self.of.expert is not None:
            return self._named(self.of.of(expert), self.place, self.sizes)
        return self._named(self.of.name, (*self.place[:-1], expert), (*self.sizes[:-1], experts))

    @staticmethod
    def _named(name: str, place: tuple[int, ...], sizes: tuple[int, ...]) -> str:
        numbers = "_".join(".".join(map(str, n)) for n in (place, sizes))
        return f"{name}/shard_{numbers}"


def expert_object(name: str) -> ExpertObject | None:
    """What a stored object is of experts, ``None`` of anything else."""
    match = _OBJECT.match(name)
    of = None if match is None else expert_name(match[1])
    if match is None or of is None or of.kind != "expert":
        return None
    place, sizes = (tuple(map(int, match[i].split("."))) for i in (2, 3))
    return ExpertObject(of, place, sizes)


def unknown_names(names: Iterable[str]) -> list[str]:
    """Names of tensors of experts and routers that nobody here knows."""
    return sorted(
        name
        for name in names
        if _OTHER.search(name) and not is_own(name) and expert_name(name) is None
    )


def moe_layers(shapes: Mapping[str, tuple[int, ...]]) -> list[Layer]:
    """Layers that have a router, those of multi-token prediction last.

    Args:
        shapes: of the model's tensors, by name.
    """
    layers: set[Layer] = set()
    for name, size in shapes.items():
        known = expert_name(name)
        if known is not None and known.state is None and known.kind == "weight":
            stacked = size[0] if known.layers_axis else 1
            layers |= {known.layer(index) for index in range(stacked)}
    return sorted(layers)
