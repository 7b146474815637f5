"""Saved models and processors load from the code in their folders, in a process without this package."""

import re

import numpy as np
import torch
from PIL import Image
from weights import assert_same_weights

from simipu_hf.hub.card import write_model_card
from simipu_hf.modeling.configuration_simipu import SimIPUDepthConfig, SimIPUDetectionConfig
from simipu_hf.modeling.image_processing_simipu import SimIPUImageProcessor
from simipu_hf.modeling.modeling_simipu_depth import SimIPUForDepthEstimation
from simipu_hf.modeling.modeling_simipu_detection import SimIPUForMonocular3DDetection
from simipu_hf.modeling.processing_simipu import SimIPUProcessor

ENCODER = {"architecture": "test_resnet"}
PROJECTION = np.array([[80.0, 0, 48, 0], [0, 80, 32, 0], [0, 0, 1, 0]])
LIDAR_TO_CAMERA = np.array([[0.0, -1, 0, 0], [0, 0, -1, 0], [1, 0, 0, 0], [0, 0, 0, 1]])

# one process for all of them: importing torch and transformers takes most of its time
SCRIPT = """
import os
import numpy as np
import torch
from PIL import Image
from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoProcessor, pipeline

os.chdir(FOLDER)
space = {}
exec(open("snippet.py").read(), space)
inputs = dict(np.load("detection.npz"))
outputs = space["model"](torch.from_numpy(inputs["pixels"]), torch.from_numpy(inputs["projection"]))
np.save("boxes.npy", outputs.boxes_3d.detach().numpy())

estimate = pipeline("depth-estimation", model="depth", trust_remote_code=True)
depth = estimate(Image.new("RGB", (200, 120), (90, 120, 60)))

classes = [AutoProcessor, AutoImageProcessor, AutoFeatureExtractor]
processor, *parts = (c.from_pretrained("processor", trust_remote_code=True) for c in classes)
assert hasattr(parts[0], "post_process_depth_estimation")
row = dict(np.load("row.npz"))
batch = processor(Image.fromarray(row.pop("images")), **row)
np.savez("batch.npz", **{name: tensor.numpy() for name, tensor in batch.items()})
processor.save_pretrained("again")
AutoProcessor.from_pretrained("again", trust_remote_code=True)

result = {
    "boxes": list(space["boxes"].shape),
    "names": len(space["names"]),
    "depth": list(depth["predicted_depth"].shape),
    "picture": depth["depth"].size,
    "parts": [type(part).__name__ for part in parts],
}
"""


def test_models_and_processors_need_no_more_than_their_folders(isolated, tmp_path):
    torch.manual_seed(0)
    detector = SimIPUForMonocular3DDetection(SimIPUDetectionConfig(image_config=ENCODER, hidden_size=16)).eval()
    detector.save_pretrained(tmp_path / "detection")
    SimIPUImageProcessor(size={"height": 64, "width": 192}).save_pretrained(tmp_path / "detection")
    card = write_model_card(tmp_path / "detection").read_text(encoding="utf-8")
    (tmp_path / "snippet.py").write_text(re.search(r"```python\n(.*?)```", card, flags=re.S)[1], encoding="utf-8")
    pixels, projection = torch.randn(1, 3, 64, 96), torch.from_numpy(PROJECTION).float()[None]
    np.savez(tmp_path / "detection.npz", pixels=pixels.numpy(), projection=projection.numpy())

    SimIPUForDepthEstimation(SimIPUDepthConfig(image_config=ENCODER)).save_pretrained(tmp_path / "depth")
    SimIPUImageProcessor(size={"height": 64, "width": 96}).save_pretrained(tmp_path / "depth")

    processor = SimIPUProcessor.from_preset("recommended", (64, 160), num_points=77, depth_range=(2, 33))
    processor.save_pretrained(tmp_path / "processor")
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (64, 96, 3), dtype=np.uint8)
    points = rng.uniform((-10, -45, -4, 0), (80, 45, 2, 1), (3000, 4)).astype("<f4")
    row = {"points": points, "camera_projection": PROJECTION, "lidar_to_camera": LIDAR_TO_CAMERA}
    np.savez(tmp_path / "row.npz", images=image, **row)

    result = isolated(SCRIPT, offline=True, FOLDER=str(tmp_path))

    assert result["boxes"] == [result["names"], 7]
    with torch.no_grad():
        expected = detector(pixels, projection).boxes_3d
    torch.testing.assert_close(torch.from_numpy(np.load(tmp_path / "boxes.npy")), expected, rtol=1e-4, atol=1e-5)
    assert_same_weights(SimIPUForMonocular3DDetection.from_pretrained(tmp_path / "detection"), detector)

    assert (result["depth"], result["picture"]) == ([120, 200], [200, 120])

    assert result["parts"] == ["SimIPUImageProcessor", "SimIPUFeatureExtractor"]
    expected = processor(Image.fromarray(image), **row)
    found = np.load(tmp_path / "batch.npz")
    assert sorted(found) == sorted(expected)
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name].numpy())
