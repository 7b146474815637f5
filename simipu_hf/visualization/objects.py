"""Boxes of objects: in the image, and from above."""

from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from simipu_hf.data.kitti_objects import KittiObjects
from simipu_hf.modeling.geometry import box_corners, project_points

from .figures import WIDTH, panel_height, show_image
from .style import BLUE, FAINT, ORANGE, styled

ABOVE = 5.0  # inches
NEAREST = 0.1  # metres: what of a box is nearer is not drawn in the image
EDGES = ((0, 3), (1, 2), (2, 3), (4, 7), (5, 6), (6, 7), (2, 6), (3, 7), (0, 1), (4, 5), (0, 4), (1, 5))
CROSS = ((0, 5), (1, 4))  # on the front, which says where the object heads


@styled
def draw_objects(
    title: str,
    image: np.ndarray,
    camera_projection: np.ndarray,
    labels: KittiObjects,
    predictions: KittiObjects | None = None,
) -> Figure:
    """Labels and predictions as boxes in the image `(H, W, 3)`, and from above.

    Args:
        camera_projection: (3, 4), rectified camera frame to pixels.
        labels: in blue, with DontCare regions as dotted rectangles.
        predictions: in orange, with their scores.
    """
    picture = panel_height(image, WIDTH)
    figure = Figure(figsize=(WIDTH, picture + ABOVE))
    front, above = figure.subplots(2, 1, height_ratios=[picture, ABOVE])
    show_image(front, image, brightness=0.8)
    drawn = [(labels, BLUE, "labels")] + ([] if predictions is None else [(predictions, ORANGE, "predictions")])
    for objects, color, _ in drawn:
        _draw_boxes(front, above, objects[(objects.dimensions > 0).all(axis=1)], camera_projection, color)
    regions = labels.bbox[labels.type == "DontCare"][:, [0, 1, 2, 1, 2, 3, 0, 3, 0, 1]].reshape(-1, 5, 2)
    front.add_collection(LineCollection(list(regions), colors=FAINT, linestyles="dotted"))
    for axes, corner in ((front, "upper right"), (above, "upper left")):
        axes.legend([Line2D([], [], color=color) for _, color, _ in drawn], [name for *_, name in drawn], loc=corner)
    front.set(xticks=[], yticks=[], title=title)
    _style_above(above, [objects for objects, *_ in drawn])
    return figure


def _draw_boxes(front: Axes, above: Axes, objects: KittiObjects, projection: np.ndarray, color: str) -> None:
    boxes = np.c_[objects.location, objects.dimensions, objects.rotation_y]
    corners = box_corners(torch.from_numpy(boxes)).numpy()
    pixels, depth = project_points(corners, projection)
    ends = np.array([*EDGES, *CROSS])
    edges = pixels[:, ends][depth[:, ends].min(axis=-1) > NEAREST]
    front.add_collection(LineCollection(list(edges), colors=color, linewidths=1.1))
    # from above, with a line from the middle to the front
    ground = corners[:, :4, [2, 0]]
    heading = np.stack([ground.mean(axis=1), ground[:, :2].mean(axis=1)], axis=1)
    outlines = [*ground[:, [0, 1, 2, 3, 0]], *heading]
    above.add_collection(LineCollection(outlines, colors=color, linewidths=1.1))
    for index, score in enumerate(objects.score if objects.score is not None else ()):
        if depth[index].min() > NEAREST and (pixels[index].max(axis=0) > 0).all():
            u, v = np.maximum(pixels[index].min(axis=0), (0, 12))  # within the picture, above the lines
            front.text(u, v - 2, f"{score:.2f}", color=color, fontsize=7, clip_on=True, zorder=3)


def _style_above(axes: Axes, drawn: Sequence[KittiObjects]) -> None:
    places = np.concatenate([o.location[(o.dimensions > 0).all(axis=1)] for o in drawn])
    far = min(80.0, max(20.0, places[:, 2].max(initial=0) + 5))
    side = max(10.0, np.abs(places[places[:, 2] <= far, 0]).max(initial=0) + 4)
    axes.set(xlim=(0, far), ylim=(-side, side), xlabel="forward (m)", ylabel="to the right (m)", title="from above")
    axes.set_aspect("equal", adjustable="box")
    axes.invert_yaxis()  # right is below, as seen from above with the camera at the left
    axes.grid()
