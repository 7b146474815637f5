"""The readers are files of their own, so what they share is copied: the copies must stay the same."""

import inspect
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from simipu_hf.dataset_scripts import argoverse2, kitti, nuscenes, waymo
from simipu_hf.modeling import feature_extraction_simipu


def test_copies_are_the_same() -> None:
    builders = (argoverse2.Argoverse2, kitti.Kitti, nuscenes.NuScenes, waymo.Waymo)
    for copies in (
        [reader.points_in_view for reader in (argoverse2, kitti, nuscenes, waymo)],
        [reader.image_size for reader in (argoverse2, kitti, nuscenes)],
        [builder._generate_examples for builder in builders],
        [module._likely_columns for module in (kitti, feature_extraction_simipu)],
        [module._are_two_points for module in (kitti, feature_extraction_simipu)],
    ):
        assert len(set(map(inspect.getsource, copies))) == 1
    assert nuscenes.features("v1.0-mini-objects")["objects"] == kitti.features("object")["objects"]


def test_an_image_cut_short_is_told(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 64, 3), dtype=np.uint8)
    for suffix in ("jpg", "png"):
        path = tmp_path / f"image.{suffix}"
        Image.fromarray(pixels).save(path)
        data = path.read_bytes()
        for padding in (100, 9000):  # harmless
            path.write_bytes(data + b"\0" * padding)
            assert kitti.image_size(str(path)) == (64, 32)
        path.write_bytes(data[:-100])
        with pytest.raises(ValueError, match=f"{suffix}: expected a readable image"):
            kitti.image_size(str(path))
