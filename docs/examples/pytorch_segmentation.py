"""A plain PyTorch training loop: road segmentation from the feature pyramid of a SimIPU encoder.

python docs/examples/pytorch_segmentation.py local-dir:OUT/image_encoder
python docs/examples/pytorch_segmentation.py hf-hub:user/resnet50-simipu-kitti
"""

import sys

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Segmenter(nn.Module):
    """Every stage of the encoder to one width, to the finest stage's size, summed, classified."""

    def __init__(self, encoder: str, num_classes: int, width: int = 128):
        super().__init__()
        # "getter": channels first for every family, Swin too
        self.encoder = timm.create_model(encoder, pretrained=True, features_only=True, feature_cls="getter")
        self.reduce = nn.ModuleList(nn.Conv2d(count, width, 1) for count in self.encoder.feature_info.channels())
        self.head = nn.Sequential(nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU())
        self.classify = nn.Conv2d(width, num_classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        maps = [reduce(feature_map) for reduce, feature_map in zip(self.reduce, self.encoder(images), strict=True)]
        total = sum(F.interpolate(m, maps[0].shape[-2:], mode="bilinear") for m in maps)
        return F.interpolate(self.classify(self.head(total)), images.shape[-2:], mode="bilinear")


def made_up_batch(height: int, width: int) -> tuple[Tensor, Tensor]:
    """In place of your data: normalised images, and a class for every pixel; here the lower half is road."""
    labels = (torch.arange(height) > height // 2).long()[:, None].expand(2, height, width)
    return torch.randn(2, 3, height, width) + labels[:, None], labels


def main(encoder: str, steps: int = 10, height: int = 192, width: int = 640) -> list[float]:
    model = Segmenter(encoder, num_classes=2).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(steps):
        images, labels = made_up_batch(height, width)
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        print(f"loss {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main(sys.argv[1])
