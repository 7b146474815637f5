"""Does pre-training help here? 3-D detection from several image encoders, all else being equal.

The comparison itself is `simipu_hf.compare`. Frames are decoded once and kept in memory.
"""

from collections.abc import Sequence
from typing import Any

from .compare import Task, compare
from .data.detection import DetectionDataset, read_labels, select_labelled
from .data.overlap import refuse_shared_frames
from .errors import SimIPUError
from .evaluate_detection import MEANS, counts_at_moderate
from .finetune_detection import DetectionTrainer, mean_dimensions, trainer_parts
from .finetuning import create_image_processor
from .hub.weights import EncoderWeights
from .training.arguments import CompareDetectionArguments


class DetectionTask(Task):
    """Monocular 3-D detection as a task of `simipu_hf.compare`; the claims are about `ap_3d`, the mean over classes of
    the moderate average precision in space.
    """

    trainer_class = DetectionTrainer
    shown = MEANS
    higher_is_better = MEANS
    arguments: CompareDetectionArguments

    def __init__(self, arguments: CompareDetectionArguments):
        train_rows, test_rows = select_labelled(arguments.train_frames), select_labelled(arguments.test_frames)
        refuse_shared_frames(train_rows, test_rows, "--test_frames")
        labels = read_labels(test_rows, arguments.on_bad_row)
        if not any(counts_at_moderate(of_frame, name) for of_frame in labels for name in arguments.classes):
            names = ", ".join(arguments.classes)
            raise SimIPUError(
                f"--test_frames: expected labels of {names} that count at moderate (25 pixels high, at most partly "
                "occluded, truncated by at most 0.3), found none to compare encoders by"
            )
        self.sizes = mean_dimensions(read_labels(train_rows, arguments.on_bad_row), arguments.classes)
        processor = create_image_processor(arguments.image_size)
        about: dict[str, Any] = {"on_bad_row": arguments.on_bad_row, "classes": arguments.classes}
        train, test = (DetectionDataset(rows, processor, **about) for rows in (train_rows, test_rows))
        super().__init__(arguments, train, test)
        self.guess = {"name": "no detection", "metrics": dict.fromkeys(MEANS, 0.0)}

    def parts(self, encoder: EncoderWeights, frames: Sequence[Any], seed: int) -> dict[str, Any]:
        return trainer_parts(self.arguments, encoder, self.sizes, frames, self.test_frames, seed)


def compare_detection(arguments: CompareDetectionArguments) -> dict[str, Any]:
    """Fine-tune for 3-D detection from every encoder, and compare; see [`simipu_hf.compare.compare`].

    compare_detection(CompareDetectionArguments(image_encoders=["simipu=OUT"], train_frames=["KITTI#train"],
                                                test_frames=["KITTI#val"], output_dir="COMPARISON"))
    """
    return compare(arguments, DetectionTask)
