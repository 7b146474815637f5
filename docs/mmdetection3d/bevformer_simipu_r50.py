"""BEVFormer-tiny with a ResNet-50 that SimIPU pre-trained; it already normalises like ImageNet's networks."""

_base_ = "./bevformer_tiny.py"

model = dict(
    pretrained=None,  # instead of ImageNet's weights
    img_backbone=dict(
        depth=50,
        frozen_stages=-1,  # the base freezes what ImageNet taught
        norm_eval=False,
        norm_cfg=dict(type="BN", eps=1e-05, requires_grad=True),
        init_cfg=dict(type="Pretrained", checkpoint="encoder.pth", prefix="img_backbone"),
    ),
)
