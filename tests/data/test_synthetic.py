"""The synthetic drive against independent geometry: planes, projections and boxes computed here from its files."""

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("embreex")

from simipu_hf.data.synthetic import Lidar, synthesize_drive, synthesize_frame, writer
from simipu_hf.data.synthetic.materials import appearance
from simipu_hf.data.synthetic.meshes import Material
from simipu_hf.errors import SimIPUError

TINY = {"image_size": (32, 106), "azimuth_steps": 120, "frames_per_drive": 3, "progress": False}


@pytest.fixture(scope="module")
def exact():
    """A few frames of different streets without range noise or lost returns."""
    lidar = Lidar(azimuth_steps=1000, range_noise=0.0, dropouts=False)
    return [
        synthesize_frame((1, 0, drive), step, image_size=(96, 320), lidar=lidar)
        for drive, step in ((0, 4), (1, 9), (2, 2))
    ]


@pytest.fixture(scope="module")
def drive(tmp_path_factory):
    """A small drive on disk: 6 train frames in 2 streets, 2 val, 1 test."""
    folder = tmp_path_factory.mktemp("synthetic") / "drive"
    fractions = {"val_fraction": 0.2, "test_fraction": 0.1}
    return synthesize_drive(folder, num_frames=9, seed=3, num_workers=1, **fractions, **TINY)


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def read_calib(path):
    rows = (line.split(":") for line in path.read_text(encoding="utf-8").splitlines())
    return {name: np.array(values.split(), float) for name, values in rows}


def project(frame):
    """u, v, depth of the frame's points by P2 @ R0_rect @ Tr_velo_to_cam."""
    c = frame.calibration
    camera = (frame.points[:, :3].astype(float) @ c.Tr_velo_to_cam[:, :3].T + c.Tr_velo_to_cam[:, 3]) @ c.R0_rect.T
    p = camera @ c.P2[:, :3].T + c.P2[:, 3]
    return p[:, 0] / p[:, 2], p[:, 1] / p[:, 2], p[:, 2], camera


def test_layout_is_kitti_object(drive):
    sets = {p.stem: p.read_text(encoding="utf-8").split() for p in (drive / "ImageSets").iterdir()}
    assert sets["train"] == [f"{i:06d}" for i in range(6)]
    assert sets["val"] == ["000006", "000007"]
    assert sets["trainval"] == sets["train"] + sets["val"]
    assert sets["test"] == ["000000"]
    for folder, names in (("training", sets["trainval"]), ("testing", sets["test"])):
        for kind, suffix in (("image_2", "png"), ("depth_2", "png"), ("velodyne", "bin"), ("calib", "txt")):
            assert sorted(p.name for p in (drive / folder / kind).iterdir()) == [f"{n}.{suffix}" for n in names]
    assert len(list((drive / "training" / "label_2").iterdir())) == 8
    assert not (drive / "testing" / "label_2").exists()


def test_files_of_a_frame_read_as_kitti(drive):
    root = drive / "training"
    image = Image.open(root / "image_2" / "000000.png")
    assert (image.mode, image.size) == ("RGB", (106, 32))
    depth = Image.open(root / "depth_2" / "000000.png")
    assert np.asarray(depth).dtype == np.uint16
    points = np.fromfile(root / "velodyne" / "000000.bin", "<f4").reshape(-1, 4)
    assert np.isfinite(points).all()
    assert points[:, 3].min() >= 0
    assert points[:, 3].max() < 1
    calib = read_calib(root / "calib" / "000000.txt")
    assert {k: v.size for k, v in calib.items()} == {
        "P0": 12, "P1": 12, "P2": 12, "P3": 12, "R0_rect": 9, "Tr_velo_to_cam": 12, "Tr_imu_to_velo": 12
    }  # fmt: skip
    rectification = calib["R0_rect"].reshape(3, 3)
    np.testing.assert_allclose(rectification @ rectification.T, np.eye(3), atol=1e-9)
    assert not np.allclose(rectification, np.eye(3), atol=1e-4)
    lidar_seen_from_camera = calib["Tr_velo_to_cam"].reshape(3, 4)[:, 3]
    np.testing.assert_allclose(lidar_seen_from_camera, [0, -0.08, -0.27], atol=0.03)
    for path in (root / "label_2").iterdir():
        for line in path.read_text(encoding="utf-8").splitlines():
            assert len(line.split()) == 15


def test_files_are_the_frame(drive):
    frame = synthesize_frame((3, 0, 1), 2, image_size=(32, 106), steps=3, lidar=Lidar(azimuth_steps=120))
    root = drive / "training"
    np.testing.assert_array_equal(np.asarray(Image.open(root / "image_2" / "000005.png")), frame.image)
    np.testing.assert_array_equal(np.fromfile(root / "velodyne" / "000005.bin", "<f4"), frame.points.ravel())
    depth = np.asarray(Image.open(root / "depth_2" / "000005.png")) / 256.0
    seen = frame.depth < 255
    np.testing.assert_allclose(depth[seen], frame.depth[seen], atol=1 / 512 + 1e-6)
    assert (depth[~seen] == 0).all()


def test_streets_change_between_drives_and_splits(drive):
    p2 = [read_calib(drive / "training" / "calib" / f"{i:06d}.txt")["P2"] for i in range(8)]
    p2.append(read_calib(drive / "testing" / "calib" / "000000.txt")["P2"])
    streets = [0, 0, 0, 1, 1, 1, 2, 2, 3]
    for i, a in enumerate(p2):
        for j, b in enumerate(p2):
            assert np.array_equal(a, b) == (streets[i] == streets[j])


def test_the_recording_car_moves(drive):
    pictures = [np.asarray(Image.open(drive / "training" / "image_2" / f"{i:06d}.png"), float) for i in range(3)]
    assert np.abs(pictures[0] - pictures[1]).mean() > 5
    assert np.abs(pictures[1] - pictures[2]).mean() > 5


def test_number_of_workers_makes_no_difference(tmp_path):
    one = synthesize_drive(tmp_path / "one", num_frames=8, seed=5, num_workers=1, **TINY)
    two = synthesize_drive(tmp_path / "two", num_frames=8, seed=5, num_workers=2, **TINY)
    assert files(one) == files(two)


def test_the_seed_makes_the_drive_and_later_frames_change_nothing(drive, tmp_path):
    same = files(synthesize_drive(tmp_path / "same", num_frames=3, seed=3, num_workers=1, val_fraction=0, **TINY))
    first = files(drive)
    for name in ("image_2/000001.png", "velodyne/000001.bin", "label_2/000001.txt", "depth_2/000001.png"):
        assert same[f"training/{name}"] == first[f"training/{name}"]
    other = files(synthesize_drive(tmp_path / "other", num_frames=2, seed=4, num_workers=1, val_fraction=0, **TINY))
    assert other["training/image_2/000001.png"] != first["training/image_2/000001.png"]
    assert other["training/velodyne/000001.bin"] != first["training/velodyne/000001.bin"]


def test_depth_of_the_road_is_that_of_its_plane(exact):
    """The rectified camera is level, 1.65 m above the road: y = 1.65 in its frame, whatever the image."""
    for frame in exact:
        height, width = frame.depth.shape
        v, u = np.mgrid[:height, :width].astype(float)
        P = frame.calibration.P2
        inverse = np.linalg.inv(P[:, :3])
        # X = depth * K^-1 [u v 1] - K^-1 p4, solved for X_y = 1.65
        ray_y = u * inverse[1, 0] + v * inverse[1, 1] + inverse[1, 2]
        plane = (1.65 + inverse[1] @ P[:, 3]) / np.where(ray_y > 1e-3, ray_y, np.nan)
        below = plane < 100
        assert (frame.depth[below] <= plane[below] * 1.0001).all(), "something is under the road"
        road = below & (np.abs(frame.depth - plane) < 1e-3 * plane)
        assert road[below].mean() > 0.2


def test_lidar_points_lie_on_the_dense_depth(exact):
    """Inverse depth of a plane is linear in the image: on planes the dense depth can be read between pixels."""
    for frame in exact:
        u, v, z, _ = project(frame)
        height, width = frame.depth.shape
        shown = (z > 1) & (u >= 0) & (v >= 0) & (u < width - 1) & (v < height - 1)
        u, v, z = u[shown], v[shown], z[shown]
        x, y = np.floor(u).astype(int), np.floor(v).astype(int)
        a, b = u - x, v - y
        inverse = 1 / frame.depth.astype(float)  # 0: sky
        corners = np.stack([inverse[y, x], inverse[y, x + 1], inverse[y + 1, x], inverse[y + 1, x + 1]])
        flat = np.abs(corners[0] + corners[3] - corners[1] - corners[2]) < 1e-5 * corners.max(axis=0)
        flat &= np.ptp(corners, axis=0) < 0.1 * corners.max(axis=0)
        weights = np.stack([(1 - a) * (1 - b), a * (1 - b), (1 - a) * b, a * b])
        read, z = 1 / (weights * corners).sum(axis=0)[flat], z[flat]
        assert flat.sum() > 500
        assert np.median(np.abs(read / z - 1)) < 1e-5
        # the rest is hidden from the camera, or thinner than a pixel
        assert (np.abs(read - z) > 2e-4 * z + 2e-3).mean() < 0.05


def test_boxes_contain_the_points_of_their_object(exact):
    checked = 0
    for frame in exact:
        _, _, _, camera = project(frame)
        for index, label in enumerate(frame.objects):
            own = camera[frame.point_object == index]
            if label.type == "DontCare" or len(own) < 5:
                continue
            height, width, length = label.dimensions
            cos, sin = np.cos(label.rotation_y), np.sin(label.rotation_y)
            x, y, z = (own - label.location).T
            along, across = cos * x - sin * z, sin * x + cos * z
            assert (np.abs(along) <= length / 2 + 0.01).all()
            assert (np.abs(across) <= width / 2 + 0.01).all()
            assert (-height - 0.01 <= y).all()
            assert (y <= 0.01).all()
            checked += 1
    assert checked >= 5


def test_image_boxes_contain_the_pixels_of_their_object(exact):
    for frame in exact:
        for index, label in enumerate(frame.objects):
            v, u = np.nonzero(frame.pixel_object == index)
            if len(u):
                left, top, right, bottom = label.bbox
                assert left - 0.01 <= u.min() <= u.max() <= right + 0.01
                assert top - 0.01 <= v.min() <= v.max() <= bottom + 0.01


def test_observation_angle_is_yaw_minus_bearing(exact):
    for frame in exact:
        for label in frame.objects:
            if label.type != "DontCare":
                bearing = np.arctan2(label.location[0], label.location[2])
                difference = label.alpha - (label.rotation_y - bearing)
                assert np.isclose(np.cos(difference), 1)


def test_noise_moves_points_along_their_rays_only():
    quiet, noisy = (
        synthesize_frame(
            (1, 0, 0), 4, image_size=(32, 106), lidar=Lidar(azimuth_steps=500, range_noise=s, dropouts=False)
        ).points
        for s in (0.0, 0.05)
    )
    ranges = [np.linalg.norm(points[:, :3], axis=1) for points in (quiet, noisy)]
    directions = [points[:, :3] / r[:, None] for points, r in zip((quiet, noisy), ranges, strict=True)]
    np.testing.assert_allclose(directions[0], directions[1], atol=1e-5)
    assert 0.045 < (ranges[1] - ranges[0]).std() < 0.055


def test_reflectance_tells_materials_apart():
    count = 200
    rng = np.random.default_rng(0)
    texture = rng.uniform(0, 50, (count, 2)).astype(np.float32)
    grey, footprint = np.full((count, 3), 0.3, np.float32), np.full(count, 0.02, np.float32)

    def mean(material):
        return appearance(np.full(count, material), texture, grey, footprint).reflectance.mean()

    assert mean(Material.TYRE) < mean(Material.ASPHALT) < mean(Material.LEAVES) < mean(Material.ROAD_PAINT)
    assert mean(Material.RETROREFLECTOR) > 0.9


def test_a_folder_in_use_is_refused(tmp_path):
    (tmp_path / "drive").mkdir()
    (tmp_path / "drive" / "mine.txt").write_text("keep", encoding="utf-8")
    with pytest.raises(SimIPUError, match="new or empty"):
        synthesize_drive(tmp_path / "drive", num_frames=1, **TINY)
    assert (tmp_path / "drive" / "mine.txt").read_text(encoding="utf-8") == "keep"


def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    written = []

    def fail_at_the_second(frame, folder, name):
        written.append(name)
        if len(written) == 2:
            raise OSError("No space left on device")

    monkeypatch.setattr(writer, "_write_frame", fail_at_the_second)
    with pytest.raises(OSError, match="No space left"):
        synthesize_drive(tmp_path / "drive", num_frames=3, num_workers=1, **TINY)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_frames": 0},
        {"val_fraction": 0.7, "test_fraction": 0.3},
        {"val_fraction": -0.1},
        {"image_size": (96,)},
        {"seed": -1},
        {"interval": 0.0},
    ],
)
def test_bad_arguments_are_named(tmp_path, wrong):
    with pytest.raises(SimIPUError, match=r"expected|must"):
        synthesize_drive(tmp_path / "drive", **{"num_frames": 2, **TINY, **wrong})
    assert not (tmp_path / "drive").exists()
