"""Processor of SimIPU: camera images and LiDAR scans in, the tensors of a batch out.

Pixel coordinates: an integer is the centre of a pixel, as in OpenCV and KITTI. Everything that happens to an image
(crop, resize, mirror) is one 3 x 3 matrix on pixel coordinates and is folded into `lidar_to_pixel`; padding is on the
right and at the bottom and moves nothing.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from transformers import BatchFeature, FeatureExtractionMixin, ProcessorMixin
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_utils import PILImageResampling, SizeDict
from transformers.processing_utils import ImagesKwargs, Unpack

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


def pixel_transform(
    crop: tuple[int, int, int, int], output_size: tuple[int, int], mirrored: bool, half_pixel_centers: bool
) -> np.ndarray:
    """What cropping, then resizing, then mirroring an image does to pixel coordinates.

    Args:
        crop: top, left, height and width of the window that is kept, in pixels of the original image.
        output_size: height and width to which the window is resized.
        mirrored: the result is mirrored left to right.
        half_pixel_centers: true for the exact map of a resize whose pixels are areas, `x' = (x + 0.5) s - 0.5`,
            and of a mirror, `x' = width - 1 - x`; false for the official code's `x' = x s` and `x' = width - x`.

    Returns:
        (3, 3) float64, homogeneous: `x_new = matrix @ [x, y, 1]`.
    """
    top, left, crop_height, crop_width = crop
    height, width = output_size
    scale_x, scale_y = width / crop_width, height / crop_height
    center = 0.5 if half_pixel_centers else 0.0
    matrix = np.array(
        [
            [scale_x, 0.0, (center - left) * scale_x - center],
            [0.0, scale_y, (center - top) * scale_y - center],
            [0.0, 0.0, 1.0],
        ]
    )
    if mirrored:
        matrix[0] *= -1
        matrix[0, 2] += width - 2 * center
    return matrix


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


def inside_images(image_sizes: torch.Tensor, padded_size: tuple[int, int]) -> torch.Tensor:
    """(B, 1, H, W) bool: which pixels of padded images belong to the images of `image_sizes` (B, 2)."""
    rows, columns = (torch.arange(length, device=image_sizes.device) for length in padded_size)
    heights, widths = image_sizes[:, None].unbind(-1)
    return ((rows < heights)[:, :, None] & (columns < widths)[:, None, :])[:, None]


def to_point_cloud(points: Any) -> np.ndarray:
    """Points as (N, 4) float32, checked: x, y, z in metres and reflectance.

    Args:
        points: bytes of little-endian float32 records of four, or an array or tensor (N, 4).

    Raises:
        ValueError: half a record, another shape, or NaN or infinite values.
    """
    if isinstance(points, bytes | bytearray | memoryview):
        size = memoryview(points).nbytes
        if size % 16:
            raise ValueError(f"points: expected the bytes of whole points, 16 (four float32) each, found {size} bytes")
        cloud = np.frombuffer(points, dtype="<f4").reshape(-1, 4)
    else:
        if isinstance(points, torch.Tensor):
            points = points.detach().cpu().numpy()
        cloud = np.asarray(points, dtype=np.float32)
    if cloud.ndim != 2 or cloud.shape[1] != 4:
        raise ValueError(f"points: expected shape (N, 4), x y z reflectance, found {cloud.shape}")
    finite = np.isfinite(cloud)
    if not finite.all():
        bad = ~finite.all(axis=1)
        raise ValueError(
            f"points: expected finite values, found {bad.sum()} of {len(cloud)} with NaN or infinity, the first at "
            f"index {bad.argmax()}"
        )
    return cloud


def project_points(points: np.ndarray, lidar_to_image: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Homogeneous pixel coordinates of points: u * depth, v * depth and depth, (N,) each, in the points' data type.

    Args:
        points: (N, 3) or more columns: x y z in metres, LiDAR frame.
        lidar_to_image: (3, 4), LiDAR to pixels.
    """
    # No matrix product: NumPy's starts threads of its own in every worker of a data loader, and they halve what
    # several workers reach together.
    x, y, z = points[:, 0], points[:, 1], points[:, 2]
    u, v, depth = (a * x + b * y + c * z + d for a, b, c, d in np.asarray(lidar_to_image, points.dtype))
    return u, v, depth


def to_calibration(camera_projection: Any, lidar_to_camera: Any) -> tuple[np.ndarray, np.ndarray]:
    """The two calibration matrices in float64, checked.

    Args:
        camera_projection: (3, 4), rectified camera to pixels.
        lidar_to_camera: (4, 4), LiDAR to rectified camera, homogeneous.

    Raises:
        ValueError: no numbers, a wrong shape, values that are not finite, or a last row that is not 0 0 0 1.
    """
    matrices = []
    for name, matrix, shape in (
        ("camera_projection", camera_projection, (3, 4)),
        ("lidar_to_camera", lidar_to_camera, (4, 4)),
    ):
        if isinstance(matrix, torch.Tensor):
            matrix = matrix.detach().cpu().numpy()
        try:
            matrix = np.asarray(matrix, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name}: expected a matrix {shape}, found {matrix!r}") from error
        if matrix.shape != shape:
            raise ValueError(f"{name}: expected shape {shape}, found {matrix.shape}")
        if not np.isfinite(matrix).all():
            raise ValueError(f"{name}: expected finite values, found NaN or infinity")
        matrices.append(matrix)
    if not np.allclose(matrices[1][3], (0, 0, 0, 1)):
        raise ValueError(f"lidar_to_camera: expected the last row 0 0 0 1, found {matrices[1][3].tolist()}")
    return matrices[0], matrices[1]


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
        inside = inside_images(image_sizes, padded_size)
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


class SimIPUPointCloudProcessor(FeatureExtractionMixin):
    """Filters LiDAR scans and draws a fixed number of points.

    Args:
        num_points: points per cloud, drawn without replacement where the cloud has enough, else with.
        point_cloud_range: x, y, z minimum, then maximum, in metres in the LiDAR frame; points strictly inside are
            kept. `None` keeps all. The default is the official configuration's.
        do_filter_field_of_view: keep only points that the camera sees: in front of it and between the centres of the
            outermost pixels of the original image.
    """

    model_input_names = ["points"]  # noqa: RUF012

    def __init__(
        self,
        num_points: int = 16384,
        point_cloud_range: Sequence[float] | None = (0.0, -40.0, -3.0, 70.4, 40.0, 1.0),
        do_filter_field_of_view: bool = True,
        **kwargs: Any,
    ) -> None:
        if num_points < 1:
            raise ValueError(f"num_points: expected at least 1, found {num_points}")
        if point_cloud_range is not None:
            low, high = point_cloud_range[:3], point_cloud_range[3:]
            if len(point_cloud_range) != 6 or any(a >= b for a, b in zip(low, high, strict=True)):
                raise ValueError(
                    f"point_cloud_range: expected x y z minimum, then maximum, found {list(point_cloud_range)}"
                )
            point_cloud_range = [float(bound) for bound in point_cloud_range]
        self.num_points = num_points
        self.point_cloud_range = point_cloud_range
        self.do_filter_field_of_view = do_filter_field_of_view
        super().__init__(**kwargs)

    def filter(
        self,
        points: np.ndarray,
        lidar_to_image: np.ndarray | None = None,
        image_size: tuple[int, int] | None = None,
    ) -> np.ndarray:
        """Points inside the range and, where `lidar_to_image` is given, seen by the camera; their order is kept.

        Args:
            points: (N, 4).
            lidar_to_image: (3, 4), LiDAR to pixels of the original image.
            image_size: height and width of the original image.

        Raises:
            ValueError: no point is left, or `lidar_to_image` comes without `image_size`.
        """
        kept = points
        if self.point_cloud_range is not None:
            x, y, z = points[:, 0], points[:, 1], points[:, 2]
            x_min, y_min, z_min, x_max, y_max, z_max = self.point_cloud_range
            inside = (x > x_min) & (x < x_max) & (y > y_min) & (y < y_max) & (z > z_min) & (z < z_max)
            kept = points.compress(inside, axis=0)  # several times faster than points[inside]
        in_range = len(kept)
        if self.do_filter_field_of_view and lidar_to_image is not None:
            if image_size is None:
                raise ValueError("image_size: expected height and width beside lidar_to_image, found None")
            height, width = image_size
            # comparing the products needs no division; single precision is good to a thousandth of a pixel
            u, v, depth = project_points(kept, lidar_to_image)
            seen = (depth > 0) & (u >= 0) & (u <= (width - 1) * depth) & (v >= 0) & (v <= (height - 1) * depth)
            kept = kept.compress(seen, axis=0)
        if len(kept) == 0:
            raise ValueError(
                f"no usable point: of {len(points)} points {in_range} are inside point_cloud_range "
                f"{self.point_cloud_range} and none of these projects into the image"
                if in_range
                else f"no usable point: none of {len(points)} points is inside point_cloud_range "
                f"{self.point_cloud_range}"
            )
        return kept

    def draw(self, points: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """`num_points` of the points (N, 4), in random order: each at most once where there are enough."""
        enough = len(points) >= self.num_points
        return points.take(generator.choice(len(points), self.num_points, replace=not enough), axis=0)

    def __call__(self, points: Any, seed: int = 0, return_tensors: str | None = "pt") -> BatchFeature:
        """Range filter and drawing for one scan or a list of scans (the field of view needs `SimIPUProcessor`).

        Args:
            points: bytes, array or tensor (N, 4), or a list of these.
            seed: of the drawing; the same scan gives the same points wherever it stands in the batch.

        Returns:
            `points` (B, num_points, 4) float32.

        Raises:
            ValueError: names the row, what was expected and what was found.
        """
        clouds = []
        for row, scan in enumerate(points if isinstance(points, list | tuple) else [points]):
            with _naming(f"row {row}"):
                clouds.append(self.draw(self.filter(to_point_cloud(scan)), np.random.default_rng(seed)))
        return BatchFeature({"points": torch.from_numpy(np.stack(clouds))}, tensor_type=return_tensors)


class SimIPUProcessor(ProcessorMixin):
    """Image processor and point-cloud processor together: rows in, a batch for [`SimIPUForPreTraining`] out."""

    def __init__(self, image_processor: SimIPUImageProcessor, feature_extractor: SimIPUPointCloudProcessor) -> None:
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
        return cls(SimIPUImageProcessor(**values), SimIPUPointCloudProcessor(num_points=num_points))

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
            with _naming(name):
                loaded.append(self.load_image(image))
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
            with _naming(name):
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

    def load_image(self, image: Any) -> torch.Tensor:
        """An image, decoded and in RGB: (3, height, width), in its own data type.

        Raises:
            ValueError: the image cannot be read.
        """
        try:
            if isinstance(image, Image) and image.mode == "RGB":
                # Left channels-last in memory: torchvision resizes that three times as fast.
                return torch.from_numpy(np.array(image)).permute(2, 0, 1)
            return self.image_processor.process_image(self.image_processor.fetch_images(image), do_convert_rgb=True)
        except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError and errors of its own
            raise ValueError(f"image: cannot be read as RGB ({type(error).__name__}: {error})") from error

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


@contextmanager
def _naming(row: str) -> Iterator[None]:
    """Puts the row's name before the message of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{row}: {error}") from error


SimIPUImageProcessor.register_for_auto_class("AutoImageProcessor")
SimIPUPointCloudProcessor.register_for_auto_class("AutoFeatureExtractor")
SimIPUProcessor.register_for_auto_class("AutoProcessor")
