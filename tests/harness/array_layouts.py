"""Parallel layouts of the covering array."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.harness import lane


@dataclass(frozen=True)
class Layout:
    """How a row runs.

    Attributes:
        nproc: processes.
        sizes: parallel sizes other than 1, as ``lane.moe`` takes them.
        flags: of this layout.
        grouped: flags besides where experts are grouped: the stand-in for TE's layer shards them
            over nothing but experts.
        pattern: of a hybrid student.
        shared, recipe: flags and recipe fields that the reference on one process has, too.
        slow: whether the main suite leaves it to the slow one.
    """

    nproc: int = 1
    sizes: Mapping[str, int] = field(default_factory=dict)
    flags: tuple[str, ...] = ()
    grouped: tuple[str, ...] = ()
    pattern: str = "*E*E*E*E"
    shared: tuple[str, ...] = ()
    recipe: Mapping[str, Any] = field(default_factory=dict)
    slow: bool = False

    @property
    def expert_ranks(self) -> int:
        """Ranks that hold the four experts of a teacher together: those of a stage."""
        return min(4, self.nproc // self.sizes.get("pp", 1))


VIRTUAL = ("--num-layers-per-virtual-pipeline-stage", "1")
_FULL = ("--recompute-granularity", "full", "--recompute-method", "uniform")
_SELECTIVE = ("--recompute-granularity", "selective", "--recompute-modules", "core_attn", "moe")
_WHOLE = ("--expert-tensor-parallel-size", "1", "--expert-model-parallel-size", "2")
_FOUR = "*E|*E|*E|*E"
_OVERLAPS = tuple(lane.DISTRIBUTED_OPTIMIZER)
LAYOUTS = {
    "ep2": Layout(2, {"ep": 2}),
    "tp2-sp": Layout(2, {"tp": 2}, grouped=_WHOLE),
    "pp2": Layout(2, {"pp": 2}, pattern="*E*E|*E*E"),
    "pp2-vpp2": Layout(2, {"pp": 2}, VIRTUAL, pattern=_FOUR),
    "cp2": Layout(2, {"cp": 2}),
    "dp2, distributed optimizer": Layout(2, {}, _OVERLAPS),
    "full recompute": Layout(flags=(*_FULL, "--recompute-num-layers", "1")),
    "selective recompute": Layout(flags=_SELECTIVE),
    "per-token loss": Layout(flags=("--calculate-per-token-loss",)),
    "micro-batches of one": Layout(
        flags=("--micro-batch-size", "1"),
        # Balance losses are taken by micro-batch, whatever trains.
        shared=("--moe-router-load-balancing-type", "none"),
        recipe={"steering.balance": 0.0},
    ),
    "ep2, distributed optimizer": Layout(2, {"ep": 2}, _OVERLAPS, slow=True),
    "tp2-pp2": Layout(4, {"tp": 2, "pp": 2}, grouped=_WHOLE, pattern="*E*E|*E*E", slow=True),
    "tp2-ep2": Layout(4, {"tp": 2, "ep": 2}, slow=True),
    "pp2-vpp2-ep2": Layout(4, {"pp": 2, "ep": 2}, VIRTUAL, pattern=_FOUR, slow=True),
    "cp2-tp2": Layout(4, {"cp": 2, "tp": 2}, grouped=_WHOLE, slow=True),
    "pp4": Layout(4, {"pp": 4}, pattern=_FOUR, slow=True),
    "tp4": Layout(4, {"tp": 4}, grouped=(*_WHOLE[:-1], "4"), slow=True),
}
