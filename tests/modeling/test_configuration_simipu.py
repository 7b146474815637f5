import pytest

from simipu_hf.modeling.configuration_simipu import (
    PRESETS,
    SimIPUConfig,
    SimIPUDepthConfig,
    SimIPUDetectionConfig,
    SimIPUImageConfig,
    SimIPUPointNet2Config,
    SimIPUSparseConvConfig,
)


@pytest.mark.parametrize("point_encoder", ["pointnet2", "sparse_conv"])
@pytest.mark.parametrize("preset", PRESETS)
def test_presets_survive_saving(tmp_path, preset, point_encoder):
    config = SimIPUConfig.from_preset(preset, point_encoder=point_encoder)
    config.save_pretrained(tmp_path)
    loaded = SimIPUConfig.from_pretrained(tmp_path)
    assert type(loaded.point_config) is type(config.point_config)
    expected = SimIPUConfig.from_dict(config.to_dict()).to_dict()
    assert {**loaded.to_dict(), "auto_map": None} == {**expected, "auto_map": None}


def test_official_preset_holds_the_official_values():
    config = SimIPUConfig.from_preset("official")
    assert list(config.image_config.out_indices) == [-1]
    assert config.max_match_distance is None
    assert not config.mask_out_of_image
    assert config.inter_modal_point_gradient == "none"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SimIPUConfig.from_preset("offical"), "unknown preset 'offical': choose from recommended, official"),
        (lambda: SimIPUConfig.from_preset(point_encoder="pointnet"), "unknown point encoder 'pointnet'"),
        (lambda: SimIPUConfig(preset="my own"), "preset"),
        (lambda: SimIPUConfig(temperature=0), "temperature must be above 0, found 0"),
        (lambda: SimIPUConfig(temperature="warm"), "temperature"),
        (lambda: SimIPUConfig(max_match_distance=-1), "max_match_distance must be above 0 metres"),
        (lambda: SimIPUConfig(projection_normalization="image"), "projection_normalization"),
        (lambda: SimIPUConfig(point_config={"model_type": "kpconv"}), "unknown model_type 'kpconv'"),
        (lambda: SimIPUImageConfig(out_indices=[]), "out_indices is empty"),
        (lambda: SimIPUImageConfig(image_size=[96]), r"expected height and width, found \[96\]"),
        (lambda: SimIPUImageConfig(feature_grids=[[8, 8, 0]]), "expected stride_y, stride_x, offset_y"),
        (lambda: SimIPUPointNet2Config(radii=((0.2,),)), "radii has 1 levels, num_points has 3"),
        (lambda: SimIPUPointNet2Config(fps_mods=(("FPS",), ("FS",), ("F-FPS", "D-FPS"))), "unknown .'FPS'."),
        (
            lambda: SimIPUPointNet2Config(
                radii=((), (0.8,), (1.6,)), num_samples=((), (8,), (8,)), mlp_channels=((), ((8,),), ((8,),))
            ),
            "level 0.*one entry per scale",
        ),
        (
            lambda: SimIPUPointNet2Config(radii=((0.4, 0.2, 0.8), (0.4, 0.8, 1.6), (1.6, 3.2, 4.8))),
            "radii of level 0 must grow",
        ),
        (lambda: SimIPUSparseConvConfig(voxel_size=(0.1, 0.1, 0.0)), "must be positive"),
        (lambda: SimIPUSparseConvConfig(voxel_size=(0.1, 0.1)), "voxel_size takes 3 numbers"),
        (lambda: SimIPUSparseConvConfig(channels=(16, 32)), "one entry per stage"),
        (lambda: SimIPUDepthConfig(max_depth=0.0), "max_depth"),
        (lambda: SimIPUDepthConfig(out_indices=[]), "out_indices"),
        (lambda: SimIPUDetectionConfig(classes=["Car"]), "mean_dimensions"),
        (lambda: SimIPUDetectionConfig(hidden_size=0), "hidden_size"),
        (lambda: SimIPUDetectionConfig(out_indices=[]), "out_indices is empty"),
        (lambda: SimIPUDetectionConfig(classes=[], mean_dimensions=[]), "classes is empty"),
    ],
)
def test_bad_values_are_named(make, message):
    with pytest.raises(Exception, match=message):
        make()
