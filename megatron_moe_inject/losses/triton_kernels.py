"""Device code of ``triton_rows.py``, which see: the row maths of ``rows.py``, a program per row.

Shapes: t tokens (rows), c columns of this rank. A program walks along its row in tiles
[LANES, WIDTH] of neighbouring columns; a lane's WIDTH columns are loads of 16 bytes where rows are
aligned, and only the last tile has a mask.

Statistics: every lane keeps its own running maxima, and sums relative to them that shrink when a
maximum rises. So no lane waits for another, and a tile costs one more exponential per sum and lane,
until the end of the row merges the lanes by the formulas by which ``rows.py`` merges ranks.

Exponentials are powers of 2, which are one instruction; ``rate`` is log2(e) / temperature.
Differences of logits are taken before anything multiplies them. They are exactly 0 where student
and teacher agree, and no contraction into fused multiply-adds leaves a rounding error there.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton's compiler, not Python, gives these functions their types, anew for each launch.

import triton
import triton.language as tl

_NO_MAXIMUM = tl.constexpr(-1e30)  # as in rows.py
_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)

# Names of the statistics kernel's results, and their rows in its output.
STATISTICS = ("x_max", "y_max", "x_sum", "y_sum", "cross", "ce_sum", "label_logit", "y_ce_sum",
              "y_moment", "y_label_logit")  # fmt: skip
_X_MAX, _Y_MAX, _X_SUM, _Y_SUM, _CROSS, _CE_SUM, _LABEL, _Y_CE_SUM, _Y_MOMENT, _Y_LABEL = (
    tl.constexpr(i) for i in range(len(STATISTICS))
)


@triton.jit
def _tile(row, column, columns, WHOLE: tl.constexpr):
    """Logits of a row in float32, -inf behind its end."""
    if WHOLE:
        logits = tl.load(row + column)
    else:
        logits = tl.load(row + column, mask=column < columns, other=-float("inf"))
    return logits.to(tl.float32)


@triton.jit
def _of_row(values, row, NEEDED: tl.constexpr):
    """A row's number, 0 where it is not needed and ``values`` may be None."""
    value = 0.0
    if NEEDED:
        value = tl.load(values + row).to(tl.float32)
    return value


@triton.jit
def _temperature_of(temperatures, temperature, row, PER_TOKEN: tl.constexpr):
    if PER_TOKEN:
        temperature = tl.load(temperatures + row).to(tl.float32)
    return temperature


@triton.jit
def _expm1(x):
    """exp(x) - 1 to float32's rounding, also near 0."""
    series = 1.0 + x * (1 / 7) * (1.0 + x * (1 / 8))
    series = 1.0 + x * (1 / 5) * (1.0 + x * (1 / 6) * series)
    series = x * (1.0 + x * (1 / 2) * (1.0 + x * (1 / 3) * (1.0 + x * (1 / 4) * series)))
    return tl.where(tl.abs(x) < 0.5, series, tl.exp2(x * _LOG2_E) - 1.0)


@triton.jit
def _log1p(x):
    """log(1 + x) for -1 <= x <= 0 to float32's rounding, also near 0: 2 atanh(x / (2 + x))."""
    s = x / (2.0 + x)
    z = s * s
    series = 1 / 7 + z * (1 / 9 + z * (1 / 11 + z * (1 / 13)))
    series = 2.0 * s * (1.0 + z * (1 / 3 + z * (1 / 5 + z * series)))
    return tl.where(x > -0.5, series, tl.log(1.0 + x))


@triton.jit
def _mixture(gap, w):
    """log(P/M) and log(Q/M) from gap = log P - log Q, see ``rows._mixture``."""
    smaller = tl.where(gap < 0, w, 1.0 - w)
    log_m = _log1p(smaller * _expm1(-tl.abs(gap)))
    return tl.minimum(gap, 0.0) - log_m, tl.minimum(-gap, 0.0) - log_m


@triton.jit
def _kl_terms(weight, gap, other):
    """Lanes' sums of weight * gap, and of the weights where ``other`` is -inf, kept apart.

    Such a term is infinite, but only if its weight is not 0 relative to the whole row's maximum,
    and an infinite sum could not shrink to 0 with its weight when a maximum rises.
    """
    excluded = other == -float("inf")
    terms = tl.where(excluded | (weight == 0), 0.0, weight * gap)
    return tl.sum(terms, axis=1), tl.sum(tl.where(excluded, weight, 0.0), axis=1)


@triton.jit
def _add_tile(
    x_row, y_row, column, columns, rate,
    x_max, x_sum, ce_sum, y_max, y_sum, cross, excluded, y_ce_sum, y_moment,
    KIND: tl.constexpr, CE: tl.constexpr, WEIGHTING: tl.constexpr, UNIT: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """Lanes' statistics with one tile more; ``cross`` is of logits not divided by T."""
    x = _tile(x_row, column, columns, WHOLE)
    x_top = tl.maximum(x_max, tl.max(x, axis=1))
    x_drop, x_max = x_max - x_top, x_top
    x_gap = x - x_top[:, None]
    if CE and not UNIT:
        ce_sum = ce_sum * tl.exp2(x_drop * _LOG2_E) + tl.sum(tl.exp2(x_gap * _LOG2_E), axis=1)
    if KIND != "":
        y = _tile(y_row, column, columns, WHOLE)
        y_top = tl.maximum(y_max, tl.max(y, axis=1))
        y_drop, y_max = y_max - y_top, y_top
        y_gap = y - y_top[:, None]
        q, q_shrink = tl.exp2(x_gap * rate), tl.exp2(x_drop * rate)
        p, p_shrink = tl.exp2(y_gap * rate), tl.exp2(y_drop * rate)
        move = y_drop - x_drop
        if KIND == "forward_kl":
            terms, infinite = _kl_terms(p, y_gap - x_gap, x)
            cross = (cross + y_sum * move) * p_shrink + terms
            excluded = excluded * p_shrink + infinite
        elif KIND == "reverse_kl":
            terms, infinite = _kl_terms(q, x_gap - y_gap, y)
            cross = (cross - x_sum * move) * q_shrink + terms
            excluded = excluded * q_shrink + infinite
        if WEIGHTING:
            if UNIT:
                probs, shrink = p, p_shrink
            else:
                probs, shrink = tl.exp2(y_gap * _LOG2_E), tl.exp2(y_drop * _LOG2_E)
            moment = tl.sum(tl.where(probs == 0, 0.0, probs * y_gap), axis=1)
            if UNIT:
                y_moment = (y_moment + y_sum * y_drop) * shrink + moment
            else:
                y_moment = (y_moment + y_ce_sum * y_drop) * shrink + moment
                y_ce_sum = y_ce_sum * shrink + tl.sum(probs, axis=1)
        x_sum = x_sum * q_shrink + tl.sum(q, axis=1)
        y_sum = y_sum * p_shrink + tl.sum(p, axis=1)
    return x_max, x_sum, ce_sum, y_max, y_sum, cross, excluded, y_ce_sum, y_moment


@triton.jit(do_not_specialize=["out", "out_stride", "temperatures", "labels", "first_id"])
def statistics(
    x, x_stride, y, y_stride, out, out_stride, columns, temperatures, temperature, labels, first_id,
    KIND: tl.constexpr, CE: tl.constexpr, WEIGHTING: tl.constexpr, PER_TOKEN: tl.constexpr,
    UNIT: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """What ``rows.local_statistics`` gives of x, y [t, c] as rows of ``out`` [10, t] float32.

    KIND is "" without a teacher. UNIT, the temperature is the number 1: X_SUM is CE_SUM, too, and
    Y_SUM is Y_CE_SUM; those are not written. Neither is what KIND, CE and WEIGHTING do not need.
    """
    row = tl.program_id(0).to(tl.int64)
    x += row * x_stride
    if KIND != "":
        y += row * y_stride
    out += row
    row_temperature = _temperature_of(temperatures, temperature, row, PER_TOKEN)
    rate = _LOG2_E / row_temperature
    zero = tl.zeros([LANES], tl.float32)
    x_max, y_max = zero + _NO_MAXIMUM, zero + _NO_MAXIMUM
    x_sum, ce_sum, y_sum, cross, excluded = zero, zero, zero, zero, zero
    y_ce_sum, y_moment = zero, zero
    tile = tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    whole = columns // (LANES * WIDTH) * (LANES * WIDTH)
    for first in range(0, whole, LANES * WIDTH):
        x_max, x_sum, ce_sum, y_max, y_sum, cross, excluded, y_ce_sum, y_moment = _add_tile(
            x, y, first + tile, columns, rate,
            x_max, x_sum, ce_sum, y_max, y_sum, cross, excluded, y_ce_sum, y_moment,
            KIND, CE, WEIGHTING, UNIT, True,
        )  # fmt: skip
    if whole < columns:
        x_max, x_sum, ce_sum, y_max, y_sum, cross, excluded, y_ce_sum, y_moment = _add_tile(
            x, y, whole + tile, columns, rate,
            x_max, x_sum, ce_sum, y_max, y_sum, cross, excluded, y_ce_sum, y_moment,
            KIND, CE, WEIGHTING, UNIT, False,
        )  # fmt: skip

    x_top = tl.max(x_max, axis=0)
    x_below = x_max - x_top
    tl.store(out + out_stride * _X_MAX, x_top)
    if CE:
        if not UNIT:
            ce_sum *= tl.exp2(x_below * _LOG2_E)
            tl.store(out + out_stride * _CE_SUM, tl.sum(ce_sum, axis=0))
        column = tl.load(labels + row) - first_id
        in_shard = (column >= 0) & (column < columns)
        logit = tl.load(x + column, mask=in_shard, other=-float("inf")).to(tl.float32)
        tl.store(out + out_stride * _LABEL, logit)
        if WEIGHTING:
            logit = tl.load(y + column, mask=in_shard, other=-float("inf")).to(tl.float32)
            tl.store(out + out_stride * _Y_LABEL, logit)
    if KIND != "":
        y_top = tl.max(y_max, axis=0)
        y_below = y_max - y_top
        q_weight, p_weight = tl.exp2(x_below * rate), tl.exp2(y_below * rate)
        move = y_below - x_below
        if KIND == "forward_kl":
            cross = (cross + y_sum * move) * p_weight
            excluded = excluded * p_weight
        elif KIND == "reverse_kl":
            cross = (cross - x_sum * move) * q_weight
            excluded = excluded * q_weight
        if KIND == "forward_kl" or KIND == "reverse_kl":
            total = tl.sum(cross, axis=0) / row_temperature
            total = tl.where(tl.sum(excluded, axis=0) > 0, float("inf"), total)
            tl.store(out + out_stride * _CROSS, total)
        if WEIGHTING:
            if UNIT:
                moment = (y_moment + y_sum * y_below) * p_weight
            else:
                weight = tl.exp2(y_below * _LOG2_E)
                moment = (y_moment + y_ce_sum * y_below) * weight
                tl.store(out + out_stride * _Y_CE_SUM, tl.sum(y_ce_sum * weight, axis=0))
            tl.store(out + out_stride * _Y_MOMENT, tl.sum(moment, axis=0))
        tl.store(out + out_stride * _Y_MAX, y_top)
        tl.store(out + out_stride * _X_SUM, tl.sum(x_sum * q_weight, axis=0))
        tl.store(out + out_stride * _Y_SUM, tl.sum(y_sum * p_weight, axis=0))


@triton.jit
def _probabilities(x_gap, y_gap, rate, x_log2, y_log2):
    """Q, P and log P - log Q from logits relative to their maxima and the log2 of their sums."""
    q = tl.exp2(x_gap * rate - x_log2)
    p = tl.exp2(y_gap * rate - y_log2)
    return q, p, ((y_gap - x_gap) * rate - (y_log2 - x_log2)) * _LN_2


@triton.jit
def _add_mixture(
    x_row, y_row, column, columns, rate, x_max, x_log2, y_max, y_log2, w, loss, slope,
    KIND: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Lanes' sums of P log(P/M), and of Q log(Q/M) for jsd or Q (P/M - 1) for skew_kl."""
    x_gap = _tile(x_row, column, columns, WHOLE) - x_max
    y_gap = _tile(y_row, column, columns, WHOLE) - y_max
    q, p, gap = _probabilities(x_gap, y_gap, rate, x_log2, y_log2)
    log_p_over_m, log_q_over_m = _mixture(gap, w)
    if KIND == "jsd":
        slopes = q * log_q_over_m
    else:
        slopes = q * _expm1(log_p_over_m)
    loss += tl.sum(tl.where(p == 0, 0.0, p * log_p_over_m), axis=1)
    slope += tl.sum(tl.where(q == 0, 0.0, slopes), axis=1)
    return loss, slope


@triton.jit(
    do_not_specialize=["out", "out_stride", "temperatures", "x_max", "x_lse", "y_max", "y_lse"]
)
def mixture(
    x, x_stride, y, y_stride, out, out_stride, columns, temperatures, temperature,
    x_max, x_lse, y_max, y_lse, w,
    KIND: tl.constexpr, PER_TOKEN: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """``rows.mixture_terms`` of x, y [t, c]: ``out`` [2, t] float32, this rank's D and slope."""
    row = tl.program_id(0).to(tl.int64)
    x += row * x_stride
    y += row * y_stride
    rate = _LOG2_E / _temperature_of(temperatures, temperature, row, PER_TOKEN)
    x_max, x_log2 = tl.load(x_max + row), tl.load(x_lse + row) * _LOG2_E
    y_max, y_log2 = tl.load(y_max + row), tl.load(y_lse + row) * _LOG2_E
    loss, slope = tl.zeros([LANES], tl.float32), tl.zeros([LANES], tl.float32)
    tile = tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    whole = columns // (LANES * WIDTH) * (LANES * WIDTH)
    for first in range(0, whole, LANES * WIDTH):
        loss, slope = _add_mixture(
            x, y, first + tile, columns, rate, x_max, x_log2, y_max, y_log2, w, loss, slope,
            KIND, True,
        )  # fmt: skip
    if whole < columns:
        loss, slope = _add_mixture(
            x, y, whole + tile, columns, rate, x_max, x_log2, y_max, y_log2, w, loss, slope,
            KIND, False,
        )  # fmt: skip
    total, slopes = tl.sum(loss, axis=0), tl.sum(slope, axis=0)
    if KIND == "jsd":
        slopes = (1.0 - w) * slopes
        total = w * total + slopes
    else:
        slopes = (w - 1.0) * slopes
    tl.store(out + row, total)
    tl.store(out + out_stride + row, slopes)


@triton.jit
def _store_gradient(
    x_row, y_row, out_row, column, columns, rate, x_max, x_log2, y_max, y_log2, slope, ce_log2,
    kd, ce, label_column, w, softcap, scale,
    KIND: tl.constexpr, CE: tl.constexpr, UNIT: tl.constexpr, CAPPED: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """The gradient of a tile of columns."""
    x = _tile(x_row, column, columns, WHOLE)
    x_gap = x - x_max
    if KIND == "":
        gradient = ce * tl.exp2(x_gap * _LOG2_E - ce_log2)
    else:
        y_gap = _tile(y_row, column, columns, WHOLE) - y_max
        q, p, gap = _probabilities(x_gap, y_gap, rate, x_log2, y_log2)
        if KIND == "forward_kl":
            gradient = q - p
        else:
            if KIND == "reverse_kl":
                g = -gap
            else:
                log_p_over_m, log_q_over_m = _mixture(gap, w)
                if KIND == "jsd":
                    g = (1.0 - w) * log_q_over_m
                else:
                    g = (w - 1.0) * _expm1(log_p_over_m)
            gradient = tl.where(q == 0, 0.0, (g - slope) * q)
        gradient = tl.where(kd == 0, 0.0, kd * gradient)
        if CE:
            if UNIT:
                gradient += ce * q
            else:
                gradient += ce * tl.exp2(x_gap * _LOG2_E - ce_log2)
    if CE:
        gradient -= tl.where(column == label_column, ce, 0.0)
    if CAPPED:
        capped = x / softcap
        gradient *= 1.0 - capped * capped
    gradient = (gradient * scale).to(out_row.dtype.element_ty)
    if WHOLE:
        tl.store(out_row + column, gradient)
    else:
        tl.store(out_row + column, gradient, mask=column < columns)


@triton.jit(
    do_not_specialize=[
        "temperatures", "labels", "x_max", "x_lse", "y_max", "y_lse", "slope", "ce_lse",
        "kd_weight", "ce_weight", "first_id",
    ]
)  # fmt: skip
def gradient(
    x, x_stride, y, y_stride, out, out_stride, columns, temperatures, temperature, labels,
    x_max, x_lse, y_max, y_lse, slope, ce_lse, kd_weight, ce_weight, first_id, w, softcap, scale,
    KIND: tl.constexpr, CE: tl.constexpr, PER_TOKEN: tl.constexpr, UNIT: tl.constexpr,
    CAPPED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """``rows.logit_gradient`` into ``out`` [t, c], which may be x; KIND "" without KD."""
    row = tl.program_id(0).to(tl.int64)
    x += row * x_stride
    if KIND != "":
        y += row * y_stride
    out += row * out_stride
    row_temperature = _temperature_of(temperatures, temperature, row, PER_TOKEN)
    rate = _LOG2_E / row_temperature
    row_x_max = tl.load(x_max + row)
    row_x_log2 = _of_row(x_lse, row, KIND != "") * _LOG2_E
    row_y_max = _of_row(y_max, row, KIND != "")
    row_y_log2 = _of_row(y_lse, row, KIND != "") * _LOG2_E
    row_slope = _of_row(slope, row, KIND != "" and KIND != "forward_kl")
    kd = _of_row(kd_weight, row, KIND != "") * row_temperature
    row_ce_log2 = _of_row(ce_lse, row, CE) * _LOG2_E
    ce = _of_row(ce_weight, row, CE)
    label_column = -1
    if CE:
        label = tl.load(labels + row)
        label_column = label - first_id
        ce = tl.where(label >= 0, ce, 0.0)
    tile = tl.arange(0, TILE)
    whole = columns // TILE * TILE
    for first in range(0, whole, TILE):
        _store_gradient(
            x, y, out, first + tile, columns, rate, row_x_max, row_x_log2, row_y_max, row_y_log2,
            row_slope, row_ce_log2, kd, ce, label_column, w, softcap, scale,
            KIND, CE, UNIT, CAPPED, True,
        )  # fmt: skip
    if whole < columns:
        _store_gradient(
            x, y, out, whole + tile, columns, rate, row_x_max, row_x_log2, row_y_max, row_y_log2,
            row_slope, row_ce_log2, kd, ce, label_column, w, softcap, scale,
            KIND, CE, UNIT, CAPPED, False,
        )  # fmt: skip


# Triton's interpreter, which the environment chooses when Triton is imported, runs on the CPU.
INTERPRETED = not isinstance(gradient, triton.JITFunction)
