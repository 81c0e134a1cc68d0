"""Drawings as inline SVG text: a few kinds of picture that every chapter of the report is made of.

Text stays text (the page's own font draws it), so the pictures are small and can be searched.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

BLUE, RED, GREEN, AMBER, PURPLE, GREY = "#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#94a3b8"
_SERIES = (BLUE, AMBER, GREEN, PURPLE, RED, "#0891b2", "#be185d", GREY)
_INK, _GRID = "#334155", "#e2e8f0"
_WIDTH, _PANEL_HEIGHT = 5.0, 1.8
_MOST_POINTS, _MOST_COLUMNS, _BINS = 300, 60, 40
_LABEL_START, _LABEL_END = 8, 19

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "figure.autolayout": False,
    "figure.constrained_layout.use": False,
    "svg.hashsalt": "ppomax",
    "text.parse_math": False,
    "font.size": 9,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "text.color": _INK,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}
_STYLE_WITHOUT_GRID: dict[Any, Any] = {**_STYLE, "axes.grid": False}


@dataclass(frozen=True)
class Line:
    """One curve; `spread` is the half width of a band around it. NaN where a row has no value."""

    label: str
    values: Sequence[float]
    spread: Sequence[float] | None = None

    @property
    def has_points(self) -> bool:
        """Whether there is anything to draw."""
        return any(math.isfinite(value) for value in self.values)


@dataclass(frozen=True)
class Panel:
    """One pair of axes with its curves."""

    ylabel: str
    lines: Sequence[Line]
    percent: bool = False
    from_zero: bool = False


def line_chart(
    x: Sequence[float], panels: Sequence[Panel], *, xlabel: str, shaded: tuple[float, float] | None = None
) -> str:
    """Panels above each other over one x axis. `shaded` marks the part in which only the critic was trained."""
    drawn = [panel for panel in panels if any(line.has_points for line in panel.lines)]
    if not drawn:
        return ""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(len(drawn))
        for ax, panel in zip(axes, drawn, strict=True):
            lines = [line for line in panel.lines if line.has_points]
            for line, colour in zip(lines, _SERIES, strict=False):
                _draw_line(ax, x, line, colour)
            if shaded is not None:
                ax.axvspan(*shaded, color=GREY, alpha=0.18, linewidth=0, label="critic only" if ax is axes[0] else None)
            _finish_panel(ax, panel, legend=len(lines) > 1 or (shaded is not None and ax is axes[0]))
        axes[-1].set_xlabel(xlabel)
        axes[-1].set_xlim(min(x) - 0.5, max(x) + 0.5)
        axes[-1].xaxis.set_major_locator(MaxNLocator(8, integer=True))
        return _svg(figure)


def trajectory(x: Sequence[float], ys: Sequence[tuple[str, Sequence[float]]], *, xlabel: str) -> str:
    """Quantities against x (not against time), dots from light (first) to dark (last), one panel each."""
    drawn = [(label, y) for label, y in ys if np.isfinite(np.add(x, y)).any()]
    if not drawn:
        return ""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(len(drawn))
        for ax, (label, values) in zip(axes, drawn, strict=True):
            points = np.array([x, values], dtype=float)
            points = _thin(points[:, np.isfinite(points).all(axis=0)])
            ax.plot(*points, color=GREY, linewidth=1, zorder=1)
            ax.scatter(*points, c=np.linspace(0.25, 1, points.shape[1]), cmap="Blues", vmin=0, vmax=1, s=24, zorder=2)
            for i, name in ((0, "start"), (-1, "end")):
                ax.annotate(
                    name,
                    (points[0, i], points[1, i]),
                    textcoords="offset points",
                    xytext=(0, 7),
                    ha="center",
                    fontsize=8,
                )
            ax.margins(x=0.06, y=0.18)
            ax.set_ylabel(label)
        axes[-1].set_xlabel(xlabel)
        return _svg(figure)


def heat_map(x: Sequence[float], histograms: Sequence[Mapping[str, Any] | None], *, xlabel: str, ylabel: str) -> str:
    """Histograms over time: each column is one distribution, darker where more of it lies."""
    read = [(position, *_histogram(histogram)) for position, histogram in zip(x, histograms, strict=True)]
    known = [(position, edges, counts) for position, edges, counts in read if counts.sum() > 0]
    if not known:
        return ""
    low = min(edges[0] for _, edges, _ in known)
    high = max(edges[-1] for _, edges, _ in known)
    grid = np.linspace(low, high if high > low else low + 1, _BINS + 1)
    columns = np.stack([_rebin(edges, counts, grid) for _, edges, counts in known], axis=1)
    columns = _thin(columns, _MOST_COLUMNS)
    with matplotlib.rc_context(_STYLE_WITHOUT_GRID):
        figure, (ax,) = _figure(1, height=2.3)
        half = (known[-1][0] - known[0][0]) / max(len(known) - 1, 1) / 2 or 0.5
        extent = (known[0][0] - half, known[-1][0] + half, grid[0], grid[-1])
        ax.imshow(columns, aspect="auto", origin="lower", extent=extent, cmap="Blues", interpolation="nearest")
        ax.set(xlabel=xlabel, ylabel=ylabel)
        ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        return _svg(figure)


def histogram_bars(histogram: Mapping[str, Any], *, xlabel: str, ylabel: str) -> str:
    """One histogram; bars below zero are red, bars above zero blue."""
    edges, counts = _histogram(histogram)
    if counts.sum() <= 0:
        return ""
    with matplotlib.rc_context(_STYLE):
        figure, (ax,) = _figure(1, height=2.2)
        colours = np.where(edges[:-1] + edges[1:] < 0, RED, BLUE)
        ax.bar(edges[:-1], counts, width=np.diff(edges), align="edge", color=colours, edgecolor="white", linewidth=0.5)
        ax.axvline(0, color=_INK, linewidth=1)
        ax.set(xlabel=xlabel, ylabel=ylabel)
        return _svg(figure)


def calibration_chart(groups: Sequence[Mapping[str, Any]], *, xlabel: str, ylabel: str) -> str:
    """Groups by `confidence` (x) and `accuracy` (y), with the diagonal on which both agree."""
    if not groups:
        return ""
    points = np.array([[group["confidence"], group["accuracy"]] for group in groups], dtype=float).T
    with matplotlib.rc_context(_STYLE):
        figure, (ax,) = _figure(1, height=2.6)
        ax.plot((0.5, 1), (0.5, 1), color=GREY, linewidth=1, linestyle="--", label="as sure as it is right")
        ax.plot(*points, color=BLUE, marker="o", markersize=4, label="groups of equally many pairs")
        ax.set(xlabel=xlabel, ylabel=ylabel, xlim=(0.49, 1.01))
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.3g}%"))
        _legend(ax)
        return _svg(figure)


def stacked_bars(
    x: Sequence[float], parts: Sequence[tuple[str, Sequence[float], str]], *, xlabel: str, ylabel: str
) -> str:
    """Parts of a sum (label, values, colour) at each x, on top of each other; missing values count as 0."""
    if not parts:
        return ""
    table = _thin(np.nan_to_num(np.array([x, *(values for _, values, _ in parts)], dtype=float)), _MOST_COLUMNS)
    with matplotlib.rc_context(_STYLE):
        figure, (ax,) = _figure(1, height=3.0)
        width = 0.85 * (table[0, -1] - table[0, 0]) / max(table.shape[1] - 1, 1) or 0.85
        below = np.zeros(table.shape[1])
        for (label, _, colour), heights in zip(parts, table[1:], strict=True):
            ax.bar(table[0], heights, width, bottom=below, color=colour, linewidth=0, label=_short(label))
            below += heights
        ax.set(xlabel=xlabel, ylabel=ylabel)
        ax.margins(x=0.01)
        ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        # In the order of the stack, which begins at the bottom.
        figure.legend(loc="outside right center", reverse=True, handlelength=1.0)
        return _svg(figure)


def shades(colour: str, count: int) -> list[str]:
    """`count` versions of a colour, from itself to pale."""
    mixes = [1 - 0.72 * i / max(count - 1, 1) for i in range(count)]
    red, green, blue = to_rgb(colour)
    return [to_hex((mix * red + 1 - mix, mix * green + 1 - mix, mix * blue + 1 - mix)) for mix in mixes]


def share_bars(rows: Sequence[tuple[str, Sequence[float]]], parts: Sequence[tuple[str, str]], *, unit: str) -> str:
    """Horizontal stacked bars, one row each, with the numbers inside; `parts` are (label, colour).

    Shares (`unit` "%") are given as fractions of 1, other units as they are.
    """
    if not rows:
        return ""
    with matplotlib.rc_context(_STYLE_WITHOUT_GRID):
        figure, (ax,) = _figure(1, height=0.75 + 0.36 * len(rows))
        left = np.zeros(len(rows))
        longest = max(sum(values) for _, values in rows)
        for j, (label, colour) in enumerate(parts):
            widths = np.array([values[j] for _, values in rows])
            ax.barh(range(len(rows)), widths, left=left, color=colour, height=0.66, label=label)
            for i, width in enumerate(widths):
                if width > 0.07 * longest:
                    text = f"{width:.0%}" if unit == "%" else f"{width:,.0f} {unit}"
                    ax.text(left[i] + width / 2, i, text, ha="center", va="center", color="white", fontsize=8)
            left += widths
        ax.set_yticks(range(len(rows)), [_short(name) for name, _ in rows])
        ax.invert_yaxis()
        ax.spines[["left", "bottom"]].set_visible(False)
        ax.set_xticks([])
        ax.margins(x=0)
        figure.legend(loc="outside upper left", ncols=6, borderaxespad=0.2, handlelength=1.3, columnspacing=1.2)
        return _svg(figure)


def _figure(panels: int, height: float | None = None) -> tuple[Figure, list[Axes]]:
    total = height or (_PANEL_HEIGHT * panels + 0.45)
    figure = Figure(figsize=(_WIDTH, total), layout="constrained")
    FigureCanvasSVG(figure)
    grid = figure.subplots(panels, 1, sharex=True, squeeze=False)
    return figure, list(grid[:, 0])


def _draw_line(ax: Axes, x: Sequence[float], line: Line, colour: str) -> None:
    spread = line.spread if line.spread is not None else [0.0] * len(line.values)
    table = np.array([x, line.values, spread], dtype=float)
    table = _thin(table[:, np.isfinite(table[:2]).all(axis=0)])
    marker = "o" if table.shape[1] <= 30 else None
    ax.plot(table[0], table[1], color=colour, marker=marker, markersize=3.2, label=_short(line.label))
    if line.spread is not None:
        half = np.nan_to_num(table[2])
        ax.fill_between(table[0], table[1] - half, table[1] + half, color=colour, alpha=0.15, linewidth=0)


def _finish_panel(ax: Axes, panel: Panel, *, legend: bool) -> None:
    ax.set_ylabel(panel.ylabel)
    if panel.percent:
        ax.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.3g}%"))
    if panel.from_zero:
        ax.set_ylim(bottom=0)
    if legend:
        _legend(ax)


def _legend(ax: Axes) -> None:
    """Above the axes, where it hides no data."""
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, borderaxespad=0.2, handlelength=1.3, columnspacing=1.2)


def _thin(table: np.ndarray, most: int = _MOST_POINTS) -> np.ndarray:
    """Means over blocks of neighbouring columns, so that a long run does not make a large file."""
    count = table.shape[1]
    if count <= most:
        return table
    blocks = np.array_split(np.arange(count), most)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a block of NaN only is NaN
        return np.stack([np.nanmean(table[:, block], axis=1) for block in blocks], axis=1)


def _histogram(histogram: Mapping[str, Any] | None) -> tuple[np.ndarray, np.ndarray]:
    """Edges and counts; empty where the histogram is missing or its lists do not fit each other."""
    if not isinstance(histogram, Mapping):
        return np.zeros(1), np.zeros(0)
    edges, counts = (np.array(histogram.get(key) or [], dtype=float) for key in ("edges", "counts"))
    fits = len(edges) == len(counts) + 1 and np.isfinite(edges).all() and np.isfinite(counts).all()
    return (edges, counts) if fits else (np.zeros(1), np.zeros(0))


def _rebin(edges: np.ndarray, counts: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Shares on a common grid, each old bin spread evenly over the new ones."""
    if edges[-1] <= edges[0]:
        return np.histogram(edges[:1], bins=grid)[0].astype(float)
    cumulative = np.concatenate([[0.0], np.cumsum(counts)]) / counts.sum()
    return np.diff(np.interp(grid, edges, cumulative))


def _short(label: str) -> str:
    """A label that leaves room for its plot; of a reward's long name the middle goes."""
    fits = len(label) <= _LABEL_START + 1 + _LABEL_END
    return label if fits else f"{label[:_LABEL_START]}…{label[-_LABEL_END:]}"


def _svg(figure: Figure) -> str:
    stream = io.StringIO()
    figure.align_ylabels()
    layout = figure.get_layout_engine()
    assert layout is not None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # the browser's font draws it
        layout.execute(figure)
        figure.set_layout_engine(None)  # else matplotlib draws twice, to lay out what is laid out
        figure.savefig(stream, format="svg", dpi=144, transparent=True, metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    # The page sets the width; ids of groups serve nothing and would repeat from picture to picture.
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    return re.sub(r"\n\s*", "\n", text)
