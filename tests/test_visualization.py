"""Pictures: what is drawn where, against positions, colours and numbers worked out by hand."""

import base64
import io
import json
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from html_pages import References
from matplotlib.collections import PathCollection
from matplotlib.colors import LogNorm, to_hex
from matplotlib.patches import ConnectionPatch
from PIL import Image
from tiny_simipu import tiny_config

from simipu_hf.data.rows import Frame, dataset_from_rows, to_row
from simipu_hf.errors import SimIPUError
from simipu_hf.hub.export import write_timm
from simipu_hf.hub.sources import find_image_encoder
from simipu_hf.modeling.geometry import FeatureGrid, pixel_transform, project_points
from simipu_hf.modeling.image_encoder import timm_template
from simipu_hf.modeling.modeling_simipu import SimIPUForPreTraining
from simipu_hf.modeling.processing_simipu import SimIPUProcessor
from simipu_hf.visualization import frames
from simipu_hf.visualization.features import (
    FrameEmbeds,
    ViewMatches,
    cell_map,
    embed_frame,
    feature_colors,
    principal_directions,
)
from simipu_hf.visualization.figures import (
    draw_depth,
    draw_image_features,
    draw_matches,
    draw_points_on_image,
    draw_retrieval,
    draw_training_curves,
)
from simipu_hf.visualization.frames import _image_processor, aligned_frame, choose_points, load_model, visualize
from simipu_hf.visualization.scene import scene_html
from simipu_hf.visualization.style import RED

WIDTH, HEIGHT = 96, 32
PATCHES = FeatureGrid(stride_y=8.0, stride_x=8.0, offset_y=3.5, offset_x=3.5)
PROJECTION = np.array([[40.0, 0, 47.5, 0], [0, 40.0, 15.5, 0], [0, 0, 1, 0]])
# camera x right = -y, y down = -z, z forward = x of the LiDAR
LIDAR_TO_CAMERA = np.array([[0.0, -1, 0, 0], [0, 0, -1, 0], [1, 0, 0, 0], [0, 0, 0, 1]])


def make_frame(points: np.ndarray | None = None, name: str = "frame/1") -> Frame:
    rng = np.random.default_rng(0)
    if points is None:
        points = rng.uniform([5, -12, -2, 0], [40, 12, 1, 1], size=(700, 4))
    image = rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    return Frame(name, image, np.asarray(points, dtype=np.float32), PROJECTION @ LIDAR_TO_CAMERA)


def make_row(frame: Frame) -> dict:
    return to_row(frame.frame_id, frame.image, frame.points, PROJECTION, LIDAR_TO_CAMERA)


# --- projection ---


def test_points_project_to_the_pixels_of_a_pinhole_camera():
    # straight ahead; 1 m to the left and 2 m up at 10 m; behind; to the left of the image
    frame = make_frame([[20, 0, 0, 0], [10, 1, 0.2, 0], [-5, 0, 0, 0], [10, 15, 0, 0]])
    pixels, depth, inside = frame.view
    np.testing.assert_allclose(pixels[:2], [[47.5, 15.5], [47.5 - 4, 15.5 - 0.8]])
    np.testing.assert_allclose(depth, [20, 10, -5, 10])
    assert inside.tolist() == [True, True, False, False]
    np.testing.assert_allclose(frame.lift(pixels[1:2], 10.0), [[10, 1, 0.2]], atol=1e-6)


def test_points_are_drawn_where_they_project_far_ones_first():
    frame = make_frame()
    figure = draw_points_on_image(frame)
    dots = next(c for c in figure.axes[0].collections if isinstance(c, PathCollection))
    pixels, depth, inside = frame.view
    order = np.argsort(-depth[inside])
    np.testing.assert_allclose(dots.get_offsets(), pixels[inside][order])
    np.testing.assert_allclose(dots.get_array(), depth[inside][order])
    assert isinstance(dots.norm, LogNorm)
    assert figure.axes[1].get_ylabel() == "depth (m)"
    assert 0 < inside.sum() < 700
    assert f"{inside.sum()} of the row's 700 points" in figure.axes[0].get_title(loc="left")


def test_depth_maps_share_one_scale_and_leave_out_what_is_unknown():
    known = np.array([[0, 5.0], [80, 20]])
    figure = draw_depth("frame", np.zeros((2, 2, 3), np.uint8), {"target": known, "predicted": known + 1})
    image, target, predicted, hidden, _ = figure.axes
    assert target.images[0].get_array().mask.tolist() == [[True, False], [False, False]]
    assert target.images[0].norm.vmax == predicted.images[0].norm.vmax == 80
    assert not hidden.get_visible()
    titles = [axes.get_title(loc="left") for axes in (image, target, predicted)]
    assert titles == ["frame: image", "target", "predicted"]
    sparse = np.zeros((4, 6))
    sparse[1, 2], sparse[3, 5] = 7, 30
    (dots,) = draw_depth("frame", np.zeros((4, 6, 3), np.uint8), {"target": sparse}).axes[1].collections
    assert dots.get_offsets().tolist() == [[5, 3], [2, 1]]  # columns and rows, far ones first
    assert dots.get_array().tolist() == [30, 7]
    draw_depth("enc$^$", np.zeros((2, 2, 3), np.uint8), {"target": known}).savefig(io.BytesIO())


def test_points_of_any_lidar_are_drawn_ahead_of_the_camera():
    frame = make_frame()
    turned = np.array([[0.0, 1, 0, 5], [0, 0, 1, 1], [1, 0, 0, 2], [0, 0, 0, 1]])  # y right, z ahead, x down, shifted
    points = frame.points.copy()
    points[:, :3] = frame.points[:, :3] @ turned[:3, :3].T + turned[:3, 3]
    row = to_row("turned", frame.image, points, PROJECTION, LIDAR_TO_CAMERA @ np.linalg.inv(turned))
    aligned = aligned_frame(row)
    np.testing.assert_allclose(aligned.points, frame.points, atol=1e-4)  # its LiDAR has these axes already
    np.testing.assert_allclose(aligned.view[0], frame.view[0], atol=1e-3)


# --- features as colours ---


def test_principal_components_order_directions_by_variance():
    rng = np.random.default_rng(1)
    rows = np.zeros((500, 8))
    rows[:, [5, 2, 7]] = rng.uniform(-1, 1, (500, 3)) * (10, 3, 1)
    basis = principal_directions(rows)
    np.testing.assert_allclose(np.abs(basis[[5, 2, 7], [0, 1, 2]]), 1, atol=0.02)
    colors, shuffled = feature_colors(rows, basis, rows), rows[rng.permutation(500)]
    np.testing.assert_allclose(feature_colors(rows, principal_directions(shuffled), shuffled), colors, atol=1e-9)
    # another mean and scale of the same structure shows as the same colours along the same directions
    other = 3 * rows + 4
    np.testing.assert_allclose(feature_colors(other, basis, other), colors, atol=1e-9)


def test_features_of_one_color_do_not_show_rounding_noise():
    noise = np.random.default_rng(0).normal(size=(50, 8)) * 1e-9
    noise[:, 0] += np.linspace(0, 1, 50)
    colors = feature_colors(noise, principal_directions(noise), noise)
    assert np.ptp(colors[:, 1:], axis=0).max() == 0


def test_cells_lie_over_the_pixels_that_they_saw():
    frame = make_frame()
    # twice as large, 64 x 192, then padded to 96 x 224; stride 8
    resize = pixel_transform((0, 0, HEIGHT, WIDTH), (2 * HEIGHT, 2 * WIDTH), False, True)
    cells = cell_map(np.zeros((12, 28, 1)), PATCHES, resize, frame)
    np.testing.assert_allclose(cells.pixels[0, 0], 1.5)  # the mean of pixels 0 to 3
    np.testing.assert_allclose(cells.pixels[3, 10], [41.5, 13.5])
    assert cells.inside[:8, :24].all()
    assert cells.inside.sum() == 8 * 24
    assert cells.cell_size.tolist() == [4, 4]
    strided = cell_map(np.zeros((12, 28, 1)), FeatureGrid(8.0, 8.0, 0.0, 0.0), resize, frame)
    np.testing.assert_allclose(strided.pixels[0, 0], -0.25)  # a convolution of stride 8 sees around pixel 0
    shown = draw_image_features(frame, {"stage": strided}, photograph=False).axes[0].images[0]
    assert shown.get_extent() == pytest.approx((-6.25, 113.75, 49.75, -6.25))  # (-2.25, 109.75, ...), and a cell


def test_image_features_are_drawn_over_the_image_stage_by_stage():
    frame = make_frame()
    values = np.zeros((4, 12, 8))
    values[:, 6:] = 1
    stages = {"stage 2, stride 8": cell_map(values, PATCHES, np.eye(3), frame)}
    figure = draw_image_features(frame, stages)
    shown = figure.axes[1].images[0]
    assert tuple(shown.get_extent()) == (-8.5, 103.5, 39.5, -8.5)  # the image, and a cell beyond it
    assert len(np.unique(np.asarray(shown.get_array()).reshape(-1, 3), axis=0)) == 2
    assert "stage 2" in figure.axes[1].get_title(loc="left")
    (without,) = draw_image_features(frame, stages, photograph=False).axes
    assert [np.asarray(image.get_array()).tolist() for image in without.images] == [shown.get_array().tolist()]


# --- matches and retrieval ---


def test_matches_join_their_points_and_far_ones_are_red():
    rng = np.random.default_rng(0)
    view, augmented = rng.uniform(0, 30, (2, 8, 3))
    match = rng.permutation(8)
    distance = np.array([0.1, 0.2, 0.3, 1.9, 2.1, 5.0, np.inf, 0.4])
    figure = draw_matches("frame", ViewMatches(view, augmented, match, distance), 2.0)
    title = figure.get_suptitle()
    assert "7 matches" in title
    assert "28.6% beyond the limit of 2 m" in title
    lines = [artist for artist in figure.artists if isinstance(artist, ConnectionPatch)]
    ends = {(tuple(line.xy1), tuple(line.xy2)) for line in lines}
    assert ends == {(tuple(view[i, [1, 0]]), tuple(augmented[match[i], [1, 0]])) for i in range(8) if i != 6}
    assert sum(to_hex(line.get_edgecolor()) == RED for line in lines) == 2
    left, right = figure.axes[:2]
    assert left.get_xlim()[0] > left.get_xlim()[1]  # y grows to the left
    assert "(m)" in left.get_xlabel()
    assert "(m)" in right.get_ylabel()


def test_matches_without_a_limit_or_without_any_match():
    points = np.random.default_rng(0).uniform(0, 30, (2, 4, 3))
    assert "no limit" in draw_matches("frame", ViewMatches(*points, np.arange(4), np.ones(4)), None).get_suptitle()
    none = ViewMatches(*points, np.zeros(4, dtype=int), np.full(4, np.inf))
    assert "0 matches" in draw_matches("frame", none, 2.0).get_suptitle()


def test_retrieval_marks_the_true_pixel_and_the_most_similar_cell():
    frame = make_frame()
    point = np.array([10.0, 1.0, 0.2])  # at pixel (43.5, 14.7)
    values = np.zeros((4, 12, 1))
    values[2, 7] = 0.9  # centre: column 59.5, row 19.5
    cells = cell_map(values, PATCHES, np.eye(3), frame)
    cells = replace(cells, cell_size=np.array([8, 4]))  # an image that was stretched
    figure = draw_retrieval(frame, FrameEmbeds(cells, point[None], np.ones((1, 1))), [0])
    marks = {line.get_label(): line.get_xydata()[0] for line in figure.axes[0].lines}
    np.testing.assert_allclose(marks["where the point is"], [43.5, 14.7], atol=1e-5)
    np.testing.assert_allclose(marks["most similar cell"], [59.5, 19.5])
    said = "point 0, 10.0 m ahead: most similar cell 17 px off (2.3 cells)"  # (16, 4.8) pixels, (2, 1.2) cells
    assert said in figure.axes[0].get_title(loc="left")


def test_similarity_is_the_cosine_and_padding_is_never_the_best_cell():
    frame = make_frame()
    cells = np.random.default_rng(0).normal(size=(4, 16, 5))
    cells /= np.linalg.norm(cells, axis=-1, keepdims=True)
    placed = cell_map(cells, PATCHES, np.eye(3), frame)  # 32 columns of padding
    embeds = FrameEmbeds(placed, frame.points[:3, :3], np.array([cells[1, 3], cells[2, 14], cells[0, 0]]))
    found = embeds.similarities(0).values[..., 0]
    assert found[1, 3] == pytest.approx(1)
    assert found[2, 5] == pytest.approx(float(cells[2, 5] @ cells[1, 3]))
    figure = draw_retrieval(frame, embeds, [1])
    best = next(line for line in figure.axes[0].lines if line.get_label() == "most similar cell").get_xydata()[0]
    assert best[0] < WIDTH


# --- training curves ---


def test_curves_have_their_chance_level_dashed_and_skip_null():
    metrics = [
        {"step": 1, "loss": 15.0, "inter_modal_loss": 8.5, "inter_modal_chance": 8.3, "intra_modal_loss": 6.5},
        {"step": 2, "loss": None, "inter_modal_loss": None, "inter_modal_chance": 8.3, "intra_modal_loss": 6.0},
        {"step": 2, "eval/loss": 14.0, "eval/inter_modal_loss": 8.4, "eval/inter_modal_chance": 6.2},
        {"step": 3, "loss": 13.0, "inter_modal_loss": 8.0, "inter_modal_chance": 8.3, "intra_modal_loss": 5.5},
    ]
    figure = draw_training_curves(metrics)
    panels = {axes.get_title(loc="left"): {line.get_label(): line for line in axes.lines} for axes in figure.axes}
    assert list(panels) == ["inter-modal loss", "intra-modal loss"]
    inter = panels["inter-modal loss"]
    np.testing.assert_allclose(inter["training"].get_xydata(), [[1, 8.5], [3, 8.0]])
    np.testing.assert_allclose(inter["evaluation"].get_xydata(), [[2, 8.4]])
    assert inter["chance: ln(candidates)"].get_linestyle() == "--"
    np.testing.assert_allclose(inter["chance: ln(candidates)"].get_ydata(), 8.3)
    np.testing.assert_allclose(inter["chance in evaluation"].get_xydata(), [[2, 6.2]])
    assert list(panels["intra-modal loss"]) == ["training"]


def test_curves_of_a_run_with_one_loss_or_none():
    (axes,) = draw_training_curves([{"step": 10, "loss": 0.7}, {"step": 20, "loss": 0.5}]).axes
    assert axes.get_title(loc="left") == "loss"
    (only,) = draw_training_curves([{"step": 10, "loss": 0.7}]).axes[0].lines
    assert only.get_marker() == "o"  # a line of one point is not seen
    assert draw_training_curves([{"step": 1, "learning_rate": 0.1}]) is None
    assert draw_training_curves([]) is None


# --- the 3-D page ---


def traces(html: str) -> dict[str, dict]:
    """What plotly draws, by name, the frustum under `None`: typed arrays are decoded."""
    start = html.index("[", html.rindex("Plotly.newPlot("))
    data, _ = json.JSONDecoder().raw_decode(html[start:])

    def decode(value):
        if isinstance(value, dict) and "bdata" in value:
            return np.frombuffer(base64.b64decode(value["bdata"]), value["dtype"])
        return {name: decode(inner) for name, inner in value.items()} if isinstance(value, dict) else value

    return {trace.get("name"): decode(trace) for trace in data}


def xyz(trace: dict) -> np.ndarray:
    return np.stack([np.asarray(trace[axis], dtype=np.float64) for axis in "xyz"], axis=1)


def make_embeds(frame: Frame) -> FrameEmbeds:
    rng = np.random.default_rng(0)
    cells = cell_map(rng.normal(size=(4, 12, 6)), PATCHES, np.eye(3), frame)
    return FrameEmbeds(cells, frame.points[:20, :3], rng.normal(size=(20, 6)))


def test_page_holds_the_points_and_needs_nothing_else():
    frame = make_frame(name='<!--<script></script><script>alert("x")</script> & more')
    html = scene_html(frame, make_embeds(frame))
    assert References(html).fetched == []
    assert "default-src 'none'" in html.partition("<script")[0]
    assert "<script>alert" not in html
    drawn = traces(html)
    assert [name for name, trace in drawn.items() if trace.get("visible", True)] == ["Depth", None]
    for name in ("Depth", "Features"):
        np.testing.assert_array_equal(xyz(drawn[name]), frame.points[:, :3].astype(np.float64))


def test_page_colors_points_by_the_pixel_under_them_and_by_the_nearest_feature():
    frame = make_frame()
    embeds = make_embeds(frame)
    drawn = traces(scene_html(frame, embeds))
    assert list(drawn) == ["Depth", "Height", "Reflectance", "Image", "Features", None]
    pixels, depth, inside = frame.view
    np.testing.assert_allclose(np.exp(drawn["Depth"]["marker"]["color"]), depth.clip(3, 80), rtol=1e-6)
    columns, rows = np.round(pixels[inside]).astype(int).T
    shown = np.array(drawn["Image"]["marker"]["color"])
    expected = np.floor(255 * (frame.image[rows, columns] / 255) ** 0.7) / 255
    assert shown[inside].tolist() == [to_hex(color) for color in expected]
    assert len(set(shown[~inside])) == 1

    distance = np.linalg.norm(frame.points[:, None, :3] - embeds.coordinates[None], axis=-1)
    basis = principal_directions(embeds.cells.values.reshape(48, 6))
    colors = feature_colors(embeds.points, basis, embeds.points)
    expected = np.array([to_hex(color) for color in colors])[distance.argmin(1)]
    features = np.array(drawn["Features"]["marker"]["color"])
    near = distance.min(1) <= 2
    assert features[near].tolist() == expected[near].tolist()
    assert len(set(features[~near])) == 1
    assert "Features" not in traces(scene_html(frame))


def test_page_shows_the_frustum_that_the_camera_sees():
    frame = make_frame()
    line = xyz(traces(scene_html(frame))[None])
    corners = line[np.linalg.norm(line, axis=1) > 1e-3]  # here the camera stands where the LiDAR does
    assert len(corners) < len(line)
    pixels, depth, _ = frame.project(corners)
    expected = {(-0.5, -0.5), (95.5, -0.5), (95.5, 31.5), (-0.5, 31.5)}
    assert {tuple(pixel) for pixel in pixels.round(2).tolist()} == expected
    np.testing.assert_allclose(depth, 6.0, atol=1e-3)


# --- all of it ---


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    """What a short run leaves: model, processor, encoder, metrics."""
    folder = tmp_path_factory.mktemp("visualize") / "run"
    torch.manual_seed(0)
    config = tiny_config(image_config={"out_indices": [-2]})
    SimIPUForPreTraining(config).save_pretrained(folder)
    SimIPUProcessor.from_preset(image_size=(64, 192), num_points=256).save_pretrained(folder)
    write_timm(find_image_encoder(folder), folder / "image_encoder")
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n', encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    frames = [make_frame(name="drive/000"), make_frame(name="drive/001")]
    dataset_from_rows(map(make_row, frames), cache_dir=folder / "cache").save_to_disk(folder / "saved")
    return folder / "saved"


def test_visualize_writes_every_picture_of_a_run(run_folder, data, tmp_path):
    before = dict(matplotlib.rcParams)
    written = visualize(tmp_path / "new" / "pictures", run_folder, data_dir=data, frames=[1], device="cpu")
    assert dict(matplotlib.rcParams) == before
    kinds = ("points", "image_features", "matches", "shared_features", "retrieval")
    expected = [*(f"drive_001_{kind}.png" for kind in kinds), "drive_001_scene.html", "training_curves.png"]
    assert [path.name for path in written] == expected
    assert sorted(p.name for p in (tmp_path / "new" / "pictures").iterdir()) == sorted(expected)
    for path in written:
        if path.suffix == ".png":
            picture = Image.open(path).convert("RGB")
            assert picture.width > 500
            assert picture.getcolors(maxcolors=50) is None, "50 colours or fewer"
    assert "Features" in written[-2].read_text(encoding="utf-8")
    again = visualize(tmp_path / "new" / "pictures", data_dir=data, frames=[1])
    assert again == [written[0], written[5]]  # replaced


def test_an_image_encoder_of_no_run_and_no_size(run_folder, data, tmp_path, monkeypatch):
    sizes, encode = [], frames.encode_image

    def record(*given):
        sizes.append(given[1].output_size((32, 96)))
        return encode(*given)

    monkeypatch.setattr(frames, "encode_image", record)
    monkeypatch.chdir(run_folder)  # whose curves are not those of this encoder
    written = visualize(tmp_path, "random:test_resnet", dataset_name=str(data), device="cpu")
    assert "training_curves.png" not in [path.name for path in written]
    assert sizes == [(32, 96)]  # as small as the image is


def test_visualize_an_encoder_alone_and_data_alone(run_folder, data, tmp_path):
    encoder = visualize(tmp_path / "encoder", run_folder / "image_encoder", dataset_name=str(data), device="cpu")
    kinds = ["drive_000_points.png", "drive_000_image_features.png", "drive_000_scene.html"]
    assert [path.name for path in encoder if path.name != "training_curves.png"] == kinds
    assert _image_processor(timm_template("vit_small_patch14_dinov2"), (32, 96)).pad_size_divisor == 14
    alone = visualize(tmp_path / "data", dataset_name=str(data), frames=[0, 1, 1])  # one name twice
    names = ["drive_000_points.png", "drive_001_points.png", "drive_001_row1_points.png"]
    assert [path.name for path in alone if path.suffix == ".png"] == names


def test_visualize_names_what_is_wrong(run_folder, data, tmp_path):
    with pytest.raises(SimIPUError, match="rows 0 to 1, found 7"):
        visualize(tmp_path / "out", run_folder, data_dir=data, frames=[7])
    with pytest.raises(SimIPUError, match="nowhere"):
        visualize(tmp_path / "out", tmp_path / "nowhere", data_dir=data)
    assert not (tmp_path / "out").exists()


def test_embeddings_are_those_of_the_training_loss(run_folder):
    """At the pixel of a cell's centre, the dense map is what the model samples for a point that projects there."""
    model, processor = load_model(run_folder, "cpu")
    frame = make_frame()
    embeds = embed_frame(model, processor, make_row(frame), frame)
    row, column = 2, 5
    target = frame.lift(embeds.cells.pixels[row, column][None], 12.0)
    coordinates = torch.from_numpy(target).float()[None]

    batch = processor(
        images=frame.image, points=frame.points, camera_projection=PROJECTION, lidar_to_camera=LIDAR_TO_CAMERA
    )
    with torch.no_grad():
        maps = model.simipu.get_image_features(batch["pixel_values"])
        pixels, _ = project_points(coordinates, batch["lidar_to_pixel"])
        expected = torch.nn.functional.normalize(model.embed_pixels(maps, pixels, (64, 192))[0], dim=-1)
    np.testing.assert_allclose(embeds.cells.values[row, column], expected[0].numpy(), atol=2e-4)
    np.testing.assert_allclose(np.linalg.norm(embeds.points, axis=-1), 1, atol=1e-5)


def test_chosen_points_lie_in_the_image_near_to_far():
    frame = make_frame()
    chosen = choose_points(frame, frame.points[:, :3])
    _, depth, inside = frame.project(frame.points[chosen, :3])
    assert len(chosen) == 3
    assert inside.all()
    assert (np.diff(depth) > 0).all()
    with pytest.raises(SimIPUError, match="none of the points"):
        choose_points(frame, np.array([[-5.0, 0, 0]]))


def test_visualize_real_frames(kitti_mini, tmp_path):
    picture, page = visualize(tmp_path, data_dir=kitti_mini, dataset_config_name="object", split="val", frames=[2])
    assert picture.name.endswith("_points.png")
    assert len(xyz(traces(page.read_text(encoding="utf-8"))["Depth"])) > 10_000
