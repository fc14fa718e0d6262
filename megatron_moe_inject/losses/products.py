"""Matrix products with a head whose number of ids is odd, at full speed.

Shapes: t tokens, h hidden, c columns: the real ids among this rank's rows of the head.

Not every tokenizer has a round number of ids (GPT-2 has 50,257). Megatron pads the head to one that
GPUs like, but padded ids take no part here, and the tensor cores of a GPU want rows that begin at
multiples of 16 bytes: for [t, 32767] logits in bf16 cuBLAS chose kernels that reached 90 to 150
TFLOP/s on an H100, where its usual ones reach 650 to 780. So logits have rows some columns apart
that nobody reads, and a product goes over all but the last few columns (``whole``), with a small
one for the rest.
"""

import itertools

import torch
from torch import Tensor

from megatron_moe_inject.host.accumulate import in_one_pass, multiply_into

_BYTES = 16
# Terms of a sum that are copied to float32 at once where a product cannot give it.
_TERMS = 4096


def whole(columns: int, dtype: torch.dtype) -> int:
    """The columns of a row that fill multiples of 16 bytes."""
    return columns - columns % (_BYTES // dtype.itemsize)


def aligned(like: Tensor, rows: int, columns: int) -> Tensor:
    """Memory for [rows, columns] of the dtype and device of ``like``, with a spare column behind.

    Columns are neighbours, and rows begin at multiples of 16 bytes.
    """
    stride = whole(columns, like.dtype) + _BYTES // like.dtype.itemsize
    return like.new_empty(rows, stride)[:, :columns]


def with_spare(block: Tensor) -> Tensor:
    """A block that ``aligned`` made, [t, c], with the first of its spare columns, [t, c + 1]."""
    return block.as_strided((len(block), block.shape[1] + 1), block.stride())


def head_logits(hidden: Tensor, head: Tensor, *, spare: bool = False) -> Tensor:
    """``hidden @ head.T``: [t, h] and [c, h] of one dtype to [t, c]; no gradients.

    Columns are neighbours in memory, and rows begin at multiples of 16 bytes; with ``spare`` in a
    block of ``aligned``.
    """
    columns, even = len(head), whole(len(head), hidden.dtype)
    if even == columns and not spare:
        return hidden @ head.t()
    logits = aligned(hidden, len(hidden), columns)
    if even:
        torch.mm(hidden, head[:even].t(), out=logits[:, :even])
    if even < columns:
        torch.mm(hidden, head[even:].t(), out=logits[:, even:])
    return logits


def hidden_gradient(gradient: Tensor, head: Tensor, out: Tensor, *, add: bool = False) -> None:
    """``gradient @ head`` into ``out``: [t, c] as of ``head_logits`` and [c, h] to [t, h].

    ``out`` is of the dtype of the maths, so that what scales it later rounds it for the first time.
    ``add`` adds to what is there.
    """
    at_once = in_one_pass(gradient, out)
    if gradient.is_cuda and not at_once:
        # float32 operands would take several times as long
        (out.add_ if add else out.copy_)(gradient @ head)
        return
    size = max(whole(len(head), gradient.dtype), _TERMS) if at_once else _TERMS
    for part in pieces(len(head), size, gradient.dtype) or [slice(0, 0)]:
        multiply_into(out, gradient[:, part], head[part], add=add or part.start > 0)


def pieces(columns: int, size: int, dtype: torch.dtype) -> list[slice]:
    """Neighbouring columns in pieces of at most ``size``; all begin at multiples of 16 bytes.

    Args:
        size: whose bytes are a multiple of 16.
        dtype: of the columns. Only the last piece may have another width than such a multiple, and
            is then smaller than one.
    """
    even = whole(columns, dtype)
    starts = [*range(0, even, size), *([even] if even < columns else []), columns]
    return [slice(start, stop) for start, stop in itertools.pairwise(starts)]
