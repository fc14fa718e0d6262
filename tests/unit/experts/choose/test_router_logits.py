"""Samples of router logits: which tokens, and the file beside the profile."""

import json
from argparse import Namespace
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron_moe_inject.experts.choose.part import ProfilePart
from megatron_moe_inject.experts.choose.profile_file import (
    merge_profiles,
    read_profile,
    write_profile,
)
from megatron_moe_inject.experts.choose.router_logits import (
    LogitSample,
    LogitSampler,
    logit_path,
    most_tokens,
    read_logits,
    write_logits,
)
from megatron_moe_inject.host.errors import RecipeError
from megatron_moe_inject.recipe.entries import SPLITS
from megatron_moe_inject.recipe.facts import StudentFacts
from megatron_moe_inject.recipe.load import recipe_from_yaml
from megatron_moe_inject.recipe.run_part import RunContext
from tests.harness.profiles import profile
from tests.harness.recipes import text_with


class Group:
    def __init__(self, rank=0, size=1):
        self._rank, self._size = rank, size

    def rank(self):
        return self._rank

    def size(self):
        return self._size


def sampler(tokens, length=16, cp=None, tp=None, sequence_parallel=False):
    groups = SimpleNamespace(cp=cp or Group(), tp=tp or Group(), dp=Group(), pp=Group())
    groups.tp_cp = Group()
    return LogitSampler(
        tokens,
        classes=2,
        layers=1,
        experts=3,
        sequence_length=length,
        groups=groups,
        sequence_parallel=sequence_parallel,
        device=torch.device("cpu"),
    )


LABELS = torch.tensor([[0, -1], [0, 0]])


def run(made, steps=2, length=16, padding=None, row=None):
    """Logits name their step, micro-batch, sample and position.

    With ``row`` a micro-batch is one row, of which the rank has that slice.
    """
    for step in range(steps):
        made.begin(LABELS)
        for micro_batch in range(2):
            place = torch.arange(length)[:, None] + 100 * torch.arange(2)
            logits = (
                place[..., None] + 1000 * micro_batch + 10000 * step + torch.tensor([0, 0.25, 0.5])
            )
            if row is not None:
                logits = logits.transpose(0, 1).flatten(0, 1).unsqueeze(1)[row]
            made.record(micro_batch, 0, logits, logits == logits.amax(-1, True), padding)
    return made.collect([4])


def test_the_first_sequences_of_each_class_give_strided_tokens():
    general, code = run(sampler(17))
    assert code.positions.tolist() == [1, 3, 5, 7, 9, 11, 13, 15] * 2
    assert code.sequences.tolist() == [0] * 8 + [2] * 8
    assert general.sequences.tolist() == [1] * 8 + [5] * 8
    steps, batches, samples = [0, 0], [0, 1], [0, 0]
    starts = np.repeat(
        [10000 * s + 1000 * m + 100 * b for s, m, b in zip(steps, batches, samples, strict=True)], 8
    )
    assert code.logits[0, :, 0].tolist() == (starts + code.positions).tolist()
    assert general.logits[0, 8:, 1].tolist() == [10100.25 + p for p in general.positions[:8]]
    assert code.chosen.tolist() == [[[False, False, True]] * 16]


@pytest.mark.parametrize(("tokens", "positions"), [(1, [8]), (3, [2, 8, 13])])
def test_fewer_tokens_than_a_sequence_would_give(tokens, positions):
    for found in run(sampler(tokens)):
        assert found.positions.tolist() == positions
        assert len(set(found.sequences)) == 1


def test_padding_is_left_out():
    padding = torch.zeros(16, 2, dtype=torch.bool)
    padding[9:, 0] = True
    general, code = run(sampler(16), padding=padding)
    # The second sequence of the class is sample 0 as well.
    assert code.positions.tolist() == [1, 3, 5, 7] * 2
    assert code.logits.shape == (1, 8, 3)
    assert len(general.positions) == 16


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_samples_in_a_row_give_the_same_tokens(ranks):
    whole, size = run(sampler(17)), 32 // ranks
    seen = []
    for rank in range(ranks):
        own = sampler(17, tp=Group(rank, ranks), sequence_parallel=ranks > 1)
        seen.append(run(own, row=slice(rank * size, (rank + 1) * size)))
    for name in (0, 1):
        expected = whole[name].logits[0]
        found = np.concatenate([part[name].logits[0] for part in seen])
        assert found[found[:, 0].argsort()].tolist() == expected[expected[:, 0].argsort()].tolist()
    assert run(sampler(17, tp=Group(1, 2)), row=slice(0, 32))[0].logits.shape == (1, 0, 3)


def test_a_class_without_sequences_is_empty():
    made = sampler(8)
    made.begin(torch.zeros(1, 1, dtype=torch.int64))
    assert made.collect([0])[0].logits.shape == (1, 0, 3)


@pytest.mark.parametrize(
    ("ranks", "own"),
    [
        (dict(cp=Group(0, 2)), [1, 3, 13, 15]),
        (dict(cp=Group(1, 2)), [5, 7, 9, 11]),
        (dict(tp=Group(1, 2), sequence_parallel=True), [9, 11, 13, 15]),
        (dict(tp=Group(1, 2)), []),
        (dict(cp=Group(1, 2), tp=Group(0, 2), sequence_parallel=True), [5, 7]),
    ],
    ids=["cp0", "cp1", "sp1", "tp1", "cp1-sp0"],
)
def test_each_rank_takes_the_tokens_it_holds(ranks, own):
    made = sampler(8, **ranks)
    assert made._positions[made._columns].tolist() == own


def samples():
    generator = np.random.default_rng(0)
    return {
        name: LogitSample(
            generator.normal(size=(3, 4, 8)).astype(np.float32),
            generator.random((3, 4, 8)) < 0.3,
            np.arange(4),
            np.arange(4) * 2,
        )
        for name in ("general", "code")
    }


@pytest.fixture
def written(tmp_path):
    path = tmp_path / "p.json"
    kept = write_logits(path, samples())
    write_profile(path, replace(profile(), logits=kept))
    return path


def test_what_is_written_is_read(written):
    found = read_logits(written, read_profile(written))
    for name, sample in samples().items():
        for field, array in vars(sample).items():
            assert np.array_equal(getattr(found[name], field), array)
            assert getattr(found[name], field).dtype == array.dtype
    assert logit_path("a/p.v2").name == "p.v2.safetensors"


def test_a_profile_without_logits_says_so_and_stays_as_it_was(tmp_path):
    path = tmp_path / "p.json"
    write_profile(path, profile())
    assert "logits" not in json.loads(path.read_text())
    with pytest.raises(RecipeError, match="no router logits were kept"):
        read_logits(path, read_profile(path))


def test_logits_of_another_recording_are_noticed(written):
    found = read_profile(written)
    write_logits(written, {"code": samples()["code"]})
    with pytest.raises(RecipeError, match=r"p.safetensors: is not what was recorded with"):
        read_logits(written, found)
    logit_path(written).unlink()
    with pytest.raises(RecipeError, match=r"p.safetensors: cannot be read"):
        read_logits(written, found)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"file": "../p.safetensors"}, "logits.file: '../p.safetensors' is no file beside"),
        ({"tokens": {"poetry": 4}}, "logits.tokens.poetry: 4 tokens of no class"),
        ({"tokens": {"code": -1}}, "logits.tokens.code: -1 tokens"),
    ],
)
def test_what_a_profile_says_of_its_logits_must_be_possible(tmp_path, change, message):
    kept = write_logits(tmp_path / "p.json", samples())
    with pytest.raises(RecipeError, match=message):
        write_profile(tmp_path / "p.json", replace(profile(), logits=replace(kept, **change)))


def test_a_profile_with_changed_logits_is_damaged(written):
    plain = json.loads(written.read_text())
    plain["logits"]["tokens"]["code"] = 3
    written.write_text(json.dumps(plain))
    with pytest.raises(RecipeError, match="sha256: does not fit"):
        read_profile(written)


def test_merged_profiles_leave_logits_with_the_recorded_ones(written):
    merged = merge_profiles({"a": read_profile(written), "b": profile(seed=1)})
    assert merged.logits is None


def test_a_sample_has_a_size():
    """DeepSeek-V3's 58 layers of 256 experts, and a number that no memory holds."""
    most = most_tokens(classes=3, layers=58, experts=256)
    assert 5 * most * 3 * 58 * 256 <= 16 << 30 < 5 * (most + 1) * 3 * 58 * 256
    with pytest.raises(RecipeError, match=r"--inject-profile-logits: 9{17} tokens .* write fewer"):
        sampler(int("9" * 17))


def test_more_logits_than_a_sample_holds_are_refused_at_start(tmp_path):
    args = Namespace(
        inject_profile=str(tmp_path / "p.json"),
        inject_profile_logits=10**11,
        inject_dry_run=None,
        micro_batch_size=1,
        load=None,
    )
    facts = StudentFacts(2, num_moe_experts=8, moe_layers=(0, 1), mock_data=True)
    recipe = recipe_from_yaml(text_with({"domains.0.data": [0], "domains.1": ...}))
    labels = {split: [0] for split in SPLITS}
    run = RunContext("injection", recipe, args, facts, 8, labels)
    most = most_tokens(classes=2, layers=2, experts=8)
    with pytest.raises(RecipeError, match=f"100000000000 tokens .* write {most} or less"):
        ProfilePart(run)
    args.inject_profile_logits = most
    ProfilePart(run)
