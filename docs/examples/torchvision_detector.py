"""A torchvision Faster R-CNN with a feature pyramid on a SimIPU encoder, from a folder or from the Hub.

python docs/examples/torchvision_detector.py local-dir:OUT/image_encoder
python docs/examples/torchvision_detector.py hf-hub:user/resnet50-simipu-kitti
"""

import sys

import timm
import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool


class PyramidBackbone(nn.Module):
    """The encoder's four coarsest stages through a feature pyramid network of `out_channels` channels."""

    def __init__(self, encoder: str, out_channels: int = 256):
        super().__init__()
        maps = {"features_only": True, "feature_cls": "getter", "out_indices": [-4, -3, -2, -1]}  # channels first
        self.body = timm.create_model(encoder, pretrained=True, **maps)
        self.fpn = FeaturePyramidNetwork(self.body.feature_info.channels(), out_channels, LastLevelMaxPool())
        self.out_channels = out_channels

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.fpn({str(level): feature_map for level, feature_map in enumerate(self.body(images))})


def build_detector(encoder: str, height: int, width: int, **options) -> FasterRCNN:
    """Images of any size are resized so that they fit into `height` x `width`."""
    backbone = PyramidBackbone(encoder)
    data = timm.data.resolve_model_data_config(backbone.body)
    options |= {"image_mean": data["mean"], "image_std": data["std"], "min_size": height, "max_size": width}
    options["size_divisible"] = max(backbone.body.feature_info.reduction())  # the largest stride, or the patch
    return FasterRCNN(backbone, num_classes=4, **options)


def made_up_batch(height: int, width: int) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """In place of your data: RGB images from 0 to 1, and boxes (left, top, right, bottom) in pixels."""
    target = {"boxes": torch.tensor([[20.0, 10.0, 60.0, 50.0]]), "labels": torch.tensor([1])}
    return [torch.rand(3, height, width) for _ in range(2)], [target, target]


def main(encoder: str, steps: int = 10, height: int = 192, width: int = 640, **options) -> list[float]:
    detector = build_detector(encoder, height, width, **options).train()
    optimizer = torch.optim.SGD(detector.parameters(), lr=1e-3, momentum=0.9)
    losses = []
    for _ in range(steps):
        loss = sum(detector(*made_up_batch(height, width)).values())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        print(f"loss {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main(sys.argv[1])
