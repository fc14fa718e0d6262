"""Passes, what is held and how long they take, compared with Megatron's tables and arithmetic."""

import pytest
from megatron.core.pipeline_parallel.schedules import get_schedule_table

from megatron_moe_inject.planning.costs import ChunkCost
from megatron_moe_inject.planning.schedule import Schedule


@pytest.mark.parametrize(("micro_batches", "chunks", "group"), [(8, 2, 4), (12, 3, 4), (6, 2, 4)])
def test_forwards_are_those_of_megatrons_table(micro_batches, chunks, group):
    schedule = Schedule(micro_batches, stages=4, chunks=chunks, group=group)
    forwards = [p for p in schedule.passes(1) if p.forward]
    table = get_schedule_table(micro_batches, chunks, group)
    assert [(p.micro_batch, p.chunk) for p in forwards] == table


@pytest.mark.parametrize("schedule", [Schedule(6, stages=4), Schedule(8, 4, chunks=2, group=4)])
@pytest.mark.parametrize("rank", range(4))
def test_every_micro_batch_goes_forward_then_back_once(schedule, rank):
    passes = schedule.passes(rank)
    assert len(passes) == len(set(passes)) == 2 * schedule.micro_batches * schedule.chunks
    for p in passes:
        if not p.forward:
            assert passes.index(p._replace(forward=True)) < passes.index(p)


@pytest.mark.parametrize(("stages", "micro_batches"), [(1, 5), (4, 16), (4, 2)])
def test_stages_hold_what_lies_between_them_and_the_end(stages, micro_batches):
    schedule = Schedule(micro_batches, stages)
    cost = ChunkCost(kept=10, forward_peak=13, backward_peak=12)
    held = [schedule.most_held(rank, [cost]) for rank in range(stages)]
    assert held == [10 * min(stages - rank, micro_batches) + 3 for rank in range(stages)]


def test_a_chunk_that_runs_no_backward_holds_nothing_of_others():
    schedule = Schedule(8, stages=2, chunks=2, group=2)
    costs = [ChunkCost(forward_peak=5), ChunkCost(kept=10, forward_peak=12, backward_peak=11)]
    assert schedule.most_held(0, costs) == 2 * 10 + 5


def test_a_pipeline_waits_for_its_first_and_last_micro_batch():
    alike = [[(1.0, 2.0)]] * 4
    assert Schedule(16, 4).makespan(alike) == 3 * (16 + 3)
    virtual = [[(0.5, 1.0)] * 2] * 4
    assert Schedule(16, 4, chunks=2, group=4).makespan(virtual) == pytest.approx(3 * (16 + 3 / 2))
    assert Schedule(16, 4).busy(alike) == [48.0] * 4


def test_what_delays_the_last_stage_is_hidden_by_the_way_there():
    """The last of four stages waits three forward passes anyway."""
    alike = [[(1.0, 2.0)]] * 4
    stock = Schedule(16, 4).makespan(alike)
    assert Schedule(16, 4).makespan(alike, [0.0, 0.0, 0.0, 3.0]) == stock
    assert Schedule(16, 4).makespan(alike, [0.0, 0.0, 0.0, 8.0]) == stock + 5
