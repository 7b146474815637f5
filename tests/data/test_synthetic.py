"""The synthetic drive against independent geometry: planes, rays, projections and boxes computed here."""

import numpy as np
import pytest
from PIL import Image

from simipu_hf.data.synthetic import Lidar, rays, synthesize_drive, synthesize_frame
from simipu_hf.data.synthetic.appearance import Material, appearance
from simipu_hf.errors import SimIPUError

TINY = {"image_size": (32, 106), "azimuth_steps": 120}


@pytest.fixture(scope="module")
def exact():
    """A few frames without range noise or lost returns."""
    lidar = Lidar(azimuth_steps=1000, range_noise=0.0, dropouts=False)
    return [synthesize_frame(1, index, image_size=(96, 320), lidar=lidar) for index in range(3)]


@pytest.fixture(scope="module")
def drive(tmp_path_factory):
    """A small drive on disk: 3 train frames, 1 val, 1 test."""
    return synthesize_drive(
        tmp_path_factory.mktemp("synthetic") / "drive", num_frames=5, seed=3, num_workers=1, **TINY
    )


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def project(frame):
    """u, v, depth of the frame's points by P2 @ R0_rect @ Tr_velo_to_cam, and the points in the camera's frame."""
    c = frame.calibration
    camera = (frame.points[:, :3].astype(float) @ c.Tr_velo_to_cam[:, :3].T + c.Tr_velo_to_cam[:, 3]) @ c.R0_rect.T
    p = camera @ c.P2[:, :3].T + c.P2[:, 3]
    return p[:, 0] / p[:, 2], p[:, 1] / p[:, 2], p[:, 2], camera


def test_layout_is_kitti_object(drive):
    sets = {p.stem: p.read_text(encoding="utf-8").split() for p in (drive / "ImageSets").iterdir()}
    assert sets["train"] == [f"{i:06d}" for i in range(3)]
    assert sets["val"] == ["000003"]
    assert sets["trainval"] == sets["train"] + sets["val"]
    assert sets["test"] == ["000000"]
    for folder, names in (("training", sets["trainval"]), ("testing", sets["test"])):
        for kind, suffix in (("image_2", "png"), ("depth_2", "png"), ("velodyne", "bin"), ("calib", "txt")):
            assert sorted(p.name for p in (drive / folder / kind).iterdir()) == [f"{n}.{suffix}" for n in names]
    labels = [line.split() for p in (drive / "training" / "label_2").iterdir() for line in p.open(encoding="utf-8")]
    assert len(labels) > 10
    assert {len(fields) for fields in labels} == {15}
    assert not (drive / "testing" / "label_2").exists()


def test_files_are_the_frame(drive):
    frame = synthesize_frame(3, 2, image_size=(32, 106), lidar=Lidar(azimuth_steps=120))
    root = drive / "training"
    np.testing.assert_array_equal(np.asarray(Image.open(root / "image_2" / "000002.png")), frame.image)
    np.testing.assert_array_equal(np.fromfile(root / "velodyne" / "000002.bin", "<f4"), frame.points.ravel())
    depth = np.asarray(Image.open(root / "depth_2" / "000002.png")) / 256.0
    seen = frame.depth < 255
    np.testing.assert_allclose(depth[seen], frame.depth[seen], atol=1 / 512 + 1e-6)
    assert (depth[~seen] == 0).all()
    assert 0 <= frame.points[:, 3].min() < frame.points[:, 3].max() < 1
    rows = (line.split(":") for line in (root / "calib" / "000002.txt").read_text(encoding="utf-8").splitlines())
    calib = {name: np.array(values.split(), float) for name, values in rows}
    np.testing.assert_allclose(calib["P2"], frame.calibration.P2.ravel(), rtol=1e-9)
    assert {k: v.size for k, v in calib.items() if not k.startswith("P")} == {
        "R0_rect": 9, "Tr_velo_to_cam": 12, "Tr_imu_to_velo": 12
    }  # fmt: skip


def test_workers_and_later_frames_make_no_difference_but_the_seed_does(drive, tmp_path):
    two = files(synthesize_drive(tmp_path / "two", num_frames=5, seed=3, num_workers=2, **TINY))
    assert two == files(drive)
    other = files(synthesize_drive(tmp_path / "other", num_frames=1, seed=4, num_workers=1, val_fraction=0, **TINY))
    assert other["training/image_2/000000.png"] != two["training/image_2/000000.png"]
    fewer = files(synthesize_drive(tmp_path / "fewer", num_frames=2, seed=3, num_workers=1, val_fraction=0, **TINY))
    assert fewer["training/velodyne/000001.bin"] == two["training/velodyne/000001.bin"]
    assert fewer["training/velodyne/000000.bin"] != fewer["training/velodyne/000001.bin"]


def test_without_embree_rays_hit_the_same():
    embree = pytest.importorskip("embreex") and rays.EmbreeTriangles
    rng = np.random.default_rng(0)
    corners = (rng.uniform(-5, 5, (300, 1, 3)) + rng.normal(size=(300, 3, 3))).astype(np.float32)
    origins, directions = np.float32(rng.uniform(-8, 8, (2000, 3))), np.float32(rng.normal(size=(2000, 3)))
    (found, distance), (same, also) = (
        cast(corners).first(origins, directions) for cast in (embree, rays.NumbaTriangles)
    )
    np.testing.assert_array_equal(found, same)
    np.testing.assert_allclose(distance, also, rtol=1e-4)
    blocked = [cast(corners).occluded(origins, directions, 2.0) for cast in (embree, rays.NumbaTriangles)]
    np.testing.assert_array_equal(*blocked)
    np.testing.assert_array_equal(blocked[0], distance < 2.0)


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


def test_boxes_contain_the_points_and_pixels_of_their_object(exact):
    checked = 0
    for frame in exact:
        _, _, _, camera = project(frame)
        for index in range(len(frame.objects)):
            label = frame.objects[index]
            v, u = np.nonzero(frame.pixel_object == index)
            left, top, right, bottom = label.bbox
            assert left - 0.01 <= u.min() <= u.max() <= right + 0.01
            assert top - 0.01 <= v.min() <= v.max() <= bottom + 0.01
            own = camera[frame.point_object == index]
            if label.type == "DontCare" or len(own) < 5:
                continue
            bearing = np.arctan2(label.location[0], label.location[2])
            assert np.isclose(np.cos(label.alpha - (label.rotation_y - bearing)), 1)
            height, width, length = label.dimensions
            cos, sin = np.cos(label.rotation_y), np.sin(label.rotation_y)
            x, y, z = (own - label.location).T
            along, across = cos * x - sin * z, sin * x + cos * z
            assert (np.abs(along) <= length / 2 + 0.01).all()
            assert (np.abs(across) <= width / 2 + 0.01).all()
            assert (-height - 0.01 <= y).all()
            assert (y <= 0.01).all()
            checked += 1
    assert checked >= 15


def test_noise_moves_points_along_their_rays_only():
    lidars = (Lidar(azimuth_steps=500, range_noise=noise, dropouts=False) for noise in (0.0, 0.05))
    quiet, noisy = (synthesize_frame(1, 0, image_size=(32, 106), lidar=lidar).points for lidar in lidars)
    ranges = [np.linalg.norm(points[:, :3], axis=1) for points in (quiet, noisy)]
    directions = [points[:, :3] / r[:, None] for points, r in zip((quiet, noisy), ranges, strict=True)]
    np.testing.assert_allclose(directions[0], directions[1], atol=1e-5)
    assert 0.045 < (ranges[1] - ranges[0]).std() < 0.055


def test_reflectance_tells_materials_apart():
    place = np.random.default_rng(0).uniform(0, 50, (200, 2))
    grey, footprint, owner = np.full((200, 3), 0.3, np.float32), np.full(200, 0.02), np.zeros(200)

    def mean(material):
        return appearance(np.full(200, material), grey, place, footprint, owner)[1].mean()

    assert mean(Material.TYRE) < mean(Material.ASPHALT) < mean(Material.LEAVES) < mean(Material.ROAD_PAINT)
    assert mean(Material.RETROREFLECTOR) > 0.9


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_frames": 0},
        {"val_fraction": 0.7, "test_fraction": 0.3},
        {"num_frames": 4, "val_fraction": 0.5, "test_fraction": 0.4},  # no frame is left for training
        {"val_fraction": -0.1},
        {"image_size": (96,)},
        {"seed": -1},
    ],
)
def test_bad_arguments_are_named(tmp_path, wrong):
    with pytest.raises(SimIPUError, match=f"{next(reversed(wrong))}: expected"):
        synthesize_drive(tmp_path / "drive", **{"num_frames": 2, **TINY, **wrong})
    assert not (tmp_path / "drive").exists()
