"""FCOS3D (mmdetection3d 1.x) with a ResNet-50 that SimIPU pre-trained."""

_base_ = "mmdet3d::fcos3d/fcos3d_r101-caffe-dcn_fpn_head-gn_8xb2-1x_nus-mono3d.py"

model = dict(
    # the encoder saw RGB, normalised like ImageNet's networks; mmdetection reads BGR
    data_preprocessor=dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True),
    backbone=dict(
        depth=50,
        style="pytorch",  # the stride lies in the 3 x 3 convolution
        frozen_stages=-1,  # the base freezes what ImageNet taught
        norm_eval=False,
        norm_cfg=dict(type="BN", eps=1e-05, requires_grad=True),
        init_cfg=dict(type="Pretrained", checkpoint="encoder.pth", prefix="img_backbone"),
    ),
)
