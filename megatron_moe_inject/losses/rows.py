"""Row maths of one student and one teacher block of logits whose columns are vocabulary-sharded.

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

    forward_kl   D = sum P log(P/Q)                      gradient Q - P needs no slope
    reverse_kl   D = sum Q log(Q/P)                      g = log(Q/P)             slope = D
    jsd          D = w sum P log(P/M) + (1-w) sum Q log(Q/M)
                                                         g = (1-w) log(Q/M)
    skew_kl      D = sum P log(P/M)                      g = (1-w) (1 - P/M)

M = w P + (1-w) Q. The KLs of pass 1 come out of sums that need no normaliser; the mixtures M need
normalised P and Q, hence a second pass and an all-reduce.
"""

from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

KINDS = ("forward_kl", "reverse_kl", "jsd", "skew_kl")

# Stands for the maximum of a rank without a finite logit. Finite, so that differences of maxima
# stay finite; far below any logit, so that such a rank gets weight exp(-huge) = 0 in a merge.
_NO_MAXIMUM = -1e30


@dataclass(frozen=True)
class Divergence:
    """Which divergence, and the teacher's weight in its mixture M (jsd and skew_kl)."""

    kind: str
    beta: float = 0.5
    skew: float = 0.1

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"kind={self.kind!r} is no divergence; use one of {', '.join(KINDS)}")
        if self.mixture is not None and not 0 < self.mixture < 1:
            name = {"jsd": "beta", "skew_kl": "skew"}[self.kind]
            raise ValueError(
                f"{name}={self.mixture} of {self.kind} must lie strictly between 0 and 1; "
                "use forward_kl or reverse_kl for an unmixed divergence"
            )

    @property
    def mixture(self) -> float | None:
        """w of M = w P + (1 - w) Q, None for the kinds without a mixture."""
        return {"jsd": self.beta, "skew_kl": self.skew}.get(self.kind)


@dataclass(frozen=True)
class VocabShard:
    """The vocabulary ids of this rank's columns, ``start`` to ``start + columns``, no padding."""

    start: int
    columns: int
    group: ProcessGroup | None

    @classmethod
    def of(cls, width: int, group: ProcessGroup | None, valid_vocab_size: int | None) -> Self:
        """The shard of this rank in ``group`` when every rank holds ``width`` columns, v/p."""
        rank, size = (group.rank(), group.size()) if group is not None else (0, 1)
        valid = width * size if valid_vocab_size is None else valid_vocab_size
        if not 0 < valid <= width * size:
            raise ValueError(
                f"valid_vocab_size={valid_vocab_size} must lie between 1 and the {width * size} "
                f"ids that {size} shard(s) of {width} columns hold"
            )
        start = rank * width
        return cls(start, min(max(valid - start, 0), width), group if size > 1 else None)

    def locate(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Column of each label [t], any where it is not here, and whether it is here [t]."""
        column = labels - self.start
        here = (column >= 0) & (column < self.columns)
        return column.clamp(0, max(self.columns - 1, 0)), here


class RowStats(NamedTuple):
    """Merged statistics, each [t]; None where the loss does not need them.

    ``x_max`` and ``y_max`` are the largest logits; ``x_lse``, ``y_lse`` and ``ce_lse`` the log of
    the sum of exponentials relative to them, the first two at the temperature and the last at 1.
    ``divergence`` is D without T^2, ``ce`` the cross-entropy (0 where ignored).
    """

    x_max: Tensor
    x_lse: Tensor | None = None
    y_max: Tensor | None = None
    y_lse: Tensor | None = None
    divergence: Tensor | None = None
    slope: Tensor | None = None
    ce_lse: Tensor | None = None
    ce: Tensor | None = None

    def rows(self, rows: slice) -> Self:
        """The statistics of some rows."""
        return RowStats(*(None if stat is None else stat[rows] for stat in self))

    @classmethod
    def cat(cls, parts: list[Self]) -> Self:
        """The statistics of consecutive blocks of rows as one."""
        fields = zip(*parts, strict=True)
        return cls(*(None if field[0] is None else torch.cat(field) for field in fields))


def maths_dtype(dtype: torch.dtype) -> torch.dtype:
    """What the loss is computed in: float32, or float64 for float64 input."""
    return torch.promote_types(dtype, torch.float32)


def local_statistics(
    x: Tensor,
    y: Tensor | None,
    labels: Tensor | None,
    divergence: Divergence | None,
    temperature: float | Tensor,
    shard: VocabShard,
) -> dict[str, Tensor]:
    """What this rank's columns say about each row, by name, each [t]; no communication.

    ``y`` and ``divergence`` are None together (no divergence), ``labels`` None leaves out the
    cross-entropy. ``temperature`` is a float or [t].
    """
    local = {"x_max": _local_maximum(x)}
    if divergence is not None:
        local["y_max"] = _local_maximum(y)
        x_shifted = _shifted(x, local["x_max"], temperature)
        y_shifted = _shifted(y, local["y_max"], temperature)
        if divergence.kind == "forward_kl":
            local["y_sum"], local["cross"] = _sum_and_cross(y_shifted, x_shifted)
            local["x_sum"] = x_shifted.exp_().sum(-1)
        elif divergence.kind == "reverse_kl":
            local["x_sum"], local["cross"] = _sum_and_cross(x_shifted, y_shifted)
            local["y_sum"] = y_shifted.exp_().sum(-1)
        else:
            local["x_sum"] = x_shifted.exp_().sum(-1)
            local["y_sum"] = y_shifted.exp_().sum(-1)
    if labels is not None:
        if divergence is not None and _is_one(temperature):
            local["ce_sum"] = local["x_sum"]
        else:
            local["ce_sum"] = _shifted(x, local["x_max"], 1.0).exp_().sum(-1)
        local["label_logit"] = _label_logit(x, labels, shard)
    return local


def exchange(local: dict[str, Tensor], shard: VocabShard) -> dict[str, Tensor]:
    """Every rank's ``local`` statistics: name -> [p, t].

    Runs one all-gather of len(local) * t numbers over the shard's group, none without a group.
    """
    packed = torch.stack(tuple(local.values()))
    if shard.group is None:
        gathered = packed.unsqueeze(0)
    else:
        gathered = packed.new_empty(shard.group.size(), *packed.shape)
        dist.all_gather_into_tensor(gathered.flatten(0, 1), packed, group=shard.group)
    return dict(zip(local, gathered.unbind(1), strict=True))


def merge(
    ranks: dict[str, Tensor],
    labels: Tensor | None,
    divergence: Divergence | None,
    temperature: float | Tensor,
) -> RowStats:
    """Row statistics of the whole vocabulary from every rank's [p, t]; no communication.

    A mixture kind still lacks ``divergence`` and ``slope``: see ``mixture_terms``.
    """
    stats = {"x_max": ranks["x_max"].amax(0)}
    if divergence is not None:
        stats["y_max"] = ranks["y_max"].amax(0)
        x_weight = ((ranks["x_max"] - stats["x_max"]) / temperature).exp()
        y_weight = ((ranks["y_max"] - stats["y_max"]) / temperature).exp()
        x_total = (x_weight * ranks["x_sum"]).sum(0)
        y_total = (y_weight * ranks["y_sum"]).sum(0)
        stats["x_lse"], stats["y_lse"] = x_total.log(), y_total.log()
        # A rank's cross term is relative to its own maxima: move it to the common ones.
        shift = (ranks["y_max"] - stats["y_max"] - (ranks["x_max"] - stats["x_max"])) / temperature
        lse_gap = stats["x_lse"] - stats["y_lse"]
        if divergence.kind == "forward_kl":
            cross = (y_weight * (ranks["cross"] + ranks["y_sum"] * shift)).sum(0)
            stats["divergence"] = cross / y_total + lse_gap
        elif divergence.kind == "reverse_kl":
            cross = (x_weight * (ranks["cross"] - ranks["x_sum"] * shift)).sum(0)
            stats["divergence"] = stats["slope"] = cross / x_total - lse_gap
    if labels is not None:
        weight = (ranks["x_max"] - stats["x_max"]).exp()
        stats["ce_lse"] = (weight * ranks["ce_sum"]).sum(0).log()
        ce = stats["x_max"] - ranks["label_logit"].amax(0) + stats["ce_lse"]
        stats["ce"] = torch.where(labels >= 0, ce, 0.0)
    return RowStats(**stats)


def mixture_terms(
    x: Tensor, y: Tensor, stats: RowStats, divergence: Divergence, temperature: float | Tensor
) -> Tensor:
    """This rank's part of (``divergence``, ``slope``) of a mixture kind: [2, t], to be summed."""
    w = divergence.mixture
    p, q, log_p_over_m, log_q_over_m = _mixture(x, y, stats, w, temperature)
    if divergence.kind == "jsd":
        q_part = (1 - w) * _zero_safe_sum(q, log_q_over_m)
        return torch.stack((w * _zero_safe_sum(p, log_p_over_m) + q_part, q_part))
    slope = (w - 1) * _zero_safe_sum(q, log_p_over_m.expm1())
    return torch.stack((_zero_safe_sum(p, log_p_over_m), slope))


def row_statistics(
    x: Tensor,
    y: Tensor | None,
    labels: Tensor | None,
    divergence: Divergence | None,
    temperature: float | Tensor,
    shard: VocabShard,
) -> RowStats:
    """Both passes of statistics over one block of rows.

    Collectives over the shard's group: one all-gather of at most 7 numbers per row, and for jsd and
    skew_kl one all-reduce (sum) of 2 numbers per row.
    """
    local = local_statistics(x, y, labels, divergence, temperature, shard)
    stats = merge(exchange(local, shard), labels, divergence, temperature)
    if divergence is not None and divergence.mixture is not None:
        terms = mixture_terms(x, y, stats, divergence, temperature)
        stats = add_mixture(stats, terms, shard)
    return stats


def add_mixture(stats: RowStats, terms: Tensor, shard: VocabShard) -> RowStats:
    """``stats`` with the mixture ``terms`` [2, t] summed over the group (one all-reduce)."""
    if shard.group is not None:
        dist.all_reduce(terms, group=shard.group)
    return stats._replace(divergence=terms[0], slope=terms[1])


def divergence_gradient(
    x: Tensor, y: Tensor, stats: RowStats, divergence: Divergence, temperature: float | Tensor
) -> Tensor:
    """Derivative of D by the scaled student logits x / T, [t, c]."""
    if divergence.kind == "forward_kl":
        return _log_q(x, stats, temperature).exp_().sub_(_log_p(y, stats, temperature).exp_())
    if divergence.kind == "reverse_kl":
        log_q = _log_q(x, stats, temperature)
        q = log_q.exp()
        g = log_q.sub_(_log_p(y, stats, temperature))
    else:
        w = divergence.mixture
        _, q, log_p_over_m, log_q_over_m = _mixture(x, y, stats, w, temperature)
        if divergence.kind == "jsd":
            g = log_q_over_m.mul_(1 - w)
        else:
            g = log_p_over_m.expm1_().mul_(w - 1)
    return g.sub_(stats.slope[:, None]).mul_(q).masked_fill_(q == 0, 0)


def add_cross_entropy_gradient(
    gradient: Tensor, x: Tensor, labels: Tensor, stats: RowStats, weight: Tensor, shard: VocabShard
) -> Tensor:
    """Add weight [t] times the derivative of the cross-entropy by x to ``gradient`` [t, c]."""
    weight = torch.where(labels >= 0, weight, 0.0)
    probs = _shifted(x, stats.x_max, 1.0).sub_(stats.ce_lse[:, None]).exp_()
    gradient.addcmul_(probs, weight[:, None])
    if shard.columns:
        column, here = shard.locate(labels)
        row = torch.arange(len(labels), device=labels.device)
        gradient[row, column] -= torch.where(here, weight, 0.0)
    return gradient


def _is_one(temperature: float | Tensor) -> bool:
    return not isinstance(temperature, Tensor) and temperature == 1


def _local_maximum(logits: Tensor) -> Tensor:
    dtype = maths_dtype(logits.dtype)
    if logits.shape[-1] == 0:
        return logits.new_full(logits.shape[:-1], _NO_MAXIMUM, dtype=dtype)
    return logits.amax(-1).to(dtype).clamp_(min=_NO_MAXIMUM)


def _shifted(logits: Tensor, maximum: Tensor, temperature: float | Tensor) -> Tensor:
    """(logits - maximum) / temperature as a new tensor; exact near the maximum at any magnitude."""
    shifted = logits - maximum[:, None]
    if _is_one(temperature):
        return shifted
    return shifted.div_(temperature[:, None] if isinstance(temperature, Tensor) else temperature)


def _log_q(x: Tensor, stats: RowStats, temperature: float | Tensor) -> Tensor:
    return _shifted(x, stats.x_max, temperature).sub_(stats.x_lse[:, None])


def _log_p(y: Tensor, stats: RowStats, temperature: float | Tensor) -> Tensor:
    return _shifted(y, stats.y_max, temperature).sub_(stats.y_lse[:, None])


def _zero_safe_sum(probs: Tensor, log_ratio: Tensor) -> Tensor:
    """Row sums of probs * log_ratio with 0 * inf = 0; overwrites ``log_ratio``."""
    return log_ratio.mul_(probs).masked_fill_(probs == 0, 0).sum(-1)


def _sum_and_cross(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Row sums of exp(a) and of exp(a) * (a - b); overwrites ``a``."""
    exp_a = a.exp()
    return exp_a.sum(-1), _zero_safe_sum(exp_a, a.sub_(b))


def _label_logit(x: Tensor, labels: Tensor, shard: VocabShard) -> Tensor:
    """The label's logit where it is in this shard, else -inf (so is that of an id nobody holds)."""
    if shard.columns == 0:
        return x.new_full(labels.shape, -torch.inf, dtype=maths_dtype(x.dtype))
    column, here = shard.locate(labels)
    picked = x.gather(-1, column[:, None]).squeeze(-1).to(maths_dtype(x.dtype))
    return torch.where(here, picked, -torch.inf)


def _mixture(
    x: Tensor, y: Tensor, stats: RowStats, w: float, temperature: float | Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """P, Q, log(P/M) and log(Q/M); the logs are exactly 0 where P = Q and NaN where both are 0.

    Relative to the larger of P and Q, M is 1 + w' expm1(-|log P - log Q|) with w' the weight of the
    smaller: no overflow, whatever the ratio.
    """
    log_p, log_q = _log_p(y, stats, temperature), _log_q(x, stats, temperature)
    gap = log_p - log_q
    p, q = log_p.exp_(), log_q.exp_()
    weight_of_smaller = torch.full_like(gap, 1 - w).masked_fill_(gap < 0, w)
    log_m = gap.abs().neg_().expm1_().mul_(weight_of_smaller).log1p_()
    log_p_over_m = gap.clamp(max=0).sub_(log_m)
    log_q_over_m = gap.neg_().clamp_(max=0).sub_(log_m)
    return p, q, log_p_over_m, log_q_over_m
