"""Our terms leave a step's reports, and are divided once, over the interval."""

import functools
import math
from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch

from megatron_moe_inject.host import term_log
from megatron_moe_inject.host.attached_loss import (
    add_reports,
    take_terms,
)
from megatron_moe_inject.host.term_log import Interval, TermLog
from megatron_moe_inject.losses.report import merge


class Alone:
    """A process group of one."""

    def size(self):
        return 1


GROUPS = Namespace(dp_cp=Alone())


def report(**terms):
    """Of one micro-batch: general tokens and their loss, among what the script reports."""
    stock = {"lm loss": torch.tensor([5.0, 2.0])}
    return merge(stock, {name: torch.tensor(pair) for name, pair in terms.items()})


def interval(*steps):
    found = Interval()
    for names, pairs in steps:
        found.add(names, torch.tensor(pairs))
    return found.read()


def test_a_mean_is_over_what_was_counted_in_the_whole_interval():
    """Three steps with 1, 0 and 9 tokens of a class."""
    assert interval(
        (["general"], [[8.0, 1.0]]), (["general"], [[0.0, 0.0]]), (["general"], [[9.0, 9.0]])
    ) == {"general": 1.7}


def test_what_was_not_counted_is_not_there_and_what_is_zero_is():
    found = interval((["none", "zero", "wrong"], [[0.0, 0.0], [0.0, 3.0], [math.nan, 2.0]]))
    assert list(found) == ["zero", "wrong"]
    assert found["zero"] == 0.0
    assert math.isnan(found["wrong"])


def test_a_term_that_some_steps_lack():
    found = interval((["a", "b"], [[1.0, 1.0], [2.0, 1.0]]), (["b", "c"], [[4.0, 1.0], [5.0, 1.0]]))
    assert found == {"a": 1.0, "b": 3.0, "c": 5.0}


def test_many_small_numbers_add_up():
    found = Interval()
    for _ in range(3000):
        found.add(["x"], torch.tensor([[0.1, 16384.0]]))
    assert found.read()["x"] == pytest.approx(0.1 / 16384, rel=1e-6)


def test_terms_leave_the_reports_summed_over_micro_batches():
    reports = [report(a=[1.0, 2.0], b=[0.0, 0.0]), report(a=[3.0, 2.0], b=[5.0, 1.0])]
    add_reports(reports, {"c": torch.tensor([7.0, 1.0])})
    names, sums = take_terms(reports)
    assert dict(zip(names, sums.tolist(), strict=True)) == {
        "a": [4.0, 4.0],
        "b": [5.0, 1.0],
        "c": [7.0, 1.0],
    }
    assert [list(one) for one in reports] == [["total loss"], ["total loss"]]
    for nothing in ([], None, [torch.ones(2)], [{"total loss": torch.ones(2)}]):
        assert take_terms(nothing) == ([], None)


def megatron_log(printed):
    """The accounting of Megatron's ``training_log``, with a line every second step."""

    def stock(loss_dict, total_loss_dict, iteration, skipped_iter, is_first_iteration):
        steps = "advanced iterations"
        total_loss_dict[steps] = total_loss_dict.get(steps, 0) + (not skipped_iter)
        for name, value in loss_dict.items():
            if not skipped_iter:
                total_loss_dict[name] = total_loss_dict.get(name, torch.zeros(1)) + value
        if iteration % 2 == 0 or is_first_iteration:
            line = {}
            for name in total_loss_dict:
                if name != steps:
                    line[name] = total_loss_dict[name].item() / max(1, total_loss_dict[steps])
                    if not is_first_iteration:
                        total_loss_dict[name] = torch.zeros(1)
            printed.append(line)
            if not is_first_iteration:
                total_loss_dict[steps] = 0

    return stock


def test_the_line_the_board_and_a_list_get_means_over_their_own_intervals():
    log = TermLog(Namespace(log_interval=2, tensorboard_log_interval=1))
    file, sums, printed, boards = log.interval(), {}, [], []
    heard = []
    log.listeners.append(lambda given, read: heard.append((given["iteration"], read)))

    def step(iteration, *terms, skipped=0):
        log.end_step([report(**one) for one in terms], GROUPS, evaluation=False)
        stock = megatron_log(printed)

        @functools.wraps(stock)
        def watched(**given):
            boards.append({k: float(v) for k, v in given["loss_dict"].items()})
            return stock(**given)

        losses = {"total loss": torch.tensor(float(iteration))}
        log.log(watched, losses, sums, iteration, skipped, is_first_iteration=iteration == 1)
        return heard[-1][1]

    step(1, dict(g=[8.0, 1.0]), dict(g=[0.0, 0.0]))
    assert printed[-1] == {"g": 8.0, "total loss": 1.0}
    assert file.read() == {"g": 8.0}
    file.clear()
    step(2, dict(g=[9.0, 9.0]))
    assert printed[-1] == {"g": 1.7, "total loss": 1.5}
    assert file.read() == {"g": 1.0}
    assert step(3, dict(g=[0.0, 0.0])) is None
    step(4, dict(g=[0.0, 0.0]))
    assert printed[-1] == {"total loss": 3.5}
    assert "g" not in sums
    step(5, dict(g=[6.0, 2.0]))
    step(6, dict(g=[99.0, 1.0]), skipped=1)
    assert printed[-1] == {"g": 3.0, "total loss": 5.0}
    assert [iteration for iteration, _ in heard] == [1, 2, 3, 4, 5, 6]
    # Without a writer the board's numbers are read along with a line only.
    assert [board.get("g") for board in boards] == [8.0, 1.0, None, None, None, 99.0]


def test_an_evaluation_has_sums_over_its_steps_and_nothing_of_an_earlier_one():
    log = TermLog(Namespace(log_interval=1, tensorboard_log_interval=1))

    def evaluate(*steps):
        def stock():
            for terms in steps:
                log.end_step([report(**terms)], GROUPS, evaluation=True)
            return {"total loss": torch.tensor(1.0)}, None, False

        means, *rest = log.evaluate(stock)
        assert rest == [None, False]
        return {name: value.item() for name, value in means.items()}

    assert evaluate(dict(a=[1.0, 1.0], b=[0.0, 0.0]), dict(a=[9.0, 3.0], b=[0.0, 0.0])) == {
        "a": 2.5,
        "total loss": 1.0,
    }
    assert evaluate(dict(a=[3.0, 1.0], b=[1.0, 1.0])) == {"a": 3.0, "b": 1.0, "total loss": 1.0}
    assert log.evaluate(lambda: (None, None, True)) == (None, None, True)


@pytest.fixture
def boards(monkeypatch):
    """What is written to TensorBoard and W&B by the last of two ranks."""
    written, logged = {}, {}
    board = SimpleNamespace(add_scalar=lambda name, value, at: written.update({(name, at): value}))
    wandb = SimpleNamespace(log=lambda values, at: logged.setdefault(at, {}).update(values))
    monkeypatch.setattr("megatron.training.get_tensorboard_writer", lambda: board)
    monkeypatch.setattr("megatron.training.get_wandb_writer", lambda: wandb)
    monkeypatch.setattr(term_log.dist, "get_rank", lambda: 1)
    monkeypatch.setattr(term_log.dist, "get_world_size", lambda: 2)
    return written, logged


def test_only_cross_entropies_have_a_perplexity(boards, capsys):
    """Megatron's loop gives one to whatever it iterates over."""
    log = TermLog(Namespace(log_interval=1, tensorboard_log_interval=1, consumed_train_samples=80))
    terms = {"accuracy/code": [1.0, 4.0], "target share/code": [1.0, 2.0]}
    terms["lm loss/code"] = [3.0, 2.0]

    def evaluate():
        log.end_step([report(**terms)], GROUPS, evaluation=True)
        return {"total loss": torch.tensor(1.0)}, None, False

    def stock(prefix, iteration, write_to_tensorboard=True):
        means, *_ = log.evaluate(evaluate)
        assert set(means.keys()) == {"total loss", *terms}
        for name in means:
            print(f"{name} PPL: {math.exp(means[name].item()):.2f}")

    log.print_evaluation(stock, "iteration 10", 10)
    printed = capsys.readouterr().out.splitlines()
    assert set(printed[:2]) == {"total loss PPL: 2.72", "lm loss/code PPL: 4.48"}
    assert printed[2:] == [
        " validation loss at iteration 10 | accuracy/code value: 2.500000E-01 | "
        "target share/code value: 5.000000E-01 |"
    ]
    written, logged = boards
    assert written[("accuracy/code validation", 10)] == 0.25
    assert written[("target share/code validation vs samples", 80)] == 0.5
    assert logged == {10: {"accuracy/code validation": 0.25, "target share/code validation": 0.5}}
    written.clear()
    log.print_evaluation(stock, "iteration 20", 20, write_to_tensorboard=False)
    assert written == {}
    log.print_evaluation(lambda prefix, iteration: None, "iteration 30", 30)
    assert "iteration 30" not in capsys.readouterr().out
