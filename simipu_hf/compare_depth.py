"""Does pre-training help here? Depth fine-tuning from several image encoders, all else being equal.

The comparison itself is `simipu_hf.compare`. Frames are decoded and resized once and kept in memory.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from .compare import Task, compare
from .data.depth import DepthDataset
from .data.frames import select_frames
from .data.overlap import refuse_shared_frames
from .errors import SimIPUError
from .evaluation.depth import HIGHER_IS_BETTER, DepthProtocol, evaluate_maps
from .finetune_depth import DepthTrainer, create_processor, trainer_parts
from .hub.weights import EncoderWeights
from .training.arguments import CompareDepthArguments


class DepthTask(Task):
    """Monocular depth as a task of `simipu_hf.compare`; the claims are about AbsRel."""

    trainer_class = DepthTrainer
    shown = ("abs_rel", "rmse", "silog", "a1")
    higher_is_better = HIGHER_IS_BETTER
    arguments: CompareDepthArguments

    def __init__(self, arguments: CompareDepthArguments):
        train_rows, test_rows = select_frames(arguments.train_frames), select_frames(arguments.test_frames)
        refuse_shared_frames(train_rows, test_rows, "test frames")
        processor, on_bad_row = create_processor(arguments), arguments.on_bad_row
        train, test = (DepthDataset(rows, processor, on_bad_row=on_bad_row) for rows in (train_rows, test_rows))
        super().__init__(arguments, train, test)
        protocol = DepthProtocol.from_arguments(arguments)
        depth = best_constant(frame.depth[protocol.mask(frame.depth, frame.frame_id)] for frame in self.train_frames)
        maps = ((frame.frame_id, np.full_like(frame.depth, depth), frame.depth) for frame in self.test_frames)
        evaluation = evaluate_maps(maps, protocol)
        self.num_without_target = evaluation["num_images_without_target"]
        self.guess = {"name": f"{depth:.1f} m everywhere", "metrics": evaluation["metrics"]}

    def parts(self, encoder: EncoderWeights, frames: Sequence[Any], seed: int) -> dict[str, Any]:
        return trainer_parts(self.arguments, encoder, frames, self.test_frames, seed)


def best_constant(targets: Iterable[np.ndarray]) -> float:
    """The depth that, predicted everywhere, has the least AbsRel on images with these targets (`(N,)` each, metres).

    A median in which a pixel counts 1 / target, and every image the same. A `SimIPUError` where there is no target.
    """
    known = [target for target in targets if target.size]
    if not known:
        raise SimIPUError("--train_frames: expected pixels with a depth that counts in the evaluation, found none")
    depth = np.concatenate(known)
    weight = np.concatenate([1 / (target * target.size) for target in known])
    order = np.argsort(depth)
    below = np.cumsum(weight[order], dtype=np.float64)
    return float(depth[order][np.searchsorted(below, below[-1] / 2)])


def compare_depth(arguments: CompareDepthArguments) -> dict[str, Any]:
    """Fine-tune for depth from every encoder, and compare; see [`simipu_hf.compare.compare`].

    compare_depth(CompareDepthArguments(image_encoders=["simipu=OUT"], train_frames=["KITTI#train"],
                                        test_frames=["KITTI#val"], output_dir="COMPARISON"))
    """
    return compare(arguments, DepthTask)
