"""The interactive 3-D page: one HTML file that needs no server and no network."""

import base64
import json
from importlib import resources
from io import BytesIO
from typing import Any

import numpy as np
from matplotlib.colors import Colormap, to_hex, to_rgb
from PIL import Image
from scipy.spatial import cKDTree

from simipu_hf.data.rows import Frame

from .features import FrameEmbeds, Principal
from .style import DEPTH_RANGE, DEPTH_TICKS, MISSING, depth_colormap, depth_norm, visible_colormap

FRUSTUM_DEPTH = 6.0  # metres
NEIGHBOUR_DISTANCE = 2.0  # metres; a point farther than this from every kept point shows no feature
PLACEHOLDER = "__SCENE__"


def scene_html(frame: Frame, embeds: FrameEmbeds | None = None, colors: Principal | None = None) -> str:
    """A page that shows the scan in 3-D, in colours to choose from, with the camera's frustum.

    Args:
        frame: the frame; all its points are embedded.
        embeds, colors: where given, the points also show the colour of the nearest point kept by the model.

    Returns:
        HTML without any reference to another file. Its element `#scene` holds the data as JSON: `count`, `in_image`
        (points that the image shows come first), `positions` (base64 of little-endian float32 x y z, metres), and
        per mode its `colors` (base64 of uint8 r g b) and legend.
    """
    pixels, depth, inside = frame.view
    order = np.argsort(~inside, kind="stable")
    points = frame.points[order]
    modes = [
        _depth_mode(depth[order]),
        _scalar_mode("Height", "height z (m)", points[:, 2], visible_colormap("viridis")),
        _scalar_mode("Reflectance", "reflectance", points[:, 3], visible_colormap("inferno")),
        _image_mode(frame, pixels[order], inside[order]),
    ]
    if embeds is not None and colors is not None:
        modes.append(_feature_mode(points[:, :3], embeds, colors))
    visible = points[: inside.sum(), 2] if inside.any() else points[:, 2]
    scene = {
        "title": frame.frame_id,
        "count": len(points),
        "in_image": int(inside.sum()),
        "positions": _encode(points[:, :3].astype("<f4")),
        "modes": modes,
        "ground": float(np.percentile(visible, 2)),
        "frustum": _frustum(frame).round(4).tolist(),
        "image": _thumbnail(frame.image),
    }
    text = json.dumps(scene).replace("<", "\\u003c")  # a tag in it could end the element that holds the data
    template = resources.files(__package__).joinpath("scene.html").read_text(encoding="utf-8")
    return template.replace(PLACEHOLDER, text)


def _depth_mode(depth: np.ndarray) -> dict[str, Any]:
    norm, colormap = depth_norm(), depth_colormap()
    colors = colormap(norm(np.maximum(depth, DEPTH_RANGE[0])))[:, :3]
    colors[depth <= 0] = to_rgb(MISSING)
    ticks = [[float(norm(tick)), str(tick)] for tick in DEPTH_TICKS]
    return _mode("Depth", "depth (m); grey: behind the camera", colors, colormap, ticks)


def _scalar_mode(name: str, label: str, values: np.ndarray, colormap: Colormap) -> dict[str, Any]:
    low, high = (float(value) for value in np.percentile(values, (1, 99)))
    scaled = (values - low) / (high - low) if high > low else np.full(len(values), 0.5)
    digits = 1 if high - low > 2 else 2
    ticks = [[share, f"{low + share * (high - low):.{digits}f}"] for share in (0.0, 0.25, 0.5, 0.75, 1.0)]
    return _mode(name, label, colormap(scaled.clip(0, 1))[:, :3], colormap, ticks)


def _image_mode(frame: Frame, pixels: np.ndarray, inside: np.ndarray) -> dict[str, Any]:
    colors = np.tile(to_rgb(MISSING), (len(pixels), 1))
    columns, rows = np.floor(pixels[inside] + 0.5).astype(int).T
    colors[inside] = (frame.image[rows, columns] / 255) ** 0.7  # shadows would be lost on a dark ground
    return _mode("Image", "colour in the image, brightened; grey: not in it", colors)


def _feature_mode(coordinates: np.ndarray, embeds: FrameEmbeds, principal: Principal) -> dict[str, Any]:
    distance, nearest = cKDTree(embeds.coordinates).query(coordinates)
    colors = principal.adapted(embeds.points).colors(embeds.points)[nearest]
    colors[distance > NEIGHBOUR_DISTANCE] = to_rgb(MISSING)
    label = (
        f"principal components of the nearest of {len(embeds.points)} point features; "
        f"grey: none within {NEIGHBOUR_DISTANCE:g} m"
    )
    return _mode("Features", label, colors)


def _mode(
    name: str, label: str, colors: np.ndarray, colormap: Colormap | None = None, ticks: list[list[Any]] | None = None
) -> dict[str, Any]:
    """One way to colour the points; `ticks` are (share of the legend's width, text)."""
    stops = [] if colormap is None else [to_hex(colormap(share)) for share in np.linspace(0, 1, 17)]
    encoded = _encode((colors * 255).round().astype(np.uint8))
    return {"name": name, "label": label, "colors": encoded, "stops": stops, "ticks": ticks or []}


def _frustum(frame: Frame) -> np.ndarray:
    """The camera's centre and the four corners of its image some metres ahead, `(5, 3)`, in the LiDAR frame."""
    height, width = frame.image.shape[:2]
    right, bottom = width - 0.5, height - 0.5
    corners = np.array([[-0.5, -0.5], [right, -0.5], [right, bottom], [-0.5, bottom]])
    return np.concatenate([frame.lift(corners[:1], 0.0), frame.lift(corners, FRUSTUM_DEPTH)])


def _thumbnail(image: np.ndarray, width: int = 640) -> str:
    picture = Image.fromarray(image)
    picture.thumbnail((width, width))
    stream = BytesIO()
    picture.save(stream, format="JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode("ascii")


def _encode(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode("ascii")
