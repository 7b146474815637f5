"""How much depth an image encoder's features hold, read off by a linear map: exact, and seconds of work.

Log-depth is regressed on the concatenated feature maps by ridge regression. Nothing is trained by gradient descent, so
there is no learning rate, schedule or initialisation between the features and the answer.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from simipu_hf.data.depth_samples import DepthFrame, DepthPreprocessing
from simipu_hf.modeling.image_encoder import TimmModel, image_feature_maps


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
    def predict(self, frame: DepthFrame, preprocessing: DepthPreprocessing) -> np.ndarray:
        """Depth in metres at every pixel of the ground truth, `(H', W')` float32."""
        maps = image_feature_maps(self.encoder, preprocessing.normalize(frame.image)[None], self.stages)
        weights = self.weight.to(maps[0].dtype).split([feature.shape[1] for feature in maps])
        log_depth = torch.tensor(self.bias, dtype=maps[0].dtype)
        # a linear map commutes with bilinear interpolation: one channel is enlarged instead of all
        for feature, weight in zip(maps, weights, strict=True):
            part = torch.einsum("bchw,c->bhw", feature, weight)[:, None]
            log_depth = log_depth + F.interpolate(part, size=frame.full_depth.shape, mode="bilinear")[0, 0]
        return log_depth.exp().numpy()


@torch.no_grad()
def fit_linear_depth_probe(
    encoder: TimmModel,
    frames: Sequence[DepthFrame],
    preprocessing: DepthPreprocessing,
    stages: Sequence[int] = (-3, -2, -1),
    ridge: float = 0.1,
    pixels_per_frame: int = 500,
    seed: int = 0,
) -> LinearDepthProbe:
    """Ridge regression of log-depth at pixels with known depth on the features interpolated there.

    Args:
        encoder: a timm model on the CPU; it is put into evaluation mode.
        frames: with depth.
        preprocessing: of the frames.
        stages: of the encoder.
        ridge: penalty on the weights of standardised features, whose mean squared error is minimised.
        pixels_per_frame: drawn at random where more are known.
        seed: of the drawing.
    """
    encoder.eval()
    generator = np.random.default_rng(seed)
    gram = moment = torch.zeros((), dtype=torch.float64)
    for frame in frames:
        rows, columns = np.nonzero(frame.depth)
        drawn = generator.permutation(len(rows))[:pixels_per_frame]
        rows, columns = rows[drawn], columns[drawn]
        maps = image_feature_maps(encoder, preprocessing.normalize(frame.image)[None], stages)
        places = (np.stack([columns, rows], axis=-1) + 0.5) / np.array(frame.depth.shape[::-1]) * 2 - 1
        grid = torch.from_numpy(places).float()[None, None]
        # border: as F.interpolate does it, which `predict` uses
        sampled = [F.grid_sample(m, grid, padding_mode="border", align_corners=False)[0, :, 0] for m in maps]
        features = torch.cat(sampled).T.double()
        features = F.pad(features, (0, 1), value=1.0)  # the last column counts
        log_depth = torch.from_numpy(np.log(frame.depth[rows, columns])).double()
        gram, moment = gram + features.T @ features, moment + features.T @ log_depth
    gram, moment = gram / gram[-1, -1], moment / gram[-1, -1]
    mean, mean_log_depth = gram[-1, :-1], moment[-1]
    covariance = gram[:-1, :-1] - torch.outer(mean, mean)
    deviation = covariance.diagonal().clamp(min=1e-12).sqrt()
    penalty = ridge * torch.diag(deviation**2)
    weight = torch.linalg.solve(covariance + penalty, moment[:-1] - mean * mean_log_depth)
    return LinearDepthProbe(encoder, tuple(stages), weight, float(mean_log_depth - weight @ mean))
