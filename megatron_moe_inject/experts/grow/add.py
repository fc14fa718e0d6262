"""Adds experts to a checkpoint, file to file: no model is built, no process group, no GPU.

What is stored stays as it is, byte for byte, under the ids that its experts have now; an expert
that begins as a copy has the bytes of its donor. Routers are written anew, they are small. Memory
is bounded by one expert's tensor in float32, whatever the model's size.
"""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_moe_inject.experts.grow.arguments import grown_arguments
from megatron_moe_inject.experts.grow.donors import (
    Shape,
    check_recorded,
    first_of_groups,
    for_domains,
    most_used,
    named_donors,
    profile_of,
)
from megatron_moe_inject.experts.grow.feed_forwards import (
    FROM_TEACHER,
    Opens,
    TeacherNeurons,
    layers_of_teacher,
    opened,
)
from megatron_moe_inject.experts.grow.moving import Moved, known_optimizer
from megatron_moe_inject.experts.grow.new_parts import NewParts
from megatron_moe_inject.experts.grow.numbering import Numbering, check_count
from megatron_moe_inject.experts.grow.router_kinds import (
    rows_of_router,
    score_function,
    takes_weight,
)
from megatron_moe_inject.experts.grow.starts import (
    MAIN_STATES,
    WEIGHTS,
    ZERO_STATES,
    NewRows,
    NewWeights,
)
from megatron_moe_inject.experts.grow.stored_names import (
    Layer,
    expert_name,
    is_of_optimizer,
    moe_layers,
)
from megatron_moe_inject.host.checkpoint_place import CheckpointPlace
from megatron_moe_inject.host.commands import must_not_exist
from megatron_moe_inject.host.errors import RecipeError, fail
from megatron_moe_inject.host.files import new_folder, require_room
from megatron_moe_inject.host.layer_pattern import MLP, pattern_of
from megatron_moe_inject.host.model_parts import is_own
from megatron_moe_inject.host.new_experts import VERSION, NewExperts, card_in
from megatron_moe_inject.host.stored_adapters import refuse_adapters
from megatron_moe_inject.host.text import ranges
from megatron_moe_inject.host.torch_dist import TorchDistCheckpoint, is_training_state
from megatron_moe_inject.host.torch_dist_parts import Rearranged, rearranged_copy
from megatron_moe_inject.recipe.numbers import check_noise

Progress = Callable[[Iterable[Any], int], Iterable[Any]]
_TWINS = 0.01


@dataclass(frozen=True)
class Asked:
    """What a user asks for; each is a flag of the command.

    Attributes:
        per_layer: new experts of each layer.
        layers: decoder layers that get them to be trained; ``None`` = all with experts.
        domains: whose they are; in turns, if several.
        profile: a routing profile of the checkpoint.
        score: how the profile ranks donors.
        donors: named instead.
        weights, rows: words of ``starts``, or for the weights a dense teacher's source
            (``feed_forwards``); ``None`` = what is usual.
        teacher_layers: see ``feed_forwards.layers_of_teacher``.
        noise: see ``starts.NewWeights``; ``None`` = what is needed for no two to be the same.
        seed: of random numbers.
        ep: expert-parallel ranks that must be able to share them; ``None`` = those of the
            checkpoint.
        optimizer: keep the optimizer's state, where it can be.
    """

    per_layer: int
    layers: Sequence[int] | None = None
    domains: Sequence[str] = ()
    profile: str | None = None
    score: str = "token"
    donors: str | None = None
    weights: str | None = None
    teacher_layers: Sequence[int] | None = None
    rows: str | None = None
    noise: float | None = None
    seed: int = 1234
    ep: int | None = None
    optimizer: bool = True


@dataclass(frozen=True)
class Added:
    """What was added.

    Attributes:
        card: of the checkpoint that was written.
        exact: whether no token can choose a new expert.
        parameters: of all new experts, with their rows.
        copy: what it took.
        remarks: what the user should know.
    """

    card: NewExperts
    exact: bool
    parameters: int
    copy: Rearranged
    remarks: Sequence[str]


class Addition:
    """New experts for one checkpoint, planned.

    Args:
        place: the checkpoint.
        asked: for what.
        teachers: see ``feed_forwards.opened``.

    Attributes:
        checkpoint: opened.
        args: of the run that wrote it.
        numbering: ids before and after.
        layers: all with experts, those of multi-token prediction last.
        rows, weights: how they begin.
        closes_by: see ``starts.NewRows``.
        profile: read, ``None`` without.
        remarks: so far.

    Raises:
        RecipeError: the checkpoint cannot be read or takes no new experts, or what is asked for
            cannot be.
    """

    def __init__(
        self, place: CheckpointPlace, asked: Asked, teachers: Mapping[str, Opens] | None = None
    ) -> None:
        self.asked, self._teachers = asked, teachers or {}
        self.checkpoint = place.open()
        refuse_adapters(self.checkpoint.tensors, place.error)
        self.args = self.checkpoint.args
        self.remarks: list[str] = []
        _check_base(self.checkpoint, self.args)
        shapes = {name: tuple(stored.size) for name, stored in self.checkpoint.tensors.items()}
        self.layers = moe_layers(shapes)
        if not self.layers:
            raise place.error("holds no layer with routed experts", "name a MoE model's")
        self._check_routers(shapes)
        groups = getattr(self.args, "moe_router_num_groups", None) or 1
        if not getattr(self.args, "moe_router_group_topk", None):
            groups = 1
        domains = len(asked.domains) or 1
        ep = asked.ep or getattr(self.args, "expert_model_parallel_size", None) or 1
        check_count(self.args.num_experts, asked.per_layer, groups=groups, domains=domains, ep=ep)
        self.numbering = Numbering.of(self.args.num_experts, asked.per_layer, groups)
        self.closes_by = _closes_by(self.checkpoint)
        self.pattern = pattern_of(self.args)
        self._chosen = self._chosen_layers()
        self.profile = None if asked.profile is None else profile_of(asked.profile, self._shape())
        self.rows = self._rows(*self._donors())
        self.weights = self._weights()

    @property
    def takes_weight(self) -> bool:
        """See ``router_kinds.takes_weight``."""
        closed = all(self.rows.in_layer(layer) == "closed" for layer in self.layers)
        return takes_weight(self.args, self.closes_by if closed else None)

    @property
    def exact(self) -> bool:
        """Whether the function is what it was: no token can choose a new expert."""
        closed = all(self.rows.in_layer(layer) == "closed" for layer in self.layers)
        return closed and not self.takes_weight

    @property
    def decoder_layers(self) -> list[int]:
        """Layers with experts, those of multi-token prediction aside."""
        return [number for of_prediction, number in self.layers if not of_prediction]

    @property
    def filled(self) -> frozenset[Layer]:
        """Layers whose new experts are not to be trained."""
        return frozenset(layer for layer in self.layers if layer not in self._chosen)

    def _shape(self) -> Shape:
        return Shape(
            self.args.num_experts, self.args.moe_router_topk, self.decoder_layers, self.pattern
        )

    def _check_routers(self, shapes: dict[str, tuple[int, ...]]) -> None:
        for name, size in shapes.items():
            known = expert_name(name)
            axis = None if known is None else known.axis
            if axis is not None and size[axis] != self.args.num_experts:
                raise self.checkpoint.source.error(
                    f"has {size[axis]} experts in {name} and --num-experts "
                    f"{self.args.num_experts} in its arguments",
                    "name a checkpoint that Megatron's training loop saved",
                )

    def _chosen_layers(self) -> list[Layer]:
        asked, known = self.asked.layers, self.decoder_layers
        for layer in asked or ():
            if layer not in known:
                raise fail("--layers", layer, "has no experts", f"layers with: {ranges(known)}")
        return [(False, layer) for layer in (known if asked is None else sorted(set(asked)))]

    def _donors(self) -> tuple[dict[Layer, list[int]], bool]:
        """By layer a donor for each new expert; and whether they were asked for."""
        asked = self.asked
        donors = {layer: first_of_groups(self.numbering) for layer in self.layers}
        chosen = [number for _, number in self._chosen]
        if asked.donors is not None:
            named = named_donors(asked.donors, chosen, self.numbering)
        elif self.profile is not None and asked.domains:
            named = most_used(self.profile, asked.domains, asked.score, self.numbering)
        else:
            return donors, False
        donors |= {(False, layer): named[layer] for layer in chosen}
        return donors, True

    def _rows(self, donors: dict[Layer, list[int]], known: bool) -> NewRows:
        self._method = self.asked.weights or ("copy" if known else "mean")
        if self._method not in WEIGHTS and not self._method.startswith(FROM_TEACHER):
            words = f"{', '.join(WEIGHTS)} or {FROM_TEACHER}SOURCE"
            raise fail("--weights", self._method, "is no word here", f"use {words}")
        rows = rows_of_router(self.args, self.closes_by, self.asked.rows)
        for flag, word in (("--weights", "copy"), ("--rows", "donor")):
            if word in (self._method, rows) and not known:
                raise fail(
                    flag, word, "needs experts to copy from",
                    "add --profile FILE with --domain NAME, or --donors IDS",
                )  # fmt: skip
        return NewRows(
            self.numbering, rows, self.closes_by, score_function(self.args), donors,
            self._method == "copy", self.filled,
        )  # fmt: skip

    def _weights(self) -> NewWeights:
        donors, method, noise = self.rows.donors, self._method, self.asked.noise
        same = method == "mean" and len(self.numbering.new) > 1
        if method == "copy":
            same = any(len(set(donors[layer])) < len(donors[layer]) for layer in self._chosen)
        if noise is None:
            noise = _TWINS if same else 0.0
        check_noise("--noise", noise)
        if same and not noise:
            raise fail(
                "--noise", noise, "leaves new experts of a layer the same, which then train alike",
                f"write {_TWINS}, or other donors",
            )  # fmt: skip
        return NewWeights(
            self.numbering, method, donors, self.filled, noise, self.asked.seed,
            float(getattr(self.args, "init_method_std", None) or 0.02), self.args.num_layers,
            self._neurons(),
        )  # fmt: skip

    def _neurons(self) -> TeacherNeurons | None:
        """Of the dense teacher that ``--weights`` names."""
        asked = self.asked
        if not self._method.startswith(FROM_TEACHER):
            if asked.teacher_layers is not None:
                raise RecipeError(
                    f"--teacher-layers: goes with --weights {FROM_TEACHER}SOURCE; leave it out",
                    "--teacher-layers",
                )
            return None
        teacher = opened(self._method, self._teachers)
        layers = [number for _, number in self._chosen]
        depths = {layer: self._depth(layer) for layer in layers}
        return TeacherNeurons(
            teacher,
            self.args,
            layers_of_teacher(asked.teacher_layers, layers, depths, teacher.layers),
            len(self.numbering.new),
            self._width(),
        )

    def _depth(self, layer: int) -> float:
        """Where a layer stands among the model's feed-forwards, between 0 and 1."""
        if self.pattern is None:
            return (layer + 0.5) / self.args.num_layers
        known = self.pattern.where(MLP)
        return (known.index(layer) + 0.5) / len(known)

    def _width(self) -> int:
        """Neurons of an expert."""
        for name, stored in self.checkpoint.tensors.items():
            known = expert_name(name)
            if known is not None and known.key.endswith("linear_fc2.weight"):
                return int(stored.size[-1])
        raise self.checkpoint.source.error("has no experts", "name a MoE model's")

    def card(self, checksum: str) -> NewExperts:
        """The card of the checkpoint to be written."""
        ids = list(self.numbering.new)
        layers = [number for _, number in self._chosen]
        copied = self.weights.method == "copy"
        return NewExperts(
            version=VERSION,
            experts=self.numbering.experts,
            moved=list(self.numbering.moved),
            new=dict.fromkeys(layers, ids),
            filled=[n for n in self.decoder_layers if n not in layers],
            domains=for_domains(self.asked.domains, self.numbering),
            donors={n: list(self.rows.donors[False, n]) for n in layers if copied},
            layers=None if self.pattern is None else self.pattern.symbols,
            weights=self.weights.method,
            rows=self.rows.method,
            noise=self.weights.noise,
            seed=self.asked.seed,
            capacity_factor=getattr(self.args, "moe_expert_capacity_factor", None),
            base=str(self.checkpoint.folder.absolute()),
            base_sha256=checksum,
        )

    def write(
        self, output: Path, progress: Progress, check: Callable[[Path, NewExperts], None]
    ) -> Added:
        """Write the checkpoint with its new experts. No collective.

        Args:
            output: a ``--save`` directory that does not exist; it appears whole or not at all.
            progress: shows how far it is.
            check: is called with the folder before it takes its name.

        Raises:
            RecipeError: something cannot be read or written.
        """
        whole = self.checkpoint.with_training_state()
        optimizer = self._optimizer(whole)
        moved = Moved(whole, self.numbering.moved, self.numbering.experts, _kept(optimizer))
        new = NewParts(moved, self.weights, self.rows)
        new.place_copies()
        needed = sum(info.length for info in whole.metadata.storage_data.values())
        require_room(output, needed, "--output")
        written: list[NewExperts] = []

        def common(checksum: str) -> dict[str, Any]:
            written.append(self.card(checksum))
            return self._common(written[0])

        with new_folder(output) as folder:
            number = re.fullmatch(r"iter_(\d{7,})", self.checkpoint.folder.name)
            name = self.checkpoint.folder.name if number else "release"
            took = rearranged_copy(
                whole, folder / name,
                placed=moved.placed, sizes=moved.sizes, new=new.parts(), common=common,
                progress=progress,
            )  # fmt: skip
            tracker = folder / "latest_checkpointed_iteration.txt"
            tracker.write_text(str(int(number[1])) if number else "release")
            check(folder, written[0])
        if self.profile is not None:
            assert self.asked.profile is not None
            folder_name = self.checkpoint.folder
            other = check_recorded(self.asked.profile, self.profile, folder_name, took.checksum)
            self.remarks += [] if other is None else [other]
        return Added(written[0], self.exact, new.parameters, took, tuple(self.remarks))

    def _optimizer(self, whole: TorchDistCheckpoint) -> bool:
        """Whether the optimizer's state is kept."""
        if not self.asked.optimizer:
            return False
        if getattr(self.args, "inject_policy", None) is not None:
            self.remarks.append(
                "the checkpoint belongs to an injection, which ends here: its optimizer state and "
                "what the plugin kept beside the model are left out"
            )
            return False
        known = known_optimizer(whole, (*ZERO_STATES, *MAIN_STATES))
        if known is False:
            self.remarks.append(
                "the optimizer's state is not stored by parameter, and is left out: the optimizer "
                "starts anew (save with --dist-ckpt-optim-fully-reshardable to keep it)"
            )
        return bool(known)

    def _common(self, card: NewExperts) -> dict[str, Any]:
        args = grown_arguments(self.args, card)
        if card.capacity_factor is not None:
            self.remarks.append(
                f"--moe-expert-capacity-factor {args.moe_expert_capacity_factor:.6g} gives each "
                f"expert the room that it had with {card.capacity_factor:g}"
            )
        return {**self.checkpoint.common, "args": args}


def _check_base(checkpoint: TorchDistCheckpoint, args: Namespace) -> None:
    card = card_in(args, str(checkpoint.folder))
    if card is not None:
        raise checkpoint.source.error(
            f"has new experts already ({ranges(card.ids())} of {card.experts})",
            "take them out (moe-inject remove-experts), and add all at once",
        )
    if not getattr(args, "num_experts", None):
        raise checkpoint.source.error(
            "is a dense model", "name a MoE model's; new experts are added to routed ones"
        )


def _closes_by(checkpoint: TorchDistCheckpoint) -> str | None:
    """The kind of tensor by which all routers can be closed."""
    kinds = {known.kind for name in checkpoint.tensors if (known := expert_name(name)) is not None}
    return next((kind for kind in ("expert_bias", "bias") if kind in kinds), None)


def _kept(optimizer: bool) -> Callable[[str], bool]:
    """Which stored names a checkpoint keeps: not what the plugin added to an injection, and
    training state where the optimizer's is kept."""

    def keeps(name: str) -> bool:
        if is_own(name) or any(is_own(part) for part in name.split("@")):
            return False
        return optimizer or not (is_training_state(name) or is_of_optimizer(name))

    return keeps


def add_experts(
    place: CheckpointPlace,
    output: Path,
    asked: Asked,
    *,
    teachers: Mapping[str, Opens] | None = None,
    progress: Progress,
    check: Callable[[Path, NewExperts], None] = lambda folder, card: None,
) -> Added:
    """Write a checkpoint with new experts; see ``Addition`` and its ``write``."""
    must_not_exist(output)
    return Addition(place, asked, teachers).write(output, progress, check)
