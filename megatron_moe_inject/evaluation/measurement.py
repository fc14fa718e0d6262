"""Collects sums for every held-out sequence while Megatron evaluates.

The loss hook hands over each micro-batch of the last pipeline stage with the teacher's or the
original's states beside it. Sums stay on the device until the evaluation is over; then one exchange
brings the parts together: context-parallel ranks hold parts of the same sequences, data-parallel
ranks sequences of their own, tensor-parallel ranks the same numbers.

Shapes: s sequence (this context-parallel rank's part), b samples, h hidden, t = b * s tokens, C
classes (general data and each domain), B bins.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_moe_inject.evaluation.evaluation import ALWAYS, BARE, BINS, PARTLY, TAUGHT
from megatron_moe_inject.host.attached_loss import (
    sum_and_count,
)
from megatron_moe_inject.host.labels import (
    GENERAL,
)
from megatron_moe_inject.host.step import MicroBatch, Step, StepPart
from megatron_moe_inject.host.to_device import to_device
from megatron_moe_inject.losses.measure import TokenMeasures, measure_tokens
from megatron_moe_inject.losses.objective import LossTerms, SampleGroup
from megatron_moe_inject.losses.rows import RowKernels
from megatron_moe_inject.losses.student import Student
from megatron_moe_inject.losses.target import Aligned, Mixed, Target
from megatron_moe_inject.losses.triton_rows import AUTO

_COLUMNS = (*ALWAYS, *TAUGHT, *PARTLY, BARE)


@dataclass(frozen=True)
class Collected:
    """An evaluation's sums from all ranks, by class label.

    Attributes:
        rows: hash and sums of each sequence, by class.
        bins: ``[3, B]`` tokens, confidence and correct predictions, by class.
        sequences: how many were read, those that are in no row too.
    """

    rows: Mapping[int, list[tuple[str, dict[str, float]]]]
    bins: Mapping[int, np.ndarray]
    sequences: int


@dataclass
class _Part:
    """What this rank has measured since the evaluation began."""

    sums: list[torch.Tensor] = field(default_factory=list)  # [k columns, b] float64 each
    bins: torch.Tensor | None = None  # [C, 3, B] float64
    domains: list[int] = field(default_factory=list)
    against: list[str | None] = field(default_factory=list)  # "teacher", "original" or None
    partly: list[bool] = field(default_factory=list)  # whether the teacher may lack tokens
    of_text: list[bool] = field(default_factory=list)  # whether it tells of the text alone
    bare: list[bool] = field(default_factory=list)  # whether it also ran without its prefix
    hashes: list[str] = field(default_factory=list)
    bytes: list[int | None] = field(default_factory=list)


class Measurement(StepPart):
    """Measures held-out text on this rank, between ``running()`` and ``collect()``.

    Args:
        names: class names by label, ``GENERAL`` included.
        reported: labels of the classes that the evaluation data has, for Megatron's log.
        taught: labels of the domains with a teacher.
        of_text: of them, those whose teacher tells how likely it finds the text and nothing of
            other tokens.
        tp_group, cp_group: of the student's last stage.
        text_length: UTF-8 length of ids as text; None for a tokenizer without text.
        drop_empty: sequences of which no token counts only fill up batches.
    """

    def __init__(
        self,
        names: Mapping[int, str],
        reported: Sequence[int],
        taught: Sequence[int],
        *,
        tp_group: dist.ProcessGroup,
        cp_group: dist.ProcessGroup,
        text_length: Callable[[list[int]], int] | None,
        drop_empty: bool = False,
        of_text: Sequence[int] = (),
    ) -> None:
        self._of_text = of_text
        self.active = False
        self.compares_prefix = False
        self._names = names
        self._reported = reported
        self._taught = taught
        self._reads = tp_group.rank() == 0
        self._names_sequences = self._reads and cp_group.rank() == 0
        self._place = min(dist.get_process_group_ranks(cp_group))
        self._text_length = text_length
        self._drop_empty = drop_empty
        self._lengths: dict[str, int] = {}
        self._part = _Part()
        self._batches: list[MicroBatch] | None = None

    @contextlib.contextmanager
    def comparing_prefix(self) -> Iterator[None]:
        """Inside, teachers with a prefix are also measured without it, at twice their cost."""
        self.compares_prefix = True
        try:
            yield
        finally:
            self.compares_prefix = False

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Inside, evaluation steps are measured."""
        self._part = _Part()
        self.active = True
        try:
            yield
        finally:
            self.active = False
            self._batches = None

    def begin(self, step: Step) -> None:
        """Remember the micro-batches of a step that is measured, where this rank reads them."""
        if self.active:
            self._batches = step.micro_batches

    def micro_batch(
        self,
        index: int,
        student: Student,
        loss_mask: torch.Tensor,
        domains: Sequence[int],
        groups: Sequence[SampleGroup],
        *,
        kernels: RowKernels | str | None = AUTO,
    ) -> tuple[LossTerms, dict[str, torch.Tensor]]:
        """Measure a micro-batch on the last stage.

        Args:
            index: its place in the step.
            student: hidden states ``[s, b, h]``, not sequence-sharded, and labels ``[s, b]``.
            loss_mask: ``[b, s]``.
            domains: class labels of the b samples.
            groups: a partition of the samples; those of general data hold the original's target.
            kernels: see ``losses.FusedOptions``.

        Returns:
            Per-token terms, with cross-entropy as the total and KL(teacher || student) as ``kd``;
            and values for Megatron's report. Of a teacher of which some ids per token are known
            the KL is that of these and one outcome for all others, at most the whole. Where its
            ids were drawn, or the label's probability is not kept, its figures are missing, as
            where a domain has no teacher. One that tells how likely it finds the text has a loss
            alone.

        Collectives: those of ``measure_tokens``, once per group.
        """
        labels = student.labels.t()
        sums = labels.new_zeros(len(_COLUMNS), len(domains), dtype=torch.float64)
        ce = labels.new_zeros(labels.shape, dtype=torch.float32)
        kl = torch.zeros_like(ce)
        against: list[str | None] = [None] * len(domains)
        partly, of_text, bare = ([False] * len(domains) for _ in range(3))
        readable, limited = torch.ones_like(ce, dtype=torch.bool), False
        for group in groups:
            samples = list(group.samples)
            targets, mask = labels[samples], loss_mask[samples].double()
            measured = _measure(group.target, samples, student, targets, kernels)
            correct = measured.top == targets.flatten()
            tokens = [torch.ones_like(measured.loss), measured.loss, correct]
            if group.taught and (measured.kl is None or measured.teacher_loss is None):
                readable[samples], limited = False, True
            whole = measured.kl is not None or isinstance(group.target, Aligned)
            if whole and measured.teacher_loss is not None:
                compared = torch.ones_like(measured.loss)
                if group.readable is not None:
                    compared = group.readable.flatten().to(compared.dtype)
                divergence = same = torch.zeros_like(measured.loss)
                if measured.kl is not None:
                    assert measured.teacher_top is not None, "it is known where a divergence is"
                    divergence, same = measured.kl, measured.top == measured.teacher_top
                    if group.readable is not None:
                        readable[samples], limited = group.readable, True
                taught = [measured.teacher_loss, divergence, same, compared, measured.loss]
                if group.bare is not None:
                    other = _measure(group.bare, samples, student, targets, kernels)
                    assert other.teacher_loss is not None, "it is the same teacher"
                    taught.append(other.teacher_loss)
                # Where it cannot be asked, the teacher's loss may be infinite.
                tokens += [torch.where(compared > 0, value, 0) for value in taught]
                kl[samples] = tokens[len(ALWAYS) + 1].view(targets.shape).to(kl.dtype)
                for i in samples:
                    partly[i], bare[i] = group.readable is not None, group.bare is not None
                    of_text[i] = measured.kl is None
                    against[i] = "original" if domains[i] == GENERAL else "teacher"
            values = torch.stack([value.double() for value in tokens]).view(-1, *targets.shape)
            # A masked token may have any loss, an infinite one too.
            values = torch.where(mask > 0, values * mask, 0.0)
            sums[: len(values), samples] = values.sum(-1)
            ce[samples] = measured.loss.view(targets.shape).to(ce.dtype)
            self._add_bins(measured.confidence, correct, mask, [domains[i] for i in samples])
        if self._reads:
            self._part.sums.append(sums)
            self._part.domains += domains
            self._part.against += against
            self._part.partly += partly
            self._part.of_text += of_text
            self._part.bare += bare
            self._name_sequences(index)
        terms = LossTerms(ce, ce, kl, torch.ones_like(ce), readable if limited else None)
        return terms, self._report(sums, domains)

    def _add_bins(
        self,
        confidence: torch.Tensor,
        correct: torch.Tensor,
        mask: torch.Tensor,
        domains: Sequence[int],
    ) -> None:
        """Sort the tokens ``[t]`` of samples with mask ``[b, s]`` into bins."""
        if self._part.bins is None:
            shape = (len(self._names), 3, BINS)
            self._part.bins = confidence.new_zeros(shape, dtype=torch.float64)
        place = (confidence * BINS).long().clamp_(0, BINS - 1).view(mask.shape)
        values = (torch.ones_like(confidence), confidence, correct)
        stacked = torch.stack([value.double() for value in values]).view(3, *mask.shape) * mask
        for sample, domain in enumerate(domains):  # labels are GENERAL = -1, then 0, 1, ...
            bins = self._part.bins[domain + 1]
            bins.index_add_(1, place[sample], stacked[:, sample])

    def _name_sequences(self, index: int) -> None:
        """Hash and text length of a micro-batch's sequences, from the whole samples."""
        if not self._names_sequences:
            return
        assert self._batches is not None, "begin() takes what this rank reads"
        batch = self._batches[index]
        fields = [torch.as_tensor(batch[name]) for name in ("tokens", "labels", "loss_mask")]
        for tokens, labels, mask in zip(*fields, strict=True):
            counted = (mask > 0).cpu()
            labels = labels.cpu().long()
            digest = hashlib.blake2b(digest_size=16)
            for value in (tokens.cpu().long(), labels, counted):
                digest.update(value.contiguous().numpy().tobytes())
            name = digest.hexdigest()
            self._part.hashes.append(name)
            if self._text_length is not None and name not in self._lengths:
                self._lengths[name] = self._text_length(labels[counted].tolist())
            self._part.bytes.append(self._lengths.get(name))

    def _report(self, sums: torch.Tensor, domains: Sequence[int]) -> dict[str, torch.Tensor]:
        """Values for Megatron's validation log, the same keys in every micro-batch."""
        report = {}
        values = dict(zip(_COLUMNS, sums.float(), strict=True))
        for label in self._reported:
            member = torch.tensor([float(domain == label) for domain in domains])
            member = to_device(member, sums.device)
            terms = {"accuracy": ("correct", "tokens")}
            if label in self._taught:
                terms["teacher loss"] = ("teacher_loss", "taught_tokens")
            if label in self._taught and label not in self._of_text:
                terms["teacher agreement"] = ("agreement", "taught_tokens")
            for name, pair in terms.items():
                total, count = ((values[column] * member).sum() for column in pair)
                report[f"{name}/{self._names[label]}"] = sum_and_count(total, count)
        return report

    def collect(self) -> Collected:
        """Everything that was measured since ``running()`` began, on every rank.

        Collectives: one all-gather of this rank's sums as an object over the whole world.
        """
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, self._plain())
        self._part = _Part()
        parts = [part for part in parts if part is not None]
        rows: dict[int, list[tuple[str, dict[str, float]]]] = {}
        bins = {label: np.zeros((3, BINS)) for label in self._names}
        for part in parts:
            for label in self._names:
                bins[label] += part["bins"][label + 1]
        sequences = 0
        for named in (part for part in parts if part["hashes"]):
            same = [part["sums"] for part in parts if part["place"] == named["place"]]
            total = np.sum(same, axis=0)
            sequences += len(named["domains"])
            for i, domain in enumerate(named["domains"]):
                if self._drop_empty and not total[_COLUMNS.index("tokens"), i]:
                    continue
                extra: tuple[str, ...] = PARTLY if named["partly"][i] else ()
                extra += (BARE,) if named["bare"][i] else ()
                if named["against"][i] == "teacher":
                    extra += TAUGHT[:1] if named["of_text"][i] else TAUGHT
                details = named["against"][i], extra, named["bytes"][i]
                sums = _named_sums(total[:, i], *details)
                rows.setdefault(domain, []).append((named["hashes"][i], sums))
        return Collected(rows, bins, sequences)

    def _plain(self) -> dict[str, Any] | None:
        part = self._part
        if not part.sums:
            return None
        assert part.bins is not None, "each micro-batch has sums and bins"
        return {
            "place": self._place,
            "sums": torch.cat(part.sums, dim=1).cpu().numpy(),
            "bins": part.bins.cpu().numpy(),
            "domains": part.domains,
            "against": part.against,
            "partly": part.partly,
            "of_text": part.of_text,
            "bare": part.bare,
            "hashes": part.hashes,
            "bytes": part.bytes,
        }


def _measure(
    target: Target | None,
    samples: list[int],
    student: Student,
    labels: torch.Tensor,
    kernels: RowKernels | str | None,
) -> TokenMeasures:
    """Measure samples of a micro-batch, their labels and the tensors of ``target`` being
    ``[k, s, ...]``; with weights of a committee that do not know the label."""
    if isinstance(target, Mixed):
        target = target.blind()
    if target is not None:
        target = target.changed(lambda tensor: tensor.flatten(0, 1))
    hidden = student.hidden[:, samples].transpose(0, 1).flatten(0, 1)
    part = replace(student, hidden=hidden, labels=labels.flatten())
    return measure_tokens(part, target, kernels=kernels)


def _named_sums(
    values: np.ndarray, against: str | None, extra: Sequence[str], length: int | None
) -> dict[str, float]:
    by_column = dict(zip(_COLUMNS, values.tolist(), strict=True))
    sums = {name: by_column[name] for name in ALWAYS}
    if against == "teacher":
        sums |= {name: by_column[name] for name in extra}
    if against == "original":
        sums["original_kl"] = by_column["teacher_kl"]
    if length is not None:
        sums["bytes"] = length
    return sums
