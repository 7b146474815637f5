"""Processor of SimIPU: camera images and LiDAR scans in, the tensors of a batch out."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature, ProcessorMixin

from .configuration_simipu import preset_values
from .feature_extraction_simipu import SimIPUFeatureExtractor, naming_row
from .image_processing_simipu import SimIPUImageProcessor, open_unturned

GEOMETRY = ("points", "points_aug", "lidar_to_aug", "lidar_to_pixel")


class SimIPUBatch(BatchFeature):
    """A batch whose geometry keeps its precision: in bfloat16 points would move by decimetres, pixels by several."""

    def to(self, *args: Any, **kwargs: Any) -> "SimIPUBatch":
        """As `BatchFeature.to`; a data type is that of `pixel_values` alone."""
        geometry = {
            name: value for name, value in self.items() if name in GEOMETRY and isinstance(value, torch.Tensor)
        }
        super().to(*args, **kwargs)
        self.update({name: value.to(self[name].device) for name, value in geometry.items()})
        return self


class SimIPUProcessor(ProcessorMixin):
    """Image processor and feature extractor together: rows in, a batch for [`SimIPUForPreTraining`] out.

    >>> processor = SimIPUProcessor.from_preset("recommended", image_size=(384, 1248))
    >>> batch = processor(image, scan, camera_projection, lidar_to_camera)
    """

    # transformers.Trainer asks every processor for the special tokens of its tokenizer; here there are none
    tokenizer = SimpleNamespace(eos_token_id=None, bos_token_id=None, pad_token_id=None)

    def __init__(self, image_processor: SimIPUImageProcessor, feature_extractor: SimIPUFeatureExtractor) -> None:
        super().__init__(image_processor, feature_extractor)

    @classmethod
    def from_preset(
        cls,
        preset: str = "recommended",
        image_size: Sequence[int] | None = None,
        num_points: int = 16384,
        depth_range: Sequence[float] | None = None,
    ) -> "SimIPUProcessor":
        """The processor of a preset.

        Args:
            preset: `"recommended"` (RGB, ImageNet mean and deviation, a fixed size, exact resize coordinates, the
                camera-aligned frame) or `"official"` (BGR minus a mean, ratio kept within the size, padded, the
                official code's coordinates, the LiDAR's frame).
            image_size: height and width; `None` takes the preset's.
            num_points: points drawn per scan.
            depth_range: nearest and farthest depth of points in metres; `None` takes the preset's.

        Raises:
            ValueError: an unknown preset, or a value outside its meaning.
        """
        image_values = preset_values(preset, "image_processor")
        point_values = preset_values(preset, "feature_extractor")
        if image_size is not None:
            if len(image_size) != 2 or min(image_size) < 1:
                raise ValueError(f"image_size: expected height and width in pixels, found {list(image_size)}")
            image_values["size"] = {"height": int(image_size[0]), "width": int(image_size[1])}
        if depth_range is not None:
            point_values["depth_range"] = depth_range
        return cls(SimIPUImageProcessor(**image_values), SimIPUFeatureExtractor(num_points, **point_values))

    def __call__(
        self,
        images: Any,
        points: Any = None,
        camera_projection: Any = None,
        lidar_to_camera: Any = None,
        frame_id: str | Sequence[str] | None = None,
        seed: int = 0,
        return_tensors: str | None = "pt",
        **images_kwargs: Any,
    ) -> BatchFeature:
        """Process one row, or lists of as many images, scans and calibrations as there are rows.

        Args:
            images: image(s): PIL, array, tensor, path, or the bytes of a file.
            points: scan(s): bytes of little-endian float32, array or tensor (N, 4): x, y, z in metres in the LiDAR
                frame, and reflectance. Without them only the images are processed.
            camera_projection: (3, 4) per row, rectified camera to pixels of the original image.
            lidar_to_camera: (4, 4) per row, LiDAR to rectified camera.
            frame_id: name(s) used in error messages.
            seed: of the drawing of points; the same row gives the same points wherever it stands in the batch.
            images_kwargs: settings of the image processor to change for this call.

        Returns:
            `pixel_values` (B, 3, H, W) and `image_sizes` (B, 2); with points also `points` and `points_aug`
            (B, num_points, 4), the same here, in the feature extractor's frame, `lidar_to_aug` (B, 4, 4), the
            identity, and `lidar_to_pixel` (B, 3, 4), from that frame to pixels of `pixel_values`;
            all of it on the `device` of `images_kwargs`, where one is given.

        Raises:
            ValueError: an image or scan that cannot be used, or a wrong calibration; the message names the row.
        """
        many = isinstance(images, list | tuple) or getattr(images, "ndim", 3) == 4
        images = images if many else [images]

        def per_row(name: str, value: Any) -> Sequence[Any]:
            values = value if many else [value]
            if len(values) != len(images):
                raise ValueError(f"{name}: expected one per image ({len(images)}), found {len(values)}")
            return values

        names = [f"row {row}" for row in range(len(images))] if frame_id is None else per_row("frame_id", frame_id)
        image_processor = self.image_processor.with_settings(**images_kwargs)
        loaded, sizes, transforms = [], [], []
        for name, image in zip(names, images, strict=True):
            with naming_row(name):
                if points is not None or isinstance(image, bytes):
                    image = open_unturned(image)
                loaded.append(image_processor.load_image(image))
                sizes.append(tuple(loaded[-1].shape[-2:]))
                transforms.append(image_processor.pixel_transform(sizes[-1]))
        batch = image_processor(loaded, input_data_format="channels_first", return_tensors=return_tensors)
        if points is None:
            return batch
        if camera_projection is None or lidar_to_camera is None:
            raise ValueError("points need camera_projection and lidar_to_camera")

        clouds = self.feature_extractor(
            list(per_row("points", points)),
            per_row("camera_projection", camera_projection),
            per_row("lidar_to_camera", lidar_to_camera),
            sizes,
            frame_id=names,
            seed=seed,
        )
        lidar_to_pixel = torch.from_numpy(np.stack(transforms)) @ clouds["lidar_to_pixel"]
        batch.update(
            {
                "points": clouds["points"],
                "points_aug": clouds["points"].clone(),
                "lidar_to_aug": torch.eye(4).repeat(len(loaded), 1, 1),
                "lidar_to_pixel": lidar_to_pixel.float(),
            }
        )
        batch = SimIPUBatch(batch.data).convert_to_tensors(return_tensors)
        return batch if image_processor.device is None else batch.to(image_processor.device)


SimIPUProcessor.register_for_auto_class("AutoProcessor")
