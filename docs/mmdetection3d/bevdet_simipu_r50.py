"""BEVDet with a ResNet-50 that SimIPU pre-trained; its image pipeline already normalises like ImageNet's networks."""

_base_ = "./bevdet-r50.py"

model = dict(
    img_backbone=dict(
        pretrained=None,  # instead of ImageNet's weights
        depth=50,
        norm_cfg=dict(type="BN", eps=1e-05, requires_grad=True),
        init_cfg=dict(type="Pretrained", checkpoint="encoder.pth", prefix="img_backbone"),
    ),
)
