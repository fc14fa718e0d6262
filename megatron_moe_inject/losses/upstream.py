"""The gradient from above as one number times weights that were known before.

Shapes: t tokens.

A training script that sums the token losses times a loss mask sends back mask * c, with a c (loss
scale, tokens, micro-batches) that the forward pass cannot know. Work that mixes tokens can be done
in the forward pass with the mask, if c turns out to exist.
"""

import torch
from torch import Tensor

# How far a token's gradient may be from c * mask, relative to it: a few roundings on the way here,
# possibly to 16 bits where the student computes in 16 bits.
_TOLERANCE, _TOLERANCE_16_BITS = 1e-5, 1e-2


def common_factor(upstream: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The c with ``upstream`` = c * ``mask``, both [t]; NaN if there is none.

    The best c in the sense of least squares has to fit every token, to 1 % where ``dtype``, the
    student's, has 16 bits and to 1e-5 elsewhere. A mask of zeros gives 0.

    Returns:
        A scalar tensor in float64. Neither collective nor host synchronisation.
    """
    upstream, mask = upstream.double(), mask.double()
    square = mask.dot(mask)
    factor = torch.where(square > 0, upstream.dot(mask) / square, 0.0)
    expected = factor * mask
    tolerance = _TOLERANCE_16_BITS if dtype.itemsize == 2 else _TOLERANCE
    fits = (upstream - expected).abs() <= tolerance * expected.abs()
    return torch.where(fits.all(), factor, torch.nan)
