"""A checkpoint with experts as a dense one, file to file: a dense student's start from its teacher.

Every layer of experts becomes a feed-forward of one width: the shared expert, which is always
active, then as many routed ones as fit, side by side, each weighed by the mean gate of those that
it stands for (2605.28207; ``expert_groups`` says which are taken, and how much each counts). A
constant in the place of gates is exact only where experts do not differ, so that distillation from
the checkpoint is to follow.

What is left of the width, and what dense layers of the checkpoint lack of it, is filled with
neurons that give nothing yet.

No model is built, no process group, no GPU. Memory is bounded by a layer's dense feed-forward and
what its experts give on the probes.

Shapes: h hidden, f neurons of an expert, E experts, n probes.
"""

from __future__ import annotations

import copy
import hashlib
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_moe_inject.convert.architectures.table import Slot
from megatron_moe_inject.convert.arguments import default_arguments
from megatron_moe_inject.convert.expert_groups import (
    METHODS,
    SCALES,
    SCORES,
    Gates,
    Group,
    grouped,
    squared_norm,
)
from megatron_moe_inject.convert.naming import (
    Naming,
    Stored,
    extra_states,
    numbers_layers,
    slot_of,
)
from megatron_moe_inject.convert.neurons import Merging, Neurons, side_by_side, widened
from megatron_moe_inject.convert.stored_experts import StoredExperts
from megatron_moe_inject.experts.choose.routing_profile import ClassStatistics, RoutingProfile
from megatron_moe_inject.experts.delta.weights import Weights
from megatron_moe_inject.experts.grow.donors import Shape, check_recorded, profile_of
from megatron_moe_inject.host.checkpoint_place import CheckpointPlace
from megatron_moe_inject.host.errors import RecipeError, fail, listing
from megatron_moe_inject.host.files import new_folder, require_room
from megatron_moe_inject.host.layer_pattern import EXPERTS, pattern_of
from megatron_moe_inject.host.stored_adapters import refuse_adapters
from megatron_moe_inject.host.stored_checkpoint import StoredCheckpoint, joined_checksum
from megatron_moe_inject.host.torch_dist_write import CheckpointWriter

Progress = Callable[[Iterable[Any], int], Iterable[Any]]
_PROBES = 64
_WIDTH = "--ffn-hidden-size"
_DENSE = "-"
_OF_EXPERTS = ("moe_", "expert_")
"""Beginnings of Megatron's arguments that say nothing of a dense model."""
_BALANCING = "moe_router_load_balancing_type"
_PATTERNS = ("hybrid_layer_pattern", "hybrid_override_pattern")
_STATE = "._extra_state/"


@dataclass(frozen=True)
class Asked:
    """What a user asks for; each is a flag of the command.

    Attributes:
        width: neurons of each dense feed-forward (``--ffn-hidden-size``).
        profile: file of a routing profile of the checkpoint; ``None`` = every expert is chosen
            alike.
        domains: classes of the profile that count; none = all that it has, by their tokens.
        method, score, scale: words, see ``expert_groups``.
        shared_gate: mean of the sigmoid that scales the shared expert, where one does.
        seed: of the probes, and of neurons that give nothing yet.
    """

    width: int
    profile: str | None = None
    domains: Sequence[str] = ()
    method: str = METHODS[0]
    score: str = SCORES[0]
    scale: str = SCALES[0]
    shared_gate: float | None = None
    seed: int = 1234


@dataclass(frozen=True)
class Densified:
    """What was written.

    Attributes:
        layers: those that had experts.
        groups: by layer the routed part, block by block.
        kept: by layer the share of all gates' weight that went to the experts themselves that
            blocks are made of, rather than to those that they stand for.
        scaled: by layer what the routed part was multiplied by beside its weights.
        filled: neurons of each that give nothing yet.
        flags: Megatron's options of the dense model in the place of those of experts.
        remarks: what the user should know.
        before, parameters: of the model with experts, and of the dense one.
        bytes: on disk.
    """

    layers: list[int]
    groups: dict[int, list[Group]]
    kept: dict[int, float]
    scaled: dict[int, float]
    filled: int
    flags: list[str]
    remarks: list[str]
    before: int
    parameters: int
    bytes: int


class Densifying:
    """A checkpoint with experts as a dense one, planned.

    Args:
        place: the checkpoint.
        asked: for what.

    Raises:
        RecipeError: it cannot be read, has no experts or such as no dense feed-forward can stand
            for, or what is asked for cannot be.
    """

    def __init__(self, place: CheckpointPlace, asked: Asked) -> None:
        self.asked, self._place = asked, place
        self._checkpoint = place.open()
        refuse_adapters(self._checkpoint.tensors, place.error)
        self._weights = Weights(self._checkpoint)
        self._args = self._checkpoint.args
        self._check_model()
        self.experts = StoredExperts(self._weights)
        self._check_asked()
        self.count = self._blocks()
        self._profile = self._opened_profile()
        self._pattern = pattern_of(self._args)
        self._naming = Naming(
            layers=self._args.num_layers,
            stacked=self._stacked(),
            latent=bool(getattr(self._args, "multi_latent_attention", False)),
            pattern=self._pattern,
            numbers_layers=self._pattern is not None,
        )

    def _check_model(self) -> None:
        args, error = self._args, self._place.error
        if not getattr(args, "num_experts", None):
            raise error("has no experts", "name a mixture of experts; this model is dense already")
        if any(name.startswith("mtp.") for name in self._weights.tensors):
            raise error(
                "has layers of multi-token prediction, whose experts no profile counts",
                "save it without --mtp-num-layers",
            )
        if getattr(args, "moe_latent_size", None):
            raise error(
                f"has experts in a latent space of {args.moe_latent_size} (--moe-latent-size), "
                "which no dense feed-forward works in",
                "name a model whose experts take the hidden state",
            )
        if getattr(args, "moe_apply_probs_on_input", False):
            raise error(
                "weighs the inputs of experts (--moe-apply-probs-on-input), so that no weight of "
                "an output stands for a gate",
                "name a model that weighs outputs",
            )

    def _check_asked(self) -> None:
        asked = self.asked
        for flag, word, words in (
            ("--method", asked.method, METHODS),
            ("--score", asked.score, SCORES),
            ("--scale", asked.scale, SCALES),
        ):
            if word not in words:
                raise fail(flag, word, "is no word here", f"use {', '.join(words)}")
        if asked.domains and asked.profile is None:
            raise fail(
                "--domain", ",".join(asked.domains), "is a class of a profile", "name --profile"
            )
        gated = self.experts.gated_shared
        if gated and asked.shared_gate is None:
            raise RecipeError(
                "--shared-gate: a sigmoid of the input scales the shared expert, and no dense "
                "feed-forward has one; write its mean, 0.5 where nobody has measured it",
                "--shared-gate",
            )
        if asked.shared_gate is not None and not (gated and 0 < asked.shared_gate <= 1):
            problem = "is no mean of a sigmoid" if gated else "is for a shared expert with a gate"
            remedy = "write a number between 0 and 1" if gated else "leave it out"
            raise fail("--shared-gate", asked.shared_gate, problem, remedy)

    def _blocks(self) -> int:
        """K, how many routed experts fit."""
        stored, width = self.experts, self.asked.width
        least, most = stored.shared_width, stored.shared_width + stored.experts * stored.width
        sizes = f"{stored.experts} experts of {stored.width} neurons"
        if stored.shared_width:
            sizes += f" and a shared one of {stored.shared_width}"
        else:
            least = stored.width
        if not least <= width <= most:
            raise fail(_WIDTH, width, f"cannot be made of {sizes}", f"write {least} to {most}")
        if width < stored.dense_width:
            raise fail(
                _WIDTH, width,
                f"is less than the {stored.dense_width} neurons of the layers "
                f"{listing(stored.dense_layers)}, which are dense already; all dense layers of a "
                "Megatron model have one width", f"write {stored.dense_width} or more",
            )  # fmt: skip
        return (width - stored.shared_width) // stored.width

    def _opened_profile(self) -> RoutingProfile | None:
        args, stored = self._args, self.experts
        if self.asked.profile is not None:
            shape = Shape(stored.experts, args.moe_router_topk, stored.layers, pattern_of(args))
            return profile_of(self.asked.profile, shape)
        score = getattr(args, "moe_router_score_function", None) or "softmax"
        pre = getattr(args, "moe_router_pre_softmax", False)
        all_chosen = args.moe_router_topk == stored.experts
        normalised = (all_chosen or not pre) if score == "softmax" else args.moe_router_topk > 1
        if not normalised or "sinkhorn" in str(getattr(args, _BALANCING, None)):
            raise RecipeError(
                "--profile: the gates of a token do not sum to 1 in this model (softmax before "
                "the choice, one sigmoid, or sinkhorn), so that their mean is not known without "
                "one; record it by moe-inject profile",
                "--profile",
            )
        return None

    def _stacked(self) -> bool:
        """Whether the dense model stores all its layers in one tensor."""
        frequency = getattr(self._args, "moe_layer_freq", 1)
        alike = not isinstance(frequency, list | tuple) and frequency in (1, None)
        return self._pattern is None and not (
            alike and any(numbers_layers(name) for name in self._weights.tensors)
        )

    def write(self, output: Path, progress: Progress) -> Densified:
        """Write the checkpoint. No collective.

        Args:
            output: a ``--save`` directory that does not exist; it gets a ``release``, and appears
                whole or not at all.
            progress: shows how far it is.

        Raises:
            RecipeError: something cannot be read or written, or the profile saw no token in a
                layer.
        """
        stored = self.experts
        others = [
            (name, place)
            for name in self._weights.tensors
            for place in self._weights.places(name)
            if (name, place) not in stored.sites
        ]
        require_room(output, self._needed(others), "--output")
        written: list[Stored] = []
        groups: dict[int, list[Group]] = {}
        kept: dict[int, float] = {}
        scaled: dict[int, float] = {}
        parameters = 0
        with new_folder(output) as folder:
            with CheckpointWriter(folder / "release") as writer:

                def write(slot: Slot, value: torch.Tensor) -> None:
                    nonlocal parameters
                    where = self._naming.stored(slot)
                    writer.tensor(where.names, (*where.axes, *value.shape), where.place, value)
                    written.append(where)
                    parameters += value.numel()

                work: list[Any] = [*others, *stored.layers, *stored.dense_layers]
                for item in progress(work, len(work)):
                    if isinstance(item, tuple):
                        write(slot_of(*item), self._weights.read(*item))
                        continue
                    if item in stored.dense_layers:
                        neurons = stored.dense(item)
                    else:
                        neurons, groups[item], kept[item], scaled[item] = self._layer(item)
                    for name, value in self._tensors(self._full(neurons, item)):
                        write(Slot(f"mlp.{name}", item), value)
                writer.nothing(self._extra_states(written))
                writer.finish(
                    {"args": self._arguments(), "checkpoint_version": 3.0, "iteration": 0}
                )
            (folder / "latest_checkpointed_iteration.txt").write_text("release")
        before = sum(torch.Size(s.size).numel() for s in self._weights.tensors.values())
        left = self.asked.width - stored.shared_width - self.count * stored.width
        return Densified(
            stored.layers, groups, kept, scaled, left, self._flags(), self._remarks(), before,
            parameters, writer.bytes,
        )  # fmt: skip

    def _layer(self, layer: int) -> tuple[Neurons, list[Group], float, float]:
        """A layer's dense feed-forward, its routed blocks, the weight of the experts that they are
        made of, and by what the routed part was scaled."""
        stored, asked = self.experts, self.asked
        parts = []
        if stored.shared_width:
            gate = 1.0 if asked.shared_gate is None else asked.shared_gate
            parts.append(stored.shared(layer).weighed(gate))
        if not self.count:
            return side_by_side(parts), [], 0.0, 1.0
        gates, probes = self._gates(layer), self._probes(layer)
        given = torch.stack(
            [
                stored.routed(layer, expert).to(torch.float32).outputs(probes, self._args).flatten()
                for expert in range(stored.experts)
            ]
        )
        gram = (given @ given.T).double() / len(probes)
        del given
        groups = grouped(asked.method, asked.score, gates, gram, self.count)
        blocks = [self._block(layer, group) for group in groups]
        scale = 1.0
        if asked.scale == "norm":
            exact = [
                block.to(torch.float32).weighed(group.weight)
                for block, group in zip(blocks, groups, strict=True)
            ]
            routed = side_by_side(exact).outputs(probes, self._args).double()
            norm = float(routed.square().sum()) / len(probes)
            scale = (squared_norm(gates, gram) / norm) ** 0.5 if norm else 1.0
        parts += [
            block.weighed(group.weight * scale) for block, group in zip(blocks, groups, strict=True)
        ]
        total = float(gates.mean.sum())
        own = sum(float(gates.mean[group.members[0]]) for group in groups)
        return side_by_side(parts), groups, own / total if total else 0.0, scale

    def _block(self, layer: int, group: Group) -> Neurons:
        """A group's neurons, not weighed yet."""
        first, *others = group.members
        model = self.experts.routed(layer, first)
        if not others:
            return model
        merging = Merging(model.to(torch.float32))
        for expert, share in zip(others, group.shares[1:], strict=True):
            merging.add(self.experts.routed(layer, expert), share)
        return merging.merged().to(model.second.dtype)

    def _full(self, neurons: Neurons, layer: int) -> Neurons:
        deviation = float(getattr(self._args, "init_method_std", None) or 0.02)
        return widened(neurons, self.asked.width, deviation, self._generator("neurons", layer))

    @staticmethod
    def _tensors(neurons: Neurons) -> Iterator[tuple[str, torch.Tensor]]:
        yield "linear_fc1.weight", neurons.first.flatten(0, 1)
        yield "linear_fc2.weight", neurons.second
        if neurons.first_bias is not None:
            yield "linear_fc1.bias", neurons.first_bias.flatten()
        if neurons.second_bias is not None:
            yield "linear_fc2.bias", neurons.second_bias

    def _gates(self, layer: int) -> Gates:
        experts, topk = self.experts.experts, self._args.moe_router_topk
        if self._profile is None:
            factor = getattr(self._args, "moe_router_topk_scaling_factor", None) or 1.0
            return Gates.uniform(experts, topk, factor)
        row = self._profile.provenance.moe_layers.index(layer)
        names = list(self.asked.domains) or list(self._profile.classes)
        classes = [self._profile.of(name, "--domain") for name in names]
        tokens = sum(int(c.tokens[row]) for c in classes)
        if not tokens:
            raise fail(
                "--profile", self.asked.profile, f"saw no token of {listing(names)} in layer "
                f"{layer}", "record another, or name other classes by --domain",
            )  # fmt: skip

        def share(read: Callable[[ClassStatistics], np.ndarray]) -> torch.Tensor:
            return torch.from_numpy(np.sum([read(c) for c in classes], axis=0) / tokens)

        chosen = share(lambda c: c.selections[row])
        if all(c.coselections is not None for c in classes):
            together = share(lambda c: c.coselections[row])  # type: ignore[index]
        else:
            together = chosen[:, None] * chosen * ((topk - 1) / topk)
        return Gates(share(lambda c: c.gate_sums[row]), chosen, together)

    def _probes(self, layer: int) -> torch.Tensor:
        """``[n, h]``, float32: drawn, through the layer's norm."""
        drawn = torch.randn(
            (_PROBES, self._args.hidden_size), generator=self._generator("probes", layer)
        )
        drawn = drawn / drawn.square().mean(1, keepdim=True).sqrt()
        norm = self.experts.norm(layer)
        if norm is None:
            return drawn
        one = 1.0 if getattr(self._args, "apply_layernorm_1p", False) else 0.0
        drawn = drawn * (norm[0].float() + one)
        return drawn if norm[1] is None else drawn + norm[1].float()

    def _generator(self, what: str, layer: int) -> torch.Generator:
        """Random numbers that depend on the layer alone."""
        text = f"{self.asked.seed} {what} {layer}"
        seed = int(hashlib.sha256(text.encode()).hexdigest()[:15], 16)
        return torch.Generator().manual_seed(seed)

    def _extra_states(self, written: Sequence[Stored]) -> Iterator[str]:
        """Those of the dense model, and what other modules of the checkpoint have (the projections
        of Mamba layers)."""
        ours = dict.fromkeys(extra_states(self._naming, written))
        if self._pattern is not None:
            stored = self._checkpoint.metadata.state_dict_metadata
            ours |= dict.fromkeys(name for name in stored if _STATE in name and ".mlp." not in name)
        yield from ours

    def _arguments(self) -> Namespace:
        args = copy.copy(self._args)
        for name in [name for name in vars(args) if name.startswith("inject_")]:
            delattr(args, name)
        usual = default_arguments()
        for name in [name for name in vars(args) if name.startswith(_OF_EXPERTS)]:
            setattr(args, name, usual.get(name))
        args.num_experts, args.ffn_hidden_size = None, self.asked.width
        if self._pattern is not None:
            for name in self._pattern_names():
                setattr(args, name, self._pattern.text.replace(EXPERTS, _DENSE))
        args.iteration = args.consumed_train_samples = args.consumed_valid_samples = 0
        return args

    def _pattern_names(self) -> list[str]:
        """The arguments that have the pattern, by this Megatron's and earlier ones' name."""
        return [name for name in _PATTERNS if getattr(self._args, name, None)]

    def _flags(self) -> list[str]:
        flags = [_WIDTH, str(self.asked.width)]
        if self._pattern is not None:
            pattern = self._pattern.text.replace(EXPERTS, _DENSE)
            flags += [f"--{self._pattern_names()[0].replace('_', '-')}", f"'{pattern}'"]
        return flags

    def _remarks(self) -> list[str]:
        """Whether the profile is of this very checkpoint. Reads all of its model."""
        if self._profile is None:
            return []
        assert self.asked.profile is not None
        folder = self._checkpoint.folder
        stored = StoredCheckpoint(
            self._place.flag, self._place.path, folder, None, "torch_dist", resumes=False
        )
        try:
            checksum = joined_checksum((part.name, part.digest()) for part in stored.parts())
        except (OSError, EOFError) as error:
            raise stored.damaged(error) from error
        other = check_recorded(self.asked.profile, self._profile, folder, checksum)
        return [] if other is None else [other]

    def _needed(self, others: Iterable[tuple[str, tuple[int, ...]]]) -> int:
        """Bytes of the output."""
        needed = 0
        for name, place in others:
            tensor = self._weights.tensors[name]
            needed += tensor.dtype.itemsize * torch.Size(tensor.size[len(place) :]).numel()
        stored = self.experts
        neuron = 3 * self._args.hidden_size * self._args.params_dtype.itemsize
        layers = len(stored.layers) + len(stored.dense_layers)
        return needed + layers * self.asked.width * neuron
