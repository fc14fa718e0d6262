"""Proof that frozen means frozen: fingerprints before the first step against those at the end.

A fingerprint is an exact integer hash of a tensor's bits, computed where the tensor lives and
with wrap-around int64 arithmetic, so it costs one pass over the parameters and no copy of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist

from megatron_moe_inject.experts import fp8_weights

_BLOCK = 1 << 22
_ODD = (0x9E3779B97F4A7C15 - (1 << 64), 0x2545F4914F6CDD1D)
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def frozen_tensors(chunks: Iterable[torch.nn.Module]) -> Iterator[tuple[str, torch.Tensor]]:
    """Frozen parameters, and the ``expert_bias`` buffers of frozen routers, by unique name.

    Of a router with trained rows, the others.
    """
    for index, chunk in enumerate(chunks):
        routers = {
            id(module.weight): module
            for module in chunk.modules()
            if hasattr(module, "trained_row_ids")
        }
        for name, parameter in chunk.named_parameters():
            if id(parameter) in routers:
                kept = torch.ones(len(parameter), dtype=torch.bool, device=parameter.device)
                kept[routers[id(parameter)].trained_row_ids] = False
                yield f"chunk{index}.{name}", parameter.detach()[kept]
            elif parameter.requires_grad:
                continue
            elif fp8_weights.is_fp8(parameter):
                stored = fp8_weights.stored(parameter)
                yield f"chunk{index}.{name}", stored.codes
                yield f"chunk{index}.{name} scales", stored.scales
            else:
                yield f"chunk{index}.{name}", parameter.detach()
        for name, module in chunk.named_modules():
            bias = getattr(module, "expert_bias", None)
            if bias is not None and getattr(module, "frozen_expert_bias", False):
                yield f"chunk{index}.{name}.expert_bias", bias.detach()


def fingerprint(tensor: torch.Tensor) -> torch.Tensor:
    """128-bit position-dependent hash of a tensor's bits, ``[2]`` int64 on its device.

    Each element's bits are mixed with its index by two odd multipliers (a multiply-xorshift
    step) and summed modulo 2**64; a changed bit or a swap of two elements changes the sum.
    """
    flat = tensor.contiguous().view(-1)
    bits = flat.view(_BITS[flat.element_size()])
    total = torch.zeros(2, dtype=torch.int64, device=tensor.device)
    for start in range(0, bits.numel(), _BLOCK):
        block = bits[start : start + _BLOCK].long()
        index = torch.arange(start + 1, start + 1 + block.numel(), device=tensor.device)
        for lane, odd in enumerate(_ODD):
            mixed = (block ^ (index * odd)) * odd
            total[lane] += ((mixed ^ (mixed >> 29)) * _ODD[1 - lane]).sum()
    return total


class FrozenChangedError(RuntimeError):
    """Something that is frozen is not what it was."""


class FrozenCheck:
    """Remembers the fingerprints of all frozen tensors of this rank.

    Args:
        chunks: bare model chunks, at the moment from which nothing frozen may change.
    """

    def __init__(self, chunks: Iterable[torch.nn.Module]) -> None:
        self._chunks = list(chunks)
        self._before = self._fingerprints()

    def _fingerprints(self) -> dict[str, torch.Tensor]:
        return {name: fingerprint(t).cpu() for name, t in frozen_tensors(self._chunks)}

    def changed(self) -> list[str]:
        """Names of frozen tensors of this rank whose bits differ from the start."""
        after = self._fingerprints()
        names = self._before.keys() | after.keys()
        return sorted(
            name
            for name in names
            if name not in after
            or name not in self._before
            or not torch.equal(self._before[name], after[name])
        )

    def verify(self) -> str:
        """Check every rank and say so in one line.

        Collectives: one all-gather of name lists over the whole world.

        Raises:
            FrozenChangedError: on every rank, if any rank holds a changed frozen tensor.
        """
        reports: list[tuple[int, list[str]]] = [(0, [])] * dist.get_world_size()
        dist.all_gather_object(reports, (len(self._before), self.changed()))
        broken = {rank: names for rank, (_, names) in enumerate(reports) if names}
        if broken:
            rank, names = next(iter(broken.items()))
            shown = ", ".join(names[:5]) + (" ..." if len(names) > 5 else "")
            raise FrozenChangedError(
                f"{sum(map(len, broken.values()))} frozen tensors changed during training on "
                f"ranks {sorted(broken)}; first on rank {rank}: {shown}"
            )
        count = sum(total for total, _ in reports)
        return f"frozen check: {count} frozen tensors on {len(reports)} ranks bitwise unchanged"
