"""The public route from an official checkpoint to the official numbers, in float64."""

import json
import zlib

import numpy as np
import torch
from safetensors.torch import load_file

from simipu_hf.hub.export import convert_checkpoint


def reference_tensor(name: str, shape: list[int]) -> torch.Tensor:
    """The rule of the reference's weights: a pseudo-random value for every name and flat index."""
    if name.endswith("num_batches_tracked"):
        return torch.tensor(0)
    index = np.arange(1, int(np.prod(shape)) + 1, dtype=np.float64)
    hashed = 43758.5453 * np.sin(12.9898 * index + 78.233 * (zlib.crc32(name.encode()) % 9973))
    values = torch.from_numpy(2 * (hashed - np.floor(hashed)) - 1).reshape(shape)
    if len(shape) > 1:
        return values * (6 / np.prod(shape[1:])) ** 0.5
    offset, scale = {"running_var": (1, 0.1), "running_mean": (0, 0.05), "weight": (1, 0.1)}.get(
        name.rsplit(".", 1)[1], (0, 0.1)
    )
    return offset + scale * values


@torch.no_grad()
def test_official_checkpoint_gives_the_official_losses(reference, tmp_path):
    from simipu_hf.modeling.modeling_simipu import SimIPUForPreTraining

    facts = json.loads((reference / "pretraining_step.json").read_text(encoding="utf-8"))
    tensors = load_file(reference / "pretraining_step.safetensors")
    state = {name: reference_tensor(name, shape) for name, shape in facts["state_dict"].items()}
    torch.save({"state_dict": state}, tmp_path / "official.pth")
    report = convert_checkpoint(tmp_path / "official.pth", tmp_path / "simipu")
    assert len(report.mapped) + len(report.ignored) == 595
    assert not report.missing

    model = SimIPUForPreTraining.from_pretrained(tmp_path / "simipu", dtype=torch.float64).train()
    names = ("pixel_values", "points", "points_aug", "lidar_to_aug", "lidar_to_pixel")
    output = model(**{name: tensors[name] for name in names})
    losses = facts["losses"]
    assert abs(output.inter_modal_loss.item() / losses["cross_loss"] - 1) < 1e-9
    assert abs(output.intra_modal_loss.item() / losses["intro_loss"] - 1) < 1e-9
    assert torch.equal(output.point_output.indices, tensors["out_index"])
