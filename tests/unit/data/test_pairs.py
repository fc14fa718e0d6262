"""Samples of pairs, and the order that puts both answers of each into one batch."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_moe_inject.data.held_out_pairs import HeldOutAnswers
from megatron_moe_inject.data.labels import ANSWERS, TOKEN_PLACES
from megatron_moe_inject.data.pairs import Layout, PairSamples, packs
from megatron_moe_inject.data.scheduled_blend import SampleOrder, ScheduledBlend
from megatron_moe_inject.data.token_places import WithPlaces
from megatron_moe_inject.host.errors import RecipeError
from megatron_moe_inject.host.labels import GENERAL, PREFERENCE
from tests.harness.corpus import write_corpora
from tests.harness.pairs import write_pairs

PAIRS = 9


@pytest.fixture(scope="module")
def prefix(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs", PAIRS)


def built(prefix, sequences=None, length=24, mask=True, seed=5):
    """As much of a ``GPTDataset`` as is used."""
    files = IndexedDataset(prefix)
    indices = np.arange(len(files.sequence_lengths)) if sequences is None else sequences
    config = SimpleNamespace(sequence_length=length, create_attention_mask=mask, random_seed=seed)
    return SimpleNamespace(dataset=files, indices=indices, config=config)


def parts(prefix):
    files = IndexedDataset(prefix)
    return [[files.get(3 * pair + part).tolist() for part in range(3)] for pair in range(PAIRS)]


def test_a_sample_is_a_prompt_and_one_answer(prefix):
    """Of which only the answer has labels; both of a pair follow each other."""
    samples = PairSamples.in_place_of(built(prefix), "pairs", 2 * PAIRS)
    assert len(samples) == 2 * PAIRS
    seen = []
    for number in range(PAIRS):
        both = [samples[np.int64(2 * number + side)] for side in (0, 1)]
        texts = []
        for sample in both:
            labels, tokens = sample["labels"], sample["tokens"]
            answered = (labels >= 0).nonzero().flatten()
            begin, end = int(answered[0]) + 1, int(answered[-1]) + 2
            assert answered.tolist() == list(range(begin - 1, end - 1))
            assert labels[answered].tolist() == tokens[begin:end].tolist()
            assert not tokens[end:].any()
            assert sample["loss_mask"].tolist() == [1.0] * 24
            assert sample["position_ids"].tolist() == list(range(24))
            hidden = torch.ones(24, 24).tril() < 0.5
            assert torch.equal(sample["attention_mask"], hidden.unsqueeze(0))
            texts.append((tokens[:begin].tolist(), tokens[begin:end].tolist()))
        (prompt, chosen), (again, rejected) = texts
        assert prompt == again
        seen.append([prompt, chosen, rejected])
    assert sorted(seen) == sorted(parts(prefix)) != seen


def test_every_pass_has_all_pairs_in_an_order_of_its_own(prefix):
    samples = PairSamples.in_place_of(built(prefix, mask=False), "pairs", 6 * PAIRS)
    passes = [
        [tuple(samples[turn * 2 * PAIRS + 2 * i]["tokens"].tolist()) for i in range(PAIRS)]
        for turn in range(3)
    ]
    assert "attention_mask" not in samples[0]
    assert len({frozenset(read) for read in passes}) == 1
    assert len({tuple(read) for read in passes}) == 3
    again = PairSamples.in_place_of(built(prefix), "pairs", 6 * PAIRS)
    assert tuple(again[4 * PAIRS]["tokens"].tolist()) == passes[2][0]
    other = PairSamples.in_place_of(built(prefix, seed=6), "pairs", 2 * PAIRS)
    assert [tuple(other[2 * i]["tokens"].tolist()) for i in range(PAIRS)] != passes[0]


def test_a_split_has_the_pairs_that_lie_in_it_whole(prefix):
    samples = PairSamples.in_place_of(built(prefix, np.arange(2, 3 * 5 + 1)), "pairs", 8)
    read = {tuple(samples[2 * i]["tokens"].tolist()) for i in range(4)}
    whole = [prompt + chosen for prompt, chosen, _ in parts(prefix)[1:5]]
    assert read == {tuple(text + [0] * (24 - len(text))) for text in whole}
    with pytest.raises(RecipeError, match="no whole pair"):
        PairSamples.in_place_of(built(prefix, np.arange(1, 3)), "pairs", 2)


def test_beside_a_store_tokens_have_no_place(prefix):
    samples = PairSamples.in_place_of(WithPlaces(built(prefix), 0), "pairs", 2)
    assert samples[0][TOKEN_PLACES].tolist() == [-1] * 24


def test_the_longest_pair_has_to_fit(prefix):
    longest = max(len(prompt) + max(map(len, answers)) for prompt, *answers in parts(prefix))
    PairSamples.in_place_of(built(prefix, length=longest), "pairs", 2)
    with pytest.raises(RecipeError, match=f"longest has {longest} tokens; raise it") as caught:
        PairSamples.in_place_of(built(prefix, length=longest - 1), "pairs", 2)
    assert f"--max-length {longest - 1}" in str(caught.value)


def test_text_is_no_pairs(tmp_path):
    general, _ = write_corpora(tmp_path, documents=6)
    with pytest.raises(RecipeError, match="holds no pairs"):
        PairSamples.in_place_of(built(general), "general", 2)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=60))
def test_packs_hold_everything_once_and_no_more_than_fits(lengths):
    made = packs(lengths, 40)
    assert sorted(place for pack in made for place in pack) == list(range(len(lengths)))
    sizes = [sum(lengths[place] for place in pack) for pack in made]
    assert max(sizes) <= 40
    assert len(made) <= 11 / 9 * -(-sum(lengths) // 40) + 1 or min(sizes) > 20


def test_a_pack_is_whole_pairs_as_documents(prefix):
    source = built(prefix, length=64)
    source.config.inter_document_masking = True
    samples = PairSamples(source.dataset, source.indices, Layout.of(source), "pairs")
    seen = set()
    for sample in (samples[i] for i in range(len(samples))):
        numbers = [n for n in sample[ANSWERS].tolist() if n >= 0]
        assert len(sample[ANSWERS]) == samples.documents
        ends = sample["cu_seqlens"].tolist()[: len(numbers) + 1]
        for number, begin, end in zip(numbers, ends, ends[1:], strict=False):
            pair, rejected = divmod(number, 2)
            prompt, *answers = parts(prefix)[pair]
            text = prompt + answers[rejected]
            assert sample["tokens"][begin:end].tolist() == text
            labels = [-1] * (len(prompt) - 1) + answers[rejected] + [-1]
            assert sample["labels"][begin:end].tolist() == labels
            assert sample["position_ids"][begin:end].tolist() == list(range(end - begin))
        assert (sample["labels"][ends[-1] :] == -1).all()
        assert sample["max_seqlen"] == np.diff([*ends, 64]).max()
        assert {n ^ 1 for n in numbers} == set(numbers)
        seen |= set(numbers)
    assert seen == set(range(2 * PAIRS))
    assert 2 * len(samples) < 2 * PAIRS
    source.config.sequence_length = 16
    with pytest.raises(RecipeError, match="with both answers, each behind the prompt, in one pack"):
        PairSamples(source.dataset, source.indices, Layout.of(source), "pairs")


def test_held_out_pairs_come_once_and_fillers_without_answers(prefix, tmp_path):
    other = write_pairs(tmp_path / "other", 4, seed=8)
    layout = Layout(24, 5, False, False)
    sources = [(name, IndexedDataset(name)) for name in (prefix, other)]
    data = HeldOutAnswers(
        [PairSamples(f, np.arange(len(f.sequence_lengths)), layout, n) for n, f in sources]
    )
    assert (data.pairs, data.answered, len(data.hashes())) == (PAIRS + 4, 2 * PAIRS + 8, PAIRS + 4)
    data.filled_up(30)
    samples = [data[i] for i in range(len(data))]
    numbers = [int(sample[ANSWERS]) for sample in samples]
    assert sorted(numbers[:26]) == list(range(26))
    assert numbers[26:] == [-1] * 4
    assert all((sample["labels"] == -1).all() for sample in samples[26:])
    last = samples[numbers.index(2 * PAIRS)]  # the first pair of the second file
    prompt, chosen = (sources[1][1].get(i).tolist() for i in (0, 1))
    assert last["tokens"][: len(prompt) + len(chosen)].tolist() == prompt + chosen


class Told:
    def __init__(self, entry):
        self.entry = entry

    def __getitem__(self, i):
        return {"at": (self.entry, int(i))}


class ToldPairs(PairSamples):
    """Two samples for each pair."""

    def __init__(self, entry):
        self.entry, self.documents = entry, 1

    def __getitem__(self, i):
        return {"at": (self.entry, int(i)), ANSWERS: torch.tensor([int(i)])}


LABELS = (GENERAL, PREFERENCE, 0, PREFERENCE)
BLEND = SimpleNamespace(
    split="train", datasets=[(Told, ToldPairs)[at == PREFERENCE](i) for i, at in enumerate(LABELS)]
)
sizes = st.lists(st.integers(1, 11), min_size=1, max_size=14)


@given(sizes, st.floats(0.0, 1.0))
def test_every_batch_has_both_answers_of_its_pairs(sizes, share):
    """Whatever its size, and although two files share the pairs; no pair comes twice."""
    pairs = np.full(len(sizes), share)
    shares = {GENERAL: (1 - pairs) / 2, PREFERENCE: pairs, 0: (1 - pairs) / 2}
    order = SampleOrder(sizes, LABELS, shares, (0.2, 0.3, 0.3, 0.2), paired=PREFERENCE)
    assert order.counts.sum(axis=1).tolist() == sizes
    blend, begin, seen = ScheduledBlend(BLEND, order, 1, 1), 0, set()
    for size in sizes:
        batch = [blend[i] for i in range(begin, begin + size)]
        numbers = sorted(int(sample[ANSWERS]) for sample in batch)
        numbers = [number for number in numbers if number >= 0]
        assert [n // 2 for n in numbers[::2]] == [n // 2 for n in numbers[1::2]]
        assert all(n % 2 == i % 2 for i, n in enumerate(numbers))
        assert not seen & set(numbers)
        seen |= set(numbers)
        for sample in batch:
            entry, at = sample["at"]
            assert (sample[ANSWERS] >= 0) == (LABELS[entry] == PREFERENCE)
            if LABELS[entry] == PREFERENCE:
                assert sample[ANSWERS] % 2 == at % 2
        begin += size


@pytest.mark.parametrize(("size", "due"), [(6, 180), (3, 90), (7, 210)])
def test_shares_are_kept_over_a_run(size, due):
    """Also in odd batches."""
    shares = {GENERAL: np.full(100, 0.7), PREFERENCE: np.full(100, 0.3)}
    order = SampleOrder([size] * 100, (GENERAL, PREFERENCE), shares, (0.7, 0.3), paired=PREFERENCE)
    assert order.samples.tolist() == [100 * size - due, due]
    assert set(order.counts[:, 1].tolist()) == ({2, 4} if size == 7 else {0, 2})
