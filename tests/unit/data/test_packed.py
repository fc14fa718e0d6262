"""Which sample each part of a packed row is of, and what does not work on rows of several."""

from argparse import Namespace

import pytest
import torch

from megatron_moe_inject.data.packed import check_packed, segments
from megatron_moe_inject.host.errors import (
    RecipeError,
)

LENGTH = 24


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


def test_what_follows_samples_through_layers_takes_rows_of_one_sample():
    packed = Namespace(dataloader_inter_document_masking=True)
    with pytest.raises(RecipeError, match=r"--dataloader-inter-document-masking: .*--inject-prof"):
        check_packed(packed, 2, "--inject-profile")
    with pytest.raises(RecipeError, match="--sft: puts the 4 samples"):
        check_packed(Namespace(sft=True), 4, "steering")
    check_packed(packed, 1, "steering")
    check_packed(Namespace(sft=False), 2, "steering")
