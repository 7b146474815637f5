"""Image processor of SimIPU: the image pipeline of pre-training, fine-tuning and inference."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from transformers import BatchFeature
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_utils import PILImageResampling, SizeDict
from transformers.processing_utils import ImagesKwargs, Unpack

from .geometry import content_mask

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# Only what differs from the class attributes below, which are the recommended preset.
IMAGE_PRESETS: dict[str, dict[str, Any]] = {
    "recommended": {},
    "official": {
        "size": {"height": 384, "width": 1280},
        "keep_aspect_ratio": True,
        "do_flip_channel_order": True,
        "do_rescale": False,
        "image_mean": [103.53, 116.28, 123.675],
        "image_std": [1.0, 1.0, 1.0],
        "half_pixel_centers": False,
    },
}


def size_within(image_size: tuple[int, int], bounds: tuple[int, int]) -> tuple[int, int]:
    """The largest (height, width) with the ratio of `image_size` that fits into `bounds`, rounded to pixels."""
    scale = min(bound / length for bound, length in zip(bounds, image_size, strict=True))
    height, width = (max(1, int(length * scale + 0.5)) for length in image_size)
    return height, width


def pad_to_largest(images: Sequence[torch.Tensor], divisor: int = 32) -> torch.Tensor:
    """Stack images (C, h, w) into (B, C, H, W), zeros right and below, H and W multiples of `divisor`."""
    height, width = (math.ceil(max(image.shape[axis] for image in images) / divisor) * divisor for axis in (-2, -1))
    shape = (len(images), images[0].shape[0], height, width)
    dtype = functools.reduce(torch.promote_types, (image.dtype for image in images))
    # Decoded images have their channels last in memory; to reorder them here would cost as much as the resize.
    layout = torch.contiguous_format if images[0].is_contiguous() else torch.channels_last
    batch = torch.empty(shape, dtype=dtype, device=images[0].device, memory_format=layout).zero_()
    for slot, image in zip(batch, images, strict=True):
        slot[:, : image.shape[-2], : image.shape[-1]] = image
    return batch


class SimIPUImageProcessorKwargs(ImagesKwargs, total=False):
    """
    keep_aspect_ratio (`bool`): resize within `size` instead of to `size`.
    do_flip_channel_order (`bool`): RGB to BGR.
    pad_size_divisor (`int`): height and width of `pixel_values` are multiples of it.
    half_pixel_centers (`bool`): how a resize moves pixel coordinates, see `pixel_transform`.
    """

    keep_aspect_ratio: bool
    do_flip_channel_order: bool
    pad_size_divisor: int
    half_pixel_centers: bool


class SimIPUImageProcessor(TorchvisionBackend):
    """Resizes, normalises and pads camera images.

    Calling it on one image or many (PIL, arrays or tensors, 0 to 255) returns `pixel_values` (B, 3, H, W) float32,
    zero-padded on the right and at the bottom to the batch's largest image and to multiples of `pad_size_divisor`,
    and `image_sizes` (B, 2) int64, height and width of each image before padding. Images that are not RGB are
    converted. Values are those of the recommended preset; `SimIPUProcessor.from_preset` has the official ones.
    """

    valid_kwargs = SimIPUImageProcessorKwargs
    model_input_names = ["pixel_values", "image_sizes"]  # noqa: RUF012

    do_convert_rgb = True
    do_resize = True
    size: Any = {"height": 384, "width": 1248}  # noqa: RUF012 (an instance's is a SizeDict)
    keep_aspect_ratio = False
    resample = PILImageResampling.BILINEAR
    do_flip_channel_order = False
    do_rescale = True
    rescale_factor = 1 / 255
    do_normalize = True
    image_mean = IMAGENET_MEAN
    image_std = IMAGENET_STD
    do_pad = True
    pad_size_divisor = 32
    half_pixel_centers = True

    def __init__(self, **kwargs: Unpack[SimIPUImageProcessorKwargs]) -> None:
        super().__init__(**kwargs)

    def load_image(self, image: Any) -> torch.Tensor:
        """An image, decoded and in RGB: (3, height, width), in its own data type.

        Raises:
            ValueError: the image cannot be read.
        """
        try:
            if isinstance(image, Image) and image.mode == "RGB":
                # Left channels-last in memory: torchvision resizes that three times as fast.
                return torch.from_numpy(np.array(image)).permute(2, 0, 1)
            return self.process_image(self.fetch_images(image), do_convert_rgb=True)
        except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError and errors of its own
            raise ValueError(f"image: cannot be read as RGB ({type(error).__name__}: {error})") from error

    def output_size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Height and width, before padding, to which an image of height and width `image_size` is resized."""
        if not self.do_resize:
            return image_size
        return _resized_size(image_size, self.size, self.keep_aspect_ratio)

    def _preprocess(  # type: ignore[override]  # called by name, with the values of valid_kwargs
        self,
        images: list[torch.Tensor],
        do_resize: bool,
        size: SizeDict,
        keep_aspect_ratio: bool,
        resample: Any,
        do_flip_channel_order: bool,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: list[float],
        image_std: list[float],
        do_pad: bool,
        pad_size_divisor: int,
        return_tensors: str | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        resized = []
        for image in images:
            if do_resize:
                height, width = _resized_size((image.shape[-2], image.shape[-1]), size, keep_aspect_ratio)
                image = self.resize(image, SizeDict(height=height, width=width), resample)
            resized.append(image)
        image_sizes = torch.tensor([image.shape[-2:] for image in resized], device=resized[0].device)
        settings = {
            "do_flip_channel_order": do_flip_channel_order,
            "do_rescale": do_rescale,
            "rescale_factor": rescale_factor,
            "do_normalize": do_normalize,
            "image_mean": image_mean,
            "image_std": image_std,
        }
        pixel_values = (
            self.normalize_images(pad_to_largest(resized, pad_size_divisor), image_sizes, **settings)
            if do_pad
            else [
                self.normalize_images(image[None], size[None], **settings)[0]
                for image, size in zip(resized, image_sizes, strict=True)
            ]
        )
        return BatchFeature({"pixel_values": pixel_values, "image_sizes": image_sizes}, tensor_type=return_tensors)

    def normalize_images(self, images: torch.Tensor, image_sizes: torch.Tensor, **settings: Any) -> torch.Tensor:
        """The `pixel_values` of images that are resized and padded, computed where they are.

        A data loader's workers can then leave it to the training device: bytes are a quarter of the size.

        Args:
            images: (B, 3, H, W) RGB, 0 to 255.
            image_sizes: (B, 2), height and width of each image before padding.
            settings: what to change of this processor's own for this call.

        Returns:
            (B, 3, H, W) float32, zero outside the images.
        """
        names = ("do_flip_channel_order", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")
        settings = {name: getattr(self, name) for name in names} | settings
        if settings.pop("do_flip_channel_order"):
            images = images.flip(1)
        pixels = self.rescale_and_normalize(images, **settings)
        padded_size = (images.shape[-2], images.shape[-1])
        inside = content_mask(image_sizes, padded_size)
        return pixels.to(torch.float32).masked_fill(~inside, 0).contiguous()

    def post_process_depth_estimation(
        self, outputs: Any, target_sizes: torch.Tensor | Sequence[tuple[int, int]] | None = None
    ) -> list[dict[str, torch.Tensor]]:
        """Depth maps in the size of the original images, padding removed.

        Args:
            outputs: a model output whose `predicted_depth` (B, H, W) covers the padded `pixel_values` of images that
                this processor made, with its own settings, at any resolution.
            target_sizes: height and width of each original image; without them the maps are returned as they are.

        Returns:
            One dictionary per image with `predicted_depth` (height, width), in the unit of the model.

        Raises:
            ValueError: as many target sizes as depth maps are needed.
        """
        depths = outputs.predicted_depth
        if target_sizes is None:
            return [{"predicted_depth": depth} for depth in depths]
        if len(target_sizes) != len(depths):
            raise ValueError(f"expected one target size per depth map, found {len(target_sizes)} for {len(depths)}")
        targets = [(int(height), int(width)) for height, width in target_sizes]
        contents = [self.output_size(target) for target in targets]
        divisor = self.pad_size_divisor if self.do_pad else 1
        padded = [math.ceil(max(lengths) / divisor) * divisor for lengths in zip(*contents, strict=True)]
        results = []
        for depth, content, target in zip(depths, contents, targets, strict=True):
            rows, columns = (
                max(1, round(cells * length / whole))
                for cells, length, whole in zip(depth.shape, content, padded, strict=True)
            )
            depth = torch.nn.functional.interpolate(
                depth[None, None, :rows, :columns], size=target, mode="bilinear", align_corners=False
            )
            results.append({"predicted_depth": depth[0, 0]})
        return results


def _resized_size(image_size: tuple[int, int], size: SizeDict, keep_aspect_ratio: bool) -> tuple[int, int]:
    if not (size.height and size.width):
        raise ValueError(f"size: expected height and width, found {dict(size)}")
    bounds = (size.height, size.width)
    return size_within(image_size, bounds) if keep_aspect_ratio else bounds


SimIPUImageProcessor.register_for_auto_class("AutoImageProcessor")
