"""New experts from a dense teacher's feed-forward: its neurons, shared out between them.

A neuron is a row of the first matrix (of gate and up, where it is gated) and a column of the
second. The feed-forward is the sum of its neurons, so that an expert made of some of them computes
their part of it. What that means depends on the residual stream: a teacher that began from the same
weights as the student (the dense model that it was upcycled from, trained on) reads and writes the
student's own, any other one does not, and its neurons are then a start among others.

Shapes: h hidden, f neurons of an expert, F of the teacher's feed-forward.
"""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch

from megatron_moe_inject.host.checkpoint_place import CheckpointPlace
from megatron_moe_inject.host.errors import RecipeError, fail
from megatron_moe_inject.host.torch_dist import Piece, TorchDistCheckpoint

FROM_TEACHER = "teacher:"
"""What ``--weights`` begins with, in front of a source as recipes have them."""
_WEIGHTS = "--weights"
_NAME = re.compile(r"^decoder\.layers\.(?:(\d+)\.)?mlp\.(linear_fc[12]\.(?:weight|bias))$")
_ACTIVATION = (
    "swiglu", "squared_relu", "quick_geglu", "openai_gelu", "glu_linear_offset",
    "activation_func_clamp_value",
)  # fmt: skip
_GELU_GATES = "megatron_moe_inject.host.gelu_gates"


class FeedForwards(Protocol):
    """The feed-forwards of a dense model, in the order of its layers.

    Attributes:
        args: Megatron's of it.
        layers: how many there are.
    """

    args: Namespace
    layers: int

    def shape(self, layer: int, name: str) -> tuple[int, ...] | None:
        """Of what ``read`` gives."""
        ...

    def read(self, layer: int, name: str) -> torch.Tensor | None:
        """A tensor of one, such as ``linear_fc1.weight`` ``[F or 2 F, h]``, gate over up;
        ``None`` where it has none.

        Raises:
            RecipeError: it cannot be read.
        """
        ...


class StoredFeedForwards:
    """Of a ``torch_dist`` checkpoint, a GPT or a hybrid model.

    Args:
        place: of the checkpoint.

    Raises:
        RecipeError: it cannot be read, or has no dense feed-forward.
    """

    def __init__(self, place: CheckpointPlace) -> None:
        self._checkpoint: TorchDistCheckpoint = place.open()
        self.args = self._checkpoint.args
        self._places: dict[tuple[int, str], tuple[str, tuple[int, ...]]] = {}
        for name, stored in self._checkpoint.tensors.items():
            match = _NAME.match(name)
            if match is None:
                continue
            stacked = match[1] is None
            for layer in range(stored.size[0]) if stacked else [int(match[1])]:
                self._places[layer, match[2]] = name, ((layer,) if stacked else ())
        self._numbers = sorted({layer for layer, _ in self._places})
        if not self._numbers:
            raise place.error("has no dense feed-forward", "name a dense model's checkpoint")
        self.layers = len(self._numbers)

    def shape(self, layer: int, name: str) -> tuple[int, ...] | None:
        """See ``FeedForwards``."""
        place = self._places.get((self._numbers[layer], name))
        if place is None:
            return None
        return tuple(self._checkpoint.tensors[place[0]].size)[len(place[1]) :]

    def read(self, layer: int, name: str) -> torch.Tensor | None:
        """See ``FeedForwards``."""
        shape = self.shape(layer, name)
        if shape is None:
            return None
        key, place = self._places[self._numbers[layer], name]
        stored = self._checkpoint.tensors[key]
        value = torch.empty(shape, dtype=stored.properties.dtype)
        offset = (*place, *(0 for _ in shape))
        self._checkpoint.read([Piece(key, tuple(stored.size), offset, value)])
        return value


Opens = Callable[[str, Path], FeedForwards]
"""Opens a teacher, of the flag that names it and its folder."""


def opened(weights: str, kinds: Mapping[str, Opens]) -> FeedForwards:
    """The teacher that ``--weights`` names.

    Args:
        weights: the flag's value.
        kinds: by the word in front of a folder, beside ``megatron``.

    Raises:
        RecipeError: no such kind, or it cannot be read.
    """
    kind, colon, path = weights.removeprefix(FROM_TEACHER).partition(":")
    known = {"megatron": _stored, **kinds}
    if not colon or not path or kind not in known:
        words = " or ".join(f"{FROM_TEACHER}{word}:/dir" for word in known)
        raise fail(_WEIGHTS, weights, "names no dense teacher's folder", f"write {words}")
    return known[kind](_WEIGHTS, Path(path))


def _stored(flag: str, path: Path) -> FeedForwards:
    return StoredFeedForwards(CheckpointPlace(flag, path))


class TeacherNeurons:
    """Neurons of a teacher as new experts.

    The most important ones, by the product of the norms of a neuron's weights, are dealt out to the
    layer's new experts in turns, so that these differ and none gets only the least. They keep the
    order that they have in the teacher, and their values: what an expert adds is weighed by its
    router.

    Args:
        teacher: its feed-forwards.
        student: arguments of the checkpoint.
        layers: of the student that get new experts, each with the one of the teacher's.
        count: new experts of a layer.
        width: f.

    Raises:
        RecipeError: sizes or activations that do not fit.
    """

    def __init__(
        self,
        teacher: FeedForwards,
        student: Namespace,
        layers: Mapping[int, int],
        count: int,
        width: int,
    ) -> None:
        self._teacher, self._layers, self._count, self._width = teacher, layers, count, width
        self._neurons: dict[int, list[torch.Tensor]] = {}
        self._last: tuple[int, str, torch.Tensor | None] | None = None
        check_fit(teacher, student, count, width)

    def value(self, name: str, layer: int, number: int, like: torch.Tensor) -> torch.Tensor:
        """A tensor of a new expert, float32 or in the teacher's type.

        Args:
            name: such as ``linear_fc2.weight``.
            layer: of the student.
            number: which of the layer's new experts.
            like: an old expert's.
        """
        theirs = self._layers[layer]
        chosen = self._chosen(theirs)[number]
        whole = self._read(theirs, name)
        if whole is None:
            return torch.zeros_like(like)
        if name == "linear_fc2.bias":
            return whole * (self._width / self._width_of(theirs))
        if name == "linear_fc2.weight":
            value = whole[:, chosen]
        else:
            parts = whole.shape[0] // self._width_of(theirs)
            value = whole.unflatten(0, (parts, -1))[:, chosen].flatten(0, 1)
        assert value.shape == like.shape, (name, value.shape, like.shape)
        return value.contiguous()

    def _width_of(self, layer: int) -> int:
        shape = self._teacher.shape(layer, "linear_fc2.weight")
        assert shape is not None, "looked at before"
        return shape[1]

    def _read(self, layer: int, name: str) -> torch.Tensor | None:
        """Once for all new experts of a layer, which follow each other."""
        if self._last is None or self._last[:2] != (layer, name):
            self._last = layer, name, self._teacher.read(layer, name)
        return self._last[2]

    def _chosen(self, layer: int) -> list[torch.Tensor]:
        """By number of a new expert its neurons' ids, rising."""
        if layer not in self._neurons:
            first, second = (self._teacher.read(layer, f"linear_fc{n}.weight") for n in (1, 2))
            assert first is not None, "looked at before"
            assert second is not None, "looked at before"
            parts = first.float().unflatten(0, (-1, second.shape[1])).norm(dim=2).prod(0)
            order = torch.argsort(parts * second.float().norm(dim=0), descending=True, stable=True)
            best = order[: self._count * self._width]
            dealt = (best[number :: self._count] for number in range(self._count))
            self._neurons[layer] = [neurons.sort().values for neurons in dealt]
        return self._neurons[layer]


def check_fit(teacher: FeedForwards, student: Namespace, count: int, width: int) -> None:
    """Whether a teacher's neurons can be new experts.

    Raises:
        RecipeError: naming what differs.
    """
    if getattr(student, "moe_latent_size", None):
        raise RecipeError(
            f"{_WEIGHTS}: the student's experts work in a latent space of "
            f"{student.moe_latent_size} (--moe-latent-size), which no dense feed-forward does; "
            "use copy or mean",
            _WEIGHTS,
        )
    ours, theirs = (_activation(args) for args in (student, teacher.args))
    for name in ours:
        if ours[name] != theirs[name]:
            flag = f"--{name.replace('_', '-')}"
            raise RecipeError(
                f"{_WEIGHTS}: the teacher has {flag} {theirs[name]}, the student {ours[name]}, so "
                "that its neurons would compute something else; name a teacher with the same "
                "activation",
                _WEIGHTS,
            )
    for layer in range(teacher.layers):
        second = teacher.shape(layer, "linear_fc2.weight")
        if second is None or teacher.shape(layer, "linear_fc1.weight") is None:
            raise RecipeError(
                f"{_WEIGHTS}: the teacher's feed-forward {layer} lacks a matrix; name a whole "
                "dense model",
                _WEIGHTS,
            )
        hidden, neurons = second
        if hidden != student.hidden_size:
            raise RecipeError(
                f"{_WEIGHTS}: the teacher's hidden size is {hidden}, the student's "
                f"{student.hidden_size}; name a teacher of the same",
                _WEIGHTS,
            )
        if count * width > neurons:
            most = neurons // width
            remedy = f"--per-layer can be {most} at most" if most else "use copy or mean"
            raise RecipeError(
                f"{_WEIGHTS}: the teacher's feed-forward {layer} has {neurons} neurons, and "
                f"{count} new experts of {width} need {count * width}; {remedy}",
                _WEIGHTS,
            )
    for number in (1, 2):
        if teacher.shape(0, f"linear_fc{number}.bias") and not student.add_bias_linear:
            raise RecipeError(
                f"{_WEIGHTS}: the teacher's feed-forward has biases, and the student's experts "
                "have none (--disable-bias-linear); name a teacher without",
                _WEIGHTS,
            )


def _activation(args: Namespace) -> dict[str, object]:
    """What tells activations apart; off is ``None``."""
    told = {name: getattr(args, name, None) or None for name in _ACTIVATION}
    spec = getattr(args, "spec", None) or ()
    return {**told, "spec": _GELU_GATES if _GELU_GATES in spec else None}


def layers_of_teacher(
    asked: Sequence[int] | None, layers: Sequence[int], depths: Mapping[int, float], count: int
) -> dict[int, int]:
    """By layer of the student the teacher's feed-forward that its new experts come from.

    Args:
        asked: of ``--teacher-layers``: one for each layer.
        layers: of the student that get new experts.
        depths: of these in the model, between 0 and 1; without ``asked`` each gets the one at the
            same depth.
        count: the teacher's.

    Raises:
        RecipeError: not one for each, or one that is not there.
    """
    if asked is None:
        return {layer: min(int(depths[layer] * count), count - 1) for layer in layers}
    flag = "--teacher-layers"
    if len(asked) != len(layers):
        raise fail(
            flag, ",".join(map(str, asked)), f"has {len(asked)}, for {len(layers)} layers",
            "name one for each layer that gets new experts",
        )  # fmt: skip
    for layer in asked:
        if layer not in range(count):
            raise fail(flag, layer, "is none of the teacher's", f"name some of 0 to {count - 1}")
    return dict(zip(layers, asked, strict=True))
