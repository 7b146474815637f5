"""How much depth an image encoder's features hold, read off by a linear map: exact, and seconds of work.

Log-depth is regressed on the concatenated feature maps by ridge regression. Nothing is trained by gradient descent, so
there is no learning rate, schedule or initialisation between the features and the answer.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from simipu_hf.data.depth import DepthFrame
from simipu_hf.data.frames import to_pixel_values
from simipu_hf.modeling.geometry import sample_feature_map
from simipu_hf.modeling.image_encoder import TimmModel, feature_grids, image_feature_maps, pad_to_divisor
from simipu_hf.modeling.image_processing_simipu import SimIPUImageProcessor


@dataclass(frozen=True)
class LinearDepthProbe:
    """log(depth) = bias + weight · features, at every pixel.

    Args:
        encoder: a timm model in evaluation mode.
        stages: whose maps are concatenated.
        weight: `(C,)`, C over all stages.
        bias: log of metres.
    """

    encoder: TimmModel
    stages: tuple[int, ...]
    weight: torch.Tensor
    bias: float

    @torch.no_grad()
    def predict(self, frame: DepthFrame, processor: SimIPUImageProcessor) -> np.ndarray:
        """Depth in metres at every pixel of the ground truth, `(H, W)` float32; 0 outside the processor's crop."""
        maps = _feature_maps(self.encoder, frame, processor, self.stages)
        weights = self.weight.to(maps[0].dtype).split([feature.shape[1] for feature in maps])
        top, left, height, width = frame.window
        rows, columns = np.indices((height, width)).reshape(2, -1)
        pixels = _pixels_of(rows, columns, (height, width), frame.image.shape[:2])
        log_depth = torch.tensor(self.bias, dtype=maps[0].dtype)
        # a linear map commutes with bilinear interpolation: one channel is sampled instead of all
        for feature, weight, grid in zip(maps, weights, feature_grids(self.encoder, self.stages), strict=True):
            part = torch.einsum("bchw,c->bhw", feature, weight)[:, None]
            log_depth = log_depth + sample_feature_map(part, grid.cells(pixels)).view(height, width)
        whole = np.zeros(frame.depth.shape, np.float32)
        whole[top : top + height, left : left + width] = log_depth.exp().numpy()
        return whole


@torch.no_grad()
def fit_linear_depth_probe(
    encoder: TimmModel,
    frames: Sequence[DepthFrame],
    processor: SimIPUImageProcessor,
    stages: Sequence[int] = (-3, -2, -1),
    ridge: float = 0.1,
    pixels_per_frame: int = 500,
    seed: int = 0,
) -> LinearDepthProbe:
    """Ridge regression of log-depth at pixels with known depth on the features interpolated there.

    probe = fit_linear_depth_probe(encoder, train_frames, processor)
    depth = probe.predict(test_frame, processor)

    Args:
        encoder: a timm model on the CPU; it is put into evaluation mode.
        frames: with depth.
        processor: with which the frames were prepared.
        stages: of the encoder.
        ridge: penalty on the weights of standardised features, whose mean squared error is minimised.
        pixels_per_frame: drawn at random where more are known.
        seed: of the drawing.
    """
    encoder.eval()
    grids = feature_grids(encoder, stages)
    generator = np.random.default_rng(seed)
    gram = moment = torch.zeros((), dtype=torch.float64)
    for frame in frames:
        rows, columns = np.nonzero(frame.target)
        drawn = generator.permutation(len(rows))[:pixels_per_frame]
        rows, columns = rows[drawn], columns[drawn]
        maps = _feature_maps(encoder, frame, processor, stages)
        pixels = _pixels_of(rows, columns, frame.target.shape, frame.image.shape[:2])
        sampled = [sample_feature_map(m, grid.cells(pixels))[0] for m, grid in zip(maps, grids, strict=True)]
        features = torch.cat(sampled, dim=1).double()
        features = F.pad(features, (0, 1), value=1.0)  # the last column counts
        log_depth = torch.from_numpy(np.log(frame.target[rows, columns])).double()
        gram, moment = gram + features.T @ features, moment + features.T @ log_depth
    gram, moment = gram / gram[-1, -1], moment / gram[-1, -1]
    mean, mean_log_depth = gram[-1, :-1], moment[-1]
    covariance = gram[:-1, :-1] - torch.outer(mean, mean)
    deviation = covariance.diagonal().clamp(min=1e-12).sqrt()
    penalty = ridge * torch.diag(deviation**2)
    weight = torch.linalg.solve(covariance + penalty, moment[:-1] - mean * mean_log_depth)
    return LinearDepthProbe(encoder, tuple(stages), weight, float(mean_log_depth - weight @ mean))


def _feature_maps(
    encoder: TimmModel, frame: DepthFrame, processor: SimIPUImageProcessor, stages: Sequence[int]
) -> tuple[torch.Tensor, ...]:
    pixel_values = pad_to_divisor(to_pixel_values([frame.image], processor), encoder)
    return image_feature_maps(encoder, pixel_values, stages)


def _pixels_of(rows: np.ndarray, columns: np.ndarray, size: Sequence[int], image_size: Sequence[int]) -> torch.Tensor:
    """Pixels `(1, K, 2)` of the processed image that correspond to those of a map of another `size`."""
    y, x = ((index + 0.5) * image_size[axis] / size[axis] - 0.5 for axis, index in enumerate((rows, columns)))
    return torch.from_numpy(np.stack([x, y], axis=-1)).float()[None]
