"""Where the gradient of what trains of a language-model head goes, summed over chunks of tokens.

Shapes: t tokens, h hidden, v vocabulary, p tensor-parallel size. A weight is the head, [v/p, h], or
what changes it (``head_rows.py``): the values of some rows [k, h], or the factors of a correction.

Two destinations. An ordinary gradient is summed in float32 and handed to autograd in the weight's
dtype. Under Megatron's gradient accumulation fusion the sum goes straight into
``weight.main_grad``, by the contract in ``accumulate.py``.

A sum that is formed up to a factor which only the backward pass knows has a buffer of its own in
either case: one more of ``main_grad``'s size, as long as the factor is not known.
"""

import torch
from torch import Tensor

from megatron_moe_inject.host.accumulate import in_one_pass, multiply_into, placeholder
from megatron_moe_inject.losses.products import pieces, whole
from megatron_moe_inject.losses.rows import maths_dtype

# Rows of the head that one product covers where it needs a float32 copy of operands and result.
_ROWS = 4096


class HeadGradient:
    """Sum of ``gradient.T @ (scale * hidden)`` over chunks for one weight, such as a head [v/p, h].

    With ``factor_later`` it goes nowhere before ``finish``, which then takes a common factor.
    """

    def __init__(self, weight: Tensor, accumulate_main_grad: bool, factor_later: bool = False):
        self.weight = weight
        self.main_grad = self.main_grad_of(weight) if accumulate_main_grad else None
        dtype = maths_dtype(weight.dtype)
        if self.main_grad is not None and self.main_grad.dtype == dtype and not factor_later:
            self.sum, self._begun = self.main_grad, True
        else:
            self.sum = torch.empty(weight.shape, dtype=dtype, device=weight.device)
            self._begun = False

    @staticmethod
    def main_grad_of(weight: Tensor) -> Tensor:
        """The buffer that ``accumulate_main_grad`` needs; ValueError for a weight without one."""
        main_grad = getattr(weight, "main_grad", None)
        if main_grad is None or main_grad.shape != weight.shape:
            actual = "none" if main_grad is None else f"one of shape {tuple(main_grad.shape)}"
            raise ValueError(
                f"accumulate_main_grad=True needs student_weight.main_grad {tuple(weight.shape)}, "
                f"found {actual}; Megatron's DDP creates it, pass False elsewhere"
            )
        return main_grad

    def add(self, gradient: Tensor, hidden: Tensor, scale: Tensor) -> None:
        """Add a chunk: ``gradient`` [t, c] by the logits of the first c rows, ``hidden`` [t, h].

        ``scale`` [t] multiplies the tokens.
        """
        hidden = (hidden * scale[:, None]).to(hidden.dtype)
        columns = gradient.shape[1]
        at_once = in_one_pass(gradient, self.sum)
        size = max(whole(columns, gradient.dtype), _ROWS) if at_once else _ROWS
        for part in pieces(columns, size, gradient.dtype):
            multiply_into(self.sum[part], gradient[:, part].t(), hidden, add=self._begun)
        if not self._begun:
            self.sum[columns:].zero_()
            self._begun = True

    def finish(self, factor: Tensor | None = None) -> Tensor | None:
        """What autograd receives as the weight's gradient; ``factor`` multiplies the sum."""
        rounds = self.main_grad is None and self.weight.dtype != self.sum.dtype
        if rounds and factor is not None:
            # In one pass, as this is the largest tensor of the loss.
            return torch.mul(self.sum, factor, out=self.weight.new_empty(self.weight.shape))
        if factor is not None:
            self.sum.mul_(factor)
        if self.main_grad is None:
            return self.sum.to(self.weight.dtype)
        if self.sum is not self.main_grad:
            self.main_grad.add_(self.sum)
        return placeholder(self.weight)
