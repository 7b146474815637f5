"""Image processor of SimIPU: the image pipeline of pre-training, fine-tuning and inference."""

import copy
import functools
import io
import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.ExifTags
import PIL.Image
import torch
from PIL.Image import Image
from transformers import BatchFeature
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_utils import ChannelDimension, PILImageResampling, SizeDict
from transformers.processing_utils import ImagesKwargs, Unpack
from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from .geometry import image_boxes, pixel_transform


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
    batch = torch.empty(shape, dtype=dtype, device=images[0].device, memory_format=layout)
    if any(image.shape[-2:] != (height, width) for image in images):
        batch.zero_()
    for slot, image in zip(batch, images, strict=True):
        slot[:, : image.shape[-2], : image.shape[-1]] = image
    return batch


def open_unturned(image: Any) -> Any:
    """The image, opened where it is the path or the bytes of a file; what Pillow cannot read is returned as it is.

    Raises:
        ValueError: an image, or the file of one, that is to be turned by its EXIF orientation: whether a calibration
            is that of the pixels as they are stored or as they are shown cannot be told.
    """
    try:
        file = io.BytesIO(image) if isinstance(image, bytes) else image
        is_file = isinstance(image, bytes) or (isinstance(image, str | os.PathLike) and os.path.isfile(image))
        image = PIL.Image.open(file) if is_file else image
        orientation = image.getexif().get(PIL.ExifTags.Base.Orientation) if isinstance(image, Image) else None
    except Exception:  # `load_image` names it
        return image
    if orientation in range(2, 9):
        raise ValueError(
            f"EXIF orientation {orientation}: turn the pixels to what camera_projection speaks of, without the tag"
        )
    return image


def to_8_bits(image: Any) -> Any:
    """The image with 8 bits a channel; 16 bits are scaled to them, anything else is returned as it is.

    Raises:
        ValueError: at most 12 bits stored in 16, by the largest value of this image, 32-bit integers and booleans,
            which do not say what is white, or floats in a file.
    """
    mode = image.mode if isinstance(image, Image) else str(getattr(image, "dtype", "")).removeprefix("torch.")
    if mode.startswith("I;16") or mode == "uint16":
        values = image.numpy() if isinstance(image, torch.Tensor) else np.asarray(image)
        if 0 < values.max() < 2**12:  # all but black: what cameras of 8, 10 or 12 bits store in 16
            raise ValueError(f"expected 16 bits a channel, found values up to {values.max()}: scale them first")
        return (values / 257).round().astype(np.uint8)
    if mode in ("I", "F", "bool", "int8", "int16", "uint32", "int32", "uint64", "int64"):
        raise ValueError(f"expected 8 or 16 bits a channel, found mode {mode!r}: convert it first")
    return image


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
    """Crops, resizes, normalises and pads camera images.

        >>> image_processor = SimIPUImageProcessor(size={"height": 352, "width": 1216})
        >>> pixel_values = image_processor(image, return_tensors="pt")["pixel_values"]

    Calling it on one image or many (PIL, arrays or tensors, 0 to 255; 16-bit ones are scaled, floats from 0 to 1 take
    `do_rescale=False`) returns `pixel_values`
    (B, 3, H, W) float32, zero-padded on the right and at the bottom to the batch's largest image and to multiples of
    `pad_size_divisor`, and `image_sizes` (B, 2) int64, height and width of each image before padding. Images that are
    not RGB are converted. `crop_size` keeps the window of that height and width at the bottom centre of every image,
    where the road is (KITTI's depth benchmark: 352 x 1216), and comes before the resize. Values are those of the
    recommended preset; `SimIPUProcessor.from_preset` has the official ones.
    """

    valid_kwargs = SimIPUImageProcessorKwargs
    model_input_names = ["pixel_values", "image_sizes"]  # noqa: RUF012

    do_convert_rgb = True
    crop_size: Any = None
    do_resize = True
    size: Any = {"height": 384, "width": 1248}  # noqa: RUF012 (an instance's is a SizeDict)
    keep_aspect_ratio = False
    resample = PILImageResampling.BILINEAR
    do_flip_channel_order = False
    do_rescale = True
    rescale_factor = 1 / 255
    do_normalize = True
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    do_pad = True
    pad_size_divisor = 32
    half_pixel_centers = True

    def __init__(self, **kwargs: Unpack[SimIPUImageProcessorKwargs]) -> None:
        super().__init__(**kwargs)  # type: ignore[misc]  # it takes those of valid_kwargs
        if self.pad_size_divisor < 1:
            raise ValueError(f"pad_size_divisor: expected at least 1, found {self.pad_size_divisor}")

    def _standardize_kwargs(self, **kwargs: Any) -> dict:  # type: ignore[override]
        """transformers' form of settings; one mean, or one deviation, is that of every channel."""
        for name in ("image_mean", "image_std"):
            if isinstance(kwargs.get(name), int | float):
                kwargs[name] = (float(kwargs[name]),) * 3
        return super()._standardize_kwargs(**kwargs)

    def with_settings(self, **settings: Any) -> "SimIPUImageProcessor":
        """A copy of this processor with some settings changed.

        Raises:
            TypeError: a setting that there is none of.
        """
        if unknown := sorted(settings.keys() - set(self._valid_kwargs_names)):
            raise TypeError(f"SimIPUImageProcessor has no setting {unknown[0]!r}")
        changed = copy.copy(self)
        current = {name: getattr(self, name) for name in self._valid_kwargs_names}
        vars(changed).update(self._standardize_kwargs(**(current | settings)))
        return changed

    def load_image(self, image: Any) -> torch.Tensor:
        """An image, decoded and in RGB: (3, height, width), in its own data type (16 bits become 8).

        Raises:
            ValueError: the image cannot be read.
        """
        try:
            return self.process_image(self.fetch_images(image), do_convert_rgb=True)
        except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError and errors of its own
            raise ValueError(f"image: cannot be read as RGB ({type(error).__name__}: {error})") from error

    def process_image(self, image: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """transformers' conversion of one image to a tensor (C, height, width), of 16-bit images as well."""
        image = to_8_bits(image)
        if isinstance(image, np.ndarray):  # a view that is turned round, as of OpenCV's BGR, has negative strides
            image = np.ascontiguousarray(image)
        if isinstance(image, Image) and kwargs.get("do_convert_rgb"):
            pixels = np.array(image if image.mode == "RGB" else image.convert("RGB"))  # alpha is dropped, as of rows
        elif isinstance(image, np.ndarray) and image.shape[2:] == (3,) and len(image) > 4 and image.dtype == np.uint8:
            pixels = image
        else:
            return super().process_image(image, *args, **kwargs)
        # left channels-last in memory: torchvision resizes that three times as fast
        return torch.from_numpy(pixels).permute(2, 0, 1).to(kwargs.get("device"))

    def convert_to_rgb(self, image: Any, input_data_format: Any = None) -> Any:
        """transformers' conversion, but alpha of an array (C, height, width) is dropped, as of images of Pillow."""
        if input_data_format == ChannelDimension.FIRST and image.shape[0] == 4:
            image = image[:3]
        return super().convert_to_rgb(image, input_data_format)

    def crop_window(self, image_size: tuple[int, int]) -> tuple[int, int, int, int]:
        """Top, left, height and width of the part of an image of height and width `image_size` that is kept.

        Raises:
            ValueError: the image is smaller than `crop_size`.
        """
        if self.crop_size is None:
            return 0, 0, *image_size
        height, width = self.crop_size.height, self.crop_size.width
        top, left = image_size[0] - height, (image_size[1] - width) // 2
        if top < 0 or left < 0:
            raise ValueError(
                f"crop_size: expected an image of at least {height} x {width} pixels (height x width), found "
                f"{image_size[0]} x {image_size[1]}"
            )
        return top, left, height, width

    def output_size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Height and width, before padding, that an image of height and width `image_size` gets."""
        return self._resized_size(self.crop_window(image_size)[2:])

    def _resized_size(self, window_size: tuple[int, int]) -> tuple[int, int]:
        if not self.do_resize:
            return window_size
        if not (self.size.height and self.size.width):
            raise ValueError(f"size: expected height and width, found {dict(self.size)}")
        bounds = (self.size.height, self.size.width)
        return size_within(window_size, bounds) if self.keep_aspect_ratio else bounds

    def resize_image(
        self,
        image: torch.Tensor,
        window: tuple[int, int, int, int] | None = None,
        output_size: tuple[int, int] | None = None,
    ) -> torch.Tensor:
        """A window of an image (C, H, W), resized.

        Args:
            image: 0 to 255, in any data type.
            window: top, left, height and width; `None` takes this processor's crop.
            output_size: height and width; `None` takes those that this processor gives the window.
        """
        top, left, height, width = window or self.crop_window((image.shape[-2], image.shape[-1]))
        image = image[:, top : top + height, left : left + width]
        new_height, new_width = output_size or self._resized_size((height, width))
        if (new_height, new_width) == (height, width):
            return image
        return self.resize(image, SizeDict(height=new_height, width=new_width), self.resample)

    def pixel_transform(self, image_size: tuple[int, int]) -> np.ndarray:
        """What this processor does to the pixel coordinates of an image of height and width `image_size`, (3, 3)."""
        window = self.crop_window(image_size)
        return pixel_transform(window, self._resized_size(window[2:]), False, self.half_pixel_centers)

    def _preprocess(  # type: ignore[override]
        self, images: list[torch.Tensor], return_tensors: str | None = None, **settings: Any
    ) -> BatchFeature:
        processor = self.with_settings(**settings)
        for image in images:
            processor.check_floats(image)
        resized = [processor.resize_image(image) for image in images]
        image_sizes = torch.tensor([image.shape[-2:] for image in resized], device=resized[0].device)
        pixel_values: torch.Tensor | list[torch.Tensor]
        if processor.do_pad:
            padded = pad_to_largest(resized, processor.pad_size_divisor)
            pixel_values = processor.normalize_images(padded, image_sizes)
        else:
            pixel_values = [
                processor.normalize_images(image[None], size[None])[0]
                for image, size in zip(resized, image_sizes, strict=True)
            ]
        return BatchFeature({"pixel_values": pixel_values, "image_sizes": image_sizes}, tensor_type=return_tensors)

    def check_floats(self, image: torch.Tensor) -> None:
        """
        Raises:
            ValueError: floats from 0 to 1, or normalised ones, where this processor divides by 255 or subtracts a
                mean between 0 and 255.
        """
        expects_255 = self.do_rescale or (self.do_normalize and max(self.image_mean) > 1)
        if not (expects_255 and image.is_floating_point()):
            return
        low, high = (float(value) for value in image.aminmax())
        if not (low == high == 0 or 3 < high < 2 * 255):  # normalised images reach 2.7
            raise ValueError(
                f"expected an image from 0 to 255, found floats from {low:.3g} to {high:.3g}: scale it, or pass "
                "do_rescale=False for one from 0 to 1"
            )

    def normalize_images(self, images: torch.Tensor, image_sizes: torch.Tensor) -> torch.Tensor:
        """The `pixel_values` of images that are resized and padded, computed where they are.

        A data loader's workers can then leave it to the training device: bytes are a quarter of the size.

        Args:
            images: (B, 3, H, W) RGB, 0 to 255.
            image_sizes: (B, 2), height and width of each image before padding.

        Returns:
            (B, 3, H, W) float32, zero outside the images.
        """
        if self.do_flip_channel_order:
            images = images.flip(1)
        names = ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")
        settings = {name: getattr(self, name) for name in names}
        if not self.do_rescale:  # by 1, or mean and deviation would be copied to the device every time
            settings |= {"do_rescale": True, "rescale_factor": 1.0}
        pixels = self.rescale_and_normalize(images, **settings)
        rows, columns = (torch.arange(length, device=image_sizes.device) for length in images.shape[-2:])
        heights, widths = image_sizes[:, :, None, None, None].unbind(1)
        inside = (rows[:, None] < heights) & (columns < widths)
        return pixels.to(torch.float32).masked_fill(~inside, 0).contiguous()

    def post_process_depth_estimation(
        self, outputs: Any, target_sizes: torch.Tensor | Sequence[tuple[int, int]] | None = None
    ) -> list[dict[str, torch.Tensor]]:
        """Depth maps in the size of the original images, padding removed and the crop put back in its place.

        Args:
            outputs: a model output whose `predicted_depth` (B, H, W) covers the padded `pixel_values` of images that
                this processor made, with its own settings, at any resolution.
            target_sizes: height and width of each original image; without them the maps are returned as they are.

        Returns:
            One dictionary per image with `predicted_depth` (height, width), in the unit of the model; 0, which stands
            for no depth in every depth map, outside the window that `crop_size` keeps.

        Raises:
            ValueError: as many target sizes as depth maps are needed, none smaller than `crop_size`.
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
            top, left, height, width = self.crop_window(target)
            window = torch.nn.functional.interpolate(
                depth[None, None, :rows, :columns], size=(height, width), mode="bilinear", align_corners=False
            )[0, 0]
            placed = (left, target[1] - left - width, top, target[0] - top - height)
            results.append({"predicted_depth": torch.nn.functional.pad(window, placed)})
        return results

    def post_process_3d_object_detection(
        self,
        outputs: Any,
        camera_projections: Sequence[Any] | torch.Tensor,
        target_sizes: torch.Tensor | Sequence[tuple[int, int]],
        threshold: float = 0.1,
    ) -> list[dict[str, torch.Tensor]]:
        """Detections of the original images.

            >>> projection = image_processor.pixel_transform((image.height, image.width)) @ camera_projection
            >>> outputs = model(pixel_values, torch.from_numpy(projection)[None])
            >>> found = image_processor.post_process_3d_object_detection(
            ...     outputs, [camera_projection], [(image.height, image.width)]
            ... )[0]

        Args:
            outputs: a model output with `scores` (B, K), `labels` (B, K) and `boxes_3d` (B, K, 7).
            camera_projections: (3, 4) of each original image, rectified camera frame to pixels.
            target_sizes: height and width of each original image.
            threshold: least score.

        Returns:
            One dictionary per image: `scores` (n,), `labels` (n,); `boxes_3d` (n, 7): x, y, z of the middle of the
            bottom, height, width, length (metres) and `rotation_y` (radians) in the camera's frame; `boxes` (n, 4):
            left, top, right, bottom of its corners in the image, pixels; `alpha` (n,): observation angle, radians.
        """
        results = []
        for scores, labels, boxes_3d, projection, size in zip(
            outputs.scores, outputs.labels, outputs.boxes_3d, camera_projections, target_sizes, strict=True
        ):
            boxes = image_boxes(boxes_3d, torch.as_tensor(projection).to(boxes_3d), (int(size[0]), int(size[1])))
            visible = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
            kept = (scores > 0) & (scores >= threshold) & visible & (boxes_3d[:, 2] > 0)
            angle = boxes_3d[:, 6] - torch.atan2(boxes_3d[:, 0], boxes_3d[:, 2])
            alpha = torch.atan2(angle.sin(), angle.cos())
            columns = {"scores": scores, "labels": labels, "boxes_3d": boxes_3d, "boxes": boxes, "alpha": alpha}
            results.append({name: column[kept] for name, column in columns.items()})
        return results


SimIPUImageProcessor.register_for_auto_class("AutoImageProcessor")
