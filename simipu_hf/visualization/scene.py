"""The interactive 3-D page: one HTML file that needs no server and no network."""

import numpy as np
import plotly.graph_objects as go
from matplotlib.colors import Colormap, to_hex
from PIL import Image
from scipy.spatial import cKDTree

from simipu_hf.data.rows import Frame

from .features import FrameEmbeds
from .style import BACKGROUND, DEPTH_RANGE, DEPTH_TICKS, FAINT, MISSING, TEXT, depth_colormap, visible_colormap

FRUSTUM_DEPTH = 6.0  # metres
NEIGHBOUR_DISTANCE = 2.0  # metres; a point farther than this from every kept point shows no feature
# nothing may be requested; plotly needs the rest to draw
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval' blob:; style-src 'unsafe-inline'; "
    "img-src data: blob:; worker-src blob:"
)


def scene_html(frame: Frame, embeds: FrameEmbeds | None = None) -> str:
    """A page that shows the scan in 3-D, in colours to choose from, with the camera's frustum and its image.

    Args:
        frame: the frame, x forward, y left, z up; its points are drawn.
        embeds: where given, the points also show the colour of the nearest point kept by the model.

    Returns:
        HTML without any reference to another file.
    """
    modes = _color_modes(frame)
    if embeds is not None:
        modes["Features"] = _feature_mode(frame, embeds)
    x, y, z = frame.points[:, :3].T.astype(np.float32)
    figure, buttons = go.Figure(), []
    for name, marker in modes.items():
        style = {"mode": "markers", "marker": {"size": 1.5, **marker}, "hoverinfo": "none", "visible": name == "Depth"}
        figure.add_scatter3d(x=x, y=y, z=z, name=name, showlegend=False, **style)
        shown = [*(name == other for other in modes), True]
        buttons.append({"label": name, "method": "update", "args": [{"visible": shown}]})
    figure.add_trace(_frustum(frame))
    # plotly fills the chosen button with white
    menu = {"type": "buttons", "direction": "right", "x": 0, "y": 1, "yanchor": "top", "buttons": buttons}
    menu |= {"bgcolor": FAINT, "font": {"color": BACKGROUND}}
    axis = {"color": FAINT, "gridcolor": "#343a44", "showbackground": False, "ticksuffix": " m"}
    figure.update_layout(
        title={"text": frame.frame_id.replace("<", "&lt;"), "font": {"size": 14}},
        font={"color": TEXT},
        paper_bgcolor=BACKGROUND,
        margin={"l": 0, "r": 0, "t": 40, "b": 0},
        updatemenus=[menu],
        images=[_picture(frame.image)],
        scene={
            "aspectmode": "data",
            "camera": {"eye": {"x": -1.1, "y": 0.0, "z": 0.5}, "center": {"x": -0.2, "y": 0.0, "z": 0.0}},
            **{f"{name}axis": {**axis, "title": name} for name in "xyz"},
        },
    )
    page = figure.to_html(include_plotlyjs=True, config={"displaylogo": False})
    return page.replace("<head>", f'<head><meta http-equiv="Content-Security-Policy" content="{POLICY}">', 1)


def _color_modes(frame: Frame) -> dict[str, dict]:
    """Plotly's marker for each way to colour the points."""
    pixels, depth, inside = frame.view
    bar = {"title": "depth (m)", "tickvals": np.log(DEPTH_TICKS), "ticktext": [str(tick) for tick in DEPTH_TICKS]}
    shades = np.full((len(depth), 3), 91, dtype=np.uint8)
    columns, rows = np.floor(pixels[inside] + 0.5).astype(int).T
    shades[inside] = 255 * (frame.image[rows, columns] / 255) ** 0.7  # shadows would be lost on a dark ground
    return {
        "Depth": {
            "color": np.log(depth.clip(*DEPTH_RANGE)).astype(np.float32),
            "cmin": np.log(DEPTH_RANGE[0]),
            "cmax": np.log(DEPTH_RANGE[1]),
            **_scale(depth_colormap(), bar),
        },
        "Height": {"color": frame.points[:, 2], **_scale(visible_colormap("viridis"), {"title": "height z (m)"})},
        "Reflectance": {"color": frame.points[:, 3], **_scale(visible_colormap("inferno"), {"title": "reflectance"})},
        "Image": {"color": [f"#{r:02x}{g:02x}{b:02x}" for r, g, b in shades]},
    }


def _scale(colormap: Colormap, bar: dict) -> dict:
    stops = np.linspace(0, 1, 17)
    return {
        "colorscale": [[stop, to_hex(colormap(stop))] for stop in stops],
        "showscale": True,
        "colorbar": {"len": 0.5, "thickness": 12, **bar},
    }


def _feature_mode(frame: Frame, embeds: FrameEmbeds) -> dict:
    """The principal components of the nearest point feature; grey where none is near."""
    distance, nearest = cKDTree(embeds.coordinates).query(frame.points[:, :3])
    names = np.array([to_hex(color) for color in embeds.colors[1]])[nearest]
    return {"color": np.where(distance > NEIGHBOUR_DISTANCE, MISSING, names).tolist()}


def _frustum(frame: Frame) -> go.Scatter3d:
    """Lines from the camera's centre to the corners of its image some metres ahead, and around these."""
    height, width = frame.image.shape[:2]
    right, bottom = width - 0.5, height - 0.5
    corners = np.array([[-0.5, -0.5], [right, -0.5], [right, bottom], [-0.5, bottom]])
    center, (a, b, c, d) = frame.lift(corners[:1], 0.0)[0], frame.lift(corners, FRUSTUM_DEPTH)
    x, y, z = np.array([center, a, b, center, c, d, center, b, c, d, a]).T
    line = {"color": TEXT, "width": 3}
    return go.Scatter3d(x=x, y=y, z=z, mode="lines", line=line, hoverinfo="none", showlegend=False)


def _picture(image: np.ndarray) -> go.layout.Image:
    """The camera's image, small, in the lower left corner."""
    thumbnail = Image.fromarray(image)
    thumbnail.thumbnail((640, 640))
    place = {"xref": "paper", "yref": "paper", "x": 0, "y": 0, "xanchor": "left", "yanchor": "bottom"}
    return go.layout.Image(source=thumbnail, sizex=0.33, sizey=0.33, **place)
