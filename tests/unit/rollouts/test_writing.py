"""What a command is asked, its prompts, its draws and the files that are left to do."""

import json

import numpy as np
import pytest
import torch

from megatron_moe_inject.cli import main
from megatron_moe_inject.host.errors import RecipeError
from megatron_moe_inject.rollouts.file_format import Writer, read_rollouts
from megatron_moe_inject.rollouts.generate import next_tokens
from megatron_moe_inject.rollouts.parts import Completion, missing, parts_of, write_part
from megatron_moe_inject.rollouts.prompts import Prompt, checksum, read_prompts
from megatron_moe_inject.rollouts.settings import Asked, Sampling, told
from tests.harness.corpus import write_corpora

WRITER = Writer("ab" * 16, 40)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_corpora(tmp_path_factory.mktemp("data"), documents=12, length=30)[1]


def test_prompts_are_beginnings_of_documents_in_an_order_of_the_seed(data):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    found = read_prompts(Asked(data, "o", prompt_tokens=5), None, 61)
    assert [prompt.number for prompt in found] == list(range(12))
    assert sorted(prompt.source for prompt in found) == list(range(12))
    documents = IndexedDataset(data)
    for prompt in found:
        assert prompt.ids == documents[prompt.source][:5].tolist()
    assert found == read_prompts(Asked(data, "o", prompt_tokens=5), None, 61)
    other = Asked(data, "o", prompt_tokens=5, count=4, sampling=Sampling(seed=1))
    fewer = read_prompts(other, None, 61)
    assert [p.source for p in fewer] != [p.source for p in found[:4]]
    assert checksum(fewer) != checksum(found)
    some = read_prompts(Asked(data, "o", prompt_tokens=5, documents=(3, 6)), None, 61)
    assert sorted(prompt.source for prompt in some) == [3, 4, 5]


def test_a_long_document_gives_a_prompt_for_each_stretch(data):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    asked = Asked(data, "o", prompt_tokens=4, sampling=Sampling(max_tokens=7))
    found = read_prompts(asked, None, 61)
    documents = IndexedDataset(data)
    texts = [documents[document].tolist() for document in range(12)]
    assert sorted((p.source, p.ids) for p in found) == sorted(
        (document, text[begin : begin + 4])
        for document, text in enumerate(texts)
        for begin in (0, 11, 22)
    )
    assert [prompt.number for prompt in found] == list(range(36))


def test_prompts_of_lines_are_ids_or_text(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": [1, 2]}\n\n{"prompt": "ab"}\n')
    found = read_prompts(Asked(str(path), "o"), lambda text: list(text.encode()), 256)
    assert found == [Prompt(0, [1, 2], 0), Prompt(1, [97, 98], 2)]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 1 is no JSON"),
        ('{"prompt": []}', "line 1 has no ids and no text"),
        ('{"prompt": [1, -1]}', "line 1 has no ids and no text"),
        ('{"text": "a"}', "line 1 has no ids and no text"),
        ('{"prompt": "a"}', "line 1 is text, for which there is no tokenizer"),
        ('{"prompt": [99]}', "has id 99 in document or line 0"),
        ("", "has no prompt"),
    ],
)
def test_wrong_prompts_are_named(tmp_path, line, said):
    path = tmp_path / "p.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(RecipeError, match=said):
        read_prompts(Asked(str(path), "o"), None, 61)


def test_half_a_character_is_no_prompt(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"prompt": "a \ud800"}) + "\n")
    with pytest.raises(RecipeError, match="line 1 has half a character"):
        read_prompts(Asked(str(path), "o"), lambda text: list(text.encode()), 256)


def test_prompts_that_are_not_there(data):
    with pytest.raises(RecipeError, match="is no data set"):
        read_prompts(Asked("/nowhere", "o"), None, 61)
    with pytest.raises(RecipeError, match="has no prompt; lower --prompt-tokens 30"):
        read_prompts(Asked(data, "o", prompt_tokens=30), None, 61)
    with pytest.raises(RecipeError, match="--documents: '3:13' is more than the 12"):
        read_prompts(Asked(data, "o", documents=(3, 13)), None, 61)


def test_tokens_are_drawn_by_their_probabilities():
    logits = torch.tensor([1.0, 3.0, 2.0, -1.0])
    places = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000
    for temperature in (0.7, 1.0):
        found = next_tokens(logits.expand(20000, -1), Sampling(temperature=temperature), places)
        shares = torch.bincount(found, minlength=4) / 20000
        expected = torch.softmax(logits / temperature, -1)
        assert torch.allclose(shares, expected, atol=2e-4)


def test_top_p_leaves_the_least_likely_out():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    places = (torch.arange(8000, dtype=torch.float64) + 0.5) / 8000
    for top_p, kept in ((0.5, 1), (0.51, 2), (0.8, 2), (0.81, 3), (1.0, 4)):
        found = next_tokens(logits.expand(8000, -1), Sampling(top_p=top_p), places)
        assert set(found.tolist()) == set(range(kept)), top_p
    first = (next_tokens(logits.expand(8000, -1), Sampling(top_p=0.8), places) == 0).float()
    assert float(first.mean()) == pytest.approx(0.5 / 0.8, abs=1e-3)


def test_top_k_leaves_as_many_and_top_p_is_a_share_of_these():
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    places = (torch.arange(8000, dtype=torch.float64) + 0.5) / 8000
    for top_k, top_p, kept in ((1, 1.0, 1), (3, 1.0, 3), (9, 1.0, 4), (2, 0.56, 1), (2, 0.58, 2)):
        sampling = Sampling(top_k=top_k, top_p=top_p)
        found = next_tokens(logits.expand(8000, -1), sampling, places)
        assert set(found.tolist()) == set(range(kept)), (top_k, top_p)
    first = (next_tokens(logits.expand(8000, -1), Sampling(top_k=2), places) == 0).float()
    assert float(first.mean()) == pytest.approx(0.4 / 0.7, abs=1e-3)


def test_at_temperature_0_the_most_likely_counts():
    logits = torch.tensor([[1.0, 3.0, 3.0], [2.0, 0.0, 1.0]])
    assert next_tokens(logits, Sampling(temperature=0.0), torch.rand(2).double()).tolist() == [1, 0]


def test_the_draws_of_a_prompt_are_its_own():
    sampling = Sampling(max_tokens=4, seed=3)
    assert np.array_equal(sampling.uniforms(7), sampling.uniforms(7))
    assert not np.array_equal(sampling.uniforms(7), sampling.uniforms(8))
    assert not np.array_equal(sampling.uniforms(7), Sampling(max_tokens=4, seed=4).uniforms(7))


def test_a_command_goes_on_where_it_stopped(tmp_path):
    prompts = [Prompt(n, [n + 1], n) for n in range(7)]
    asked = Asked("p", str(tmp_path), per_file=3)
    settings = told(asked, checksum(prompts), "megatron")
    parts = parts_of(tmp_path, prompts, 3, WRITER, settings)
    assert [len(part.prompts) for part in parts] == [3, 3, 1]
    assert missing(parts, WRITER) == [0, 1, 2]
    texts = [Completion([5]), Completion([6, 7], [-0.5, -1.5]), Completion([8])]
    write_part(parts[1], texts, WRITER, settings)
    assert missing(parts, WRITER) == [0, 2]
    found = read_rollouts(parts[1].path)
    assert [r.prompt.tolist() for r in found.rollouts] == [[4], [5], [6]]
    assert found.rollouts[0].log_probs is None
    assert found.rollouts[1].log_probs.tolist() == [-0.5, -1.5]
    assert found.lm_loss is None
    assert found.settings == settings
    other = told(Asked("p", "o", sampling=Sampling(seed=1)), checksum(prompts), "megatron")
    assert {p.path for p in parts_of(tmp_path, prompts, 3, WRITER, other)}.isdisjoint(
        part.path for part in parts
    )
    parts[0].path.write_text("half")
    with pytest.raises(RecipeError, match="is half a file"):
        missing(parts, WRITER)


def test_what_is_asked_survives_being_a_flag():
    asked = Asked("p", "o", 5, 6, (1, 9), 7, 8, False, Sampling(3, 0.5, 0.9, 4, (1, 2), 7), "c", 9)
    assert Asked.of_plain(asked.plain()) == asked
    assert json.loads(asked.plain())["sampling"]["stop"] == [1, 2]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("r.yaml", "--temperature", "-1"), "--temperature: -1.0 is none"),
        (("r.yaml", "--top-p", "0"), "--top-p: 0.0 is not in (0, 1]"),
        (("r.yaml", "--top-k", "-1"), "--top-k: -1 is too small"),
        (("r.yaml", "--ckpt-step", "3"), "--ckpt-step: is about --checkpoint here"),
        (("r.yaml", "--max-tokens", "0"), "--max-tokens: 0 is too small"),
        (("r.yaml", "--documents", "5"), "--documents: '5' is no range"),
        (("r.yaml", "--documents", "5:5"), "--documents: '5:5' is no range"),
        (("r.yaml", "--stop", "-1"), "--stop: [-1] has a negative id"),
        (("r.yaml", "--count", "0"), "--count: 0 is too small"),
        (("r.yaml", "--model", "m"), "--model: is about servers; add --server"),
        ((), "RECIPE is missing"),
        (("r.yaml", "--server", "http://a"), "--server: needs no recipe"),
        (("--server", "http://a"), "--checkpoint: missing"),
    ],
)
def test_mistakes_of_the_command_are_named(tmp_path, capsys, options, said):
    common = ("--prompts", "p", "--output", str(tmp_path / "o"))
    assert main(["rollouts", *common, *options]) == 2
    assert said in capsys.readouterr().err
