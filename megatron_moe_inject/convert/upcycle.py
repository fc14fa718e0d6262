"""A dense checkpoint as a mixture of experts that computes the same, file to file (2212.05055).

Every feed-forward becomes E experts that begin as copies of it. A router that chooses k of them and
lets their gates sum to 1, as Megatron's softmax behind the choice does, then gives what the dense
layer gave, whatever it chooses; its rows are drawn, so that training can tell experts apart.

With a granularity G each copy is cut into G experts of a G-th of the width (2410.07524). Those of
one copy have the same row, so that k, a multiple of G, takes whole copies; a gate is then a G-th of
its copy's, which the second matrix makes up for by a factor G.

No model is built, no process group, no GPU. Memory is bounded by one matrix, and copies share the
bytes of one another.

Shapes: h hidden, f width of the dense feed-forward.
"""

from __future__ import annotations

import copy
import hashlib
import re
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_moe_inject.convert.architectures.table import Slot
from megatron_moe_inject.convert.naming import Naming, Stored, extra_states, slot_of
from megatron_moe_inject.experts.delta.weights import Weights
from megatron_moe_inject.host.checkpoint_place import CheckpointPlace
from megatron_moe_inject.host.errors import RecipeError, fail
from megatron_moe_inject.host.files import new_folder, require_room
from megatron_moe_inject.host.gpt_names import Place
from megatron_moe_inject.host.stored_adapters import refuse_adapters
from megatron_moe_inject.host.torch_dist_write import CheckpointWriter
from megatron_moe_inject.recipe.numbers import check_noise

Progress = Callable[[Iterable[Any], int], Iterable[Any]]
_FEED_FORWARD = re.compile(r"^mlp\.(linear_fc[12])\.(weight|bias)$")
_ROUTER, _ROUTER_BIAS = "mlp.router.weight", "mlp.router.bias"


@dataclass(frozen=True)
class Asked:
    """What a user asks for; each is a flag of the command.

    Attributes:
        experts: E, of a layer.
        topk: k; ``None`` = two copies.
        granularity: G, experts that one copy of the dense feed-forward is cut into.
        layers: those that get experts; ``None`` = all.
        noise: standard deviation of what is added to each expert, in that of its matrix.
        seed: of rows and noise.
    """

    experts: int
    topk: int | None = None
    granularity: int = 1
    layers: Sequence[int] | None = None
    noise: float = 0.0
    seed: int = 1234


@dataclass(frozen=True)
class Upcycled:
    """What was written.

    Attributes:
        layers: those with experts.
        flags: Megatron's options that the model needs beside those of the dense one.
        parameters, active: of the model, and those that a token uses.
        dense: parameters of the dense model.
        bytes: on disk.
    """

    layers: list[int]
    flags: list[str]
    parameters: int
    active: int
    dense: int
    bytes: int


class Upcycling:
    """A dense checkpoint as a mixture of experts, planned.

    Args:
        place: the checkpoint.
        asked: for what.

    Raises:
        RecipeError: it cannot be read, is no dense GPT model, or what is asked for cannot be.
    """

    def __init__(self, place: CheckpointPlace, asked: Asked) -> None:
        self.asked = asked
        self._place = place
        self._checkpoint = place.open()
        refuse_adapters(self._checkpoint.tensors, place.error)
        self._weights = Weights(self._checkpoint)
        self._args = self._checkpoint.args
        self._check_dense()
        self._width = self._args.ffn_hidden_size
        self.topk = self._checked_topk()
        self.layers = self._checked_layers()
        self._naming = Naming(
            layers=self._args.num_layers,
            experts=asked.experts,
            stacked=len(self.layers) == self._args.num_layers,
            latent=bool(getattr(self._args, "multi_latent_attention", False)),
        )

    def _check_dense(self) -> None:
        if self._weights.pattern is not None:
            raise self._place.error(
                "is of a hybrid model", "upcycling takes a GPT model's; name such a one"
            )
        if getattr(self._args, "num_experts", None):
            raise self._place.error(
                f"has {self._args.num_experts} experts in a layer already",
                "name a dense model's, or give it more by moe-inject add-experts",
            )
        if any(name.startswith("mtp.") for name in self._weights.tensors):
            raise self._place.error(
                "has layers of multi-token prediction, which would have to have experts too",
                "save it without --mtp-num-layers",
            )

    def _checked_topk(self) -> int:
        asked = self.asked
        if asked.granularity < 1 or self._width % asked.granularity:
            raise fail(
                "--granularity", asked.granularity,
                f"does not divide the width {self._width} of the feed-forward",
                "write a divisor of it",
            )  # fmt: skip
        if asked.experts < 2 * asked.granularity or asked.experts % asked.granularity:
            raise fail(
                "--experts", asked.experts,
                f"is no two or more copies of {asked.granularity} experts",
                f"write a multiple of {asked.granularity}, at least {2 * asked.granularity}",
            )  # fmt: skip
        topk = 2 * asked.granularity if asked.topk is None else asked.topk
        if topk % asked.granularity or not 0 < topk <= asked.experts:
            raise fail(
                "--topk", topk, f"takes no whole copies of {asked.granularity} experts",
                f"write a multiple of {asked.granularity}, at most {asked.experts}",
            )  # fmt: skip
        check_noise("--noise", asked.noise)
        return topk

    def _checked_layers(self) -> list[int]:
        count = self._args.num_layers
        layers = range(count) if self.asked.layers is None else sorted(set(self.asked.layers))
        for layer in layers:
            if layer >= count:
                raise fail("--layers", layer, "is not in the model", f"its last is {count - 1}")
        return list(layers)

    def write(self, output: Path, progress: Progress) -> Upcycled:
        """Write the checkpoint. No collective.

        Args:
            output: a ``--save`` directory that does not exist; it gets a ``release``, and appears
                whole or not at all.
            progress: shows how far it is.

        Raises:
            RecipeError: something cannot be read or written, or a feed-forward has another shape
                than the arguments say.
        """
        slices = [
            (name, place, slot_of(name, place))
            for name in self._weights.tensors
            for place in self._weights.places(name)
        ]
        require_room(output, self._needed(slices), "--output")
        biases = any(slot.name == "mlp.linear_fc1.bias" for *_, slot in slices)
        stored: list[Stored] = []
        with new_folder(output) as folder:
            with CheckpointWriter(folder / "release") as writer:
                for name, place, slot in progress(slices, len(slices)):
                    value = self._weights.read(name, place)
                    if self._is_feed_forward(slot):
                        stored += self._write_experts(writer, slot, value)
                    else:
                        stored += self._write(writer, [slot], value)
                for layer in self.layers:
                    rows = self._rows(layer)
                    stored += self._write(writer, [Slot(_ROUTER, layer)], rows)
                    if biases:  # --add-bias-linear is for routers too
                        no_bias = rows.new_zeros(len(rows))
                        stored += self._write(writer, [Slot(_ROUTER_BIAS, layer)], no_bias)
                writer.nothing(extra_states(self._naming, stored))
                writer.finish(
                    {"args": self._arguments(), "checkpoint_version": 3.0, "iteration": 0}
                )
            (folder / "latest_checkpointed_iteration.txt").write_text("release")
        return self._summary(writer.bytes)

    def _is_feed_forward(self, slot: Slot) -> bool:
        return slot.layer in self.layers and _FEED_FORWARD.match(slot.name) is not None

    def _write(
        self, writer: CheckpointWriter, slots: Sequence[Slot], value: torch.Tensor
    ) -> list[Stored]:
        """The same value in all of these."""
        first, *others = places = [self._naming.stored(slot) for slot in slots]
        size = (*first.axes, *value.shape)
        writer.tensor(first.names, size, first.place, value, [other.place for other in others])
        return places

    def _write_experts(
        self, writer: CheckpointWriter, slot: Slot, value: torch.Tensor
    ) -> Iterator[Stored]:
        match = _FEED_FORWARD.match(slot.name)
        assert match is not None, slot
        name = f"mlp.experts.experts.{match[1]}.{match[2]}"
        pieces = self.asked.granularity
        for piece, part in enumerate(self._pieces(match[1], match[2], value)):
            slots = [Slot(name, slot.layer, e) for e in range(piece, self.asked.experts, pieces)]
            if not self.asked.noise:
                yield from self._write(writer, slots, part)
                continue
            for own in slots:
                generator = self._generator(name, own.layer, own.expert)
                drawn = torch.randn(part.shape, generator=generator)
                spread = self.asked.noise * (float(part.float().std()) if part.numel() > 1 else 0)
                yield from self._write(
                    writer, [own], (part.float() + spread * drawn).to(part.dtype)
                )

    def _pieces(self, module: str, kind: str, value: torch.Tensor) -> Iterator[torch.Tensor]:
        """What the G experts of a copy have of a dense feed-forward's tensor."""
        count, width = self.asked.granularity, self._width
        if module == "linear_fc1":
            halves = 2 if value.shape[0] == 2 * width else 1
            if value.shape[0] != halves * width:
                raise self._shape_error(module, value, width)
            rows = value.reshape(halves, count, width // count, *value.shape[1:])
            for piece in range(count):
                yield rows[:, piece].flatten(0, 1)
        elif kind == "bias":
            yield from [value] * count
        else:
            if value.shape[1] != width:
                raise self._shape_error(module, value, width)
            for columns in value.chunk(count, dim=1):
                yield columns * count

    def _shape_error(self, module: str, value: torch.Tensor, width: int) -> RecipeError:
        return self._place.error(
            f"has {module} of {tuple(value.shape)}, and --ffn-hidden-size {width} in its arguments",
            "name a checkpoint that Megatron's training loop saved",
        )

    def _rows(self, layer: int) -> torch.Tensor:
        """A router's rows, ``[E, h]``."""
        copies = self.asked.experts // self.asked.granularity
        deviation = float(getattr(self._args, "init_method_std", None) or 0.02)
        generator = self._generator(_ROUTER, layer, None)
        drawn = deviation * torch.randn(copies, self._args.hidden_size, generator=generator)
        return drawn.repeat_interleave(self.asked.granularity, 0).to(self._args.params_dtype)

    def _generator(self, name: str, layer: int | None, expert: int | None) -> torch.Generator:
        """Random numbers that depend on the tensor, its layer and the expert alone."""
        text = f"{self.asked.seed} {name} {layer} {expert}"
        seed = int(hashlib.sha256(text.encode()).hexdigest()[:15], 16)
        return torch.Generator().manual_seed(seed)

    def _arguments(self) -> Namespace:
        args = copy.copy(self._args)
        for name in [name for name in vars(args) if name.startswith("inject_")]:
            delattr(args, name)
        args.num_experts, args.moe_router_topk = self.asked.experts, self.topk
        args.moe_ffn_hidden_size = self._width // self.asked.granularity
        args.moe_layer_freq = self._frequency() or 1
        args.iteration = args.consumed_train_samples = args.consumed_valid_samples = 0
        return args

    def _frequency(self) -> list[int] | None:
        """``--moe-layer-freq``; ``None`` where all layers have experts."""
        if len(self.layers) == self._args.num_layers:
            return None
        return [int(layer in self.layers) for layer in range(self._args.num_layers)]

    def _flags(self) -> list[str]:
        flags = [
            *("--num-experts", str(self.asked.experts), "--moe-router-topk", str(self.topk)),
            *("--moe-ffn-hidden-size", str(self._width // self.asked.granularity)),
        ]
        frequency = self._frequency()
        if frequency is not None:
            flags += ["--moe-layer-freq", str(frequency).replace(" ", "")]
        return flags

    def _needed(self, slices: Iterable[tuple[str, Place, Slot]]) -> int:
        """Bytes of the output."""
        needed = len(self.layers) * self.asked.experts * self._args.hidden_size
        needed *= self._args.params_dtype.itemsize  # routers
        for name, place, slot in slices:
            stored = self._weights.tensors[name]
            size = stored.dtype.itemsize * torch.Size(stored.size[len(place) :]).numel()
            copies = self.asked.experts // self.asked.granularity
            many = self.asked.noise and self._is_feed_forward(slot)
            needed += size * copies if many else size
        return needed

    def _summary(self, written: int) -> Upcycled:
        dense = feed_forward = 0
        for name, stored in self._weights.tensors.items():
            for place in self._weights.places(name):
                size = torch.Size(stored.size[len(place) :]).numel()
                dense += size
                feed_forward += size if self._is_feed_forward(slot_of(name, place)) else 0
        routers = len(self.layers) * self.asked.experts * self._args.hidden_size
        copies, used = (
            self.asked.experts / self.asked.granularity,
            self.topk / self.asked.granularity,
        )
        return Upcycled(
            self.layers,
            self._flags(),
            parameters=dense + (copies - 1) * feed_forward + routers,
            active=dense + (used - 1) * feed_forward + routers,
            dense=dense,
            bytes=written,
        )
