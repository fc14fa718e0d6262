"""A sample of the raw router logits, the same tokens at every parallel layout.

The first sequences of each class, in the order in which Megatron's sampler deals them out, give
``POSITIONS`` tokens each, evenly strided over the sequence. So what is kept depends on the data and
the number asked for alone. It is written beside the profile as a safetensors file, whose checksum
the profile holds: ``<class>.logits``, ``.chosen``, ``.sequences`` and ``.positions``.

Shapes: C classes, L MoE layers, E experts, s sequence, l this rank's part of it, n sampled tokens
of a class, m micro-batches of a step, b samples each.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.numpy import load, save

from megatron_moe_inject.experts.choose.routing_profile import LogitFile, RoutingProfile
from megatron_moe_inject.host.context_parallel import (
    context_parallel_slice,
)
from megatron_moe_inject.host.errors import (
    RecipeError,
    one_line,
)
from megatron_moe_inject.host.files import replace_file
from megatron_moe_inject.host.labels import GENERAL
from megatron_moe_inject.host.megatron_types import Groups
from megatron_moe_inject.host.to_device import to_device

POSITIONS = 8
"""Tokens of one sequence, which resemble each other: more sequences are worth more."""

MOST_BYTES = 16 << 30
"""Of a sample, which the first rank gathers on its host."""

_AGAIN = "record the profile again, or restore both files from a copy"


@dataclass(frozen=True, eq=False)
class LogitSample:
    """Sampled tokens of one class.

    Attributes:
        logits: float32 ``[L, n, E]``, what the router computes, before score function and bias.
        chosen: bool ``[L, n, E]``, the experts that it chose, before any capacity drop.
        sequences: int64 ``[n]``, number of the token's sequence among all that were recorded.
        positions: int64 ``[n]``, the token's position in it.
    """

    logits: np.ndarray
    chosen: np.ndarray
    sequences: np.ndarray
    positions: np.ndarray


class LogitSampler:
    """Keeps the sample of one rank; 5 C L n E bytes on its device.

    Args:
        tokens: at most so many of each class.
        classes: C; labels count from -1.
        layers: L, of this rank.
        experts: E.
        sequence_length: s.
        groups: the student's ``ProcessGroupCollection``.
        sequence_parallel: whether tensor-parallel ranks hold parts of a sequence.
        device: where logits are.

    Raises:
        RecipeError: they do not fit on the device.
    """

    def __init__(
        self,
        tokens: int,
        *,
        classes: int,
        layers: int,
        experts: int,
        sequence_length: int,
        groups: Groups,
        sequence_parallel: bool,
        device: torch.device,
    ) -> None:
        self._groups = groups
        self._length = sequence_length
        tensor_rank = groups.tp.rank()
        # Without sequence parallelism all ranks have the same tokens, and the first counts them.
        self._rank = tensor_rank if sequence_parallel else (None if tensor_rank else 0)
        self._each = min(POSITIONS, tokens, sequence_length)
        self._quota = tokens // self._each
        steps = torch.arange(self._each)
        self._positions = (2 * steps + 1) * sequence_length // (2 * self._each)
        local_positions = torch.arange(sequence_length).view(1, -1, 1)
        local_positions = context_parallel_slice(
            local_positions, groups.cp.rank(), groups.cp.size()
        ).flatten()
        if sequence_parallel:
            local_positions = local_positions.chunk(groups.tp.size())[groups.tp.rank()]
        elif groups.tp.rank() > 0:
            local_positions = local_positions[:0]
        rows, columns = (local_positions[:, None] == self._positions).nonzero(as_tuple=True)
        self._rows, self._columns = rows.to(device), columns.to(device)
        shape = (classes, layers, self._quota, self._each, experts)
        try:
            self._logits = torch.zeros(shape, dtype=torch.float32, device=device)
            self._chosen = torch.zeros(shape, dtype=torch.uint8, device=device)
            self._seen = torch.zeros(shape[:-1], dtype=torch.uint8, device=device)
        except RuntimeError as error:  # torch.OutOfMemoryError, or the host's allocator
            raise RecipeError(
                f"--inject-profile-logits: {tokens} tokens of each class do not fit into the "
                f"memory of {device} ({one_line(str(error))}); write fewer"
            ) from error
        self._sequences: list[list[int]] = [[] for _ in range(classes)]
        self._dealt = 0

    def begin(self, labels: torch.Tensor) -> None:
        """Choose sequences of a step with these labels, ``[m, b]`` on the host.

        Collectives: one all-gather of m b int64 over the data-parallel group, until every class
        is full.
        """
        self._labels = labels
        self._slots = torch.full_like(labels, -1)
        if all(len(sequences) == self._quota for sequences in self._sequences):
            return
        group = self._groups.dp
        ranks = [labels]
        if group.size() > 1:
            local_labels = labels.to(self._logits.device)
            ranks = [torch.empty_like(local_labels) for _ in range(group.size())]
            dist.all_gather(ranks, local_labels, group=group)
        dealt = torch.stack(ranks, dim=1).cpu()
        slots = torch.full_like(dealt, -1)
        for number, label in enumerate(dealt.flatten().tolist()):
            if label < GENERAL:  # an answer of a pair is of no class
                continue
            sequences = self._sequences[label + 1]
            if len(sequences) < self._quota:
                slots.view(-1)[number] = len(sequences)
                sequences.append(self._dealt + number)
        self._dealt += dealt.numel()
        self._slots = slots[:, group.rank()]

    def record(
        self,
        micro_batch: int,
        layer: int,
        logits: torch.Tensor,
        chosen: torch.Tensor,
        padding: torch.Tensor | None,
    ) -> None:
        """Take from a router: logits and bool choices ``[l, b, E]``, padding ``[l, b]``; of a row
        of packed samples ``[t, 1, E]`` and ``[t, 1]``."""
        slots, labels = (x[micro_batch].tolist() for x in (self._slots, self._labels))
        in_row = logits.shape[1] < len(labels)
        for sample, (slot, label) in enumerate(zip(slots, labels, strict=True)):
            if slot < 0:
                continue
            rows, columns = self._rows, self._columns
            if in_row:
                rows, columns = self._in_row(sample, len(logits))
            if not len(rows):
                continue
            column = 0 if in_row else sample
            at = (label + 1, layer, slot, columns)
            self._logits[at] = logits[rows, column].float()
            self._chosen[at] = chosen[rows, column].to(torch.uint8)
            seen = 1 if padding is None else (~padding[rows, column]).to(torch.uint8)
            self._seen[at] = seen

    def _in_row(self, sample: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Which of a rank's t = ``tokens`` of a row are kept of a sample, and as which."""
        rank = self._rank
        if rank is None:
            return self._rows[:0], self._columns[:0]
        places = self._positions + sample * self._length - rank * tokens
        columns = ((places >= 0) & (places < tokens)).nonzero().flatten()
        device = self._logits.device
        return to_device(places[columns], device), to_device(columns, device)

    def collect(self, layers: Sequence[int]) -> list[LogitSample] | None:
        """The sample of each class on the first pipeline rank, None on others.

        Args:
            layers: 0-based MoE layers of this rank.

        Collectives: three all-reduces of the buffers over the data-parallel group and three over
        the sequence's ranks, one gather over the pipeline group.
        """
        buffers = (self._logits, self._chosen, self._seen)
        for group in (self._groups.dp, self._groups.tp_cp):
            for buffer in buffers if group.size() > 1 else ():
                dist.all_reduce(buffer, group=group)
        group = self._groups.pp
        local = (list(layers), *(buffer.cpu().numpy() for buffer in buffers))
        stages: list[Any] | None = [local]
        if group.size() > 1:
            stages = [None] * group.size() if group.rank() == 0 else None
            dist.gather_object(local, stages, dst=dist.get_global_rank(group, 0), group=group)
        if stages is None:
            return None
        order = np.argsort([layer for stage in stages for layer in stage[0]])
        whole = [np.concatenate([stage[i] for stage in stages], axis=1) for i in (1, 2, 3)]
        logits, chosen, seen = (array[:, order] for array in whole)
        return [
            self._of_class(logits[c], chosen[c], seen[c], sequences)
            for c, sequences in enumerate(self._sequences)
        ]

    def _of_class(
        self, logits: np.ndarray, chosen: np.ndarray, seen: np.ndarray, sequences: list[int]
    ) -> LogitSample:
        complete = seen.all(axis=0)  # [quota, each]; padding is not
        slots, columns = complete.nonzero()
        return LogitSample(
            np.ascontiguousarray(logits[:, slots, columns]),
            np.ascontiguousarray(chosen[:, slots, columns].astype(bool)),
            np.array(sequences, dtype=np.int64)[slots],
            self._positions.numpy()[columns],
        )


def most_tokens(*, classes: int, layers: int, experts: int) -> int:
    """The largest sample of each class, 5 bytes for a token's logit and choice, in ``MOST_BYTES``.

    Args:
        classes: C.
        layers: L, of the whole student.
        experts: E.
    """
    return MOST_BYTES // (5 * classes * layers * experts)


def logit_path(profile: str | Path) -> Path:
    """Where the logits of a profile are: beside it."""
    path = Path(profile)
    return (
        path.with_suffix(".safetensors") if path.suffix == ".json" else Path(f"{path}.safetensors")
    )


def write_logits(profile: str | Path, samples: Mapping[str, LogitSample]) -> LogitFile:
    """Replace the file beside ``profile`` by these samples, whole or not at all.

    Raises:
        RecipeError: the file cannot be written.
    """
    arrays = {
        f"{name}.{field}": array
        for name, sample in samples.items()
        for field, array in vars(sample).items()
    }
    content, path = save(arrays), logit_path(profile)
    replace_file(path, content)
    counts = {name: len(sample.positions) for name, sample in samples.items()}
    return LogitFile(path.name, hashlib.sha256(content).hexdigest(), counts)


def read_logits(path: str | Path, profile: RoutingProfile) -> dict[str, LogitSample]:
    """The samples that belong to the profile read from ``path``, by class.

    Raises:
        RecipeError: it has none, or the file beside it is missing, damaged or another's.
    """
    if profile.logits is None:
        raise RecipeError(
            f"{path}: no router logits were kept; record it with --inject-profile-logits"
        )
    file = Path(path).parent / profile.logits.file
    try:
        content = file.read_bytes()
    except OSError as error:
        raise RecipeError(f"{file}: cannot be read ({error.strerror}); {_AGAIN}") from None
    if hashlib.sha256(content).hexdigest() != profile.logits.sha256:
        raise RecipeError(f"{file}: is not what was recorded with {path}; {_AGAIN}")
    try:
        arrays = load(content)
        return {
            name: LogitSample(**{f: arrays[f"{name}.{f}"] for f in LogitSample.__annotations__})
            for name in profile.logits.tokens
        }
    except (SafetensorError, KeyError) as error:
        raise RecipeError(f"{file}: is damaged ({error}); {_AGAIN}") from None
