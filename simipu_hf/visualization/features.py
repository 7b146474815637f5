"""What the pictures show of a model: features as colours, cosine similarities, matches of two views."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from simipu_hf.data.rows import Frame
from simipu_hf.data.two_views import TwoViewAugmentation, two_view_sample
from simipu_hf.evaluation.correspondence import dense_image_embeds
from simipu_hf.modeling.geometry import FeatureGrid, project_points
from simipu_hf.modeling.image_encoder import TimmModel, feature_grids, image_feature_maps, sorted_stages
from simipu_hf.modeling.image_processing_simipu import SimIPUImageProcessor
from simipu_hf.modeling.matching import PendingMatch
from simipu_hf.modeling.modeling_simipu import SimIPUForPreTraining
from simipu_hf.modeling.processing_simipu import SimIPUProcessor

DARKEST = 0.15  # of a colour channel: black would be lost on a dark ground


def principal_directions(rows: np.ndarray) -> np.ndarray:
    """The directions `(D, 3)` of the largest variance of features `(R, D)`."""
    rows = rows.astype(np.float64)
    _, _, directions = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
    basis = np.zeros((rows.shape[1], 3))
    basis[:, : len(directions[:3])] = directions[:3].T
    # the sign of a direction is arbitrary: its largest component is made positive
    return basis * np.where(basis[np.abs(basis).argmax(0), range(3)] < 0, -1, 1)


def feature_colors(values: np.ndarray, basis: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Features `(..., D)` as colours `(..., 3)`, up to 1, along the directions `basis`.

    The colours span the 2nd to the 98th percentile of `rows`, `(R, D)`; a component that is rounding alone is halfway.
    """
    mean = rows.astype(np.float64).mean(0)
    low, high = np.percentile((rows - mean) @ basis, (2, 98), axis=0)
    span = np.where(high - low < 1e-5 * (high - low).max(), 0, high - low)  # less is rounding
    scaled = ((values - mean) @ basis - low) / np.where(span > 0, span, 1)
    return DARKEST + (1 - DARKEST) * np.where(span > 0, scaled, 0.5).clip(0, 1)


@dataclass(frozen=True)
class CellMap:
    """A feature map over an image.

    Args:
        values: `(h, w, D)`.
        pixels: `(h, w, 2)`, x and y of the cells' centres in the original image.
        cell_size: width and height of a cell in pixels of the original image.
        inside: `(h, w)`, cells that show a part of the image; the others lie in its padding.
    """

    values: np.ndarray
    pixels: np.ndarray
    cell_size: np.ndarray
    inside: np.ndarray


def cell_map(values: np.ndarray, grid: FeatureGrid, resize: np.ndarray, frame: Frame) -> CellMap:
    """Places a map of the processed image over the original image.

    Args:
        values: `(h, w, D)`.
        grid: where its cells lie in the processed image.
        resize: `(3, 3)`, pixels of the original to those of the processed image.
    """
    height, width = values.shape[:2]
    centers = grid.pixels((height, width)).double().numpy().reshape(height, width, 2)
    scale, shift = resize[[0, 1], [0, 1]], resize[:2, 2]
    pixels = (centers - shift) / scale
    cell_size = np.array([grid.stride_x, grid.stride_y]) / scale
    last_edge = np.array(frame.image.shape[1::-1]) - 0.5
    inside = (pixels + cell_size / 2 > -0.5).all(-1) & (pixels - cell_size / 2 < last_edge).all(-1)
    return CellMap(values, pixels, cell_size, inside)


@dataclass(frozen=True)
class FrameEmbeds:
    """One frame in the space in which the model compares image and points; all vectors have length 1.

    Args:
        cells: embeddings of the finest sampled stage's cells, `(h, w, D)`.
        coordinates: `(M, 3)`, the points the point encoder kept, metres, in the frame of the picture.
        points: `(M, D)`, their embeddings.
    """

    cells: CellMap
    coordinates: np.ndarray
    points: np.ndarray

    @cached_property
    def colors(self) -> tuple[np.ndarray, np.ndarray]:
        """Of the cells `(h, w, 3)` and of the points `(M, 3)`, along the principal components of the cells that show a
        part of the image.

        The model learnt to tell points apart within each modality, and image and points keep different means in that
        space; so the directions are common, the centre and the range are each one's own.
        """
        rows = self.cells.values[self.cells.inside]
        basis = principal_directions(rows)
        return feature_colors(self.cells.values, basis, rows), feature_colors(self.points, basis, self.points)

    def similarities(self, point: int) -> CellMap:
        """Cosine similarity of every cell of the image to one point, `(h, w, 1)`."""
        return replace(self.cells, values=self.cells.values @ self.points[point][:, None])


@torch.no_grad()
def embed_frame(
    model: SimIPUForPreTraining, processor: SimIPUProcessor, row: Mapping[str, Any], frame: Frame
) -> FrameEmbeds:
    """The inter-modal projections of a row, un-augmented; the model is in evaluation mode."""
    names = ("points", "camera_projection", "lidar_to_camera")
    batch = processor(images=frame.image, **{name: row[name] for name in names}).to(model.device)
    maps = model.simipu.get_image_features(batch["pixel_values"])
    padded_size = tuple(batch["pixel_values"].shape[-2:])
    embeds, grid = dense_image_embeds(model, maps, padded_size)
    values = embeds[0].unflatten(0, tuple(maps[0].shape[-2:])).cpu().numpy()
    resize = processor.image_processor.pixel_transform(frame.image.shape[:2])

    kept = model.simipu.get_point_features(batch["points"])
    coordinates, features = kept.coordinates[kept.mask], kept.features[kept.mask]
    points = model.inter_point_head(features.to(next(model.inter_point_head.parameters()).dtype))
    # whatever frame the model works in: where the points appear in the image says where they are
    pixels, depth = project_points(coordinates.double(), batch["lidar_to_pixel"][0].double())
    pixels = (pixels.cpu().numpy() - resize[:2, 2]) / resize[[0, 1], [0, 1]]
    return FrameEmbeds(
        cell_map(values, grid, resize, frame),
        frame.lift(pixels, depth.cpu().numpy()),
        F.normalize(points.float(), dim=-1).cpu().numpy(),
    )


@torch.no_grad()
def encode_image(
    encoder: TimmModel, image_processor: SimIPUImageProcessor, frame: Frame, stages: Sequence[int]
) -> dict[str, CellMap]:
    """Feature maps of a timm model's stages, named `"stage 2, stride 8"`; the encoder is in evaluation mode.

    Raises:
        ValueError: it is not known where the cells of a stage look.
    """
    device = next(encoder.parameters()).device
    batch = image_processor(frame.image, return_tensors="pt").to(device)
    resize = image_processor.pixel_transform(frame.image.shape[:2])
    maps, grids = image_feature_maps(encoder, batch["pixel_values"], stages), feature_grids(encoder, stages)
    return {
        f"stage {stage}, stride {round(grid.stride_y)}": cell_map(
            feature[0].permute(1, 2, 0).float().cpu().numpy(), grid, resize, frame
        )
        for stage, feature, grid in zip(sorted_stages(encoder, stages), maps, grids, strict=True)
    }


@dataclass(frozen=True)
class ViewMatches:
    """Two views of a scan and which of their points were matched.

    Args:
        view, augmented: `(M, 3)`, the points kept of each, metres, each in its own frame.
        match: `(M,)`, for each point of the view the row of its match in `augmented`.
        distance: `(M,)`, metres, measured in the view's frame; infinite where nothing was matched.
    """

    view: np.ndarray
    augmented: np.ndarray
    match: np.ndarray
    distance: np.ndarray


@torch.no_grad()
def match_views(
    model: SimIPUForPreTraining,
    processor: SimIPUProcessor,
    row: Mapping[str, Any],
    augmentation: TwoViewAugmentation,
) -> ViewMatches:
    """Draws two views of a row as in training and matches the points that the model keeps of each."""
    sample = two_view_sample(row, processor, augmentation, seed=0, epoch=0, index=0)
    points, points_aug, lidar_to_aug = (
        sample[name][None].to(model.device) for name in ("points", "points_aug", "lidar_to_aug")
    )
    view = model.simipu.get_point_features(points)
    augmented = model.simipu.get_point_features(points_aug)
    match, distance = PendingMatch(view, augmented, lidar_to_aug).result()
    arrays = (view.coordinates, augmented.coordinates, match, distance)
    return ViewMatches(*(array[0].cpu().numpy() for array in arrays))
