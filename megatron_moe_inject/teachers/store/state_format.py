"""What a store of states keeps of one token: what the teacher's head reads there, and no more.

    token (4 bytes) | state

- ``token``: the id that the teacher read at this place, as in ``row_format``.
- the state [h] in the teacher's own type, h times 2 or 4 bytes; or ``fp8``: h codes (e4m3) behind
  one scale (bfloat16) for each 128 of them, h + 2 ceil(h / 128) bytes. A code has 4 bits of
  precision; the largest of its 128 is 448.

Logits are made of it by the head, which the store has once (``head.py``), so that it says all that
its teacher did: any divergence and temperature, any token's confidence.

Shapes: t rows, h hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

BLOCK = 128
FP8 = "fp8"
NATIVE = "native"
PRECISIONS = (NATIVE, FP8)
_TOKEN_BYTES = 4
_LARGEST = 448.0


@dataclass(frozen=True)
class StateFormat:
    """How rows of states are laid out; as a ``RowFormat`` for whoever moves bytes.

    Attributes:
        vocab_size: of the head.
        hidden_size: h.
        precision: one of ``PRECISIONS``.
        dtype: the teacher's, and that of what is read.
    """

    vocab_size: int
    hidden_size: int
    precision: str
    dtype: torch.dtype
    slots: int = 1

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision={self.precision!r}; use one of {', '.join(PRECISIONS)}")
        if self.hidden_size < 1 or self.vocab_size < 1:
            raise ValueError(f"states of {self.hidden_size} for {self.vocab_size} ids")

    @property
    def _blocks(self) -> int:
        return -(-self.hidden_size // BLOCK)

    @property
    def widest(self) -> int:
        """Bytes of a row."""
        if self.precision == FP8:
            return _TOKEN_BYTES + 2 * self._blocks + self.hidden_size
        return _TOKEN_BYTES + self.hidden_size * self.dtype.itemsize

    def row_bytes(self, count: int) -> int:
        """Bytes of a row; all are alike."""
        return self.widest

    def bytes_of(self, counts: np.ndarray) -> np.ndarray:
        """``row_bytes`` of each of [t] counts."""
        return np.full(len(counts), self.widest)

    def encode(self, tokens: Tensor, states: Tensor) -> Tensor:
        """Bytes [t, ``widest``] of tokens [t] and states [t, h].

        Raises:
            ValueError: a state that is not finite, or another width. (Reads the device.)
        """
        if states.shape[1] != self.hidden_size or states.dtype != self.dtype:
            raise ValueError(f"states {tuple(states.shape)} {states.dtype} are not {self}")
        if not states.isfinite().all():
            raise ValueError("a teacher's states are not finite")
        front = _as_bytes(tokens.int()[:, None])
        if self.precision == NATIVE:
            return torch.cat([front, _as_bytes(states)], 1)
        blocks = torch.nn.functional.pad(
            states.float(), (0, self._blocks * BLOCK - self.hidden_size)
        ).view(len(states), self._blocks, BLOCK)
        # Rounded up, so that no code is beyond the largest.
        scales = _rounded_up(blocks.abs().amax(-1) / _LARGEST)
        codes = (blocks / scales.float().clamp(min=1e-30)[..., None]).clamp(-_LARGEST, _LARGEST)
        codes = codes.to(torch.float8_e4m3fn).flatten(1)[:, : self.hidden_size]
        return torch.cat([front, _as_bytes(scales), _as_bytes(codes)], 1)

    def tokens(self, content: Tensor) -> Tensor:
        """The tokens [t] that were read, of bytes [t, w]."""
        return _cut(content[:, :_TOKEN_BYTES]).view(torch.int32).squeeze(1).long()

    def states(self, content: Tensor) -> Tensor:
        """The states [t, h] in ``dtype``, of bytes [t, w]; zeros where there was nothing."""
        if self.precision == NATIVE:
            return _cut(content[:, _TOKEN_BYTES : self.widest]).view(self.dtype)
        split = _TOKEN_BYTES + 2 * self._blocks
        scales = _cut(content[:, _TOKEN_BYTES:split]).view(torch.bfloat16).float()
        codes = _cut(content[:, split : self.widest]).view(torch.float8_e4m3fn).float()
        wide = scales.repeat_interleave(BLOCK, 1)[:, : self.hidden_size]
        return (codes * wide).to(self.dtype)


def _rounded_up(scales: Tensor) -> Tensor:
    rounded = scales.to(torch.bfloat16)
    above = (rounded.float() * (1 + 2.0**-7)).to(torch.bfloat16)
    return torch.where(rounded.float() < scales, above, rounded)


def _cut(content: Tensor) -> Tensor:
    """Memory of its own, whose rows lie next to each other also where there is one or none."""
    return content.clone(memory_format=torch.contiguous_format)


def _as_bytes(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.uint8).view(len(values), -1)
