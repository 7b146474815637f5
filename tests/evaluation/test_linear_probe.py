"""The linear depth probe against a least-squares solution of the same problem."""

import numpy as np
import timm
import torch
from scipy.ndimage import map_coordinates

from simipu_hf.data.depth import DepthFrame
from simipu_hf.data.frames import to_pixel_values
from simipu_hf.evaluation.linear_probe import fit_linear_depth_probe
from simipu_hf.modeling.image_processing_simipu import SimIPUImageProcessor


def bilinear(feature: np.ndarray, stride: int) -> np.ndarray:
    """A map (C, h, w) at the 32 x 64 pixels of the image, the nearest cell beyond the outermost."""
    cells = np.mgrid[:32, :64] / stride
    return np.stack([map_coordinates(channel, cells, order=1, mode="nearest") for channel in feature])


def test_linear_probe_is_ridge_regression():
    generator = np.random.default_rng(0)
    processor = SimIPUImageProcessor(size={"height": 32, "width": 64}, pad_size_divisor=1)
    frames = []
    for name in "ab":
        depth = generator.uniform(2, 60, (32, 64)).astype(np.float32) * (generator.random((32, 64)) < 0.2)
        image = generator.integers(0, 255, (32, 64, 3), dtype=np.uint8)
        whole = np.pad(depth, ((8, 0), (3, 5)))  # what the frame shows is a part of the original image
        frames.append(DepthFrame(name, image, depth, whole, (8, 3, 32, 64)))
    encoder = timm.create_model("resnet18", num_classes=0).eval()
    probe = fit_linear_depth_probe(encoder, frames, processor, stages=(2, 4), ridge=0.3, pixels_per_frame=9999)

    def rows(frame):  # the features of every pixel: cell j of a ResNet's stage of stride s looks at pixel j s
        with torch.no_grad():
            maps = encoder.forward_intermediates(to_pixel_values([frame.image], processor), intermediates_only=True)
        sampled = [bilinear(maps[stage][0].numpy(), stride) for stage, stride in ((2, 8), (4, 32))]
        return np.concatenate(sampled).transpose(1, 2, 0).astype(float)

    known = [frame.target > 0 for frame in frames]
    x = np.concatenate([rows(frame)[mask] for frame, mask in zip(frames, known, strict=True)])
    y = np.concatenate([np.log(frame.target[mask]) for frame, mask in zip(frames, known, strict=True)])
    mean, deviation = x.mean(0), np.maximum(x.std(0), 1e-6)  # some features are 0 everywhere
    padded_x = np.concatenate([(x - mean) / deviation, np.sqrt(0.3 * len(x)) * np.eye(x.shape[1])])
    padded_y = np.concatenate([y - y.mean(), np.zeros(x.shape[1])])
    weight = np.linalg.lstsq(padded_x, padded_y, rcond=None)[0]
    expected = np.exp((rows(frames[0]) - mean) / deviation @ weight + y.mean())
    predicted = probe.predict(frames[0], processor)
    np.testing.assert_allclose(predicted[8:, 3:67], expected, rtol=1e-3)
    assert predicted.shape == (40, 72)
    assert not predicted[:8].any()
