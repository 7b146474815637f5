"""Pictures of the data, of what a model learnt, and of a run: static figures and an interactive 3-D page.

`visualize` draws all of them for chosen frames. The functions beneath it take arrays and return a matplotlib `Figure`
(or, for the 3-D page, HTML), so that reports and notebooks can use each alone.
"""

from simipu_hf.data.rows import Frame

from .curves import draw_training_curves
from .figures import (
    draw_image_features,
    draw_matches,
    draw_points_on_image,
    draw_retrieval,
    draw_shared_features,
)
from .frames import visualize
from .scene import scene_html
from .style import save_figure

__all__ = [
    "Frame",
    "draw_image_features",
    "draw_matches",
    "draw_points_on_image",
    "draw_retrieval",
    "draw_shared_features",
    "draw_training_curves",
    "save_figure",
    "scene_html",
    "visualize",
]
