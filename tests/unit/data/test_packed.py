"""Documents and samples of a packed row, and what does not work on rows of several samples."""

from argparse import Namespace

import pytest
import torch

from megatron_moe_inject.data.packed import (
    check_packed,
    check_pipeline,
    check_whole_documents,
    counted,
    document_lengths,
    packing_flag,
    segments,
    starts,
)
from megatron_moe_inject.host.errors import (
    RecipeError,
)

LENGTH = 24
MASKED = "--dataloader-inter-document-masking"


def of_rank(row, size, rank):
    """Megatron's division of a row among context-parallel ranks, a piece from each end."""
    pieces = row.view(2 * size, -1)
    return torch.cat([pieces[rank], pieces[2 * size - 1 - rank]])


@pytest.mark.parametrize("cp", [1, 2, 3, 4])
@pytest.mark.parametrize("samples", [1, 2, 3, 4, 6, 8])
def test_segments_are_of_one_sample_each(samples, cp):
    row = torch.arange(samples).repeat_interleave(LENGTH)
    for rank in range(cp):
        own = of_rank(row, cp, rank)
        found = segments(samples, len(own), cp, rank, by_document=False)
        assert len(own) % len(found) == 0
        parts = own.view(len(found), -1)
        assert (parts == torch.tensor(found).unsqueeze(1)).all()
    assert segments(samples, samples * LENGTH // cp, cp, cp - 1, by_document=True) == [
        *range(samples)
    ]


@pytest.mark.parametrize(
    ("borders", "lengths"),
    [
        ([[0, 3, 5, 8, 8, 8]], [[3, 2, 3]]),  # 0.19 fills up with the length of the sample
        ([[0, 3, 5, 8]], [[3, 2, 3]]),  # 0.18 does not
        ([[0, 8, 8], [0, 1, 8]], [[8], [1, 7]]),
        ([[0, 0, 2, 8, 8]], [[2, 6]]),
    ],
)
def test_documents_are_where_their_borders_say(borders, lengths):
    batch = {"cu_seqlens": torch.tensor(borders, dtype=torch.int32)}
    found = starts(batch, (len(borders), 8))
    assert found.shape == (len(borders), 8)
    assert document_lengths(found) == lengths


def test_tokens_count_whose_loss_does():
    batch = {"loss_mask": torch.tensor([[0.0, 1.0, 0.5, 0.0]])}
    assert counted(batch, (1, 4)).tolist() == [[False, True, True, False]]
    assert counted({}, (2, 3)).all()


def test_the_flag_that_packs():
    assert packing_flag(Namespace(sft=False, dataloader_inter_document_masking=True)) == MASKED
    assert packing_flag(Namespace(sft=True)) == "--sft"
    assert packing_flag(Namespace(sft=False)) is None


def args(sft=False, cp=1, pp=1):
    return Namespace(
        sft=sft,
        dataloader_inter_document_masking=not sft,
        context_parallel_size=cp,
        pipeline_model_parallel_size=pp,
    )


def test_what_follows_samples_does_not_take_rows_that_context_parallelism_divides():
    with pytest.raises(RecipeError, match=rf"{MASKED}: --context-parallel-size 2 .*steering"):
        check_packed(args(cp=2), 4, "steering")
    check_packed(args(cp=2), 1, "steering")
    check_packed(args(), 4, "steering")
    check_packed(Namespace(sft=False, context_parallel_size=2), 4, "steering")


def test_a_pipeline_takes_rows_of_one_sample():
    with pytest.raises(RecipeError, match=r"--sft: puts the 2 samples .*--micro-batch-size"):
        check_pipeline(args(sft=True, pp=2), 2)
    check_pipeline(args(pp=2), 1)
    check_pipeline(args(), 2)


def test_documents_that_context_parallelism_divides_are_left_to_megatron():
    with pytest.raises(RecipeError, match=r"--sft: --context-parallel-size 2 .*a teacher"):
        check_whole_documents(args(sft=True, cp=2), "a teacher")
    check_whole_documents(args(cp=2), "a teacher")
    check_whole_documents(args(sft=True), "a teacher")
