"""Megatron teachers: written by one layout, read by ranks of another, equal to the original."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from megatron_moe_inject.host.errors import RecipeError
from megatron_moe_inject.teachers import StudentTokenizer, check_teacher
from megatron_moe_inject.teachers.base import RoutedExperts
from tests.harness.teacher_worlds import (
    EXPERTS,
    IDS,
    LAYOUTS,
    LENGTH,
    ROWS,
    SEQUENCES,
    STUDENT,
    run_worlds,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("teachers")
    run_worlds(folder)
    return folder


@pytest.fixture(scope="module")
def logits(folder):
    return torch.load(folder / "write0.pt")["logits"]


@pytest.fixture(scope="module")
def job(folder):
    return [torch.load(folder / f"read_in_job{rank}.pt") for rank in (0, 1)]


@pytest.fixture(scope="module")
def alone(folder):
    return torch.load(folder / "read_alone0.pt")


@pytest.mark.parametrize(
    ("name", "original"),
    [
        ("llama-tp1", "llama"),
        ("llama-tp2pp1", "llama"),
        ("gpt2-tp1/iter_0000003", "gpt2"),
        ("gpt2-tp2pp1", "gpt2"),
        ("mup-tp1/iter_0000003", "mup"),
        ("hybrid-tp1", "hybrid"),
        *((name, "moe") for name in EXPERTS),
    ],
)
def test_hidden_and_head_give_the_logits_of_the_original(alone, logits, name, original):
    hidden, (head, _) = alone["hidden"][name], alone["heads"][name]
    assert hidden.shape[:2] == (SEQUENCES, LENGTH)
    scale = alone["scales"][name]
    assert scale == (0.5 if original == "mup" else 1.0)
    torch.testing.assert_close(scale * (hidden @ head[:IDS].T), logits[original], rtol=0, atol=0)
    assert logits[original].std() > 0.1


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_on_two_ranks_say_what_they_say_on_one(job, alone, name):
    for result in job:
        torch.testing.assert_close(result["of_experts"][name], alone["hidden"][name])
        assert torch.equal(result["of_experts"][name], job[0]["of_experts"][name])


def test_a_rank_with_fewer_samples_keeps_up(job, alone):
    """With whole samples and with documents, of which one of two ranks has none."""
    for rank, result in enumerate(job):
        with_samples = 2 * rank
        for number, states in enumerate(result["unequal"]):
            if number // 2 != rank:
                assert states.shape == (0, LENGTH, 32)
                continue
            expected = alone["hidden"]["moe-tp1"], alone["of_documents"]
            torch.testing.assert_close(states, expected[number - with_samples])


def test_head_rows_beyond_the_vocabulary_are_zero(alone):
    for whole, part in alone["heads"].values():
        assert whole.shape[0] == ROWS + 8
        assert not whole[IDS:].any()
        assert torch.equal(whole[7:50], part)


def test_every_layout_gives_bitwise_the_same_teacher_in_and_out_of_a_job(job, alone):
    for result in job:
        hidden = result["hidden"]
        assert torch.equal(hidden["llama-tp1"], alone["hidden"]["llama-tp1"])
        assert torch.equal(hidden["llama-tp2pp1"], alone["hidden"]["llama-tp1"])
        assert torch.equal(hidden["llama-tp1pp2"], alone["hidden"]["llama-tp1"])
        assert torch.equal(hidden["gpt2-tp2pp1"], alone["hidden"]["gpt2-tp2pp1"])
        for layout in LAYOUTS:
            assert torch.equal(hidden[f"hybrid-{layout}"], alone["hidden"]["hybrid-tp1"]), layout


def test_one_rank_alone_may_load(job, alone):
    assert torch.equal(job[1]["alone"], alone["hidden"]["gpt2-tp2pp1"])
    assert [result["meeting"] for result in job] == [2, 2]
    assert [result["groups"] for result in job] == [0, 0]


def test_random_numbers_stay_as_they_were(job):
    assert all(result["rng"] for result in job)


def test_teacher_does_not_train(job):
    assert not any(result["training"] or result["trainable"] for result in job)


def test_shared_forward_equals_the_plain_forward_on_every_rank(job):
    for result in job:
        for count, (every_plain, every_parts) in result["shared"].items():
            assert len(every_plain) == len(every_parts) == (1 if count == "bf16" else 3)
            for plain, parts in zip(every_plain, every_parts, strict=True):
                assert plain.shape == parts.shape
                assert plain.dtype == parts.dtype
                assert torch.equal(plain, parts)
    assert job[0]["shared"]["bf16"][0][0].dtype == torch.bfloat16
    assert job[0]["shared"][0][0][0].shape == (0, LENGTH, 32)


def test_masks_are_given_to_the_sequences_that_they_belong_to(job):
    plain = job[0]["shared"][5][0][0]
    everywhere = job[0]["one_mask"][0]
    torch.testing.assert_close(everywhere[1], plain[1])
    torch.testing.assert_close(everywhere[0, :6], plain[0, :6])
    assert not torch.allclose(everywhere[0, 6:], plain[0, 6:], atol=1e-3)


def test_attention_switches_of_the_student_stay(alone):
    assert alone["switches"] == {"NVTE_FLASH_ATTN": "1", "NVTE_FUSED_ATTN": "0"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nan", "weights missing or not finite: output_layer.weight"),
        ("hole", "weights missing or not finite: output_layer.weight"),
        (
            "wrong-args",
            "self_attention.linear_qkv.weight of shape [4, 64, 32] where its arguments ask for",
        ),
        ("lost-expert", "it lacks decoder.layers.2.mlp.experts.experts.3.linear_fc2.weight"),
        ("missing", "it lacks decoder.final_layernorm.weight"),
        ("unexpected", "it holds decoder.extra besides"),
    ],
)
def test_a_checkpoint_that_is_not_the_trained_model_is_refused(alone, name, message):
    assert message in alone["errors"][name]
    assert alone["errors"][name].startswith("teachers.coder.source: 'megatron:")


def check(folder: Path, student: StudentTokenizer = STUDENT, **more):
    return check_teacher("coder", f"megatron:{folder}", student_tokenizer=student, **more)


def test_check_reads_the_architecture(folder):
    info = check(folder / "llama-tp1")
    assert info.path == str(folder / "llama-tp1" / "iter_0000003")
    assert (info.num_layers, info.hidden_size) == (4, 32)
    assert (info.vocab_size, info.vocab_rows) == (IDS, ROWS)
    assert info.max_positions is None
    assert info.config["iteration"] == 3
    assert info.config["kv_groups"] == 2
    assert "sizes agree (100 ids)" in info.vocabulary
    hybrid = check(folder / "hybrid-tp1pp2")
    assert (info.architecture, hybrid.architecture) == ("GPTModel", "HybridModel")
    assert (hybrid.num_layers, hybrid.config["pattern"]) == (4, "M*M-")
    gpt2 = check(folder / "gpt2-tp2pp1")
    assert gpt2.max_positions == 16
    assert gpt2.config["tied_embeddings"]
    layer = 24 * 72 + 72 + 24 * 24 + 24 + 2 * 24 * 96 + 96 + 24 + 4 * 24
    assert gpt2.parameters == ROWS * 24 + 16 * 24 + 2 * 24 + 2 * layer


def test_check_finds_the_prefix(folder):
    """A NullTokenizer has nothing to put in front, so only ids can be named."""
    info = check(folder / "llama-tp1")
    assert info.prefix == ()
    assert "its tokenizer cannot be read" in info.prefix_told
    assert check(folder / "llama-tp1", prefix=[3, 4]).prefix == (3, 4)
    with pytest.raises(RecipeError, match=r"teachers\.coder\.prefix: 'bos' is not named"):
        check(folder / "llama-tp1", prefix="bos")
    with pytest.raises(RecipeError, match=f"holds the id {ROWS}"):
        check(folder / "llama-tp1", prefix=[ROWS])


@pytest.mark.parametrize(
    ("name", "message"),
    [("truncated", "is incomplete: .*distcp must have"), ("gone", "it is not there")],
)
def test_check_finds_incomplete_files(folder, name, message):
    with pytest.raises(RecipeError, match=message):
        check(folder / name)


def test_check_compares_the_vocabulary(folder):
    with pytest.raises(RecipeError, match=r"another vocabulary: 100 ids .* student's 101 ids"):
        check(folder / "gpt2-tp2pp1", StudentTokenizer("NullTokenizer", vocab_size=101))


@pytest.mark.parametrize("name", EXPERTS)
def test_check_counts_experts(folder, name):
    """Three layers of four, of which a token passes two."""
    info = check(folder / name)
    one = 3 * 3 * 32 * 24
    assert info.experts == RoutedExperts(4, 2, 4 * one)
    assert info.active_parameters == info.parameters - 2 * one
    assert (info.config["experts"], info.config["shared_experts_ffn"]) == (4, 40)


class _Harmful:
    def __reduce__(self):
        return os.system, ("touch harmed",)


def test_metadata_cannot_run_code(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (folder / "pickle" / ".metadata").write_bytes(pickle.dumps(_Harmful()))
    with pytest.raises(RecipeError, match=r"refers to (posix|os)\.system"):
        check(folder / "pickle")
    assert not Path("harmed").exists()


def test_common_state_cannot_run_code(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder / "gpt2-tp1" / "iter_0000003", tmp_path / "copy")
    torch.save({"args": _Harmful()}, tmp_path / "copy" / "common.pt")
    with pytest.raises(RecipeError, match="objects that this Megatron does not know as data"):
        check(tmp_path / "copy")
    assert not Path("harmed").exists()


def test_iterations_are_found(folder, tmp_path):
    stored = folder / "llama-tp1" / "iter_0000003"
    assert check(stored).path == str(stored)
    (tmp_path / "iter_0000003").symlink_to(stored)
    with pytest.raises(RecipeError, match=r"no latest_checkpointed.*such as .*iter_0000003"):
        check(tmp_path)
    tracker = tmp_path / "latest_checkpointed_iteration.txt"
    tracker.write_text("release\n")
    with pytest.raises(RecipeError, match="points to release, which is not there"):
        check(tmp_path)
    (tmp_path / "release").symlink_to(stored)
    assert check(tmp_path).path == str(tmp_path / "release")
    tracker.write_text("metadata")
    with pytest.raises(RecipeError, match=r"unreadable latest_checkpointed_iteration\.txt"):
        check(tmp_path)


def test_other_formats_are_refused(tmp_path):
    with pytest.raises(RecipeError, match=r"no latest_checkpointed.*--save"):
        check(tmp_path)
    (tmp_path / "metadata.json").write_text(json.dumps({"sharded_backend": "zarr"}))
    with pytest.raises(RecipeError, match="in format 'zarr'; save it with --ckpt-format"):
        check(tmp_path)
    (tmp_path / "metadata.json").write_text("{")
    with pytest.raises(RecipeError, match=r"cannot be read at .*metadata.json"):
        check(tmp_path)
    (tmp_path / "mp_rank_00").mkdir()
    with pytest.raises(RecipeError, match=r"old torch format.*--ckpt-convert-format"):
        check(tmp_path)
    with pytest.raises(RecipeError, match="is no directory on this machine"):
        check(tmp_path / "nowhere")
