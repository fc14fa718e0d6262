"""Samples say where their tokens stand in the file, however Megatron cuts and joins them."""

import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from megatron.core.datasets.utils import Split, compile_helpers  # noqa: F401

from megatron_moe_inject.data.labels import TOKEN_PLACES
from megatron_moe_inject.data.token_places import (
    TokenPlaces,
    WithPlaces,
    number_data_sets,
    split_places,
)
from megatron_moe_inject.host import compat

LENGTH = 16


@pytest.fixture(scope="module")
def prefix(tmp_path_factory):
    """Documents whose token at place p of the file is p; some are empty or one token long."""
    prefix, at = tmp_path_factory.mktemp("data") / "text", 0
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    for length in np.random.default_rng(0).integers(0, 40, 60).tolist():
        builder.add_document(torch.arange(at, at + length), [length])
        at += length
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def dataset_of(prefix, split=Split.train, samples=200, documents=None, extra=True, tmp=None):
    compat.use_prebuilt_dataset_helpers()
    config = GPTDatasetConfig(
        random_seed=7, sequence_length=LENGTH, reset_position_ids=False,
        reset_attention_mask=False, eod_mask_loss=False, create_attention_mask=False,
        tokenizer=SimpleNamespace(eod=1 << 30, vocab_size=1 << 20, unique_identifiers={"a": "b"},
                                  pad=-1),
        drop_last_partial_validation_sequence=False, add_extra_token_to_sequence=extra,
        split="1,0,0", blend=([prefix], None),
    )  # fmt: skip
    text = GPTDataset.build_low_level_dataset(prefix, config)
    own = np.arange(len(text) if documents is None else documents, dtype=np.int32)
    return GPTDataset(text, prefix, own, samples, split, config)


@pytest.mark.parametrize("extra", [True, False])
def test_places_are_where_the_tokens_stand(prefix, extra):
    data = WithPlaces(dataset_of(prefix, extra=extra), 3)
    assert len(data) >= 200
    spans = set()
    for sample in map(data.__getitem__, range(200)):
        places = sample[TOKEN_PLACES]
        assert places.shape == (LENGTH,)
        numbers, positions = split_places(places.numpy())
        assert (numbers == 3).all()
        assert positions.tolist() == sample["tokens"].tolist()
        spans.add(int((np.diff(positions) != 1).sum()))
    assert len(spans) > 2  # samples of one document and of several


def test_a_sample_that_is_filled_up_has_no_places_there(prefix):
    stock = dataset_of(prefix, Split.valid, samples=None)
    data = WithPlaces(stock, 0)
    filled = 0
    for index in range(len(data)):
        sample = data[index]
        places, counted = sample[TOKEN_PLACES], sample["loss_mask"] != 0
        there = places >= 0
        assert (sample["tokens"][there] == places[there]).all()
        assert not counted[~there].any()
        filled += int((~there).sum())
    assert 0 < filled < LENGTH


def test_in_all_else_it_is_the_data_set(prefix):
    stock = dataset_of(prefix)
    data = WithPlaces(stock, 0)
    assert data.index_split is Split.train
    assert data.config is stock.config
    assert not hasattr(data, "datasets")
    sample = data[5]
    assert sample.keys() - stock[5].keys() == {TOKEN_PLACES}
    assert all(torch.equal(value, sample[key]) for key, value in stock[5].items())
    again = pickle.loads(pickle.dumps(WithPlaces(SimpleNamespace(config=3), 4)))
    assert again.config == 3


def test_data_sets_have_the_same_numbers_on_every_rank_and_in_every_split():
    numbers = number_data_sets({"train": ("/b/x", "/a/y/"), "valid": ("/a//y", "c")})
    assert numbers == {"/a/y": 0, "/b/x": 1, "c": 2}


def test_blends_and_lists_of_sets_are_placed_once(prefix):
    part = TokenPlaces(number_data_sets({"train": (prefix,)}), "teachers.a.source")
    blend = BlendedDataset.__new__(BlendedDataset)
    blend.datasets = kept = [dataset_of(prefix)]
    placed = part.placed(blend)
    assert placed is blend
    assert blend.datasets is kept
    assert isinstance(kept[0], WithPlaces)
    first = kept[0]
    assert part.placed(blend).datasets[0] is first  # of another model chunk
    (valid,) = part.placed([dataset_of(prefix)])
    assert isinstance(valid, WithPlaces)
    assert part.placed(None) is None


class OtherText(GPTDataset):
    """A data set of the script's own."""


def test_data_of_a_scripts_own_is_an_error_when_the_iterators_are_there(prefix, monkeypatch):
    from megatron_moe_inject.data import token_places
    from megatron_moe_inject.host.errors import RecipeError

    monkeypatch.setattr(token_places, "agree", lambda action: action())
    part = TokenPlaces(number_data_sets({"train": (prefix,)}), "teachers.a.source")
    own = dataset_of(prefix)
    own.__class__ = OtherText
    build = part.around["build_train_valid_test_datasets"]
    assert build(lambda: (own, None, None)) == (own, None, None)
    message = "teachers.a.source: the script's data is a OtherText of .*use indexed data sets"
    with pytest.raises(RecipeError, match=message):
        part.around["build_train_valid_test_data_iterators"](lambda: None)
