"""Weight gradients that add up in buffers wider than what they are made of.

Two kinds of buffer: a sum of one's own, and Megatron's ``main_grad``. The contract of the latter is
that of gradient accumulation fusion, from Megatron-Core's
``LinearWithGradAccumulationAndAsyncCommunication``: a weight with the attribute
``grad_added_to_main_grad`` (DDP sets it) gets it set to True and autograd receives a placeholder,
so that DDP's hook still fires and sees that nothing is left to add. The placeholder must be zeros
when ``zero_out_wgrad`` is set: an embedding shares the weight, its own gradient is summed with the
placeholder, and DDP adds that sum. A weight without the attribute gets no gradient.
"""

import torch
from torch import Tensor

# torch.mm(..., out_dtype=) and torch.addmm(..., out_dtype=) came with torch 2.8, for CUDA.
_HAS_OUT_DTYPE = torch.version.cuda is not None and hasattr(torch.ops.aten.addmm, "dtype_out")


def in_one_pass(a: Tensor, total: Tensor) -> bool:
    """Whether ``multiply_into`` needs no copies of its operands or of the product."""
    return a.dtype == total.dtype or (a.is_cuda and _HAS_OUT_DTYPE)


def multiply_into(total: Tensor, a: Tensor, b: Tensor, *, add: bool = True) -> None:
    """Add ``a @ b`` to ``total``, or overwrite it; no gradients.

    A product of 16-bit operands is not rounded on its way to a wider ``total``, which would make a
    sum of several worse than one product over all. The products of the gradient are fused into the
    addition where torch can do that.

    Args:
        total: [n, m], of the operands' dtype or a wider one.
        a, b: [n, k] and [k, m] of one dtype.
        add: False writes the product, whatever was there.
    """
    if a.dtype == total.dtype:
        torch.addmm(total, a, b, beta=int(add), out=total)
    elif in_one_pass(a, total):
        torch.addmm(total, a, b, out_dtype=total.dtype, beta=int(add), out=total)
    elif add:
        total.add_(a.to(total.dtype) @ b.to(total.dtype))
    else:
        torch.mm(a.to(total.dtype), b.to(total.dtype), out=total)


def placeholder(weight: Tensor) -> Tensor | None:
    """What autograd receives for a gradient that was added to ``weight.main_grad``."""
    if not hasattr(weight, "grad_added_to_main_grad"):
        return None
    weight.grad_added_to_main_grad = True
    zero = getattr(weight, "zero_out_wgrad", False)
    return (torch.zeros_like if zero else torch.empty_like)(weight)
