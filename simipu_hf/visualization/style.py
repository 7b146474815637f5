"""One look for all pictures: light text and coloured data on a dark ground, as in the 3-D page."""

import re
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure

from simipu_hf.files import atomic_path

BACKGROUND = "#14171c"
TEXT = "#e8eaed"
FAINT = "#8a919c"
BLUE, ORANGE, RED = "#5aa9ff", "#ffb454", "#ff5d55"
MISSING = "#5b626d"  # points that have no value to colour them by

# `@styled` before a function that draws: matplotlib's settings within it, untouched elsewhere
styled = matplotlib.rc_context(
    {
        "figure.facecolor": BACKGROUND,
        "figure.constrained_layout.use": True,
        "axes.facecolor": "#1c2027",
        "axes.edgecolor": "#343a44",
        "axes.labelcolor": TEXT,
        "axes.labelsize": 9,
        "axes.titlecolor": TEXT,
        "axes.titlelocation": "left",
        "axes.titlesize": 10,
        "axes.axisbelow": True,
        "grid.color": "#343a44",
        "text.color": TEXT,
        "text.parse_math": False,  # a frame may be called anything
        "legend.fontsize": 8,
        "xtick.color": FAINT,
        "ytick.color": FAINT,
        "xtick.labelsize": 8,
        "ytick.labelsize": 8,
        "figure.titlesize": 11,
    }
)

DEPTH_RANGE = (3.0, 80.0)  # metres; the same in every picture, so that colours can be compared
DEPTH_TICKS = (3, 5, 10, 20, 40, 80)


def depth_norm() -> LogNorm:
    """Logarithmic in metres: near and far are both told apart."""
    return LogNorm(*DEPTH_RANGE, clip=True)


def depth_colormap() -> Colormap:
    """Near red to far blue."""
    return visible_colormap("turbo_r", 0.08, 0.93)


def visible_colormap(name: str, low: float = 0.28, high: float = 1.0) -> Colormap:
    """A colour map of matplotlib without its darkest part, which a dark ground would hide."""
    return LinearSegmentedColormap.from_list(name, matplotlib.colormaps[name](np.linspace(low, high, 256)))


def add_depth_bar(figure: Figure, mappable: ScalarMappable, axes: Axes | list[Axes]) -> None:
    """The scale of depth in metres."""
    bar = figure.colorbar(mappable, ax=axes, pad=0.01, label="depth (m)", ticks=DEPTH_TICKS, extend="both", aspect=30)
    bar.ax.minorticks_off()
    bar.set_ticklabels([str(tick) for tick in DEPTH_TICKS])


class PictureFolder:
    """Pictures of the first `count` frames that are given, named by number and frame, in the place of earlier ones.

    Args:
        folder: `None` draws nothing.
    """

    def __init__(self, folder: Path | None, count: int = 8):
        self.folder, self.count, self.drawn = folder, count, 0

    def add(self, frame_id: str, draw: Callable[[], Figure]) -> None:
        """Save what `draw` returns, which is only called where there is room."""
        if self.folder is None or self.drawn == self.count:
            return
        figure = draw()
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.drawn == 0:
            for earlier in self.folder.glob("[0-9][0-9][0-9]_*.png"):
                earlier.unlink()
        name = re.sub(r"[^A-Za-z0-9]+", "_", frame_id)
        save_figure(figure, self.folder / f"{self.drawn:03d}_{name}.png")
        self.drawn += 1


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Writes a PNG atomically, in the place of an earlier one.

    Raises:
        SimIPUError: the file cannot be written.
    """
    with atomic_path(path) as beside:
        figure.savefig(beside, format="png", dpi=120, bbox_inches="tight")
    return Path(path)
