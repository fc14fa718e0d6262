"""The row maths of ``rows.py`` on GPUs as Triton kernels: what runs there by default.

    fused_loss(..., options=FusedOptions(kernels=TritonRows()))

On an H100 they take a twentieth to a fortieth of the time of the torch operations of ``rows.py``,
and about half of theirs under ``torch.compile`` (``row_bench.py`` in ``examples/benchmarks``,
``results/2026-11-26-rows-h100.json``).

Shapes: t tokens (rows), c columns of this rank.

Between the matrix products the row maths only moves memory. With x and y of 2 bytes the kernels
read 4 bytes per pair of logits for the statistics, and read 4 and write 2 for the gradient; torch
makes some dozens of passes over float32 blocks. jsd and skew_kl read 4 more for their second pass
of statistics and are likely bound by arithmetic.

One program works on one row. Rows are long (16k to 262k columns) and chunks have hundreds of them,
so all multiprocessors are busy without splitting rows, which would take an exchange between
programs. The launch shape is fixed, not autotuned: the same input gives the same bits in every run,
no launch waits for the device, and nothing is timed on logits that the gradient has overwritten.
``row_bench.py`` tries other shapes.

Kernels are compiled at their first use, once per kind of loss and input type whatever the number of
rows, and once more where a row's stride or length is divisible by 16 or not. After that the
launches can be captured in a CUDA graph.
"""

import functools
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from megatron_moe_inject.losses.rows import LogitRows, RowKernels, RowStats, is_one, known
from megatron_moe_inject.losses.spec import (
    Divergence,
    LogitTransform,
    TokenWeighting,
    VocabShard,
)

AUTO = "auto"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class TritonRows:
    """``rows.RowKernels`` in Triton for CUDA tensors in 16 or 32 bits; the maths is in float32.

    Attributes:
        warps: per program and row, a power of 2. The defaults were the fastest of three on an H100.
        width: neighbouring columns per thread and step, a power of 2; 8 of 2 bytes make the widest
            load.

    Raises:
        ValueError: where Triton cannot be imported, and in use on any other tensors.
    """

    warps: int = 4
    width: int = 8

    def __post_init__(self) -> None:
        try:
            _kernels()
        except ImportError as error:
            raise ValueError(
                "TritonRows() needs the package triton, which torch for CUDA brings along "
                f"(pip install triton); without it leave kernels=None: {error}"
            ) from error

    def local_statistics(
        self,
        logits: LogitRows,
        divergence: Divergence | None,
        shard: VocabShard,
        weighting: TokenWeighting | None,
    ) -> dict[str, Tensor]:
        """See ``RowKernels``."""
        kind, labels = "" if divergence is None else divergence.kind, logits.labels
        unit = _unit_temperature(logits, kind)
        names: tuple[str, ...] = _kernels().STATISTICS
        out = torch.empty(len(names), len(logits.x), dtype=torch.float32, device=logits.x.device)
        constants: dict[str, str | bool | int] = dict(
            KIND=kind, CE=labels is not None, WEIGHTING=bool(weighting), UNIT=unit, **self._lanes
        )
        self._launch(
            "statistics", logits, kind, out, dict(labels=labels), dict(first_id=shard.start),
            constants,
        )  # fmt: skip
        written = dict(zip(names, out.unbind(), strict=True))
        if unit:  # sums at the temperature are sums at temperature 1
            written |= dict(ce_sum=written["x_sum"], y_ce_sum=written["y_sum"])
        needed = ["x_max"]
        if divergence is not None:
            needed += ["y_max", "x_sum", "y_sum"]
            needed += ["cross"] if divergence.mixture is None else []
        if labels is not None:
            needed += ["ce_sum", "label_logit"]
        if weighting:
            needed += ["y_ce_sum", "y_moment", "y_label_logit"]
        return {name: written[name] for name in needed}

    def mixture_terms(self, logits: LogitRows, stats: RowStats, divergence: Divergence) -> Tensor:
        """See ``RowKernels``."""
        out = torch.empty(2, len(logits.x), dtype=torch.float32, device=logits.x.device)
        per_row = {name: getattr(stats, name) for name in ("x_max", "x_lse", "y_max", "y_lse")}
        w = divergence.mixture
        assert w is not None, "a kind with a mixture"
        self._launch(
            "mixture", logits, divergence.kind, out, per_row, dict(w=w),
            dict(KIND=divergence.kind, **self._lanes),
        )  # fmt: skip
        return out

    def logit_gradient(
        self,
        logits: LogitRows,
        stats: RowStats,
        divergence: Divergence | None,
        shard: VocabShard,
        kd_weight: Tensor | None,
        ce_weight: Tensor | None,
        out: Tensor,
    ) -> None:
        """See ``RowKernels``."""
        if kd_weight is None and ce_weight is None:
            out.zero_()
            return
        assert out.stride(1) == 1 or out.shape[1] <= 1, "columns must be neighbours in memory"
        kind, w = "", 0.0
        if kd_weight is not None:
            assert divergence is not None, "distillation has a divergence"
            kind, w = divergence.kind, divergence.mixture or 0.0
        with_ce, transform = ce_weight is not None, logits.transform or LogitTransform()
        per_row = dict(
            labels=logits.labels if with_ce else None,
            x_max=stats.x_max,
            x_lse=stats.x_lse if kind else None,
            y_max=stats.y_max if kind else None,
            y_lse=stats.y_lse if kind else None,
            slope=stats.slope if kind and kind != "forward_kl" else None,
            ce_lse=stats.ce_lse if with_ce else None,
            kd_weight=kd_weight,
            ce_weight=ce_weight,
        )
        numbers = dict(
            first_id=shard.start,
            w=w,
            softcap=float(transform.softcap or 1.0),
            scale=float(transform.scale),
        )
        constants: dict[str, str | bool | int] = dict(
            KIND=kind,
            CE=with_ce,
            UNIT=_unit_temperature(logits, kind),
            CAPPED=transform.softcap is not None,
            TILE=32 * self.warps * self.width,
        )
        self._launch("gradient", logits, kind, out, per_row, numbers, constants)

    @property
    def _lanes(self) -> dict[str, int]:
        return dict(LANES=32 * self.warps, WIDTH=self.width)

    def _launch(
        self,
        name: str,
        logits: LogitRows,
        kind: str,
        out: Tensor,
        per_row: dict[str, Tensor | None],
        numbers: dict[str, int | float],
        constants: dict[str, str | bool | int],
    ) -> None:
        """Run a kernel into ``out``, a program per row of ``logits``; no teacher for kind ""."""
        x, y = _neighbours(logits.x), None
        temperature, temperatures = 1.0, None
        if kind:
            y = _neighbours(known(logits.y))
            if isinstance(logits.temperature, Tensor):
                temperatures = logits.temperature
            else:
                temperature = float(logits.temperature)
        per_row = per_row | dict(temperatures=temperatures)
        per_row = {key: None if v is None else v.contiguous() for key, v in per_row.items()}
        if out.numel() == 0:
            return
        with torch.cuda.device_of(x):
            getattr(_kernels(), name)[(len(x),)](
                x=x, x_stride=x.stride(0), y=y, y_stride=0 if y is None else y.stride(0),
                out=out, out_stride=out.stride(0), columns=x.shape[1],
                temperature=temperature, **per_row, **numbers,
                PER_TOKEN=temperatures is not None, **constants,
                num_warps=self.warps, enable_fp_fusion=False,
            )  # fmt: skip


def kernels_for(kernels: RowKernels | str | None, *sources: Tensor | None) -> RowKernels | None:
    """What ``kernels`` means for logits of these devices and types.

    Args:
        kernels: "auto" takes ``TritonRows()`` for CUDA tensors that it works on, where Triton can
            be imported; None means the torch operations of ``rows.py``.
        sources: student's and teacher's logits, or what they are made of; None is no source.

    Raises:
        ValueError: any other text.
    """
    if not isinstance(kernels, str):
        return kernels
    if kernels != AUTO:
        raise ValueError(f"kernels={kernels!r} is neither {AUTO!r}, None nor an object")
    tensors = [source for source in sources if source is not None]
    fit = all(source.is_cuda and source.dtype in _DTYPES for source in tensors)
    return _triton_rows() if fit and torch.version.cuda is not None else None


@functools.cache
def _triton_rows() -> TritonRows | None:
    try:
        return TritonRows()
    except ValueError:
        return None


def _kernels() -> ModuleType:
    """The module that imports Triton."""
    from megatron_moe_inject.losses import triton_kernels

    return triton_kernels


def _unit_temperature(logits: LogitRows, kind: str) -> bool:
    return bool(kind) and is_one(logits.temperature)


def _neighbours(logits: Tensor) -> Tensor:
    """Logits [t, c] that the kernels can read; a copy only where columns are not neighbours."""
    if logits.dtype not in _DTYPES or not (logits.is_cuda or _kernels().INTERPRETED):
        raise ValueError(
            f"TritonRows() works on CUDA tensors in {', '.join(map(str, _DTYPES))}, these logits "
            f"are {logits.dtype} on {logits.device}; leave kernels=None for them"
        )
    return logits if logits.stride(1) == 1 else logits.contiguous()
