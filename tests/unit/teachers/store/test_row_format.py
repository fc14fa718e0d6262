"""What a row holds comes back from its bytes, in as few bits as it claims."""

import math

import numpy as np
import pytest
import torch

from megatron_moe_inject.teachers.store.row_format import PRECISIONS, RowFormat, Rows, top_rows

TEMPERATURES = (1.0, 2.0, 0.5)
CASES = [
    # vocabulary, ids, mass, spread of the logits
    (1, 1, None, 1.0),
    (2, 1, None, 1.0),
    (2, 2, 0.5, 4.0),
    (127, 127, None, 2.0),
    (127, 127, 0.9, 2.0),
    (1000, 7, None, 0.0),
    (1000, 64, 0.99, 6.0),
    (32003, 64, None, 3.0),
    (131072, 128, None, 3.0),
    (100000, 16, 0.7, 30.0),
]


def teacher(seed, vocabulary, spread, count=24):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, vocabulary, generator=generator) * spread
    tokens = torch.randint(vocabulary, (count,), generator=generator)
    return tokens, logits.log_softmax(-1)


def labels_of(tokens):
    return tokens.roll(-1)


def through(layout, rows, mass):
    """Encoded and decoded; what stands behind a row must not matter."""
    content, counts = layout.encode(rows)
    sizes = torch.from_numpy(layout.bytes_of(counts.numpy()))
    behind = torch.arange(layout.widest) >= sizes[:, None]
    assert not content[behind].any()
    noise = torch.randint(256, content.shape, dtype=torch.uint8)
    content = torch.where(behind, noise, content)
    return layout.decode(content, None if mass is None else counts)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("vocabulary", "slots", "mass", "spread"), CASES)
def test_rows_come_back(vocabulary, slots, mass, spread, precision):
    for seed in range(3 if vocabulary < 2000 else 1):
        tokens, log_probs = teacher(seed, vocabulary, spread)
        labels = labels_of(tokens)
        rows = top_rows(
            tokens, log_probs, slots=slots, mass=mass, temperatures=TEMPERATURES, labels=labels
        )
        layout = RowFormat(vocabulary, slots, precision, len(TEMPERATURES))
        back = through(layout, rows, mass)
        assert torch.equal(back.tokens, tokens)
        assert torch.equal(back.ids, rows.ids)
        label = log_probs.gather(1, labels[:, None]).squeeze(1)
        reach = {"packed": label.clamp(min=-64), "bf16": label, "fp32": label}[precision]
        bound = {"packed": 6e-4 * (1 - reach), "bf16": -reach * 2.0**-8, "fp32": 0 * reach}
        assert ((back.label - reach).abs() <= bound[precision] + 1e-6).all()
        used = rows.ids >= 0
        for index, temperature in enumerate(TEMPERATURES):
            whole = (log_probs / temperature).log_softmax(-1)
            expected = whole.gather(1, rows.ids.clamp(min=0))
            found = back.at(index, temperature)
            assert (found[~used] == -torch.inf).all()
            # What is stored and the rest are all there is, whatever was rounded.
            mass_kept = found.exp().sum(-1) + back.log_rest[:, index].exp()
            torch.testing.assert_close(mass_kept, torch.ones(len(tokens)), rtol=0, atol=1e-5)
            gap = (found - expected)[used].abs()
            if precision == "fp32":
                assert gap.max() < 2e-5 / min(temperature, 1)
            elif precision == "bf16":
                furthest = rows.log_probs.masked_fill(~used, 0).abs().amax(-1, keepdim=True)
                bound = 2.0**-8 * furthest.expand_as(used)[used] / temperature + 2e-5
                assert (gap <= bound).all()
            else:
                terms = expected.exp() * (expected - found)
                lost = terms.where(used, 0.0).sum(-1)
                assert lost.mean() < 1e-3
                assert lost.max() < 1e-2


def test_the_rest_is_what_is_not_stored():
    tokens, log_probs = teacher(0, 500, 3.0)
    rows = top_rows(tokens, log_probs, slots=20, mass=None, temperatures=TEMPERATURES)
    for index, temperature in enumerate(TEMPERATURES):
        probs = (log_probs / temperature).softmax(-1)
        rest = 1 - probs.gather(1, rows.ids).sum(-1)
        torch.testing.assert_close(rows.log_rest[:, index].exp(), rest, rtol=1e-4, atol=1e-6)
    whole = top_rows(tokens, log_probs, slots=500, mass=None, temperatures=(1.0,))
    assert (whole.log_rest == -torch.inf).all()


def test_by_mass_a_token_has_the_fewest_ids_that_reach_it():
    tokens, log_probs = teacher(1, 300, 3.0)
    rows = top_rows(tokens, log_probs, slots=100, mass=0.8, temperatures=(1.0,))
    used = rows.ids >= 0
    kept = rows.log_probs.exp().where(used, 0.0)
    least = kept.masked_fill(~used, 2).amin(-1)
    full = used.sum(-1) == 100
    assert ((kept.sum(-1) >= 0.8 - 1e-6) | full).all()
    assert (kept.sum(-1) - least < 0.8 + 1e-6).all()
    assert len(used.sum(-1).unique()) > 5


@pytest.mark.parametrize(
    ("vocabulary", "slots", "most"),
    [(131072, 128, 300), (131072, 64, 160), (129280, 64, 160), (151936, 128, 300),
     (151936, 64, 160), (32000, 64, 160)],
)  # fmt: skip
def test_bytes_of_a_token(vocabulary, slots, most):
    assert RowFormat(vocabulary, slots, "packed").row_bytes(slots) <= most


def test_ids_take_hardly_more_than_a_set_of_them_must():
    for vocabulary, count in [(131072, 128), (151936, 64), (32000, 17), (500, 20)]:
        layout = RowFormat(vocabulary, count, "packed")
        bits = count * layout.low_bits(count) + layout.high_bits(count)
        least = math.log2(math.comb(vocabulary, count))
        assert least <= bits <= least + 0.7 * count + 8


@pytest.mark.parametrize(
    "change",
    [
        {"ids": torch.tensor([[3, 2, 5]])},
        {"ids": torch.tensor([[2, 2, 5]])},
        {"ids": torch.tensor([[2, 3, 10]])},
        {"ids": torch.tensor([[-1, 3, 5]])},
        {"ids": torch.tensor([[-1, -1, -1]])},
        {"tokens": torch.tensor([10])},
        {"log_probs": torch.tensor([[-1.0, float("nan"), -2.0]])},
        {"log_rest": torch.tensor([[float("nan")]])},
        {"log_rest": torch.tensor([[0.5]])},
        {"label": torch.tensor([float("nan")])},
        {"label": None},
    ],
)
def test_what_is_no_row_is_not_written(change):
    rows = Rows(
        torch.tensor([4]), torch.tensor([[2, 3, 5]]), torch.tensor([[-1.0, -2.0, -3.0]]),
        torch.tensor([[-1.0]]), torch.tensor([-1.0]),
    )  # fmt: skip
    layout = RowFormat(10, 3, "packed")
    layout.encode(rows)
    with pytest.raises(ValueError, match=r"ids must ascend|not finite|a row must hold"):
        layout.encode(rows._replace(**change))


def test_a_row_that_is_not_there_says_nothing():
    layout = RowFormat(100, 5, "packed", 2)
    assert not layout.decode(torch.zeros(3, layout.widest, dtype=torch.uint8)).label.any()
    back = layout.decode(torch.zeros(3, layout.widest, dtype=torch.uint8), torch.zeros(3))
    assert (back.ids == -1).all()
    assert (back.tokens == -1).all()
    assert (back.at(1, 2.0) == -torch.inf).all()
    assert (back.label == -torch.inf).all()


def test_a_store_that_knows_no_label_keeps_none():
    tokens, log_probs = teacher(3, 100, 2.0)
    rows = top_rows(tokens, log_probs, slots=5, mass=None, temperatures=(1.0,))
    layout = RowFormat(100, 5, "packed", labels=False)
    assert layout.widest < RowFormat(100, 5, "packed").widest
    back = through(layout, rows, None)
    assert back.label is None
    assert torch.equal(back.ids, rows.ids)


@pytest.mark.parametrize(
    ("vocabulary", "slots", "precision"), [(10, 11, "bf16"), (10, 0, "bf16"), (10, 3, "fp16")]
)
def test_layouts_that_are_none(vocabulary, slots, precision):
    with pytest.raises(ValueError, match=r"keep 1 to 10|use one of packed"):
        RowFormat(vocabulary, slots, precision)


def test_numbers_of_bytes_agree():
    layout = RowFormat(1000, 30, "bf16", 2)
    counts = np.arange(31)
    assert layout.bytes_of(counts).tolist() == [layout.row_bytes(n) for n in counts.tolist()]
    assert layout.widest == layout.row_bytes(30)
