"""Layer x expert heat maps as PNG, with the chosen experts framed.

Amounts are drawn from white to dark blue and differences from brown over white to blue-green:
both stay readable for colour-blind readers and in print. Chosen experts carry a black frame with
a white seam, where the cells are large enough for one, so that it stands out on every colour.

matplotlib is optional and imported where it is used; no global state of it (pyplot) is touched.

Shapes: L layers, E experts.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_moe_inject.host.errors import (
    RecipeError,
)

_DPI = 150
_SMALL_CELL = 0.09
"""Inches; the frames of smaller cells are thin and without a seam."""


@dataclass(frozen=True)
class Panel:
    """One heat map.

    Attributes:
        title: what the colours are.
        values: ``[L, E]``, finite.
        signed: the values are differences, drawn around 0; otherwise amounts, drawn from 0.
    """

    title: str
    values: np.ndarray
    signed: bool = False


def heat_map(
    panels: Sequence[Panel],
    layers: Sequence[int],
    chosen: Mapping[int, Sequence[int]],
    title: str,
) -> bytes:
    """The panels below each other as a PNG.

    Args:
        layers: decoder layers of the rows, rising.
        chosen: layer -> expert ids to mark.

    Raises:
        RecipeError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise RecipeError(
            "a heat map needs matplotlib, which is not installed; "
            "pip install 'megatron-moe-inject[report]'"
        ) from None
    rows, experts = panels[0].values.shape
    width = float(np.clip(0.3 * experts, 4.5, 0.05 * experts + 6))
    height = float(np.clip(0.3 * rows, 0.9, 0.05 * rows + 4))
    figure = Figure(
        (width + 1.9, len(panels) * (height + 0.75) + 0.45), dpi=_DPI, layout="constrained"
    )
    FigureCanvasAgg(figure)
    scale = float(np.clip(width / 10, 1, 2))
    figure.suptitle(title, fontsize=10 * scale)
    for axes, panel in zip(
        figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels, strict=True
    ):
        _draw(figure, axes, panel, layers, scale)
        _mark(axes, layers, chosen, min(width / experts, height / rows))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _draw(figure: Any, axes: Any, panel: Panel, layers: Sequence[int], scale: float) -> None:
    """Draw one panel; ``scale`` enlarges its letters."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    rows, experts = panel.values.shape
    most = max(float(np.abs(panel.values).max(initial=0)), 1e-12)
    image = axes.imshow(
        panel.values,
        cmap="BrBG" if panel.signed else "Blues",
        vmin=-most if panel.signed else 0,
        vmax=most,
        aspect="auto",
        interpolation="nearest",
    )
    bar = figure.colorbar(image, ax=axes, pad=0.01, aspect=12)
    bar.ax.tick_params(labelsize=7 * scale)
    axes.set_title(panel.title, fontsize=9 * scale, loc="left")
    axes.set_xlabel("expert", fontsize=8 * scale)
    axes.set_ylabel("layer", fontsize=8 * scale)
    axes.tick_params(labelsize=7 * scale)
    for axis, size, names in ((axes.xaxis, experts, range(experts)), (axes.yaxis, rows, layers)):
        step = next(s for s in (1, 2, 4, 8, 16, 32, 64, 128, size) if size / s <= 33)
        axis.set_major_locator(FixedLocator(range(0, size, step)))
        axis.set_major_formatter(FuncFormatter(lambda at, _, names=names: str(names[int(at)])))
        axis.set_minor_locator(NullLocator())


def _mark(
    axes: Any, layers: Sequence[int], chosen: Mapping[int, Sequence[int]], cell: float
) -> None:
    """Mark chosen cells; ``cell`` is the shorter side of one in inches."""
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    places = [(e, row) for row, layer in enumerate(layers) for e in chosen.get(layer, ())]
    small = cell < _SMALL_CELL
    half = 0.5 if small else 0.45
    frames = [Rectangle((e - half, row - half), 2 * half, 2 * half) for e, row in places]
    for colour, line in (("black", 0.9),) if small else (("white", 3.2), ("black", 1.6)):
        axes.add_collection(
            PatchCollection(frames, facecolor="none", edgecolor=colour, linewidth=line)
        )
