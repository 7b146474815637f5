import importlib

import pytest
import torch
from tiny_simipu import tiny_batch, tiny_config
from transformers import AutoConfig, AutoModel, AutoModelForPreTraining
from transformers.utils.generic import can_return_loss
from weights import assert_same_weights

from simipu_hf import SimIPUForPreTraining, SimIPUModel


@pytest.fixture
def model() -> SimIPUForPreTraining:
    torch.manual_seed(0)
    return SimIPUForPreTraining(tiny_config())


@pytest.mark.parametrize("preset", ["official", "recommended"])
def test_a_step_has_finite_losses_and_gradients_where_it_should(preset):
    model = SimIPUForPreTraining(tiny_config(preset))
    output = model(**tiny_batch())
    output.loss.backward()
    assert torch.isfinite(output.loss)
    assert output.loss.item() == pytest.approx(output.intra_modal_loss.item() + output.inter_modal_loss.item())
    assert output.match.shape == (2, 32)
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    frozen = {name for name in dict(model.named_parameters()) if name.startswith("inter_point_head")}
    assert without == (frozen if preset == "official" else set())
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_what_is_frozen_stays_so_after_loading(tmp_path):
    built = SimIPUForPreTraining(tiny_config("official", image_config={"frozen": ["conv1", "layer1"]}))
    built.save_pretrained(tmp_path)
    loaded = SimIPUForPreTraining.from_pretrained(tmp_path)
    trained, expected = ({n for n, p in m.named_parameters() if p.requires_grad} for m in (loaded, built))
    assert trained == expected
    frozen = {name for name, _ in loaded.named_parameters()} - trained
    assert {name.split(".")[0] for name in frozen} == {"simipu", "inter_point_head"}
    assert {name.split(".")[2] for name in frozen if name.startswith("simipu")} == {"conv1", "layer1"}


@pytest.mark.parametrize(("gradient", "head", "encoder"), [("none", 0, 0), ("head", 1, 0), ("encoder", 1, 1)])
def test_inter_modal_gradient_reaches_as_far_as_configured(gradient, head, encoder):
    model = SimIPUForPreTraining(tiny_config(inter_modal_point_gradient=gradient, intra_modal_weight=0.0))
    model(**tiny_batch()).inter_modal_loss.backward()

    def reached(module: torch.nn.Module) -> bool:
        return any(p.grad is not None and p.grad.abs().max() > 0 for p in module.parameters())

    assert reached(model.inter_point_head) == head
    assert reached(model.simipu.point_encoder) == encoder
    assert reached(model.simipu.image_encoder)


def test_without_the_inter_modal_loss_the_image_encoder_learns_nothing(model):
    """The paper's table 5: "w/o inter" is training from scratch by construction."""
    model(**tiny_batch()).intra_modal_loss.backward()
    assert all(parameter.grad is None for parameter in model.simipu.image_encoder.parameters())


def test_padding_changes_nothing_but_for_the_official_normalisation():
    """A sample padded to its batch's largest must give the point features their own pixels."""
    batch = tiny_batch(batch_size=1)
    sizes = torch.tensor([[64, 96]])
    padded = {**batch, "pixel_values": torch.nn.functional.pad(batch["pixel_values"], (0, 64)), "image_sizes": sizes}
    for normalization, equal in (("batch", True), ("sample", False)):
        config = tiny_config(projection_normalization=normalization, image_config={"out_indices": [1]})
        torch.manual_seed(0)
        model = SimIPUForPreTraining(config).eval()
        with torch.no_grad():
            plain = model(**batch, image_sizes=sizes).image_embeds
            wide = model(**padded).image_embeds
        # the rightmost cells see the padding through the convolutions
        close = torch.isclose(plain, wide, atol=1e-4).all(-1).float().mean()
        assert (close > 0.6) == equal


def test_points_outside_the_image_are_masked_or_kept():
    batch = tiny_batch()
    batch["lidar_to_pixel"][1, 0, 2] = 1e6  # the second sample projects far to the left or right, or nowhere
    batch["lidar_to_pixel"][1, 0, 3] = 1e6
    masked = SimIPUForPreTraining(tiny_config(mask_out_of_image=True))(**batch)
    kept = SimIPUForPreTraining(tiny_config(mask_out_of_image=False))(**batch)
    assert masked.pairs_in_image < 0.6
    assert masked.inter_modal_chance.exp().item() == pytest.approx(round(masked.pairs_in_image.item() * 64), rel=1e-5)
    assert kept.inter_modal_chance.exp().item() == pytest.approx(64, rel=1e-5)


def test_distant_matches_are_dropped(model):
    batch = tiny_batch()
    batch["lidar_to_aug"][1, 0, 3] += 500  # the second sample's views no longer fit
    output = model(**batch)
    assert output.intra_modal_chance.exp().item() <= 32 + 1e-3


@pytest.mark.parametrize("empty", ["matches", "image"])
def test_a_batch_without_pairs_leaves_no_nan(empty):
    model = SimIPUForPreTraining(tiny_config(max_match_distance=1e-9 if empty == "matches" else 2.0))
    batch = tiny_batch()
    if empty == "matches":
        batch["points_aug"] = batch["points_aug"] + 5
    else:
        batch["lidar_to_pixel"] = -batch["lidar_to_pixel"]  # all of it behind the camera
    output = model(**batch)
    output.loss.backward()
    assert (output.intra_modal_loss if empty == "matches" else output.inter_modal_loss) == 0
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)
    assert all(buffer.isfinite().all() for buffer in model.buffers())


def test_base_model_encodes_either_input(model):
    batch = tiny_batch()
    base = model.simipu.eval()
    output = base(pixel_values=batch["pixel_values"], points=batch["points"])
    assert [tuple(maps.shape[-2:]) for maps in output.image_features] == [(8, 12), (4, 6), (2, 3)]
    assert output.point_output.features.shape == (2, 32, 32)
    assert base(pixel_values=batch["pixel_values"]).point_output is None
    assert base(points=batch["points"]).image_features is None
    assert isinstance(base(points=batch["points"], return_dict=False), tuple)
    with pytest.raises(ValueError, match="needs pixel_values, points, or both"):
        base()


def test_save_and_load_are_bit_equal(model, tmp_path):
    model(**tiny_batch())  # running statistics leave their initial values
    model.save_pretrained(tmp_path)
    for whole in (SimIPUForPreTraining, AutoModelForPreTraining):
        assert_same_weights(model, whole.from_pretrained(tmp_path))
    for base in (SimIPUModel, AutoModel):
        assert_same_weights(model.simipu, base.from_pretrained(tmp_path))
    assert AutoConfig.from_pretrained(tmp_path).point_config.num_points == [[64], [32], [16, 16]]


def test_every_missing_tensor_is_initialised_after_meta_loading(model, tmp_path):
    """from_pretrained builds on the meta device; what the checkpoint lacks must not be left-over memory."""
    model.simipu.save_pretrained(tmp_path)  # without the heads
    loaded, info = SimIPUForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    heads = {"intra_point_head", "inter_image_head", "inter_point_head"}
    assert {key.split(".")[0] for key in info["missing_keys"]} == heads
    for name, tensor in loaded.state_dict().items():
        assert not tensor.is_meta, name
        assert torch.isfinite(tensor.float()).all(), name
    weight = loaded.intra_point_head.layers[0].linear.weight
    assert 0.5 < weight.abs().max() * 32**0.5 <= 1  # uniform in +-1/sqrt(fan in), PyTorch's default
    assert torch.equal(loaded.intra_point_head.layers[0].norm.running_var, torch.ones(32))


@pytest.mark.parametrize(("architecture", "divisor"), [("resnet10t", 32), ("test_vit", 16)])
def test_the_official_normalisation_stretches_nothing_in_a_batch_of_one(architecture, divisor):
    """Images are padded to what the encoder divides by: alone, an image has the batch's size."""
    config = tiny_config("official", architecture, image_config={"out_indices": [-1], "image_size": [64, 5 * divisor]})
    batch = {**tiny_batch(1, 64, 5 * divisor), "image_sizes": torch.tensor([[64, 5 * divisor - 3]])}
    losses = []
    for normalization in ("sample", "batch"):
        torch.manual_seed(0)
        config.projection_normalization = normalization
        losses.append(SimIPUForPreTraining(config).eval()(**batch).inter_modal_loss)
    torch.testing.assert_close(*losses, rtol=0, atol=0)


def test_every_linear_layer_runs_its_own_forward():
    """Adapters (peft) and quantizers replace it: one that is only read for its weights would lose what they add."""
    model = SimIPUForPreTraining(tiny_config(architecture="test_vit", image_config={"image_size": [64, 96]}))
    run = set()
    layers = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    for name, module in layers.items():
        module.register_forward_hook(lambda *_, name=name: run.add(name))
    model(**tiny_batch())
    assert run == layers.keys()
    assert all("image_encoder" in name for name in layers)


def test_replicas_of_data_parallel_run(model, monkeypatch):
    """transformers' Trainer wraps a model so where it finds several GPUs; here the copy between them is a clone."""
    replicate = importlib.import_module("torch.nn.parallel.replicate")
    monkeypatch.setattr(replicate, "_get_device_index", lambda device, *_: device)
    monkeypatch.setattr(
        replicate, "_broadcast_coalesced_reshape", lambda tensors, *_, **__: [list(map(torch.clone, tensors))]
    )
    replica = replicate.replicate(model, ["cpu"])[0]
    assert not list(replica.parameters())
    replica(**tiny_batch()).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_official_batch_norm_constants_reach_the_image_encoder():
    encoder = SimIPUForPreTraining(tiny_config("official")).simipu.image_encoder
    norms = [module for module in encoder.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert {(norm.eps, norm.momentum) for norm in norms} == {(1e-3, 0.01)}


def test_a_batch_in_half_precision_is_compared_in_single(model):
    model.anchor_image_encoder()
    model.config.anchor_weight = 1.0
    batch = {name: value.bfloat16() if value.is_floating_point() else value for name, value in tiny_batch().items()}
    output = model.bfloat16()(**batch)
    output.loss.backward()
    assert output.loss.isfinite()
    assert output.match_distance.dtype == torch.float32


def test_too_small_clouds_are_named(model):
    batch = tiny_batch()
    with pytest.raises(ValueError, match="D-FPS has to draw 64 points from 40"):
        model.simipu.get_point_features(batch["points"][:, :40])


def test_transformers_trainer_evaluates_the_loss():
    assert can_return_loss(SimIPUForPreTraining)


def test_accuracies_are_computed_when_asked_for(model):
    model.eval()
    with torch.no_grad():
        plain, measured = model(**tiny_batch()), model(**tiny_batch(), return_metrics=True)
    assert plain.inter_modal_top1 is None
    assert 0 <= measured.inter_modal_top1 <= measured.inter_modal_top5 <= 1
    assert torch.equal(plain.loss, measured.loss)


def test_the_anchor_is_the_encoder_of_the_start_and_no_part_of_the_model(tmp_path):
    torch.manual_seed(0)
    model = SimIPUForPreTraining(tiny_config(anchor_weight=2.0))
    names, parameters = set(model.state_dict()), len(list(model.parameters()))
    with pytest.raises(ValueError, match=r"call anchor_image_encoder\(\)"):
        model(**tiny_batch())
    model.anchor_image_encoder()
    model.eval()
    start = model(**tiny_batch())
    assert start.anchor_loss.item() == pytest.approx(0, abs=1e-5)  # the encoder is its own anchor, in evaluation mode
    with torch.no_grad():
        for parameter in model.simipu.image_encoder.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    moved = model(**tiny_batch())
    assert moved.anchor_loss > 1e-3
    total = moved.intra_modal_loss + moved.inter_modal_loss + 2.0 * moved.anchor_loss
    torch.testing.assert_close(moved.loss, total)
    moved.loss.backward()
    assert set(model.state_dict()) == names
    assert len(list(model.parameters())) == parameters
    model.save_pretrained(tmp_path)
    loaded = SimIPUForPreTraining.from_pretrained(tmp_path)
    assert loaded(**tiny_batch()).anchor_loss is None  # in evaluation mode it can be done without
    assert_same_weights(model, loaded)
