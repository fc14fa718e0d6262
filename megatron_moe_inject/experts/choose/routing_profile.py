"""Routing statistics of a student: what one profile holds, and what must be true of it.

A profile counts, for each class of data (every domain by name, and ``general``) and each MoE
layer, how the router distributed that class's tokens, with the provenance that says which model
on which text. Sums are kept, never means, so that profiles add. ``profile_file`` stores them.

The sequence-wise spread is there because tokens of one text are routed alike: the standard error
of a share over millions of tokens is set by the number of sequences, not of tokens.

Shapes: L MoE layers, E experts, k top-k.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron_moe_inject.host.errors import (
    RecipeError,
    suggest,
)
from megatron_moe_inject.host.files import is_plain_name
from megatron_moe_inject.host.layer_pattern import LayerPattern

GENERAL_CLASS = "general"
"""Name of the class that belongs to no domain."""

_NAME = re.compile(r"[A-Za-z0-9_-]+")
_AGAIN = "record the profile again"
_MISSING = {"remedy": _AGAIN}


@dataclass(frozen=True)
class RouterSettings:
    """How the student's routers choose; names and meanings are those of Megatron's flags."""

    num_moe_experts: int = field(metadata=_MISSING)
    topk: int = field(metadata=_MISSING)
    score_function: str = "softmax"
    pre_softmax: bool = False
    num_groups: int | None = None
    group_topk: int | None = None
    enable_expert_bias: bool = False
    topk_scaling_factor: float | None = None
    expert_capacity_factor: float | None = None


@dataclass(frozen=True)
class Provenance:
    """Which student was profiled, and how.

    Attributes:
        checkpoint: directory the student was loaded from; empty for a random start.
        checkpoint_iteration, checkpoint_sha256: see ``host.student_load.Origin``; ``None`` in files
            of earlier versions, too.
        first_iteration, last_iteration: the student's iteration when recording began and ended;
            they differ only where it trained meanwhile.
        megatron_version: of Megatron-Core; several, joined by commas, after merging.
        sequence_length: tokens of a sequence.
        num_layers: decoder layers, multi-token-prediction layers not counted.
        moe_layers: 0-based global ids of the MoE layers, rising; row ``l`` of every array is
            layer ``moe_layers[l]``.
        hybrid_layer_pattern: of a hybrid student, whose layers the numbers count; ``None`` for a
            GPT model, whose blocks they count.
        parameters: of the whole model.
        expert_parameters: of one routed expert.
        new_experts: by layer the experts that ``moe-inject add-experts`` gave the checkpoint to be
            trained; ``None`` without any.
    """

    checkpoint: str = field(metadata=_MISSING)
    first_iteration: int = field(metadata=_MISSING)
    last_iteration: int = field(metadata=_MISSING)
    megatron_version: str = field(metadata=_MISSING)
    sequence_length: int = field(metadata=_MISSING)
    num_layers: int = field(metadata=_MISSING)
    moe_layers: list[int] = field(metadata=_MISSING)
    parameters: int = field(metadata=_MISSING)
    expert_parameters: int = field(metadata=_MISSING)
    router: RouterSettings = field(metadata=_MISSING)
    checkpoint_iteration: int | None = None
    checkpoint_sha256: str | None = None
    hybrid_layer_pattern: str | None = None
    new_experts: dict[int, list[int]] | None = None

    @property
    def pattern(self) -> LayerPattern | None:
        """Of a hybrid student, ``None`` for a GPT model."""
        text = self.hybrid_layer_pattern
        return None if text is None else LayerPattern(text)

    @property
    def shape(self) -> tuple[int, int]:
        """``(L, E)``."""
        return len(self.moe_layers), self.router.num_moe_experts


@dataclass(frozen=True, eq=False)
class Spread:
    """How the share of routing choices varies between sequences.

    Attributes:
        sequences: how many were seen.
        share_sums: float64 ``[L, E]``, sum over sequences of each expert's share of the
            sequence's choices.
        share_squares: float64 ``[L, E]``, sum of the squares of those shares.
    """

    sequences: int
    share_sums: np.ndarray
    share_squares: np.ndarray

    def error(self) -> np.ndarray | None:
        """Standard error ``[L, E]`` of the mean share; None below two sequences."""
        n = self.sequences
        if n < 2:
            return None
        mean = self.share_sums / n
        variance = np.maximum(self.share_squares / n - mean**2, 0) * n / (n - 1)
        return np.sqrt(variance / n)


@dataclass(frozen=True, eq=False)
class ClassStatistics:
    """How one class of data was routed.

    Attributes:
        data: the blend entries it was read from.
        tokens: int64 ``[L]``, tokens that passed each router, padding not counted.
        selections: int64 ``[L, E]``, tokens that chose each expert, before any capacity drop.
        gate_sums: float64 ``[L, E]``, sum of the weights by which the chosen experts' outputs
            were multiplied.
        prob_sums: float64 ``[L, E]``, sum of the routers' scores over all experts, normalised to
            1 per token as in Megatron's balance loss; divided by ``tokens`` the mean probability.
        spread: variation between sequences, where recorded.
        dropped: int64 ``[L, E]``, selections dropped for capacity; exactly where the router has
            an ``expert_capacity_factor``.
        coselections: int64 ``[L, E, E]``, tokens that chose both experts, symmetric with a zero
            diagonal, where recorded.
    """

    data: tuple[str, ...]
    tokens: np.ndarray
    selections: np.ndarray
    gate_sums: np.ndarray
    prob_sums: np.ndarray
    spread: Spread | None = None
    dropped: np.ndarray | None = None
    coselections: np.ndarray | None = None

    def selection_share(self) -> np.ndarray:
        """Share ``[L, E]`` of the layer's routing choices; 0 in a layer that saw no token."""
        return _share(self.selections)

    def gate_share(self) -> np.ndarray:
        """Share ``[L, E]`` of the layer's gate weights; 0 in a layer that saw no token."""
        return _share(self.gate_sums)

    def share_of(self, experts: Mapping[int, Collection[int]], layers: Sequence[int]) -> float:
        """Share of the choices of some layers that goes to these experts, in layers with some.

        Args:
            experts: by layer.
            layers: the layers of the rows.
        """
        rows = [(row, list(experts[la])) for row, la in enumerate(layers) if experts.get(la)]
        total = sum(int(self.selections[row].sum()) for row, _ in rows)
        return sum(int(self.selections[row, ids].sum()) for row, ids in rows) / max(total, 1)

    def share_error(self) -> np.ndarray | None:
        """Standard error ``[L, E]`` of ``selection_share``, where the spread allows one."""
        return None if self.spread is None else self.spread.error()


def _share(sums: np.ndarray) -> np.ndarray:
    totals = sums.sum(axis=1, keepdims=True)
    return sums / np.where(totals == 0, 1, totals)


@dataclass(frozen=True)
class LogitFile:
    """The router logits that were sampled with a profile; see ``router_logits``.

    Attributes:
        file: name of the file beside the profile.
        sha256: of its content.
        tokens: how many of each class.
    """

    file: str = field(metadata=_MISSING)
    sha256: str = field(metadata=_MISSING)
    tokens: dict[str, int] = field(metadata=_MISSING)


@dataclass(frozen=True, eq=False)
class RoutingProfile:
    """Statistics by class of data, and where they are from.

    Attributes:
        parts: checksums of the recorded profiles that were merged into this one; empty for a
            recorded one.
        logits: sampled router logits, where a recorded one has them.
    """

    provenance: Provenance
    classes: Mapping[str, ClassStatistics]
    parts: tuple[str, ...] = ()
    logits: LogitFile | None = None

    def of(self, name: str, key: str) -> ClassStatistics:
        """The statistics of a class.

        Raises:
            RecipeError: there is no such class; the message begins with ``key``.
        """
        if name not in self.classes:
            raise RecipeError(
                f"{key}: the profile has no class {name!r}; "
                f"{suggest(name, self.classes, 'it has')}",
                key,
            )
        return self.classes[name]


def check_profile(profile: RoutingProfile) -> None:
    """Check the values and that they agree with each other.

    Raises:
        RecipeError: the first contradiction, by its key in the file.
    """
    check_provenance(profile.provenance)
    if not profile.classes:
        raise _contradiction("classes", "is empty")
    if profile.logits is not None:
        _check_logit_file(profile.logits, profile.classes)
    for name, statistics in profile.classes.items():
        key = f"classes.{name}"
        if not _NAME.fullmatch(name):
            raise _contradiction("classes", f"{name!r} is no name of letters, digits, _ and -")
        _check_class(key, statistics, profile.provenance)


def _check_logit_file(logits: LogitFile, classes: Collection[str]) -> None:
    if not is_plain_name(logits.file):
        raise _contradiction("logits.file", f"{logits.file!r} is no file beside the profile")
    for name, count in logits.tokens.items():
        if name not in classes or count < 0:
            raise _contradiction(f"logits.tokens.{name}", f"{count} tokens of no class")


def _contradiction(key: str, problem: str) -> RecipeError:
    return RecipeError(f"{key}: {problem}; {_AGAIN}", key)


def check_provenance(provenance: Provenance) -> None:
    """The part of ``check_profile`` that the sizes of all arrays follow from."""
    router, layers = provenance.router, provenance.moe_layers
    sizes = {
        "sequence_length": provenance.sequence_length,
        "num_layers": provenance.num_layers,
        "expert_parameters": provenance.expert_parameters,
        "router.num_moe_experts": router.num_moe_experts,
        "router.topk": router.topk,
    }
    for name, value in sizes.items():
        if value < 1:
            raise _contradiction(f"provenance.{name}", f"{value} is not positive")
    if not 0 <= provenance.first_iteration <= provenance.last_iteration:
        raise _contradiction(
            "provenance.last_iteration",
            f"{provenance.last_iteration} does not follow "
            f"first_iteration {provenance.first_iteration}",
        )
    if not layers or sorted(set(layers)) != layers or layers[0] < 0:
        raise _contradiction("provenance.moe_layers", f"{layers} are not rising layer ids")
    if layers[-1] >= provenance.num_layers:
        raise _contradiction(
            "provenance.moe_layers", f"{layers[-1]} is beyond num_layers {provenance.num_layers}"
        )
    for layer, ids in (provenance.new_experts or {}).items():
        if layer not in layers or not set(ids) <= set(range(router.num_moe_experts)):
            raise _contradiction(
                f"provenance.new_experts.{layer}", f"{ids} are no experts of a MoE layer"
            )
    if router.topk > router.num_moe_experts:
        raise _contradiction(
            "provenance.router.topk", f"{router.topk} of {router.num_moe_experts} experts"
        )
    experts = len(layers) * router.num_moe_experts * provenance.expert_parameters
    if provenance.parameters < experts:
        raise _contradiction(
            "provenance.parameters", f"{provenance.parameters}, but the experts have {experts}"
        )


def _check_class(key: str, found: ClassStatistics, provenance: Provenance) -> None:
    layers, experts = provenance.shape
    topk = provenance.router.topk
    _check_array(f"{key}.tokens", found.tokens, (layers,), np.int64)
    _check_array(f"{key}.selections", found.selections, (layers, experts), np.int64)
    for name in ("gate_sums", "prob_sums"):
        _check_array(f"{key}.{name}", getattr(found, name), (layers, experts), np.float64)
    _refuse(
        f"{key}.selections",
        found.selections,
        found.selections > found.tokens[:, None],
        "is more than the layer's tokens",
    )
    _refuse(
        f"{key}.selections",
        found.selections.sum(axis=1),
        found.selections.sum(axis=1) != topk * found.tokens,
        f"in sum is not topk {topk} times the layer's tokens",
    )
    _refuse(
        f"{key}.gate_sums",
        found.gate_sums,
        (found.selections == 0) & (found.gate_sums != 0),
        "belongs to an expert that no token chose",
    )
    _refuse(
        f"{key}.prob_sums",
        found.prob_sums.sum(axis=1),
        np.abs(found.prob_sums.sum(axis=1) - found.tokens) > 0.01 * found.tokens,
        "in sum is not the number of the layer's tokens",
    )
    if (found.dropped is None) != (provenance.router.expert_capacity_factor is None):
        raise _contradiction(f"{key}.dropped", "disagrees with the router's expert_capacity_factor")
    if found.dropped is not None:
        where = f"{key}.dropped"
        _check_array(where, found.dropped, (layers, experts), np.int64)
        more = found.dropped > found.selections
        _refuse(where, found.dropped, more, "is more than was selected")
    if found.spread is not None:
        _check_spread(f"{key}.spread", found.spread, (layers, experts))
    if found.coselections is not None:
        _check_coselections(f"{key}.coselections", found.coselections, found.selections, topk)


def _check_spread(key: str, spread: Spread, shape: tuple[int, int]) -> None:
    n = spread.sequences
    if n < 0:
        raise _contradiction(f"{key}.sequences", f"{n} is negative")
    for name in ("share_sums", "share_squares"):
        _check_array(f"{key}.{name}", getattr(spread, name), shape, np.float64)
    slack = 1e-6 * max(n, 1)
    sums, squares = spread.share_sums, spread.share_squares
    totals = sums.sum(axis=1)
    _refuse(
        f"{key}.share_sums", totals, np.abs(totals - n) > slack, f"in sum is not {n}, the sequences"
    )
    # Shares lie between 0 and 1, and the square of their mean is at most the mean of their squares.
    possible = (squares <= sums + slack) & (sums**2 <= n * (squares + slack))
    _refuse(f"{key}.share_squares", squares, ~possible, "does not fit share_sums")


def _check_coselections(key: str, pairs: np.ndarray, selections: np.ndarray, topk: int) -> None:
    layers, experts = selections.shape
    _check_array(key, pairs, (layers, experts, experts), np.int64)
    assert (pairs == pairs.transpose(0, 2, 1)).all(), key
    assert not pairs.diagonal(axis1=1, axis2=2).any(), key
    _refuse(
        key,
        pairs.sum(axis=2),
        pairs.sum(axis=2) != (topk - 1) * selections,
        f"in sum is not (topk {topk} - 1) times the expert's selections",
    )


def _check_array(key: str, array: np.ndarray, shape: tuple[int, ...], kind: Any) -> None:
    """Shape and type are the writer's business (asserted), values the file's."""
    assert array.shape == shape, (key, array.shape, shape)
    assert array.dtype == kind, (key, array.dtype)
    _refuse(key, array, ~np.isfinite(array), "is not finite")
    _refuse(key, array, array < 0, "is negative")


def _refuse(key: str, values: np.ndarray, wrong: np.ndarray, problem: str) -> None:
    """Raise for the first of ``values`` where ``wrong`` is True."""
    if wrong.any():
        at = tuple(np.argwhere(wrong)[0])
        indices = "".join(f"[{i}]" for i in at)
        raise _contradiction(f"{key}{indices}", f"{values[at]} {problem}")
