"""Image encoders: sizes, stages, freezing, weights of another size; the whole way is in hub/test_every_encoder.py."""

import copy

import pytest
import timm
import torch
from tiny_simipu import tiny_batch, tiny_config
from torch import nn

from simipu_hf.modeling.configuration_simipu import SimIPUDepthConfig, SimIPUImageConfig
from simipu_hf.modeling.image_encoder import (
    build_image_encoder,
    feature_grids,
    image_feature_maps,
    load_image_encoder_weights,
    pad_to_divisor,
    pyramid_stages,
    timm_arguments,
    with_image_size,
)
from simipu_hf.modeling.modeling_simipu import SimIPUForPreTraining, SimIPUModel
from simipu_hf.modeling.modeling_simipu_depth import SimIPUForDepthEstimation

FEW_BLOCKS = {"stages": [1, 1, 1, 1]}


@pytest.mark.parametrize(
    ("architecture", "model_args"), [("hiera_tiny_224", FEW_BLOCKS), ("efficientvit_m0", {}), ("test_vit", {})]
)
def test_an_encoder_saved_after_a_change_of_size_is_the_same(architecture, model_args, tmp_path):
    torch.manual_seed(0)
    image_config = {"architecture": architecture, "image_size": (64, 128), "model_args": model_args}
    model = SimIPUForDepthEstimation(SimIPUDepthConfig(image_config=image_config)).eval()
    model.set_image_size((128, 192))
    model.save_pretrained(tmp_path)
    reloaded = SimIPUForDepthEstimation.from_pretrained(tmp_path).eval()
    image = torch.randn(1, 3, 128, 192)
    with torch.no_grad():
        torch.testing.assert_close(model(image).predicted_depth, reloaded(image).predicted_depth)


def test_position_embeddings_are_interpolated_over_the_image():
    """Of an embedding that is x in one channel and y in another, so is the resized one."""
    config = SimIPUImageConfig(architecture="hiera_tiny_224", image_size=(64, 128), model_args=FEW_BLOCKS)
    encoder = build_image_encoder(config)
    with torch.no_grad():
        encoder.pos_embed.zero_()
        encoder.pos_embed.view(16, 32, -1)[..., 0] = torch.linspace(0, 1, 32)
        encoder.pos_embed.view(16, 32, -1)[..., 1] = torch.linspace(0, 1, 16)[:, None]
    resized = with_image_size(encoder, config, (128, 192)).pos_embed.view(32, 48, -1)
    assert (resized[:, 1:-1, 0].diff(dim=1) > 0).all()
    assert (resized[1:-1, :, 1].diff(dim=0) > 0).all()
    assert config.image_size == [128, 192]


def test_timm_arguments_build_the_same_network():
    for architecture, model_args, sizes in (
        ("hiera_tiny_224", FEW_BLOCKS, {"img_size": (96, 320)}),
        ("test_vit", {"drop_path_rate": 0.1}, {"dynamic_img_size": True}),
        ("efficientvit_m0", {}, {"img_size": (128, 320)}),
        ("deit_tiny_distilled_patch16_224", {"depth": 1}, {"dynamic_img_size": True}),
        ("test_resnet", {"drop_path_rate": 0.1}, {}),
    ):
        config = SimIPUImageConfig(architecture=architecture, image_size=(96, 300), model_args=model_args)
        arguments = timm_arguments(config)
        assert arguments == model_args | sizes
        with torch.device("meta"):
            plain = timm.create_model(architecture, num_classes=0, **arguments)
            ours = build_image_encoder(config)
        shapes = [{name: value.shape for name, value in m.state_dict().items()} for m in (plain, ours)]
        assert shapes[0] == shapes[1]


def test_default_stages_are_the_coarsest_resolutions_or_spread_over_the_layers():
    class Stages(nn.Module):
        def __init__(self, *reductions):
            super().__init__()
            self.feature_info = [{"reduction": reduction} for reduction in reductions]

    assert pyramid_stages(Stages(2, 4, 8, 16, 32)) == [0, 1, 2, 3, 4]
    assert pyramid_stages(Stages(2, 4, 8, 16, 32), 3) == [2, 3, 4]
    assert pyramid_stages(Stages(4, 8, 8, 16)) == [0, 2, 3]
    assert pyramid_stages(Stages(*[16] * 12)) == [2, 5, 8, 11]
    assert pyramid_stages(Stages(*[16] * 12), 3) == [3, 7, 11]
    assert pyramid_stages(Stages(16, 16, 16)) == [0, 1, 2]


def test_stages_behind_the_last_one_sampled_do_not_run():
    encoder = build_image_encoder(SimIPUImageConfig(architecture="resnet18", out_indices=[1, 2]))
    ran = []
    for name, module in encoder.named_children():
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
    expected = encoder.forward_intermediates(torch.ones(1, 3, 64, 64), indices=[1, 2], intermediates_only=True)
    ran.clear()
    maps = image_feature_maps(encoder.eval(), torch.ones(1, 3, 64, 64), [1, 2])
    assert "layer2" in ran
    assert "layer3" not in ran
    assert [m.shape for m in maps] == [m.shape for m in expected]


def test_padding_is_compiled_for_sizes_that_change():
    encoder = timm.create_model("test_resnet", num_classes=0)

    def enlarged(image):
        padded = pad_to_divisor(image, encoder)
        return nn.functional.interpolate(encoder.conv1(padded), size=padded.shape[-2:], mode="bilinear")

    compiled = torch.compile(enlarged, backend="aot_eager")
    for height, width in ((64, 96), (50, 70), (33, 1)):
        expected = (-(-height // 32) * 32, -(-width // 32) * 32)
        assert compiled(torch.zeros(1, 3, height, width)).shape[-2:] == expected


def test_frozen_parts_stay_as_they_are():
    config = tiny_config(architecture="resnet18", image_config={"frozen": ["conv1", "bn1", "layer1"]})
    model = SimIPUForPreTraining(config).train()
    encoder = model.simipu.image_encoder
    before = copy.deepcopy(encoder.layer1.state_dict())
    model(**tiny_batch()).loss.backward()
    assert {n.split(".")[0] for n, p in encoder.named_parameters() if p.grad is None} == {"conv1", "bn1", "layer1"}
    assert all(torch.equal(value, before[name]) for name, value in encoder.layer1.state_dict().items())
    assert encoder.layer2.training
    vit = build_image_encoder(SimIPUImageConfig(architecture="test_vit", frozen=["pos_embed", "blocks.0"]))
    frozen = {n for n, p in vit.named_parameters() if not p.requires_grad}
    assert frozen == {n for n, _ in vit.named_parameters() if n == "pos_embed" or n.startswith("blocks.0.")}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architecture": "resnet51"}, r"timm .* has no model named 'resnet51'; did you mean"),
        ({"out_indices": [5]}, r"resnet18 has stages 0 to 4 \(or -5 to -1\), found 5"),
        ({"out_indices": [-1, 4]}, r"\[-1, 4\] names a stage twice: counted from the front, \[4, 4\]"),
        ({"frozen": ["layer9"]}, r"resnet18 has no module 'layer9'; it has conv1, bn1,"),
        ({"model_args": {"depth": 3}}, r"timm cannot build resnet18 with .*depth"),
    ],
)
def test_what_does_not_exist_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        build_image_encoder(SimIPUImageConfig(**{"architecture": "resnet18", **fields}))


def test_weights_that_do_not_fit_are_named():
    encoder = build_image_encoder(SimIPUImageConfig(architecture="test_resnet"))
    weights = timm.create_model("test_resnet", num_classes=0).state_dict()
    load_image_encoder_weights(encoder, weights, "fitting")
    assert torch.equal(encoder.layer1[0].conv1.weight, weights["layer1.0.conv1.weight"])
    with pytest.raises(ValueError, match=r"somewhere: the weights do not fit test_resnet: .*not expected \(surp"):
        load_image_encoder_weights(encoder, {"surprise": torch.zeros(1)}, "somewhere")
    first = weights["conv1.0.weight"]
    with pytest.raises(ValueError, match=r"of another shape \(conv1\.0\.weight is \(1,"):
        load_image_encoder_weights(encoder, {**weights, "conv1.0.weight": first[:1]}, "somewhere")


def test_stages_without_a_regular_grid_are_refused_where_they_are_sampled():
    with pytest.raises(ValueError, match=r"stage 1 of levit_128s do not lie on a regular grid"):
        SimIPUForPreTraining(tiny_config(architecture="levit_128s", image_config={"out_indices": [1]}))
    official = tiny_config("official", architecture="levit_128s", image_config={"out_indices": [1]})
    SimIPUForPreTraining(official)
    dilated = timm.create_model("resnet18", output_stride=8)
    with pytest.raises(ValueError, match=r"strides \[2, 4, 8, 8, 8\], not \[2, 4, 8, 16, 32\]"):
        feature_grids(dilated, [-1])


def test_grids_are_measured_once_and_saved(tmp_path):
    state = torch.get_rng_state()
    with torch.device("meta"):
        model = SimIPUModel(tiny_config(architecture="test_resnet"))
    assert torch.equal(torch.get_rng_state(), state)
    grids = model.config.image_config.feature_grids
    assert len(grids) == 5
    assert grids[0] == [2.0, 2.0, 0.0, 0.0]
    model.config.save_pretrained(tmp_path)
    loaded = type(model.config).from_pretrained(tmp_path)
    assert loaded.image_config.feature_grids == grids
    loaded.image_config.feature_grids[-1] = [32.0, 32.0, 5.0, 6.0]
    assert SimIPUModel(loaded).config.image_config.feature_grids[-1] == [32.0, 32.0, 5.0, 6.0]
    loaded.image_config.model_args = {"output_stride": 16}
    with pytest.raises(ValueError, match=r"have strides \[2, 4, 8, 16, 16\], found .*32"):
        SimIPUModel(loaded)
