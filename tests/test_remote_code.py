"""Saved models and processors load from the code in their folders, in a process without this package."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

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
import sys
sys.modules["simipu_hf"] = None  # importing it fails; the finder of an editable install would find it
import json
import numpy as np
import torch
from PIL import Image
from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoModel, AutoProcessor, pipeline

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
json.dump(result, open("result.json", "w"))
"""


@pytest.fixture(scope="module")
def detector() -> SimIPUForMonocular3DDetection:
    torch.manual_seed(0)
    return SimIPUForMonocular3DDetection(SimIPUDetectionConfig(image_config=ENCODER, hidden_size=16)).eval()


@pytest.fixture(scope="module")
def row() -> dict:
    rng = np.random.default_rng(0)
    points = rng.uniform((-10, -45, -4, 0), (80, 45, 2, 1), (3000, 4)).astype("<f4")
    image = rng.integers(0, 256, (64, 96, 3), dtype=np.uint8)
    return {"images": image, "points": points, "camera_projection": PROJECTION, "lidar_to_camera": LIDAR_TO_CAMERA}


@pytest.fixture(scope="module")
def processor() -> SimIPUProcessor:
    return SimIPUProcessor.from_preset("recommended", (64, 160), num_points=77)


@pytest.fixture(scope="module")
def inputs() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {"pixels": torch.randn(1, 3, 64, 96), "projection": torch.from_numpy(PROJECTION).float()[None]}


@pytest.fixture(scope="module")
def work(detector, processor, row, inputs, tmp_path_factory):
    """The folder in which the script ran."""
    work = tmp_path_factory.mktemp("remote_code")
    detector.save_pretrained(work / "detection")
    SimIPUImageProcessor(size={"height": 64, "width": 192}).save_pretrained(work / "detection")
    card = write_model_card(work / "detection").read_text(encoding="utf-8")
    (work / "snippet.py").write_text(re.search(r"```python\n(.*?)```", card, flags=re.S)[1], encoding="utf-8")
    SimIPUForDepthEstimation(SimIPUDepthConfig(image_config=ENCODER)).save_pretrained(work / "depth")
    SimIPUImageProcessor(size={"height": 64, "width": 96}).save_pretrained(work / "depth")
    processor.save_pretrained(work / "processor")
    np.savez(work / "row.npz", **row)
    np.savez(work / "detection.npz", **{name: value.numpy() for name, value in inputs.items()})
    environment = os.environ | {"HF_HOME": str(work / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("HF_MODULES_CACHE", None)
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return work


@pytest.fixture(scope="module")
def result(work) -> dict:
    return json.loads((work / "result.json").read_text(encoding="utf-8"))


def test_the_cards_snippet_loads_a_detector(result):
    assert result["boxes"] == [result["names"], 7]


def test_a_detector_computes_the_same(work, detector, inputs):
    with torch.no_grad():
        expected = detector(inputs["pixels"], inputs["projection"]).boxes_3d
    torch.testing.assert_close(torch.from_numpy(np.load(work / "boxes.npy")), expected, rtol=1e-4, atol=1e-5)
    again = SimIPUForMonocular3DDetection.from_pretrained(work / "detection")
    assert all(torch.equal(again.state_dict()[name], value) for name, value in detector.state_dict().items())


def test_the_pipeline_takes_a_depth_model(result):
    assert (result["depth"], result["picture"]) == ([120, 200], [200, 120])


def test_a_processor_returns_the_same_batch(work, result, processor, row):
    assert result["parts"] == ["SimIPUImageProcessor", "SimIPUFeatureExtractor"]
    expected = processor(**{**row, "images": Image.fromarray(row["images"])})
    found = np.load(work / "batch.npz")
    assert sorted(found) == sorted(expected)
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name].numpy())
