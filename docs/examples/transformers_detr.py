"""A transformers DETR whose backbone is a SimIPU encoder, from a folder or from the Hub.

python docs/examples/transformers_detr.py local-dir:OUT/image_encoder
python docs/examples/transformers_detr.py hf-hub:user/resnet50-simipu-kitti
"""

import sys

import timm
import torch
from transformers import DetrConfig, DetrForObjectDetection, TimmBackboneConfig


def build_detector(encoder: str, **config) -> DetrForObjectDetection:
    """A DETR on the last stage of `encoder`, a name that timm loads; `config` are fields of `DetrConfig`."""
    pyramid = timm.create_model(encoder, pretrained=True, features_only=True)
    if getattr(pyramid, "output_fmt", "NCHW") == "NHWC":
        raise ValueError(f"{encoder}: its maps have channels last; torchvision_detector.py takes them")
    last = len(pyramid.feature_info) - 1
    backbone = TimmBackboneConfig(backbone=encoder, out_indices=[last], features_only=True)
    detector = DetrForObjectDetection(DetrConfig(backbone_config=backbone, **config))
    # transformers builds the backbone anew and resets batch-norm statistics: load the encoder's weights behind it
    frozen = detector.model.backbone.model.load_state_dict(pyramid.state_dict(), strict=False)
    assert not frozen.missing_keys, frozen.missing_keys
    return detector


def made_up_batch(height: int, width: int) -> tuple[torch.Tensor, list[dict[str, torch.Tensor]]]:
    """In place of your data: images `(B, 3, height, width)`, and boxes (centre x, y, width, height) from 0 to 1."""
    labels = [{"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.4]])} for _ in range(2)]
    return torch.randn(2, 3, height, width), labels


def main(encoder: str, steps: int = 10, height: int = 192, width: int = 640, **config) -> list[float]:
    detector = build_detector(encoder, num_labels=3, **config).train()
    inside = {id(parameter) for parameter in detector.model.backbone.parameters()}
    rest = [parameter for parameter in detector.parameters() if id(parameter) not in inside]
    groups = [{"params": rest}, {"params": detector.model.backbone.parameters(), "lr": 1e-5}]
    optimizer = torch.optim.AdamW(groups, lr=1e-4)
    losses = []
    for _ in range(steps):
        pixel_values, labels = made_up_batch(height, width)
        loss = detector(pixel_values=pixel_values, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        print(f"loss {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main(sys.argv[1])
