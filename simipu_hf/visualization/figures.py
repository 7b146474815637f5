"""The static pictures: arrays in, a matplotlib `Figure` out."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection, PathCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.patches import ConnectionPatch

from simipu_hf.data.kitti_objects import KittiObjects
from simipu_hf.data.rows import Frame
from simipu_hf.modeling.geometry import box_corners, project_points

from .features import CellMap, FrameEmbeds, ViewMatches, feature_colors, principal_directions
from .style import BLUE, FAINT, ORANGE, RED, add_depth_bar, depth_colormap, depth_norm, styled, visible_colormap

WIDTH, NARROW, ABOVE = 12.5, 9.4, 5.0  # inches; the last is the height of a view from above
MATCHES_DRAWN = 100  # at random but always the same
SPARSE = 0.5  # a depth map that knows fewer of its pixels is drawn as points
NEAREST = 0.1  # metres: what of a box is nearer is not drawn in the image
EDGES = ((0, 3), (1, 2), (2, 3), (4, 7), (5, 6), (6, 7), (2, 6), (3, 7), (0, 1), (4, 5), (0, 4), (1, 5))
CROSS = ((0, 5), (1, 4))  # on the front, which says where the object heads
PIXELS = {"xlabel": "column (px)", "ylabel": "row (px)"}


@styled
def draw_points_on_image(frame: Frame) -> Figure:
    """The scan over the image, coloured by depth in metres on a logarithmic scale."""
    pixels, depth, inside = frame.view
    figure = Figure(figsize=(WIDTH, _panel_height(frame.image, WIDTH, colorbar=True)))
    axes = figure.subplots()
    _show_image(axes, frame.image, brightness=0.6)
    dots = _scatter_depth(axes, pixels[inside], depth[inside], size=2.5)
    add_depth_bar(figure, dots, axes)
    nearest = f", {depth[inside].min():.1f} to {depth[inside].max():.1f} m" if inside.any() else ""
    title = f"{frame.frame_id}: {inside.sum():,} of the row's {len(depth):,} points in the image{nearest}"
    axes.set(title=title, **PIXELS)
    return figure


@styled
def draw_depth(frame_id: str, image: np.ndarray, maps: Mapping[str, np.ndarray]) -> Figure:
    """The image `(H, W, 3)` and depth maps `(h, w)` of it by title, all on one scale in metres; 0 shows nothing."""
    height, width = image.shape[:2]
    rows = (len(maps) + 2) // 2
    figure = Figure(figsize=(WIDTH, rows * (5.75 * height / width + 0.3) + 0.3))  # a panel is about 5.75 inches wide
    panels = list(figure.subplots(rows, 2).flat)
    panels[0].imshow(image, extent=(0, width, height, 0))
    panels[0].set_title(f"{frame_id}: image")
    for axes, (title, depth) in zip(panels[1:], maps.items(), strict=False):
        known = depth > 0
        if known.mean() < SPARSE:  # single pixels would be lost between those of the picture
            size = max(1.5, (414 / depth.shape[1]) ** 2)  # a pixel of a panel that is 414 points wide
            drawn = _scatter_depth(axes, np.argwhere(known)[:, ::-1], depth[known], size)
            _stay_within(axes, depth)
        else:
            shown = np.ma.masked_array(depth, ~known)
            drawn = axes.imshow(shown, cmap=depth_colormap(), norm=depth_norm(), interpolation="nearest")
        axes.set_title(title)
    for axes in panels:
        axes.set(xticks=[], yticks=[])
    for axes in panels[len(maps) + 1 :]:
        axes.set_visible(False)
    add_depth_bar(figure, drawn, panels)
    return figure


@styled
def draw_matches(frame_id: str, matches: ViewMatches, max_match_distance: float | None) -> Figure:
    """Two views from above, and some of their matches as lines coloured by distance.

    Args:
        max_match_distance: the model's limit in metres, beyond which lines are red; `None`: it has none.
    """
    matched = np.flatnonzero(np.isfinite(matches.distance))
    distance = matches.distance[matched]
    colors = visible_colormap("viridis")
    if max_match_distance is None:
        norm = Normalize(0, np.percentile(distance, 95) if len(distance) else 1)
        beyond = "no limit on their distance"
    else:
        colors = colors.with_extremes(over=RED)
        norm = Normalize(0, max_match_distance)
        share = (distance > max_match_distance).mean() if len(distance) else 0
        beyond = f"{share:.1%} beyond the limit of {max_match_distance:g} m"
    mean = f"mean distance {distance.mean():.2f} m, " if len(distance) else ""

    figure = Figure(figsize=(WIDTH, 6.4))
    panels = figure.subplots(1, 2)
    for axes, points, name in zip(
        panels, (matches.view, matches.augmented), ("un-augmented view", "augmented view"), strict=True
    ):
        axes.scatter(points[:, 1], points[:, 0], s=3, color=FAINT, linewidths=0)
        _style_from_above(axes, f"{name}, from above: the {len(points):,} points kept")
    panels[1].yaxis.tick_right()  # away from the lines between the panels
    panels[1].yaxis.set_label_position("right")
    drawn = np.random.default_rng(0).permutation(matched)[:MATCHES_DRAWN]
    drawn = drawn[np.argsort(matches.distance[drawn])]
    shades = colors(norm(matches.distance[drawn]))
    ends = [points[:, [1, 0]] for points in (matches.view[drawn], matches.augmented[matches.match[drawn]])]
    for axes, places in zip(panels, ends, strict=True):
        axes.scatter(*places.T, s=12, c=shades, linewidths=0)
    left, right = panels
    for start, end, shade in zip(*(points.tolist() for points in ends), shades, strict=True):
        line = ConnectionPatch(start, end, "data", "data", axesA=left, axesB=right, color=shade, alpha=0.8, lw=0.8)
        figure.add_artist(line)
    label = "distance of the matched points (m)"
    figure.colorbar(ScalarMappable(norm, colors), ax=panels, pad=0.01, label=label, extend="max", aspect=40)
    figure.suptitle(f"{frame_id}: {len(matched):,} matches, {mean}{beyond} ({len(drawn)} drawn)")
    return figure


@styled
def draw_shared_features(frame: Frame, embeds: FrameEmbeds) -> Figure:
    """Image and points in the space in which the model compares them, as colours."""
    cell_colors, point_colors = embeds.colors
    pixels, depth, inside = frame.project(embeds.coordinates)
    figure = Figure(figsize=(WIDTH, max(2 * _panel_height(frame.image, WIDTH * 0.68) + 0.3, 4.5)))
    panels = figure.subplot_mosaic([["image", "above"], ["points", "above"]], width_ratios=[2.15, 1])

    _show_image(panels["image"], frame.image, brightness=0.45)
    _show_cells(panels["image"], embeds.cells, cell_colors, frame, alpha=0.8)
    panels["image"].set(title=f"{frame.frame_id}: image features", **PIXELS)

    _show_image(panels["points"], frame.image, brightness=0.3)
    order = np.flatnonzero(inside)[np.argsort(-depth[inside])]
    x, y = pixels[order].T
    panels["points"].scatter(x, y, c=point_colors[order], s=14, linewidths=0)
    panels["points"].set(title="point features, where the points project", **PIXELS)

    panels["above"].scatter(embeds.coordinates[:, 1], embeds.coordinates[:, 0], c=point_colors, s=6, linewidths=0)
    _style_from_above(panels["above"], "point features, from above")
    figure.suptitle("Features after the projection heads, along the three principal components of the image features")
    return figure


@styled
def draw_image_features(frame: Frame, stages: Mapping[str, CellMap], photograph: bool = True) -> Figure:
    """The image, and under it each stage's features as colours: their first three principal components.

    Args:
        stages: name -> feature map; each stage has its own components.
        photograph: false leaves the image itself out.
    """
    count = len(stages) + photograph
    figure = Figure(figsize=(NARROW, count * _panel_height(frame.image, NARROW)))
    panels = list(figure.subplots(count, 1, squeeze=False)[:, 0])
    if photograph:
        axes = panels.pop(0)
        _show_image(axes, frame.image)
        axes.set(title=frame.frame_id, **PIXELS)
    for axes, (name, cells) in zip(panels, stages.items(), strict=True):
        rows = cells.values[cells.inside]
        _show_cells(axes, cells, feature_colors(cells.values, principal_directions(rows), rows), frame)
        axes.set(title=f"image encoder, {name}: first three principal components", **PIXELS)
    return figure


@styled
def draw_retrieval(frame: Frame, embeds: FrameEmbeds, chosen: Sequence[int]) -> Figure:
    """For each of the `chosen` points of `embeds`, how similar every cell of the image is to it."""
    figure = Figure(figsize=(NARROW, len(chosen) * _panel_height(frame.image, NARROW, colorbar=True) + 0.3))
    figure.suptitle(f"{frame.frame_id}: where the image features resemble a point's")
    pixels, depth, _ = frame.project(embeds.coordinates[chosen])
    heat = visible_colormap("inferno")
    for row, axes in enumerate(figure.subplots(len(chosen), 1, squeeze=False)[:, 0]):
        cells = embeds.similarities(chosen[row])
        values = np.where(cells.inside, cells.values[..., 0], np.nan)
        best = cells.pixels[np.unravel_index(np.nanargmax(values), values.shape)]
        _show_image(axes, frame.image.mean(-1, keepdims=True).repeat(3, -1), brightness=0.6)
        shown = _show_cells(axes, cells, values, frame, alpha=0.7, cmap=heat)
        axes.plot(*best, "s", mfc="none", mec="white", ms=9, mew=1.6, label="most similar cell", zorder=3)
        axes.plot(*pixels[row], "+", color="#4dffea", ms=15, mew=2.2, label="where the point is", zorder=3)
        figure.colorbar(shown, ax=axes, pad=0.01, label="cosine similarity", aspect=15)
        off = best - pixels[row]
        distances = np.linalg.norm(off), np.linalg.norm(off / cells.cell_size)
        where = "most similar cell {:.0f} px off ({:.1f} cells)".format(*distances)
        axes.set(title=f"point {chosen[row]}, {depth[row]:.1f} m ahead: {where}", **PIXELS)
        if row == 0:
            axes.legend(loc="upper right", ncols=2)
    return figure


@styled
def draw_training_curves(metrics: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Losses over optimizer steps, each with its chance level, and the evaluation's values and chance levels.

    Args:
        metrics: lines of a `metrics.jsonl`: `step`, and values under names such as `inter_modal_loss`,
            `inter_modal_chance` and `eval/inter_modal_loss`.

    Returns:
        One panel per loss; the total, which has no chance level of its own, only where there is no other. `None`
        where no loss was logged.
    """
    logged = dict.fromkeys(name.removeprefix("eval/") for line in metrics for name in line if name.endswith("loss"))
    names = [name for name in logged if name != "loss"] or list(logged)
    if not names:
        return None
    figure = Figure(figsize=(5.2 * len(names), 3.4))
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        title = name.replace("_modal", "-modal").replace("_", " ")
        axes.set(title=title, xlabel="optimizer step", ylabel="nats" if name.endswith("modal_loss") else "loss")
        axes.grid()
        _plot(axes, metrics, name, "training", color=BLUE, linewidth=1.6)
        _plot(axes, metrics, f"eval/{name}", "evaluation", color=ORANGE, marker="o", markersize=3.5)
        chance = name.removesuffix("loss") + "chance"
        _plot(axes, metrics, chance, "chance: ln(candidates)", color=FAINT, linestyle="--")
        # another one where the evaluation's batches have another size
        _plot(axes, metrics, f"eval/{chance}", "chance in evaluation", color=ORANGE, linestyle=":")
        axes.legend()
    return figure


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
    picture = _panel_height(image, WIDTH)
    figure = Figure(figsize=(WIDTH, picture + ABOVE))
    front, above = figure.subplots(2, 1, height_ratios=[picture, ABOVE])
    _show_image(front, image, brightness=0.8)
    drawn = [(labels, BLUE, "labels")] + ([] if predictions is None else [(predictions, ORANGE, "predictions")])
    for objects, color, _ in drawn:
        _draw_boxes(front, above, objects[(objects.dimensions > 0).all(axis=1)], camera_projection, color)
    regions = labels.bbox[labels.type == "DontCare"][:, [0, 1, 2, 1, 2, 3, 0, 3, 0, 1]].reshape(-1, 5, 2)
    front.add_collection(LineCollection(list(regions), colors=FAINT, linestyles="dotted"))
    for axes, corner in ((front, "upper right"), (above, "upper left")):
        axes.legend([Line2D([], [], color=color) for _, color, _ in drawn], [name for *_, name in drawn], loc=corner)
    front.set(xticks=[], yticks=[], title=title)
    _style_boxes_from_above(above, [objects for objects, *_ in drawn])
    return figure


def _plot(axes: Axes, metrics: Sequence[Mapping[str, Any]], name: str, label: str, **style: Any) -> None:
    # a value that was not finite is written as null
    values = [(line["step"], line[name]) for line in metrics if line.get(name) is not None]
    if values:
        if len(values) == 1:  # a line of one point is not drawn
            style = {"marker": "o", "markersize": 3.5} | style
        axes.plot(*zip(*values, strict=True), label=label, **style)


def _scatter_depth(axes: Axes, pixels: np.ndarray, depth: np.ndarray, size: float) -> PathCollection:
    """Points `(N, 2)` coloured by depth `(N,)`, near ones over far ones."""
    order = np.argsort(-depth)
    x, y = pixels[order].T
    return axes.scatter(x, y, c=depth[order], cmap=depth_colormap(), norm=depth_norm(), s=size, linewidths=0)


def _panel_height(image: np.ndarray, width: float, colorbar: bool = False) -> float:
    """Inches, labels and title included, of a panel with the image that is `width` inches wide."""
    height, columns = image.shape[:2]
    return (width - (1.9 if colorbar else 0.9)) * height / columns + 0.85


def _show_image(axes: Axes, image: np.ndarray, brightness: float = 1.0) -> None:
    axes.imshow((image * brightness).astype(np.uint8), interpolation="antialiased", zorder=0)
    _stay_within(axes, image)


def _show_cells(axes: Axes, cells: CellMap, values: np.ndarray, frame: Frame, **style: Any) -> AxesImage:
    """Values `(h, w)` or colours `(h, w, 3)` of cells; beyond the outermost cells the nearest one counts."""
    reach = 1.5 * cells.cell_size  # from the centre of an outermost cell over it and one more
    (left, top), (right, bottom) = cells.pixels[0, 0] - reach, cells.pixels[-1, -1] + reach
    bordered = np.pad(values, ((1, 1), (1, 1), (0, 0))[: values.ndim], "edge")
    shown = axes.imshow(bordered, extent=(left, right, bottom, top), interpolation="nearest", zorder=1, **style)
    _stay_within(axes, frame.image)
    return shown


def _stay_within(axes: Axes, image: np.ndarray) -> None:
    """Padding, and what else lies outside the image, isn't shown."""
    height, width = image.shape[:2]
    axes.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5), aspect="equal")


def _style_from_above(axes: Axes, title: str) -> None:
    axes.set(title=title, xlabel="y, to the left (m)", ylabel="x, forward (m)")
    axes.grid()
    axes.set_aspect("equal", adjustable="datalim")
    axes.invert_xaxis()  # left is left


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


def _style_boxes_from_above(axes: Axes, drawn: Sequence[KittiObjects]) -> None:
    places = np.concatenate([o.location[(o.dimensions > 0).all(axis=1)] for o in drawn])
    far = min(80.0, max(20.0, places[:, 2].max(initial=0) + 5))
    side = max(10.0, np.abs(places[places[:, 2] <= far, 0]).max(initial=0) + 4)
    axes.set(xlim=(0, far), ylim=(-side, side), xlabel="forward (m)", ylabel="to the right (m)", title="from above")
    axes.set_aspect("equal", adjustable="box")
    axes.invert_yaxis()  # right is below, as seen from above with the camera at the left
    axes.grid()
