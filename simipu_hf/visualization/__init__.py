"""Pictures of the data, of what a model learnt, and of a run: static figures and an interactive 3-D page.

>>> visualize("pictures", model="RUN", data_dir="KITTI", split="val", frames=[0, 3])

The functions beneath it take arrays and return a matplotlib `Figure` (for the 3-D page HTML), for reports and
notebooks.
"""

from .figures import (
    draw_depth,
    draw_image_features,
    draw_matches,
    draw_points_on_image,
    draw_retrieval,
    draw_shared_features,
    draw_training_curves,
)
from .frames import draw_curves, visualize
from .objects import draw_objects
from .scene import scene_html
from .style import PictureFolder, save_figure

__all__ = [
    "PictureFolder",
    "draw_curves",
    "draw_depth",
    "draw_image_features",
    "draw_matches",
    "draw_objects",
    "draw_points_on_image",
    "draw_retrieval",
    "draw_shared_features",
    "draw_training_curves",
    "save_figure",
    "scene_html",
    "visualize",
]
