"""Which gradient a schedule asks for, and what it gets below the boundary."""

from types import SimpleNamespace

import pytest
import torch
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

from megatron_moe_inject.experts.train.pipeline import BoundaryCommunicator, gets_no_graph, receives
from megatron_moe_inject.host.errors import RecipeError


def test_each_rank_but_the_last_gets_one_gradient_for_each_micro_batch():
    assert [list(receives(3, 1, rank, 4, None)) for rank in range(4)] == [
        [0] * 3, [1] * 3, [2] * 3, [],
    ]  # fmt: skip


def test_an_interleaved_schedule_asks_in_the_order_of_its_backward_passes():
    """Groups of two micro-batches: both pass the last chunk, then both the first."""
    assert list(receives(4, 2, 0, 2, 2)) == [2, 2, 0, 0, 2, 2, 0, 0]
    assert list(receives(4, 2, 1, 2, 2)) == [1, 1, 1, 1]
    assert list(receives(3, 3, 1, 2, 3)) == [3, 3, 3, 1, 1, 1]


class Group:
    def __init__(self, rank, size):
        self._rank, self._size = rank, size

    def rank(self):
        return self._rank

    def size(self):
        return self._size


@pytest.fixture
def communicator(monkeypatch):
    """Makes communicators that record what they send and receive: next and previous, N and P."""

    def make(rank, size, chunks, forward_stages):
        config = SimpleNamespace(
            timers=None,
            virtual_pipeline_model_parallel_size=None,
            microbatch_group_size_per_vp_stage=size,
        )
        made = BoundaryCommunicator(Group(rank, size), config, chunks, forward_stages)
        made.calls = []

        def communicate(
            *, tensor_send_next, tensor_send_prev, recv_prev, recv_next, tensor_shape, **_
        ):
            sent = "n" * (tensor_send_next is not None) + "p" * (tensor_send_prev is not None)
            made.calls.append(sent + "P" * recv_prev + "N" * recv_next)
            prev, next_ = (torch.ones(2) if asked else None for asked in (recv_prev, recv_next))
            return prev, next_, {"recv_next": "real"} if recv_next else {}

        monkeypatch.setattr(made, "_communicate", communicate)
        return made

    monkeypatch.setattr("torch.distributed.get_global_rank", lambda group, rank: rank)
    monkeypatch.setattr("megatron_moe_inject.host.compat.schedule_groups", lambda: "groups")
    return make


def test_below_the_boundary_only_activations_move(communicator):
    lower = communicator(0, 2, 1, 1)
    begun = lower.begin(3, None)
    assert begun == {"p2p_communicator": lower, "pg_collection": "groups"}
    output = torch.ones(2)
    assert lower.send_forward_recv_backward([output], [(2,)], False) == [None]
    assert lower.send_forward_recv_backward(output, (2,), False) is None
    assert lower.recv_backward([(2,)], False) == [None]
    assert lower.calls == ["n", "n"]
    lower.end()
    upper = communicator(1, 2, 1, 1)
    upper.begin(2, None)
    assert upper.send_backward_recv_forward([None], [(2,)], False)[0] is not None
    upper.send_backward([None], False)
    assert upper.calls == ["P"]
    assert upper.recv_backward([(2,)], True) == [None]
    upper.end()


def test_above_the_boundary_everything_moves(communicator):
    middle = communicator(1, 3, 1, 1)
    middle.begin(2, None)
    output = torch.ones(2)
    assert middle.send_forward_recv_backward([output], [(2,)], False)[0] is not None
    middle.send_backward([output], False)
    assert middle.recv_backward([(2,)], False)[0] is not None
    assert middle.calls == ["nN", "p", "N"]
    middle.end()


def test_an_interleaved_schedule_waits_for_each_gradient_in_turn(communicator):
    """Its first rank gets two gradients of its second chunk, then none of its first."""
    first = communicator(0, 2, 2, 2)
    first.begin(2, None)
    got, handles = first.send_backward_recv_backward(None, True, (2,), overlap_p2p_comm=True)
    assert got is not None
    assert handles == {"recv_next": "real"}
    got = first.send_forward_backward_recv_forward_backward(None, None, False, True, (2,))
    assert got[1] is not None
    got, handles = first.send_backward_recv_backward(None, True, (2,), overlap_p2p_comm=True)
    assert got is None
    handles.pop("recv_next").wait()
    assert first.send_backward_recv_backward(None, False, (2,), overlap_p2p_comm=True)[1] == {}
    got = first.send_forward_backward_recv_forward_backward(None, None, True, True, (2,))
    assert got[0] is not None
    assert got[1] is None
    assert first.calls == ["N", "N", "", "", "P"]
    first.end()


def test_a_step_asks_for_every_gradient_and_no_more(communicator):
    lower = communicator(0, 2, 1, 1)
    lower.begin(1, None)
    with pytest.raises(AssertionError, match="left out a gradient"):
        lower.end()
    with pytest.raises(AssertionError, match="one gradient too many"):
        lower.recv_backward([(2,)], False)


def test_a_communicator_of_the_script_is_refused(communicator):
    with pytest.raises(RecipeError, match=r"hands P2PCommunicator to .* first 2 pipeline stages"):
        communicator(0, 4, 1, 2).begin(1, P2PCommunicator.__new__(P2PCommunicator))


def test_stages_above_the_first_that_trains_get_a_graph():
    assert [gets_no_graph(c, 3, Group(r, 2)) for c in (0, 1, 2) for r in (0, 1)] == [
        False, True, True, True, False, False,
    ]  # fmt: skip
