"""The plan of a whole job: what every rank holds, and what a step costs.

Each pipeline stage is built once. Its ranks differ in the experts that they hold (counted for every
expert-parallel rank) and in their shards of the optimizer (for every data-parallel rank). A
micro-batch is run for the ranks with most and with fewest experts that train; between them, what is
kept and computed grows by equal parts for each expert. Stages whose chunks are alike share a run.
"""

from __future__ import annotations

from argparse import Namespace
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from megatron_moe_inject.host import compat
from megatron_moe_inject.planning.costs import ChunkCost, TeacherCost
from megatron_moe_inject.planning.job import simulated_rank
from megatron_moe_inject.planning.job_plan import JobPlan, RankPlan, StagePlan
from megatron_moe_inject.planning.layout import Layout
from megatron_moe_inject.planning.micro_batch import ChunkShape, Job, chunk_cost
from megatron_moe_inject.planning.schedule import Schedule
from megatron_moe_inject.planning.stage import Census, Shards, Stage, StageBuilder, StateBytes
from megatron_moe_inject.planning.stand_ins import any_attention
from megatron_moe_inject.planning.teacher_cost import (
    class_shares,
    imitation_bytes,
    original_states,
    placed,
    teacher_costs,
)
from megatron_moe_inject.recipe.facts import StudentFacts
from megatron_moe_inject.recipe.run_kinds import INJECTION
from megatron_moe_inject.recipe.run_part import RunContext
from megatron_moe_inject.recipe.schema import Recipe
from megatron_moe_inject.retention.feature import kept_originals
from megatron_moe_inject.retention.section import RETENTION
from megatron_moe_inject.teachers.base import TeacherInfo
from megatron_moe_inject.teachers.expert_parallel import check_ranks
from megatron_moe_inject.teachers.fit import checked_teachers
from megatron_moe_inject.teachers.part import TeacherInfos
from megatron_moe_inject.teachers.placement import spare_bytes

_FP8_BYTES = 2
"""Of an element that is multiplied in FP8: its code, and that of its transpose."""

_FROZEN_FP8_BYTES = 1 + 4 / 128**2
"""Of an element that is kept in FP8 alone: its code, and its part of a block's scale."""


@dataclass
class _ExpertRank:
    """What ranks with the same experts of a stage have in common."""

    census: Census
    shards: Shards
    shapes: Sequence[ChunkShape]
    first_trainable: int

    @property
    def experts(self) -> int:
        return sum(self.census.trained_experts.values())


@dataclass
class _BuiltStage:
    layers: list[list[int]]
    first_trainable: int
    by_ep: list[_ExpertRank]


class JobPlanner:
    """Plans one job in a process that ``job.prepare`` has made Megatron's globals in.

    Args:
        given: Megatron's arguments as the user gave them, parsed.
        args: the same as ``job.prepare`` returned them.
        infos: what the teachers' files say; read, unless given.
        memory: bytes of a GPU, by which ``ranks: auto`` of a teacher is decided; None as on the
            CPU lane, which has no limit.
        stock: the loss is Megatron's own cross-entropy.
        activations: whether a micro-batch is run; without, activations and times are 0.
        on_gpus: see ``micro_batch.chunk_cost``.
    """

    def __init__(
        self,
        given: Namespace,
        args: Namespace,
        recipe: Recipe,
        facts: StudentFacts,
        gpus: int,
        *,
        infos: Mapping[str, TeacherInfo] | None = None,
        memory: int | None = None,
        stock: bool = False,
        activations: bool = True,
        on_gpus: bool = True,
    ) -> None:
        self._given = given
        self._args = args
        self._recipe = recipe
        self._facts = facts
        self._activations = activations
        self._on_gpus = on_gpus
        self.layout = Layout.of_args(args, gpus)
        self._vocab = compat.tokenizer_vocab_size()
        if infos is None:
            infos = checked_teachers(recipe, args) if recipe.teachers else {}
        check_ranks(recipe, args)
        self._infos = infos
        self._memory = memory
        self._stock = stock
        self._shares = class_shares(recipe, facts, given)
        self._state = StateBytes.of_args(given)
        self._builder = StageBuilder(args, self._context, TeacherInfos(self._infos))
        self._costs: dict[tuple, ChunkCost] = {}

    def _context(self) -> RunContext:
        labels = {"train": list(self._shares)}
        return RunContext(INJECTION, self._recipe, self._args, self._facts, self._vocab, labels)

    def plan(self) -> JobPlan:
        """Every rank of the job."""
        layout, args = self.layout, self._args
        micro_batches = args.global_batch_size // (args.micro_batch_size * layout.dp)
        schedule = Schedule(
            max(1, micro_batches),
            layout.pp,
            layout.vpp,
            getattr(args, "microbatch_group_size_per_vp_stage", None) or layout.pp,
            int(bool(getattr(self._given, "overlap_moe_expert_parallel_comm", False))),
        )
        original, general = original_states(
            self._recipe, self._shares, args, schedule.micro_batches
        )
        imitated = imitation_bytes(
            self._recipe, self._infos, self._facts, self._shares, args, schedule.micro_batches
        )
        built, whole, whole_trained = self._build_all()
        boundary = min(stage.first_trainable for stage in built)
        forward_stages = self._forward_stages(built, boundary)
        peaks = [
            self._peaks(pp, stage, boundary, forward_stages, schedule)
            for pp, stage in enumerate(built)
        ]
        stages = [
            StagePlan(stage.layers, costs) for stage, (_, costs) in zip(built, peaks, strict=True)
        ]
        teachers = self._teachers(built, stages, schedule.micro_batches)
        teachers[-1] = replace(teachers[-1], states=teachers[-1].states + original)
        ranks: list[RankPlan] = []
        for pp, stage in enumerate(built):
            own = [imitated.get(layer, (0, 0)) for chunk in stage.layers for layer in chunk]
            in_flight = min(layout.pp, schedule.micro_batches)
            beside = sum(states + in_flight * term for states, term in own)
            teachers[pp] = replace(teachers[pp], states=teachers[pp].states + beside)
            ranks += self._ranks(pp, stage, peaks[pp][0], teachers[pp])
        ranks.sort(key=lambda rank: rank.place.rank)
        return JobPlan(
            layout,
            ranks,
            stages,
            whole,
            whole_trained,
            boundary,
            schedule,
            teachers,
            general,
            args.global_batch_size * args.seq_length,
        )

    def _teachers(
        self, built: Sequence[_BuiltStage], stages: Sequence[StagePlan], micro_batches: int
    ) -> list[TeacherCost]:
        """What teachers cost each stage, where the run would hold them."""
        spare = None
        if self._memory is not None and len(built) > 1:
            spare = min(
                spare_bytes(self._memory, rank.census.bytes, sum(rank.census.trained.values()))
                for stage in built[:-1]
                for rank in stage.by_ep
            )
        forwards = [cost.forward_flops for stage in stages for cost in stage.costs]
        return teacher_costs(
            self._recipe,
            self._infos,
            self._shares,
            self._args,
            micro_batches,
            placed(self._recipe, self._infos, self._args, len(built), spare),
            sum(forwards) / len(forwards),
        )

    def _build_all(self) -> tuple[list[_BuiltStage], Counter[str], Counter[str]]:
        """Every stage, and the parameters of the whole model with those that train."""
        built: list[_BuiltStage] = []
        whole, trained = Counter[str](), Counter[str]()
        for pp in range(self.layout.pp):
            with simulated_rank(self._args, self.layout.first_rank(pp)), any_attention():
                stage = self._builder.build()
                known: dict[tuple[bool, ...], _ExpertRank] = {}
                by_ep = []
                for ep in range(self.layout.ep):
                    train = stage.give_experts(ep)
                    if train not in known:
                        known[train] = self._expert_rank(stage)
                    by_ep.append(known[train])
            first = min(rank.first_trainable for rank in by_ep)
            built.append(_BuiltStage(stage.layers, first, by_ep))
            whole += by_ep[0].census.dense
            trained += by_ep[0].census.dense_trained
            for rank in by_ep:
                whole += rank.census.experts
                trained += rank.census.experts_trained
        return built, whole, trained

    def _expert_rank(self, stage: Stage) -> _ExpertRank:
        return _ExpertRank(
            stage.census(self.layout),
            stage.shards(self.layout, self._state),
            [ChunkShape.of(chunk) for chunk in stage.chunks],
            stage.first_trainable,
        )

    def _forward_stages(self, built: Sequence[_BuiltStage], boundary: int) -> int:
        """How many leading stages run forward only; ``pipeline.agree_forward_stages`` asks the
        ranks for the same."""
        if getattr(self._given, "overlap_moe_expert_parallel_comm", False):
            return 0
        highest, up_to = 0, []
        for chunk in range(self.layout.vpp):
            for stage in built:
                highest = max(highest, *(n + 1 for n in stage.layers[chunk]), 0)
                up_to.append(highest)
        return sum(layers <= boundary for layers in up_to[:-1])

    def _peaks(
        self,
        pp: int,
        stage: _BuiltStage,
        boundary: int,
        forward_stages: int,
        schedule: Schedule,
    ) -> tuple[list[tuple[int, int]], list[ChunkCost]]:
        """By expert-parallel rank, the most that micro-batches hold and what of it is the loss's;
        and the costs of the chunks where most experts train."""
        if not self._activations:
            return [(0, 0)] * self.layout.ep, [ChunkCost() for _ in stage.layers]
        numbers = [rank.experts for rank in stage.by_ep]
        most, least = (pick(range(len(numbers)), key=numbers.__getitem__) for pick in (max, min))
        ends = {
            ep: self._chunk_costs(pp, stage, ep, boundary, forward_stages) for ep in (most, least)
        }
        held = {ep: schedule.most_held(pp, costs) for ep, costs in ends.items()}
        loss = max(cost.loss for cost in ends[most])
        spread = numbers[most] - numbers[least]
        per_expert = (held[most] - held[least]) / spread if spread else 0.0
        by_ep = [
            (int(held[least] + per_expert * (number - numbers[least])), loss) for number in numbers
        ]
        return by_ep, ends[most]

    def _chunk_costs(
        self,
        pp: int,
        stage: _BuiltStage,
        ep: int,
        boundary: int,
        forward_stages: int,
    ) -> list[ChunkCost]:
        """Of each chunk of a rank; runs those whose like has not run yet."""
        cuts = [0 < i * self.layout.pp + pp <= forward_stages for i in range(self.layout.vpp)]
        shapes = stage.by_ep[ep].shapes
        keys = [shape.key(boundary, cut) for shape, cut in zip(shapes, cuts, strict=True)]
        if any(key not in self._costs for key in keys):
            job = Job(
                None if self._stock else self._recipe,
                self._vocab,
                max((info.hidden_size for info in self._infos.values()), default=None),
                bool(getattr(self._given, "moe_grouped_gemm", False)),
            )
            with (
                simulated_rank(self._args, self.layout.first_rank(pp)),
                any_attention(self._on_gpus),
            ):
                built = self._builder.build()
                built.give_experts(ep)
                built.no_communication()
                for chunk, key, cut in zip(built.chunks, keys, cuts, strict=True):
                    if key not in self._costs:
                        chunk.train()
                        self._costs[key] = chunk_cost(
                            chunk, self._args, boundary, job, cut=cut, on_gpus=self._on_gpus
                        )
        return [self._costs[key] for key in keys]

    def _ranks(
        self,
        pp: int,
        stage: _BuiltStage,
        by_ep: Sequence[tuple[int, int]],
        teacher: TeacherCost,
    ) -> list[RankPlan]:
        """Every rank of a stage."""
        layout, ranks = self.layout, []
        components = kept_originals(self._recipe)
        on_host = self._recipe[RETENTION].originals == "host"
        held = [self._held(rank, components) for rank in stage.by_ep]
        beside, working = teacher.weights + teacher.states, teacher.working
        for number in range(layout.gpus):
            place = layout.place(number)
            if place.pp != pp:
                continue
            rank, (parameters, fp8, originals) = stage.by_ep[place.ep], held[place.ep]
            most, loss = by_ep[place.ep]
            ranks.append(
                RankPlan(
                    place,
                    parameters=parameters,
                    trained=sum(rank.census.trained.values()),
                    trained_experts=rank.experts,
                    gradients=rank.shards.gradient_bytes,
                    optimizer=rank.shards.state(place.dp * layout.cp + place.cp, place.edp),
                    originals=0 if on_host else originals,
                    fp8=fp8,
                    teacher=beside,
                    activations=max(most, working) - loss if most else working,
                    loss=loss,
                    on_host=originals if on_host else 0,
                )
            )
        return ranks

    def _held(self, rank: _ExpertRank, components: Sequence[str] | None) -> tuple[int, int, int]:
        """Bytes of parameters, of FP8 copies and of originals."""
        census = rank.census
        originals = sum(
            size
            for name, size in census.trained_bytes.items()
            if name != "projections" and (components is None or name in components)
        )
        parameters, fp8 = census.bytes + rank.shards.padding_bytes, 0
        frozen = census.frozen_expert_elements
        in_fp8 = self._recipe.train.frozen_experts == "fp8"
        if in_fp8:
            size = self._args.params_dtype.itemsize
            parameters -= int(frozen * (size - _FROZEN_FP8_BYTES))
        if getattr(self._given, "fp8", None):
            fp8 = _FP8_BYTES * (census.multiplied_elements + (0 if in_fp8 else frozen))
        return parameters, fp8, originals
