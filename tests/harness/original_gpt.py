"""Our GPT entry, with gamma; each rank says whether without its adapters the trained student is the
original.

Logits of fixed tokens, by the model alone, are taken before the first step and after the last, each
as the student is and as the original: ``original: bitwise, and another with adapters`` if the
original's are bitwise those of the start, and the student's are not.
"""

import functools

import torch
from megatron.training import training

from megatron_moe_inject.host import compat, gpt_entry
from tests.harness.built_model import built, keep_what_is_built, originals


def logits():
    """As the student is, and as the original."""
    (chunk,) = compat.bare_chunks(built[0])
    tokens = (torch.arange(64).view(2, 32) * 7) % 53
    mask = torch.ones(32, 32).tril() < 0.5
    inputs = tokens, torch.arange(32).expand(2, 32), mask[None, None]
    chunk.eval()
    with torch.no_grad():
        student = chunk(*inputs).clone()
        with originals[0].running():
            original = chunk(*inputs).clone()
    chunk.train()
    return student, original


if __name__ == "__main__":
    keep_what_is_built()
    stock_train, begun = training.train, []

    @functools.wraps(stock_train)
    def train(*args, **kwargs):
        begun.extend(logits())
        return stock_train(*args, **kwargs)

    training.train = train
    gpt_entry.main()
    student, original = logits()
    assert torch.equal(begun[0], begun[1]), "adapters begin as nothing"
    same = "bitwise" if torch.equal(original, begun[0]) else "not bitwise"
    other = "another" if not torch.equal(student, original) else "the same"
    print(f"original: {same}, and {other} with adapters", flush=True)
