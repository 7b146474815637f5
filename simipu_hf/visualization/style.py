"""One look for all pictures: light text and coloured data on a dark ground, as in the 3-D page."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colorbar import Colorbar
from matplotlib.colors import Colormap, LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from simipu_hf.hub.files import written_aside

BACKGROUND = "#14171c"
PANEL = "#1c2027"
TEXT = "#e8eaed"
FAINT = "#8a919c"
GRID = "#343a44"
BLUE, ORANGE, RED = "#5aa9ff", "#ffb454", "#ff5d55"
MISSING = "#5b626d"  # points that have no value to colour them by

DEPTH_RANGE = (3.0, 80.0)  # metres; the same in every picture, so that colours can be compared
DEPTH_TICKS = (3, 5, 10, 20, 40, 80)


def depth_norm() -> LogNorm:
    """Logarithmic in metres: near and far are both told apart."""
    return LogNorm(*DEPTH_RANGE, clip=True)


def depth_colormap() -> Colormap:
    """Near red to far blue."""
    return _part_of("turbo_r", 0.08, 0.93)


def visible_colormap(name: str) -> Colormap:
    """A colour map of matplotlib without its darkest part, which a dark ground would hide."""
    return _part_of(name, 0.28, 1.0)


def _part_of(name: str, low: float, high: float) -> Colormap:
    return LinearSegmentedColormap.from_list(name, matplotlib.colormaps[name](np.linspace(low, high, 256)))


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches."""
    layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08)
    return Figure(figsize=(width, height), layout=layout, facecolor=BACKGROUND)


def style_axes(axes: Axes, title: str = "", xlabel: str = "", ylabel: str = "", grid: bool = False) -> Axes:
    """Colours, title and labels of one panel."""
    axes.set_facecolor(PANEL)
    axes.set_title(title, color=TEXT, fontsize=10, loc="left")
    axes.set_xlabel(xlabel, color=TEXT, fontsize=9)
    axes.set_ylabel(ylabel, color=TEXT, fontsize=9)
    axes.tick_params(colors=FAINT, labelsize=8)
    for spine in axes.spines.values():
        spine.set_color(GRID)
    if grid:
        axes.grid(color=GRID, linewidth=0.6)
        axes.set_axisbelow(True)
    return axes


def add_colorbar(
    figure: Figure, mappable: ScalarMappable, axes: Axes | Iterable[Axes], label: str, **kwargs: Any
) -> Colorbar:
    """A colour bar in the style of the panels."""
    bar = figure.colorbar(mappable, ax=axes, pad=0.01, **kwargs)
    bar.set_label(label, color=TEXT, fontsize=9)
    bar.ax.tick_params(colors=FAINT, labelsize=8)
    bar.outline.set_edgecolor(GRID)
    return bar


def add_legend(axes: Axes, **kwargs: Any) -> None:
    axes.legend(facecolor=PANEL, edgecolor=GRID, labelcolor=TEXT, fontsize=8, **kwargs)


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Writes a PNG, whole or not at all, in the place of an earlier one.

    Raises:
        SimIPUError: the file cannot be written.
    """
    with written_aside(path, overwrite=True) as aside:
        figure.savefig(aside, format="png", dpi=120)
    return Path(path)
