"""Our GPT entry on documents of its own, several to a sample or one: the same documents either way.

``TESTS_DOCUMENTS=packed`` yields samples of ``PER_SAMPLE`` documents with their borders, as
``--dataloader-inter-document-masking`` does (which the run must have), ``single`` one document in
each, filled up with tokens that the loss mask leaves out. A batch of n packed samples has the
documents of ``PER_SAMPLE * n`` single ones, in the same order. The first tokens of each document
are a prompt, which the loss mask leaves out as well. Samples are of the two entries of the blend in
turns; both splits have the same text.
"""

import os

import numpy as np
import torch
from megatron.training import get_args

from megatron_moe_inject.host import gpt_entry
from tests.harness.corpus import VOCAB

PER_SAMPLE = 4
SAMPLES = 64
END = VOCAB


def documents(sample: int, length: int) -> list[torch.Tensor]:
    """The documents of a packed sample, of uneven lengths with ``length`` in sum."""
    rng = np.random.default_rng(sample)
    while True:
        borders = np.sort(rng.choice(np.arange(1, length), PER_SAMPLE - 1, replace=False))
        lengths = np.diff([0, *borders, length])
        if lengths.min() > 2:
            break
    stride, found = (1, 7)[sample % 2], []
    for own in lengths:
        tokens = (rng.integers(VOCAB) + stride * np.arange(own)) % VOCAB
        noise = rng.random(own) < 0.1
        tokens[noise] = rng.integers(VOCAB, size=noise.sum())
        tokens[-1] = END
        found.append(torch.from_numpy(tokens))
    return found


def fields(tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a loader gives of one document; its last token has nothing to predict."""
    mask = torch.ones(len(tokens))
    mask[: len(tokens) // 3] = mask[-1] = 0
    labels = torch.cat([tokens[1:], torch.zeros(1, dtype=torch.int64)])
    positions = torch.arange(len(tokens))
    return {"tokens": tokens, "labels": labels, "loss_mask": mask, "position_ids": positions}


class Documents(torch.utils.data.Dataset):
    """One split.

    Args:
        length: of a sample.
        packed: see the module.
    """

    def __init__(self, length: int, packed: bool) -> None:
        self.length, self.packed = length, packed

    def __len__(self) -> int:
        return SAMPLES * (1 if self.packed else PER_SAMPLE)

    def __getitem__(self, number: int) -> dict:
        if self.packed:
            own = documents(number, self.length)
            parts = [fields(tokens) for tokens in own]
            sample = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
            borders = torch.full((self.length + 1,), self.length, dtype=torch.int32)
            lengths = torch.tensor([len(tokens) for tokens in own])
            borders[: len(own) + 1] = torch.cat([torch.zeros(1).int(), lengths.cumsum(0).int()])
            extra = {"cu_seqlens": borders, "max_seqlen": lengths.max().int()}
            return {**sample, **extra, "dataset_id": number % 2}
        packed, place = divmod(number, PER_SAMPLE)
        sample = fields(documents(packed, self.length)[place])
        pad = self.length - len(sample["tokens"])
        sample = {name: torch.cat([value, value.new_zeros(pad)]) for name, value in sample.items()}
        sample["position_ids"] = torch.arange(self.length)
        mask = torch.ones(1, self.length, self.length, dtype=torch.bool).triu(1)
        return {**sample, "attention_mask": mask, "dataset_id": packed % 2}


def datasets_provider(num_samples, vp_stage=None):
    packed = os.environ["TESTS_DOCUMENTS"] == "packed"
    return [Documents(get_args().seq_length, packed) for _ in range(2)] + [None]


datasets_provider.is_distributed = True

if __name__ == "__main__":
    gpt_entry.datasets_provider = datasets_provider
    gpt_entry.main()
