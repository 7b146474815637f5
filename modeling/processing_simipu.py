"""Processor of SimIPU: camera images and LiDAR scans in, the tensors of a batch out."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature, ProcessorMixin

from .feature_extraction_simipu import SimIPUFeatureExtractor, naming_row, to_point_cloud
from .geometry import pixel_transform, to_calibration
from .image_processing_simipu import IMAGE_PRESETS, SimIPUImageProcessor


class SimIPUProcessor(ProcessorMixin):
    """Image processor and point-cloud processor together: rows in, a batch for [`SimIPUForPreTraining`] out."""

    def __init__(self, image_processor: SimIPUImageProcessor, feature_extractor: SimIPUFeatureExtractor) -> None:
        super().__init__(image_processor, feature_extractor)

    @classmethod
    def from_preset(
        cls, preset: str = "recommended", image_size: Sequence[int] | None = None, num_points: int = 16384
    ) -> "SimIPUProcessor":
        """The processor of a preset.

        Args:
            preset: `"recommended"` (RGB, ImageNet mean and deviation, a fixed size, exact resize coordinates) or
                `"official"` (BGR minus a mean, ratio kept within the size, padded, the official code's coordinates).
            image_size: height and width; `None` takes the preset's.
            num_points: points drawn per scan.

        Raises:
            ValueError: an unknown preset, or an image size that is not two positive integers.
        """
        if preset not in IMAGE_PRESETS:
            raise ValueError(f"unknown preset {preset!r}: choose from {', '.join(IMAGE_PRESETS)}")
        values = dict(IMAGE_PRESETS[preset])
        if image_size is not None:
            if len(image_size) != 2 or min(image_size) < 1:
                raise ValueError(f"image_size: expected height and width in pixels, found {list(image_size)}")
            values["size"] = {"height": int(image_size[0]), "width": int(image_size[1])}
        return cls(SimIPUImageProcessor(**values), SimIPUFeatureExtractor(num_points=num_points))

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
            images: image(s): PIL, array or tensor.
            points: scan(s): bytes of little-endian float32, array or tensor (N, 4): x, y, z in metres in the LiDAR
                frame, and reflectance. Without them only the images are processed.
            camera_projection: (3, 4) per row, rectified camera to pixels of the original image.
            lidar_to_camera: (4, 4) per row, LiDAR to rectified camera.
            frame_id: name(s) used in error messages.
            seed: of the drawing of points; the same row gives the same points wherever it stands in the batch.
            images_kwargs: settings of the image processor to change for this call.

        Returns:
            `pixel_values` (B, 3, H, W) and `image_sizes` (B, 2); with points also `points` and `points_aug`
            (B, num_points, 4), the same here, `lidar_to_aug` (B, 4, 4), the identity, and `lidar_to_pixel` (B, 3, 4).

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
        loaded = []
        for name, image in zip(names, images, strict=True):
            with naming_row(name):
                loaded.append(self.image_processor.load_image(image))
        half_pixel_centers = images_kwargs.pop("half_pixel_centers", self.image_processor.half_pixel_centers)
        batch = self.image_processor(
            loaded, input_data_format="channels_first", return_tensors=return_tensors, **images_kwargs
        )
        if points is None:
            return batch
        if camera_projection is None or lidar_to_camera is None:
            raise ValueError("points need camera_projection and lidar_to_camera")

        points = per_row("points", points)
        projections = per_row("camera_projection", camera_projection)
        extrinsics = per_row("lidar_to_camera", lidar_to_camera)
        clouds, matrices = [], []
        for row, name in enumerate(names):
            height, width = image_size = loaded[row].shape[-2], loaded[row].shape[-1]
            with naming_row(name):
                cloud, lidar_to_image = self.load_points(points[row], projections[row], extrinsics[row], image_size)
            clouds.append(self.feature_extractor.draw(cloud, np.random.default_rng(seed)))
            output_height, output_width = (int(length) for length in batch["image_sizes"][row])
            resize = pixel_transform((0, 0, height, width), (output_height, output_width), False, half_pixel_centers)
            matrices.append(resize @ lidar_to_image)

        cloud_batch = torch.from_numpy(np.stack(clouds))
        batch.update(
            {
                "points": cloud_batch,
                "points_aug": cloud_batch.clone(),
                "lidar_to_aug": torch.eye(4).repeat(len(clouds), 1, 1),
                "lidar_to_pixel": torch.from_numpy(np.stack(matrices)).to(torch.float32),
            }
        )
        return batch.convert_to_tensors(return_tensors)

    def load_points(
        self, points: Any, camera_projection: Any, lidar_to_camera: Any, image_size: tuple[int, int]
    ) -> tuple[np.ndarray, np.ndarray]:
        """The usable points of a scan, (M, 4) float32 in their order, and LiDAR to pixels, (3, 4) float64.

        Both are about the original image, of height and width `image_size`.

        Raises:
            ValueError: a damaged scan, a wrong calibration, or no point in range and in the image.
        """
        camera_projection, lidar_to_camera = to_calibration(camera_projection, lidar_to_camera)
        lidar_to_image = camera_projection @ lidar_to_camera
        return self.feature_extractor.filter(to_point_cloud(points), lidar_to_image, image_size), lidar_to_image


SimIPUProcessor.register_for_auto_class("AutoProcessor")
