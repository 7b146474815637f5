"""`simipu-hf`: every command is one Python function with the same arguments, imported when it runs.

A new command is one line in `COMMANDS`.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, is_dataclass
from importlib import import_module
from inspect import getdoc
from typing import Annotated, Any, Literal, Union

import tyro

from simipu_hf.errors import SimIPUError, exit_code_of
from simipu_hf.files import to_json
from simipu_hf.training.arguments import (
    BenchmarkDataArguments,
    BenchmarkOpsArguments,
    BenchmarkStepArguments,
    CheckArguments,
    CompareDepthArguments,
    CompareDetectionArguments,
    DepthArguments,
    DetectionArguments,
    EvaluateDepthArguments,
    EvaluateDetectionArguments,
    PreTrainingArguments,
    parse_arguments,
)
from simipu_hf.version import __version__

Switch = tyro.conf.FlagCreatePairsOff[bool]
Model = Annotated[str, tyro.conf.arg(help="Run, checkpoint, encoder folder, Hub id, .pth or timm name.")]
OutputDir = Annotated[str, tyro.conf.arg(help="Where to write.")]
RepoId = Annotated[str, tyro.conf.arg(help="Repository on the Hub, user/name.")]
AsJson = Annotated[Switch, tyro.conf.arg(name="json", help="Print JSON, for programs.")]
Overwrite = Annotated[Switch, tyro.conf.arg(help="Replace an earlier output.")]
Private = Annotated[Switch, tyro.conf.arg(help="Create the repository private.")]


@dataclass
class Source:
    """Rows to read."""

    data_dir: str | None = None
    """Folder of KITTI, nuScenes, Waymo, Argoverse 2, Parquet or save_to_disk."""
    dataset_name: str | None = None
    """Hub id, or a folder."""
    dataset_config_name: str | None = None
    """Configuration of the data set: object, odometry or raw for KITTI."""
    split: str | None = None
    """Such as train; all if None. visualize: train or the only one if None, also a part such as train[:50%]."""
    cameras: list[int | str] | None = None
    """Cameras to read, by the data set's names; its default ones if None."""
    scenes: list[str] | None = None
    """Drives, logs or segments to read; all if None."""


@dataclass
class Shards:
    """What the files hold."""

    max_shard_size: str = "500MB"
    """Size of a file."""
    num_shards: int = 1
    """Files of a split, at least: for streaming, processes times data-loading workers."""
    image_size: tuple[int, int] | None = None
    """Resize the images to this height and width."""
    image_format: Literal["png", "jpeg", "webp"] | None = None
    """Encode the images anew."""
    quality: int = 90
    """Of jpeg and webp."""
    whole_scans: Switch = False
    """Keep the points that the camera does not see."""
    num_proc: int | None = None
    """Processes; one per processor if None."""


Rows = tyro.conf.OmitArgPrefixes[Source]
Form = tyro.conf.OmitArgPrefixes[Shards]


def export(
    model: Model,
    output_dir: OutputDir,
    format: Literal["timm", "transformers", "torchvision", "mmdet", "official", "onnx"] = "timm",
    prefix: str = "img_backbone",
    channel_order: Literal["rgb", "bgr"] | None = None,
    image_size: tuple[int, int] | None = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Write the image encoder in a form that other code loads.

    simipu-hf export --model RUN --output_dir encoder --format timm

    simipu-hf export --model RUN --output_dir encoder.pth --format mmdet --prefix img_backbone

    Args:
        format: Whose code is to load it.
        prefix: Of the names in the mmdet form.
        channel_order: Reorder the input channels of the first convolution.
        image_size: Height and width that the onnx form is written for.
    """
    from simipu_hf.hub.export import export_image_encoder

    if prefix != "img_backbone" and format != "mmdet":
        raise SimIPUError(f"--prefix {prefix} does nothing without --format mmdet")
    if image_size is not None and format != "onnx":
        raise SimIPUError("--image_size does nothing without --format onnx")
    show(export_image_encoder(model, output_dir, format, prefix, channel_order, overwrite, image_size), as_json)


def convert(
    checkpoint: str,
    output_dir: OutputDir,
    batch_norm_eps: float | None = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Convert an official checkpoint; nothing in it is executed.

    simipu-hf convert --checkpoint SimIPU_kitti_50e.pth --output_dir encoder

    Args:
        checkpoint: An official .pth file.
        batch_norm_eps: With which it was trained; 1e-3 (official), or 1e-5 where there is a classifier, if None.
    """
    from simipu_hf.hub.export import convert_checkpoint

    show(convert_checkpoint(checkpoint, output_dir, batch_norm_eps, overwrite), as_json)


def inspect(model: Model, as_json: AsJson = False) -> None:
    """Describe the image encoder of a source, and the input that it takes.

    simipu-hf inspect --model RUN
    """
    from simipu_hf.hub.sources import find_image_encoder

    found = find_image_encoder(model)
    facts = {
        "found": found.description,
        "architecture": found.architecture,
        "parameters": sum(parameter.numel() for parameter in found.template().parameters()),
        "input": str(found.input),
    }
    show(facts, as_json)


def push(
    model: str,
    repo_id: RepoId,
    encoder_repo_id: str | None = None,
    private: Private = False,
    revision: str | None = None,
    as_json: AsJson = False,
) -> None:
    """Publish a finished folder on the Hub, with a card.

    simipu-hf push --model RUN --repo_id user/simipu-kitti --encoder_repo_id user/resnet50-simipu-kitti

    Args:
        model: Folder of a finished run, a converted model or an encoder.
        encoder_repo_id: Also publish the image encoder in this repository, alone.
        revision: Branch; main if None.
    """
    from simipu_hf.hub.push import push_folder

    show(push_folder(model, repo_id, private or None, encoder_repo_id, revision=revision), as_json)


def visualize(
    output_dir: OutputDir,
    rows: Rows,
    model: str | None = None,
    frames: str = "0",
    device: str | None = None,
) -> None:
    """Draw frames, and what a model makes of them.

    simipu-hf visualize --model RUN --data_dir KITTI --split val --frames 0,3 --output_dir pictures

    Args:
        model: Run, checkpoint or Hub id; the data alone are drawn if None.
        frames: Rows of the split, such as 0,3,7.
        device: Such as cuda; a GPU where there is one if None.
    """
    from simipu_hf.visualization.frames import visualize as draw

    if device is not None and model is None:
        raise SimIPUError("--device does nothing without --model")
    try:
        chosen = [int(index) for index in frames.split(",")]
    except ValueError as error:
        raise SimIPUError(f"--frames {frames!r}: expected numbers such as 0,3,7") from error
    print(*draw(output_dir, model, chosen, device, **vars(rows)), sep="\n")


def demo(
    output_dir: OutputDir = "simipu_demo",
    data_dir: str | None = None,
    seed: int = 0,
) -> None:
    """The main job in minutes: data, pre-training, export, loading, a depth probe, and a report to look at.

    simipu-hf demo --output_dir simipu_demo

    simipu-hf demo --data_dir KITTI

    Args:
        data_dir: Folder to read rows from, as for pretrain; a synthetic drive is generated if None.
        seed: Of the drive, the weights and the order of frames.
    """
    from simipu_hf.demo import demo as run

    run(output_dir, data_dir, seed)


def data_inspect(rows: Rows, picture_path: str | None = None, as_json: AsJson = False) -> None:
    """Counts, sizes, ranges, and everything that is missing or damaged. Exits with 1 where there is any.

    simipu-hf data inspect --data_dir KITTI --picture_path frame.png

    Args:
        picture_path: Draw one frame with its points there.
    """
    from simipu_hf.data.inspection import inspect_dataset

    if picture_path is not None and not picture_path.lower().endswith(".png"):
        raise SimIPUError(f"--picture_path {picture_path}: expected a name that ends in .png")
    report = inspect_dataset(**vars(rows))
    show(report, as_json)
    if picture_path is not None and report.sample is not None:
        from simipu_hf.visualization.figures import draw_points_on_image
        from simipu_hf.visualization.style import save_figure

        save_figure(draw_points_on_image(report.sample), picture_path)
    sys.exit(1 if report.problems else 0)


def data_convert(
    output_dir: OutputDir, rows: Rows, form: Form, to: Literal["parquet"] = "parquet", as_json: AsJson = False
) -> None:
    """Pack a data set into Parquet files with the images inside; goes on where it was interrupted.

    simipu-hf data convert --to parquet --data_dir KITTI --output_dir kitti_parquet
    """
    from simipu_hf.data.conversion import convert_to_parquet

    show(convert_to_parquet(output_dir, **vars(rows), **vars(form)), as_json)


def data_push(
    data: str,
    repo_id: RepoId,
    private: Private = False,
    public: Switch = False,
    license: str | None = None,
    as_json: AsJson = False,
) -> None:
    """Publish a folder of Parquet files as a data set.

    simipu-hf data push --data kitti_parquet --repo_id user/kitti-pairs

    Args:
        data: Folder of Parquet files.
        public: Create the repository public, also where neither --license nor a README.md of yours names a licence.
        license: The Hub's name of the rows' licence.
    """
    from simipu_hf.hub.push import push_dataset

    if private and public:
        raise SimIPUError("give either --private or --public, not both")
    visibility = (private and True) or (False if public else None)
    show(push_dataset(data, repo_id, visibility, license), as_json)


def data_synthesize(
    output_dir: OutputDir,
    num_frames: int = 200,
    image_size: tuple[int, int] = (375, 1242),
    seed: int = 0,
    num_workers: int | None = None,
) -> None:
    """Generate a drive with camera, LiDAR, labels and dense depth, in KITTI's layout. No download.

    simipu-hf data synthesize --output_dir DRIVE --num_frames 200 --image_size 96 320

    Args:
        num_frames: Frames in all.
        image_size: Height and width.
        seed: Of streets and light.
        num_workers: Processes; one per processor if None.
    """
    from simipu_hf.data.synthetic import synthesize_drive

    print(synthesize_drive(output_dir, num_frames, image_size, seed, num_workers))


# What a command takes: the parameters of a function here, or a dataclass, which the function of the command's name in
# the module of its name takes (`simipu_hf.finetune_depth.finetune_depth`, `simipu_hf.benchmark.step.benchmark_step`).
COMMANDS: dict[str, Any] = {
    "pretrain": PreTrainingArguments,
    "finetune-depth": DepthArguments,
    "evaluate-depth": EvaluateDepthArguments,
    "compare-depth": CompareDepthArguments,
    "finetune-detection": DetectionArguments,
    "evaluate-detection": EvaluateDetectionArguments,
    "compare-detection": CompareDetectionArguments,
    "export": export,
    "convert": convert,
    "inspect": inspect,
    "push": push,
    "visualize": visualize,
    "demo": demo,
    "check": CheckArguments,
    "data": {"inspect": data_inspect, "convert": data_convert, "push": data_push, "synthesize": data_synthesize},
    "benchmark": {"ops": BenchmarkOpsArguments, "step": BenchmarkStepArguments, "data": BenchmarkDataArguments},
}
LAUNCHED = ("pretrain", "finetune-depth", "finetune-detection")  # with accelerate, in several processes
GROUPS = {"data": "Look at, convert, publish and synthesize data sets.", "benchmark": "Measure what takes time."}
DESCRIPTION = """SimIPU: pre-train an image encoder on camera + LiDAR pairs, publish it, load it, measure it.

Completion of commands and flags: simipu-hf --tyro-write-completion bash FILE (or zsh, fish), then source FILE."""


def main(argv: Sequence[str] | None = None) -> None:
    """The console script: runs `argv` and exits with 0, 1 (a mistake, in one line) or 2 (a wrong flag)."""
    sys.exit(exit_code_of(lambda: run(list(sys.argv[1:] if argv is None else argv))))


def run(argv: list[str]) -> None:
    """Parses and runs one command line."""
    command, words = COMMANDS, []
    while isinstance(command, dict) and argv and argv[0] in command:
        words.append(argv.pop(0))
        command = command[words[-1]]
    prog = " ".join(["simipu-hf", *words])
    processes = int(os.environ.get("WORLD_SIZE") or 1)
    if processes > 1 and words and words[0] not in LAUNCHED and not {"--help", "-h"} & set(argv):
        raise SimIPUError(f"{prog}: expected one process, found {processes}: start it without a launcher")
    if isinstance(command, dict):
        if argv == ["--version"] and not words:
            print(__version__)
        else:
            description = GROUPS[words[0]] if words else DESCRIPTION
            tyro.cli(choice(command), prog=prog, description=description, args=argv, use_underscores=True)
    elif is_dataclass(command):
        arguments = parse_arguments(command, argv, prog)
        names = [word.replace("-", "_") for word in words]
        function = getattr(import_module(".".join(["simipu_hf", *names])), "_".join(names))
        result = function(arguments)
        # commands that return a dictionary, for programs, print their own table
        if hasattr(arguments, "json") and (arguments.json or not isinstance(result, dict)):
            show(result, arguments.json)
        if not getattr(result, "passed", True):
            sys.exit(1)
    else:
        tyro.cli(command, prog=prog, args=argv, use_underscores=True)


def choice(commands: dict[str, Any]) -> Any:
    """One of several commands as a type for tyro: for the list in `--help`, and for completion."""
    options = []
    for name, command in commands.items():
        about: dict[str, Any]
        if isinstance(command, dict):
            about = {"constructor_factory": lambda inner=command: choice(inner), "description": GROUPS[name]}
        else:
            about = {"constructor": command, "description": (getdoc(command) or "").partition("\n")[0]}
        options.append(Annotated[Any, tyro.conf.subcommand(name, **about)])
    return Union[tuple(options)]  # noqa: UP007 (as many as there are)


def show(result: Any, as_json: bool) -> None:
    """A result as text, or as JSON for programs."""
    if as_json:
        if hasattr(result, "to_dict"):
            result = result.to_dict()
        elif is_dataclass(result) and not isinstance(result, type):
            result = asdict(result)
        print(to_json(result, default=str))
    elif isinstance(result, dict):
        width = max(map(len, result))
        print("\n".join(f"{name:{width}}  {value}" for name, value in result.items()))
    else:
        print(result)


if __name__ == "__main__":
    main()
