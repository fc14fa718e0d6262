"""Sums of sequences over TP 2 x CP 2 against the dense reference: mixed classes, masks."""

import functools

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_moe_inject.evaluation.evaluation import build_class
from megatron_moe_inject.evaluation.measurement import Measurement
from megatron_moe_inject.host.labels import (
    GENERAL,
)
from megatron_moe_inject.losses import Dense, Sparse, Student, Vocabulary, reference
from megatron_moe_inject.losses.objective import SampleGroup, TermWeights
from megatron_moe_inject.losses.report import LossReport
from tests.harness import gloo
from tests.harness.losses_cases import VALID, V
from tests.harness.steps import step_of

WORLD = 4
B, S, H, H_T = 4, 8, 6, 5
DOMAINS = [GENERAL, 0, 1, 0]  # domain 1 has no teacher
WEIGHTS = TermWeights(0.0, 1.0)


@functools.cache
def across():
    """Groups of ranks that hold parts of the same sequences: 0 and 2, 1 and 3."""
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    return groups[dist.get_rank() % 2]


def made():
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    data = {
        "hidden": normal(S, B, H),
        "head": normal(V, H),
        "teacher": normal(B, S, H_T),
        "teacher_head": normal(V, H_T),
        "original": normal(B, S, H),
        "labels": torch.randint(VALID, (B, S), generator=generator),
        "tokens": torch.randint(VALID, (B, S), generator=generator),
        "loss_mask": (torch.rand(B, S, generator=generator) > 0.3).float(),
    }
    data["loss_mask"][3] = 0
    masked = (data["loss_mask"] == 0).nonzero()[0]
    data["labels"][tuple(masked)] = V - 1  # a padded id: infinite loss, which the mask hides
    return data


def part(tensor, dim, rank, size=2):
    return tensor.chunk(size, dim)[rank].contiguous()


def _measured(text):
    data, tp, cp = made(), gloo.block_group(2), across()
    measurement = Measurement(
        {0: "code", 1: "prose", GENERAL: "general"},
        [GENERAL, 0, 1],
        [0],
        tp_group=tp,
        cp_group=cp,
        text_length=(lambda ids: 3 * len(ids)) if text else None,
    )
    mine = {name: part(data[name], 1, cp.rank()) for name in ("labels", "loss_mask")}
    teacher, original = (part(data[name], 1, cp.rank()) for name in ("teacher", "original"))
    head, teacher_head = (part(data[name], 0, tp.rank()) for name in ("head", "teacher_head"))
    groups = [
        SampleGroup([1, 3], WEIGHTS, Dense(teacher[[1, 3]], teacher_head)),
        SampleGroup([0], WEIGHTS, Dense(original[[0]], head)),
        SampleGroup([2], WEIGHTS),
    ]
    with measurement.running():
        batch = {name: data[name] for name in ("tokens", "labels", "loss_mask")}
        measurement.begin(step_of([batch] if tp.rank() == 0 else None))
        terms, report = measurement.micro_batch(
            0,
            Student(
                part(data["hidden"], 0, cp.rank()), head, mine["labels"].t(), Vocabulary(tp, VALID)
            ),
            mine["loss_mask"],
            DOMAINS,
            groups,
        )
        found = measurement.collect()
    report = {name: value.tolist() for name, value in report.items()}
    return found.rows, {k: v.tolist() for k, v in found.bins.items()}, terms.total.tolist(), report


def expected():
    data = made()
    x = data["hidden"].transpose(0, 1) @ data["head"].t()
    mask = data["loss_mask"].double()

    def sums(y):
        labels = data["labels"].clamp(max=VALID - 1)  # the id beyond them is masked
        found = reference.measures(x, y, labels, valid_vocab_size=VALID)
        found["correct"] = found["top"] == labels
        found["agreement"] = found["top"] == found["teacher_top"]
        hidden = {k: torch.where(mask > 0, v.double(), 0.0).sum(1) for k, v in found.items()}
        return found, hidden | {"tokens": mask.sum(1)}

    taught = sums(data["teacher"] @ data["teacher_head"].t())
    held = sums(data["original"] @ data["head"].t())
    return data, taught, held


@pytest.mark.parametrize("text", [True, False])
def test_sums_of_sequences(text):
    ranks = gloo.pool(WORLD).run(_measured, text)
    assert all(str(rank[:2]) == str(ranks[0][:2]) for rank in ranks), "ranks disagree"
    rows, bins, *_ = ranks[0]
    data, (tokens, taught), (_, held) = expected()
    assert {label: len(found) for label, found in rows.items()} == {GENERAL: 1, 0: 2, 1: 1}
    places = {GENERAL: [0], 0: [1, 3], 1: [2]}
    for label, own in places.items():
        for i, (_, sums) in zip(own, rows[label], strict=True):
            names = {"tokens": "tokens", "loss": "loss", "correct": "correct"}
            if label == 0:
                names |= {"teacher_loss": "teacher_loss", "teacher_kl": "kl"}
                names["agreement"] = "agreement"
            for name, theirs in names.items():
                assert sums[name] == pytest.approx(taught[theirs][i].item(), abs=1e-4), name
            assert ("original_kl" in sums) == (label == GENERAL)
            assert ("teacher_kl" in sums) == (label == 0)
            assert ("bytes" in sums) == text
            if label == GENERAL:
                assert sums["original_kl"] == pytest.approx(held["kl"][i].item(), abs=1e-4)
            if text:
                assert sums["bytes"] == 3 * data["loss_mask"][i].sum()
        # Bins of the class, token by token.
        counted = (data["loss_mask"] > 0)[own]
        confidence = tokens["confidence"][own][counted]
        right = tokens["correct"][own][counted].float()
        place = (confidence * 15).long()
        for row, values in zip(
            bins[label], (torch.ones_like(right), confidence, right), strict=True
        ):
            whole = torch.zeros(15).index_add_(0, place, values)
            np.testing.assert_allclose(row, whole, atol=1e-5)
    # A sequence without a token counts nothing, and its class is sound.
    found = build_class(rows[0], np.array(bins[0]), "coder", [])
    assert found.sums["tokens"].min() == 0
    assert found.mean("loss") > 0


def test_what_the_log_gets_is_this_ranks_part():
    ranks = gloo.pool(WORLD).run(_measured, False)
    data, (tokens, _), _ = expected()
    keys = ["accuracy/general", "accuracy/code", "teacher loss/code", "teacher agreement/code"]
    assert list(ranks[0][3]) == [*keys, "accuracy/prose"]
    mask = data["loss_mask"].bool()
    right = (tokens["correct"] & mask)[[1, 3]].sum().item()
    parts = [rank[3]["accuracy/code"] for rank in (ranks[0], ranks[2])]
    assert sum(p[0] for p in parts) == right
    assert sum(p[1] for p in parts) == pytest.approx(mask[[1, 3]].sum().item())


def _beside_stored_ids():
    """Sums, log terms, and per-token terms where the domain's teacher is known by some ids."""
    data, tp, cp = made(), gloo.block_group(2), across()
    measurement = Measurement(
        {0: "code", GENERAL: "general"}, [GENERAL, 0], [0], tp_group=tp, cp_group=cp,
        text_length=None,
    )  # fmt: skip
    labels, mask = (part(data[name], 1, cp.rank()) for name in ("labels", "loss_mask"))
    hidden, head = part(data["hidden"], 0, cp.rank()), part(data["head"], 0, tp.rank())
    ids = torch.arange(3).expand(2, labels.shape[1], 3)
    stored = Sparse(ids, torch.full(ids.shape, 0.25).log(), "bucket")
    groups = [SampleGroup([1, 3], WEIGHTS, stored), SampleGroup([0, 2], WEIGHTS)]
    with measurement.running():
        batch = {name: data[name] for name in ("tokens", "labels", "loss_mask")}
        measurement.begin(step_of([batch] if tp.rank() == 0 else None))
        student = Student(hidden, head, labels.t(), Vocabulary(tp, VALID))
        terms, report = measurement.micro_batch(0, student, mask, [GENERAL, 0] * 2, groups)
        found = measurement.collect()
    logged = LossReport(["code"], [0], by_class=False).values(terms, mask, [GENERAL, 0] * 2)
    report = {name: value.tolist() for name, value in (report | logged).items()}
    return found.rows, report


def test_of_a_teacher_of_which_some_ids_are_known_figures_are_missing_and_nothing_is_wrong():
    rows, report = gloo.pool(WORLD).run(_beside_stored_ids)[0]
    _, (tokens, _), _ = expected()
    mask = made()["loss_mask"].double()
    assert {name for _, sums in rows[0] for name in sums} == {"tokens", "loss", "correct"}
    for i, (_, sums) in zip((1, 3), rows[0], strict=True):
        loss = torch.where(mask[i] > 0, tokens["loss"][i].double(), 0.0).sum()
        assert sums["loss"] == pytest.approx(loss.item(), abs=1e-4)
    assert report["accuracy/code"][1] > 0
    for name in ("teacher loss/code", "teacher agreement/code", "kd loss"):
        assert report[name] == [0.0, 0.0], name
