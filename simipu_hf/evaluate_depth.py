"""Evaluate a depth model by the published protocol.

python -m simipu_hf.evaluate_depth --model RUN --test_frames KITTI#val --output_dir OUT
"""

# ruff: noqa: RUF009 (`flag` returns a dataclass field)

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .data.selection import select_depth_rows
from .errors import SimIPUError
from .evaluation.depth import evaluate_frames, format_metrics, load_depth_model, write_json
from .hub.card import add_evaluation, write_model_card
from .training.fields import flag
from .training.legacy_arguments import check_choice, parse_flags
from .training.loop import exit_code_of

EVALUATION_FILE = "depth_evaluation.json"


@dataclass
class EvaluateDepthArguments:
    """Everything [`evaluate_depth`] needs."""

    model: str = flag("", "Folder or Hub id of a depth model.")
    test_frames: list[str] = flag([], "Frames to evaluate on: SOURCE[#SPLIT[:IDS]] ...", metavar="FRAMES")
    test_list: str | None = flag(None, "Eigen file list to evaluate on, instead of --test_frames.")
    image_dir: str | None = flag(None, "Folder the image paths of the list start from (KITTI raw).")
    depth_dir: str | None = flag(None, "Folder the depth paths of the list start from (annotated depth).")
    kb_crop: bool = flag(True, "Evaluate on the bottom centre of 352 x 1216 pixels of every image.")
    evaluation_crop: str = flag("garg", "garg, eigen or none.")
    min_depth: float = flag(1e-3, "In metres; smaller depths are not evaluated.")
    max_depth: float = flag(80.0, "In metres; larger depths are not evaluated.")
    flip_test: bool = flag(True, "Evaluate the mean of the predictions for the image and its mirror image.")
    output_dir: str | None = flag(None, "Where depth_evaluation.json and pictures are written; nowhere if empty.")
    num_pictures: int = flag(8, "Frames of which a picture is written.")
    update_card: bool = flag(False, "Add the result to the model card of the folder --model.")
    device: str | None = flag(None, "Such as cuda; a GPU where there is one if empty.")

    def __post_init__(self) -> None:
        if not self.model:
            raise SimIPUError("--model is missing: the folder or Hub id of a depth model")
        if bool(self.test_frames) == bool(self.test_list):
            raise SimIPUError("give the frames to evaluate on: either --test_frames or --test_list")
        if self.test_list and not (self.image_dir and self.depth_dir):
            raise SimIPUError("--test_list needs --image_dir and --depth_dir")
        if self.update_card and not Path(self.model).is_dir():
            raise SimIPUError(f"--update_card needs a folder, found --model {self.model}")
        check_choice("--evaluation_crop", self.evaluation_crop, ("garg", "eigen", "none"))


def evaluate_depth(arguments: EvaluateDepthArguments) -> dict[str, Any]:
    """Evaluate a saved depth model, on the resolution of the ground truth, per image and then averaged.

    Returns:
        As `evaluate_maps`, with `model`.

    Raises:
        SimIPUError: no such model or frames, or frames that cannot be used.
    """
    network, preprocessing = load_depth_model(arguments.model, arguments.kb_crop)
    rows = select_depth_rows(arguments.test_frames, arguments.test_list, arguments.image_dir, arguments.depth_dir)
    assert rows is not None
    output_dir = None if arguments.output_dir is None else Path(arguments.output_dir)
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    network.to(device)  # type: ignore[arg-type]  # transformers' decorator hides the method
    result = evaluate_frames(
        network,
        (preprocessing.load(rows[index]) for index in range(len(rows))),
        preprocessing,
        flip_test=arguments.flip_test,
        picture_dir=None if output_dir is None else output_dir / "pictures",
        num_pictures=arguments.num_pictures,
        crop=arguments.evaluation_crop,
        min_depth=arguments.min_depth,
        max_depth=arguments.max_depth,
    )
    result = {"model": arguments.model, **result}
    result["protocol"]["kb_crop"] = arguments.kb_crop
    if output_dir is not None:
        write_json(output_dir / EVALUATION_FILE, result)
    if arguments.update_card:
        record_in_card(Path(arguments.model), arguments.test_frames or [str(arguments.test_list)], result)
        write_model_card(arguments.model)
    print(format_metrics(result["metrics"]))
    return result


def record_in_card(folder: Path, frames: Sequence[str], result: dict[str, Any]) -> None:
    """Keep a result where the model card takes its `model-index` from; paths are reduced to their last part."""
    protocol = result["protocol"]
    text = (
        f"{result['num_images']} images{', KB crop 352 x 1216' if protocol['kb_crop'] else ''}, {protocol['crop']} "
        f"crop, {protocol['min_depth']:g} to {protocol['max_depth']:g} m, "
        f"{'flip test' if protocol['flip_test'] else 'no flip test'}, no median scaling, per image and then averaged"
    )
    add_evaluation(folder, "depth-estimation", *describe_frames(frames), result["metrics"], text)


def describe_frames(frames: Sequence[str]) -> tuple[str, str]:
    """Names of the data sets and of their splits, without folders and without lists of ids."""
    sources = dict.fromkeys(re.split(r"[/\\]", frame.partition("#")[0].rstrip("/\\"))[-1] for frame in frames)
    splits = dict.fromkeys(re.split(r":(?![^\[]*\])", frame.partition("#")[2])[0] or "all" for frame in frames)
    return " + ".join(sources), " + ".join(splits)


_DESCRIPTION = """Evaluate a depth model by the published protocol: nine metrics, overall and by range.

python -m simipu_hf.evaluate_depth --model RUN --test_frames KITTI#val --output_dir OUT
python -m simipu_hf.evaluate_depth --model RUN --test_list eigen_test.txt --image_dir KITTI_RAW \\
    --depth_dir KITTI_DEPTH"""


def main(argv: Sequence[str] | None = None) -> int:
    """The command: parse the flags and run; returns the exit code."""
    return exit_code_of(
        lambda: evaluate_depth(*parse_flags((EvaluateDepthArguments,), argv, "simipu-hf evaluate-depth", _DESCRIPTION))
    )


if __name__ == "__main__":
    sys.exit(main())
