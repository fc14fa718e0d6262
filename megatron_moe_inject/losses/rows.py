"""Row maths of student and teacher logits whose columns are sharded over the vocabulary.

Shapes: t tokens (rows), v vocabulary, p tensor-parallel size. ``x`` is the student's block and
``y`` the teacher's, [t, c] with c <= v/p the columns that hold real ids: padding is always a suffix
of the vocabulary, so callers cut it off instead of masking it, and a rank may hold c = 0 columns.
Everything here is plain tensor maths without autograd, in float32 (float64 for float64 input), and
leaves its inputs as they are.

A row needs two passes over its columns with one small exchange between them:

1. statistics: every rank reduces its columns to a few numbers per row (its own maximum, the sum of
   exponentials relative to it, ...). One all-gather carries them all, and every rank merges them in
   rank order, so the result is the same bits everywhere.
2. gradient: a function of x, y and the merged statistics only. It can run in the forward pass or
   be repeated in the backward pass without another exchange.

With Q = softmax(x / T), P = softmax(y / T) and g_i the derivative of the divergence D by Q_i, the
gradient by x_i is Q_i (g_i - slope) / T with slope = sum_j Q_j g_j. Adding a constant to all g_i
changes nothing, so each kind uses a g that is exactly 0 where P = Q:

    forward_kl   D = sum P log(P/Q)                               gradient Q - P, no slope
    reverse_kl   D = sum Q log(Q/P)                               g = log(Q/P), slope = D
    jsd          D = w sum P log(P/M) + (1-w) sum Q log(Q/M)      g = (1-w) log(Q/M)
    skew_kl      D = sum P log(P/M)                               g = (1-w) (1 - P/M)

with M = w P + (1-w) Q. The KLs come out of sums that need no normaliser; the mixtures need
normalised P and Q, hence a second pass of statistics and an all-reduce.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol, Self

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_moe_inject.losses.spec import (
    Divergence,
    LogitTransform,
    TokenWeighting,
    VocabShard,
)

# Elements of the blocks that rows are worked through in, by device type. Small, so that the float32
# temporaries stay in cache and are negligible beside the logits.
_BLOCK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 22}

# Stands for the maximum of a rank without a finite logit. Finite, so that differences of maxima
# stay finite; far below any logit, so that such a rank gets weight exp(-huge) = 0 in a merge.
_NO_MAXIMUM = -1e30


@dataclass(frozen=True)
class LogitRows:
    """Rows of logits [t, c] and what belongs to them.

    ``y`` is None without a teacher, ``labels`` [t] None without cross-entropy; ``temperature`` is a
    number or [t]. ``transform`` says what ``x`` has gone through, so that its gradient goes back.
    ``kernels`` does the maths on columns instead of this module's torch operations.
    """

    x: Tensor
    y: Tensor | None
    labels: Tensor | None
    temperature: float | Tensor
    transform: LogitTransform | None = None
    kernels: "RowKernels | None" = None

    def rows(self, rows: slice) -> "LogitRows":
        """Some of the rows."""
        return LogitRows(
            self.x[rows],
            None if self.y is None else self.y[rows],
            None if self.labels is None else self.labels[rows],
            self.temperature[rows] if isinstance(self.temperature, Tensor) else self.temperature,
            self.transform,
            self.kernels,
        )

    def blocks(self) -> list[slice]:
        """Slices of the rows to work on one after the other; one empty slice without rows."""
        elements = _BLOCK_ELEMENTS.get(self.x.device.type, _BLOCK_ELEMENTS["cuda"])
        step = max(1, elements // max(self.x.shape[1], 1))
        return [slice(start, start + step) for start in range(0, max(len(self.x), 1), step)]


class RowStats(NamedTuple):
    """Statistics of rows over the whole vocabulary, each [t]; None where the loss needs them not.

    ``x_max`` and ``y_max`` are the largest logits; ``x_lse``, ``y_lse`` and ``ce_lse`` the log of
    the sum of exponentials relative to them, the first two at the temperature and the last at 1.
    ``divergence`` is D without T^2, ``ce`` the cross-entropy (0 where ignored). ``y_ce`` and
    ``y_entropy`` are the teacher's cross-entropy of the label and its entropy, at temperature 1.
    """

    x_max: Tensor
    x_lse: Tensor | None = None
    y_max: Tensor | None = None
    y_lse: Tensor | None = None
    divergence: Tensor | None = None
    slope: Tensor | None = None
    ce_lse: Tensor | None = None
    ce: Tensor | None = None
    y_ce: Tensor | None = None
    y_entropy: Tensor | None = None

    def rows(self, rows: slice) -> Self:
        """The statistics of some rows."""
        return type(self)._make(None if stat is None else stat[rows] for stat in self)

    @classmethod
    def cat(cls, parts: list[Self]) -> Self:
        """The statistics of consecutive blocks of rows as one."""
        fields = zip(*parts, strict=True)
        return cls._make(None if field[0] is None else torch.cat(field) for field in fields)


class RowKernels(Protocol):
    """Another way to go through the columns than the torch operations of this module.

    The methods take all rows and do what the function of the same name does. Exchange and merge
    stay here, so all ranks that share the vocabulary need the same statistics in the same order.
    """

    def local_statistics(
        self,
        logits: LogitRows,
        divergence: Divergence | None,
        shard: VocabShard,
        weighting: TokenWeighting | None,
    ) -> dict[str, Tensor]: ...

    def mixture_terms(
        self, logits: LogitRows, stats: RowStats, divergence: Divergence
    ) -> Tensor: ...

    def logit_gradient(
        self,
        logits: LogitRows,
        stats: RowStats,
        divergence: Divergence | None,
        shard: VocabShard,
        kd_weight: Tensor | None,
        ce_weight: Tensor | None,
        out: Tensor,
    ) -> None: ...


class Scratch:
    """Three blocks of float32 that the row maths works in, so that no step allocates memory."""

    def __init__(self, logits: LogitRows, blocks: list[slice]):
        rows = min(blocks[0].stop, len(logits.x))
        shape, dtype = (rows, logits.x.shape[1]), maths_dtype(logits.x.dtype)
        self._buffers = [logits.x.new_empty(shape, dtype=dtype) for _ in range(3)]

    def of(self, block: LogitRows) -> list[Tensor]:
        """The three, each of the block's shape."""
        return [buffer[: len(block.x)] for buffer in self._buffers]


def maths_dtype(dtype: torch.dtype) -> torch.dtype:
    """What the loss is computed in: float32, or float64 for float64 input."""
    return torch.promote_types(dtype, torch.float32)


def known(tensor: Tensor | None) -> Tensor:
    """A tensor that only some losses have, where one of those asks for it."""
    assert tensor is not None, "this loss has no such tensor"
    return tensor


def row_statistics(
    logits: LogitRows,
    divergence: Divergence | None,
    shard: VocabShard,
    weighting: TokenWeighting | None = None,
) -> RowStats:
    """Losses and all that ``logit_gradient`` needs; ``divergence`` is None without a teacher.

    ``weighting`` adds what ``distillation_factor`` needs; it takes labels.

    Collectives over the shard's group: one all-gather of at most 7 numbers per row, 3 more with a
    weighting, and for jsd and skew_kl one all-reduce (sum) of 2 numbers per row.
    """
    local = all_statistics(logits, divergence, shard, weighting)
    stats = merge(exchange(local, shard), logits, divergence)
    if divergence is None or divergence.mixture is None:
        return stats
    if logits.kernels is not None:
        total = logits.kernels.mixture_terms(logits, stats, divergence)
    else:
        terms = [
            mixture_terms(logits.rows(rows), stats.rows(rows), divergence)
            for rows in logits.blocks()
        ]
        total = torch.cat(terms, dim=1)
    if shard.group is not None:
        dist.all_reduce(total, group=shard.group)
    return stats._replace(divergence=total[0], slope=total[1])


def logit_gradient(
    logits: LogitRows,
    stats: RowStats,
    divergence: Divergence | None,
    shard: VocabShard,
    kd_weight: Tensor | None,
    ce_weight: Tensor | None,
    out: Tensor,
) -> None:
    """Write the derivative of kd_weight T^2 D + ce_weight CE by x into ``out`` [t, c].

    A weight [t] of None leaves its term out; a row where ``kd_weight`` is 0 gets nothing from D,
    whatever its value there. ``out`` may be ``logits.x`` itself.
    """
    if logits.kernels is not None:
        logits.kernels.logit_gradient(logits, stats, divergence, shard, kd_weight, ce_weight, out)
        return
    blocks = logits.blocks()
    scratch = Scratch(logits, blocks)
    for rows in blocks:
        kd, ce = (None if weight is None else weight[rows] for weight in (kd_weight, ce_weight))
        out[rows] = block_gradient(
            logits.rows(rows), stats.rows(rows), divergence, shard, kd, ce, scratch
        )


def distillation_factor(
    stats: RowStats, labels: Tensor, weighting: TokenWeighting, shard: VocabShard
) -> Tensor:
    """How much of its distillation each token keeps, [t] between 0 and 1; no collective."""
    if weighting.confidence == "label":
        factor = torch.where(labels >= 0, known(stats.y_ce).neg().exp(), 0.0)
    elif weighting.confidence == "entropy":
        factor = (1 - known(stats.y_entropy) / math.log(max(shard.valid, 2))).clamp(0, 1)
    else:
        factor = torch.ones_like(known(stats.y_ce))
    if weighting.skip_worse:
        factor.masked_fill_((labels >= 0) & (known(stats.y_ce) > known(stats.ce)), 0)
    return factor


def all_statistics(
    logits: LogitRows,
    divergence: Divergence | None,
    shard: VocabShard,
    weighting: TokenWeighting | None,
) -> dict[str, Tensor]:
    """``local_statistics`` of all rows, by kernels or block by block."""
    if logits.kernels is not None:
        return logits.kernels.local_statistics(logits, divergence, shard, weighting)
    blocks = logits.blocks()
    scratch = Scratch(logits, blocks)
    parts = [
        local_statistics(logits.rows(rows), divergence, shard, weighting, scratch)
        for rows in blocks
    ]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def local_statistics(
    logits: LogitRows,
    divergence: Divergence | None,
    shard: VocabShard,
    weighting: TokenWeighting | None,
    scratch: Scratch,
) -> dict[str, Tensor]:
    """What this rank's columns say about each row of a block, by name, each [t]."""
    a, b, c = scratch.of(logits)
    local = {"x_max": local_maximum(logits.x)}
    if divergence is not None:
        local["y_max"] = local_maximum(known(logits.y))
        x = shifted(logits.x, local["x_max"], logits.temperature, out=a)
        y = shifted(known(logits.y), local["y_max"], logits.temperature, out=b)
        if divergence.kind == "forward_kl":
            local["y_sum"], local["cross"] = _sum_and_cross(y, x, exp_a=c)
            local["x_sum"] = x.exp_().sum(-1)
        elif divergence.kind == "reverse_kl":
            local["x_sum"], local["cross"] = _sum_and_cross(x, y, exp_a=c)
            local["y_sum"] = y.exp_().sum(-1)
        else:
            local["x_sum"], local["y_sum"] = x.exp_().sum(-1), y.exp_().sum(-1)
    if logits.labels is not None:
        if divergence is not None and is_one(logits.temperature):
            local["ce_sum"] = local["x_sum"]
        else:
            local["ce_sum"] = shifted(logits.x, local["x_max"], 1.0, out=a).exp_().sum(-1)
        local["label_logit"] = label_logit(logits.x, logits.labels, shard)
    if weighting:
        y = shifted(known(logits.y), local["y_max"], 1.0, out=b)
        probs = torch.exp(y, out=c)
        local["y_ce_sum"], local["y_moment"] = probs.sum(-1), _zero_safe_sum(probs, y)
        local["y_label_logit"] = label_logit(known(logits.y), known(logits.labels), shard)
    return local


def exchange(local: dict[str, Tensor], shard: VocabShard) -> dict[str, Tensor]:
    """Every rank's local statistics: name -> [p, t]. One all-gather of len(local) * t numbers."""
    packed = torch.stack(tuple(local.values()))
    if shard.group is None:
        gathered = packed.unsqueeze(0)
    else:
        gathered = packed.new_empty(shard.group.size(), *packed.shape)
        dist.all_gather_into_tensor(gathered.flatten(0, 1), packed, group=shard.group)
    return dict(zip(local, gathered.unbind(1), strict=True))


def merge(ranks: dict[str, Tensor], logits: LogitRows, divergence: Divergence | None) -> RowStats:
    """Statistics of the whole vocabulary from every rank's; a mixture's D and slope come later."""
    temperature = logits.temperature
    x_max = ranks["x_max"].amax(0)
    x_below = ranks["x_max"] - x_max
    stats = {"x_max": x_max}
    if divergence is not None:
        stats["y_max"] = ranks["y_max"].amax(0)
        y_below = ranks["y_max"] - stats["y_max"]
        x_weight, y_weight = (x_below / temperature).exp(), (y_below / temperature).exp()
        x_total = (x_weight * ranks["x_sum"]).sum(0)
        y_total = (y_weight * ranks["y_sum"]).sum(0)
        stats["x_lse"], stats["y_lse"] = x_total.log(), y_total.log()
        # A rank's cross term is relative to its own maxima: move it to the common ones.
        move = (y_below - x_below) / temperature
        lse_gap = stats["x_lse"] - stats["y_lse"]
        if divergence.kind == "forward_kl":
            cross = (y_weight * (ranks["cross"] + ranks["y_sum"] * move)).sum(0)
            stats["divergence"] = cross / y_total + lse_gap
        elif divergence.kind == "reverse_kl":
            cross = (x_weight * (ranks["cross"] - ranks["x_sum"] * move)).sum(0)
            stats["divergence"] = stats["slope"] = cross / x_total - lse_gap
    if logits.labels is not None:
        stats["ce_lse"] = (x_below.exp() * ranks["ce_sum"]).sum(0).log()
        ce = x_max - ranks["label_logit"].amax(0) + stats["ce_lse"]
        stats["ce"] = torch.where(logits.labels >= 0, ce, 0.0)
    if "y_ce_sum" in ranks:
        weight = y_below.exp()
        total = (weight * ranks["y_ce_sum"]).sum(0)
        moment = (weight * (ranks["y_moment"] + ranks["y_ce_sum"] * y_below)).sum(0)
        stats["y_entropy"] = total.log() - moment / total
        stats["y_ce"] = stats["y_max"] - ranks["y_label_logit"].amax(0) + total.log()
    return RowStats(**stats)


def mixture_terms(logits: LogitRows, stats: RowStats, divergence: Divergence) -> Tensor:
    """This rank's part of D and of the slope of a mixture kind: [2, t], to be summed."""
    w = divergence.mixture
    assert w is not None, "a kind with a mixture"
    p, q, log_p_over_m, log_q_over_m = _mixture(logits, stats, w)
    if divergence.kind == "jsd":
        slope = (1 - w) * _zero_safe_sum(q, log_q_over_m)
        return torch.stack((w * _zero_safe_sum(p, log_p_over_m) + slope, slope))
    slope = (w - 1) * _zero_safe_sum(q, log_p_over_m.expm1())
    return torch.stack((_zero_safe_sum(p, log_p_over_m), slope))


def block_gradient(
    logits: LogitRows,
    stats: RowStats,
    divergence: Divergence | None,
    shard: VocabShard,
    kd_weight: Tensor | None,
    ce_weight: Tensor | None,
    scratch: Scratch,
) -> Tensor:
    """``logit_gradient`` of a block of rows, in the scratch."""
    if ce_weight is not None:
        ce_weight = torch.where(known(logits.labels) >= 0, ce_weight, 0.0)
    gradient = _softmax_gradient(logits, stats, divergence, kd_weight, ce_weight, scratch)
    if ce_weight is not None and shard.columns:
        column, in_shard = shard.locate(known(logits.labels))
        row = torch.arange(len(column), device=column.device)
        gradient[row, column] -= torch.where(in_shard, ce_weight, 0.0)
    if logits.transform:
        logits.transform.pull_back_(gradient, logits.x)
    return gradient


def _softmax_gradient(
    logits: LogitRows,
    stats: RowStats,
    divergence: Divergence | None,
    kd_weight: Tensor | None,
    ce_weight: Tensor | None,
    scratch: Scratch,
) -> Tensor:
    """``block_gradient`` but for the labels' own -1 and the transform."""
    a, b, _ = scratch.of(logits)
    gradient = None
    if kd_weight is not None:
        assert divergence is not None, "distillation has a divergence"
        scale = kd_weight * logits.temperature
        if divergence.kind == "forward_kl":
            q_scale = scale
            if ce_weight is not None and is_one(logits.temperature):
                q_scale, ce_weight = scale + ce_weight, None  # one exponential serves both terms
            q = shifted(logits.x, stats.x_max, logits.temperature, out=a).exp_()
            q.mul_((q_scale * known(stats.x_lse).neg().exp())[:, None])
            p = shifted(known(logits.y), known(stats.y_max), logits.temperature, out=b).exp_()
            p.mul_((scale * known(stats.y_lse).neg().exp())[:, None])
            gradient = q.sub_(p.masked_fill_((kd_weight == 0)[:, None], 0))
        else:
            gradient = _divergence_gradient(logits, stats, divergence).mul_(scale[:, None])
            gradient.masked_fill_((kd_weight == 0)[:, None], 0)
    if ce_weight is not None:
        probs = shifted(logits.x, stats.x_max, 1.0, out=b).exp_()
        probs.mul_((ce_weight * known(stats.ce_lse).neg().exp())[:, None])
        gradient = probs if gradient is None else gradient.add_(probs)
    return a.zero_() if gradient is None else gradient


def _divergence_gradient(logits: LogitRows, stats: RowStats, divergence: Divergence) -> Tensor:
    """Derivative of D by the scaled student logits x / T, [t, c]; not for forward_kl."""
    if divergence.kind == "reverse_kl":
        log_q = _log_q(logits, stats)
        q = log_q.exp()
        g = log_q.sub_(_log_p(logits, stats))
    else:
        w = divergence.mixture
        assert w is not None, "a kind with a mixture"
        _, q, log_p_over_m, log_q_over_m = _mixture(logits, stats, w)
        if divergence.kind == "jsd":
            g = log_q_over_m.mul_(1 - w)
        else:
            g = log_p_over_m.expm1_().mul_(w - 1)
    return g.sub_(known(stats.slope)[:, None]).mul_(q).masked_fill_(q == 0, 0)


def is_one(temperature: float | Tensor) -> bool:
    return not isinstance(temperature, Tensor) and temperature == 1


def local_maximum(logits: Tensor) -> Tensor:
    dtype = maths_dtype(logits.dtype)
    if logits.shape[-1] == 0:
        return logits.new_full(logits.shape[:-1], _NO_MAXIMUM, dtype=dtype)
    return logits.amax(-1).to(dtype).clamp_(min=_NO_MAXIMUM)


def shifted(
    logits: Tensor, maximum: Tensor, temperature: float | Tensor, out: Tensor | None = None
) -> Tensor:
    """(logits - maximum) / temperature in ``out``; exact near the maximum at any magnitude."""
    difference = torch.sub(logits, maximum[:, None], out=out)
    if is_one(temperature):
        return difference
    return difference.div_(temperature[:, None] if isinstance(temperature, Tensor) else temperature)


def _log_q(logits: LogitRows, stats: RowStats) -> Tensor:
    return shifted(logits.x, stats.x_max, logits.temperature).sub_(known(stats.x_lse)[:, None])


def _log_p(logits: LogitRows, stats: RowStats) -> Tensor:
    y_shifted = shifted(known(logits.y), known(stats.y_max), logits.temperature)
    return y_shifted.sub_(known(stats.y_lse)[:, None])


def _zero_safe_sum(probs: Tensor, log_ratio: Tensor) -> Tensor:
    """Row sums of probs * log_ratio with 0 * inf = 0; overwrites ``log_ratio``."""
    return log_ratio.mul_(probs).masked_fill_(probs == 0, 0).sum(-1)


def _sum_and_cross(a: Tensor, b: Tensor, exp_a: Tensor) -> tuple[Tensor, Tensor]:
    """Row sums of exp(a) and of exp(a) * (a - b); overwrites ``a`` and ``exp_a``."""
    torch.exp(a, out=exp_a)
    return exp_a.sum(-1), _zero_safe_sum(exp_a, a.sub_(b))


def label_logit(logits: Tensor, labels: Tensor, shard: VocabShard) -> Tensor:
    """The label's logit where it is in this shard, else -inf (so is that of an id nobody holds)."""
    dtype = maths_dtype(logits.dtype)
    if shard.columns == 0:
        return logits.new_full(labels.shape, -torch.inf, dtype=dtype)
    column, in_shard = shard.locate(labels)
    picked = logits.gather(-1, column[:, None]).squeeze(-1).to(dtype)
    return torch.where(in_shard, picked, -torch.inf)


def _mixture(logits: LogitRows, stats: RowStats, w: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """P, Q, log(P/M) and log(Q/M); the logs are exactly 0 where P = Q and NaN where both are 0.

    Relative to the larger of P and Q, M is 1 + w' expm1(-|log P - log Q|) with w' the weight of the
    smaller: no overflow, whatever the ratio.
    """
    log_p, log_q = _log_p(logits, stats), _log_q(logits, stats)
    gap = log_p - log_q
    p, q = log_p.exp_(), log_q.exp_()
    weight_of_smaller = torch.full_like(gap, 1 - w).masked_fill_(gap < 0, w)
    log_m = gap.abs().neg_().expm1_().mul_(weight_of_smaller).log1p_()
    log_p_over_m = gap.clamp(max=0).sub_(log_m)
    log_q_over_m = gap.neg_().clamp_(max=0).sub_(log_m)
    return p, q, log_p_over_m, log_q_over_m
