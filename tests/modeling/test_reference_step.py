"""A converted checkpoint takes the training step that the official code computed in float64."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from official_names import fill
from safetensors.torch import load_file

from simipu_hf.hub.export import convert_checkpoint
from simipu_hf.modeling.modeling_simipu import SimIPUForPreTraining

RELATIVE = 1e-9
# The reference's own rounding: gradients of biases before a batch norm are 0 exactly, it has up to 6e-11 there
# where its other gradients of that level are about 1, and sums of 524,288 grouped rows above them.
GRADIENT = 2e-9
GRADIENT_NOISE = 1e-10


@pytest.fixture(scope="module")
def case(reference: Path) -> dict:
    facts = json.loads((reference / "pretraining_step.json").read_text(encoding="utf-8"))
    return {**facts, "tensors": load_file(reference / "pretraining_step.safetensors")}


def batch(case: dict) -> dict[str, torch.Tensor]:
    names = ("pixel_values", "points", "points_aug", "lidar_to_aug", "lidar_to_pixel")
    return {name: case["tensors"][name] for name in names}


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = RELATIVE) -> None:
    error = (actual - expected).abs().max() / expected.abs().max()
    assert error < tolerance, f"relative error {error:.2e}"


@pytest.fixture(scope="module")
def step(case: dict, tmp_path_factory):
    """The step as it runs on this machine, and the names of the official entries in the model.

    test_point_ops holds its backends equal to their plain definitions.
    """
    folder = tmp_path_factory.mktemp("official")
    torch.save({"state_dict": fill(case["state_dict"], torch.float64)}, folder / "official.pth")
    report = convert_checkpoint(folder / "official.pth", folder / "simipu")
    assert not report.missing
    assert all(name.rpartition(".")[2] == ours.rpartition(".")[2] for name, ours in report.mapped.items())
    modules: dict[str, str] = {}  # running statistics are of the layer whose weights the step is compared by
    for name, ours in report.mapped.items():
        layer = ours.rpartition(".")[0]
        assert modules.setdefault(name.rpartition(".")[0], layer) == layer
    model = SimIPUForPreTraining.from_pretrained(folder / "simipu", dtype=torch.float64).train()
    output = model(**batch(case), return_metrics=True)
    output.loss.backward()
    return model, output, report.mapped


def test_sampling_is_identical(case, step):
    _, output, _ = step
    assert torch.equal(output.point_output.indices, case["tensors"]["out_index"])
    assert torch.equal(output.point_aug_output.indices, case["tensors"]["out_aug_index"])


def test_matching_is_identical_but_for_ties(case, step):
    """The official sampler draws some points twice, so several assignments have the same cost: the same pairs of
    coordinates must be matched, and the total cost must be the reference's."""
    _, output, _ = step
    tensors = case["tensors"]
    total = 0.0
    for item in range(2):
        view, augmented = tensors["out_xyz"][item], tensors["out_aug_xyz"][item]
        ours = torch.cat([view, augmented[output.match[item]]], dim=1)
        expected = torch.cat([view, augmented[tensors["match"][item]]], dim=1)
        assert sorted(map(tuple, ours.tolist())) == sorted(map(tuple, expected.tolist()))
        back = (augmented - tensors["lidar_to_aug"][item, :3, 3]) @ tensors["lidar_to_aug"][item, :3, :3].inverse().T
        total += (view - back[tensors["match"][item]]).norm(dim=1).sum().item()
    assert output.match_distance.item() * 2 * 1024 == pytest.approx(total, rel=RELATIVE)
    # the reference computed its distances by a - 2ab + b, which is good to 1e-5 m for points that coincide
    assert total == pytest.approx(tensors["match_cost"].sum().item(), rel=1e-7)


def test_features_and_projections(case, step):
    _, output, _ = step
    tensors = case["tensors"]
    assert torch.equal(output.point_output.coordinates, tensors["out_xyz"])
    assert torch.equal(output.point_aug_output.coordinates, tensors["out_aug_xyz"])
    assert_close(output.point_output.features[..., ::16].transpose(1, 2), tensors["out_features"])
    assert_close(output.point_aug_output.features[..., ::16].transpose(1, 2), tensors["out_aug_features"])
    assert_close(output.image_features[-1][:, ::32], tensors["image_features"])
    assert_close(output.image_embeds.flatten(0, 1), tensors["inter_image_projection"])
    assert_close(output.point_embeds.flatten(0, 1), tensors["inter_point_projection"])


def test_losses_and_accuracies(case, step):
    _, output, _ = step
    losses = case["losses"]
    assert output.inter_modal_loss.item() == pytest.approx(losses["cross_loss"], rel=RELATIVE)
    assert output.intra_modal_loss.item() == pytest.approx(losses["intro_loss"], rel=RELATIVE)
    assert output.loss.item() == pytest.approx(case["total"], rel=RELATIVE)


def test_accuracies(case, step):
    """Equal similarities are common (points drawn twice), and which of them the reference's top-k took first is
    arbitrary: it must lie between counting every tie as a miss and as a hit, and so must ours."""
    model, output, _ = step
    with torch.no_grad():
        matched = output.point_aug_output.features.take_along_dim(output.match[..., None], 1)
        embeds = {
            "inter": (output.image_embeds, output.point_embeds),
            "intra": [
                model.intra_point_head(features.flatten(0, 1)).unflatten(0, output.match.shape)
                for features in (output.point_output.features, matched)
            ],
        }
    checks = [
        ("inter", 204, "cross_acc_top1", output.inter_modal_top10_percent),
        ("inter", 1024, "cross_acc_top5", output.inter_modal_top50_percent),
        ("intra", 1, "intro_acc_top1", output.intra_modal_top1),
        ("intra", 5, "intro_acc_top5", output.intra_modal_top5),
    ]
    for loss, k, official_name, ours in checks:
        anchors, candidates = (F.normalize(e.flatten(0, 1), dim=1) for e in embeds[loss])
        similarity = anchors @ candidates.T
        positive = similarity.diagonal()[:, None]
        never_worse = ((similarity > positive + 1e-9).sum(1) < k).double().mean().item()
        never_better = ((similarity > positive - 1e-9).sum(1) - 1 < k).double().mean().item()
        assert never_better <= case["losses"][official_name] / 100 <= never_worse
        assert never_better <= ours.item() + 1e-6
        assert ours.item() - 1e-6 <= never_worse


def test_gradients_and_running_statistics(case, step):
    model, _, names = step
    tensors = case["tensors"]
    parameters = dict(model.named_parameters())
    for name, norm in case["grad_norms"].items():
        key = names.get(name)
        if key is None:
            assert norm is None, name
        elif norm is None:
            assert parameters[key].grad is None, name
        else:
            gradient = parameters[key].grad.norm().item()
            assert gradient == pytest.approx(norm, rel=GRADIENT, abs=GRADIENT_NOISE), name
    assert_close(parameters["simipu.image_encoder.conv1.weight"].grad, tensors["grad_conv1"])
    first = parameters["simipu.point_encoder.levels.0.mlps.0.0.linear.weight"].grad
    assert_close(first.flatten(), tensors["grad_sa0"].flatten(), GRADIENT)
    running = model.simipu.point_encoder.levels[0].mlps[2][1].norm.running_var
    assert_close(running, tensors["bn_running_var_sa0"])
