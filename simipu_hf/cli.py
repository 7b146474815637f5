"""`simipu-hf`: every command is a thin wrapper of one Python function with the same arguments.

Flags are spelled as in transformers' examples, with underscores. What a command needs is imported when it runs.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, is_dataclass
from enum import Enum
from typing import Annotated, Any, Literal

import typer

from simipu_hf.training.command import exit_code_of
from simipu_hf.version import __version__

app = typer.Typer(
    name="simipu-hf",
    help="SimIPU: pre-train an image encoder on camera + LiDAR pairs, publish it, load it, measure it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
data_app = typer.Typer(help="Look at, convert, publish and synthesize data sets.", no_args_is_help=True)
benchmark_app = typer.Typer(help="Measure what takes time.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.add_typer(benchmark_app, name="benchmark")

# Commands that hand all their flags on to a dataclass parser of their own, its --help included.
PASS_THROUGH: dict[str, Any] = {
    "add_help_option": False,
    "context_settings": {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
}

DataDir = Annotated[str | None, typer.Option("--data_dir", help="KITTI, Parquet or save_to_disk folder.")]
DatasetName = Annotated[str | None, typer.Option("--dataset_name", help="Hub id, or a folder.")]
ConfigName = Annotated[str | None, typer.Option("--dataset_config_name", help="object or raw for KITTI.")]
Split = Annotated[str | None, typer.Option("--split", help="A split such as train, or train[:50%].")]
OutputDir = Annotated[str, typer.Option("--output_dir", help="Folder to write to.")]
Device = Annotated[str | None, typer.Option("--device", help="Such as cuda; a GPU where there is one if empty.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]
Token = Annotated[str | None, typer.Option("--token", help="Hub token; the logged-in user's if empty.")]
RepoId = Annotated[str, typer.Option("--repo_id", help="Repository on the Hub, user/name.")]
Private = Annotated[bool, typer.Option("--private", help="Create the repository private.")]


class ExportFormat(str, Enum):
    timm = "timm"
    transformers = "transformers"
    torchvision = "torchvision"
    mmdet = "mmdet"
    official = "official"


class ChannelOrder(str, Enum):
    rgb = "rgb"
    bgr = "bgr"


def main(argv: Sequence[str] | None = None) -> None:
    """The console script: runs `argv` and exits with 0, 1 (a mistake, in one line) or 2 (a wrong flag)."""
    arguments = None if argv is None else list(argv)
    sys.exit(exit_code_of(lambda: _run(arguments)))


def _run(arguments: list[str] | None) -> None:
    try:
        app(args=arguments, prog_name="simipu-hf")
    except SystemExit as end:
        if end.code:
            raise


def _version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command(**PASS_THROUGH)
def pretrain(context: typer.Context) -> None:
    """Pre-train on camera + LiDAR pairs.

    simipu-hf pretrain --data_dir KITTI --output_dir OUT        (all flags: simipu-hf pretrain --help)
    """
    from simipu_hf.pretrain import main as command

    _exit(command(context.args))


@app.command("finetune-depth", **PASS_THROUGH)
def finetune_depth(context: typer.Context) -> None:
    """Fine-tune an image encoder for monocular depth.

    simipu-hf finetune-depth --image_encoder RUN --train_frames KITTI#train --output_dir OUT
    """
    from simipu_hf.finetune_depth import main as command

    _exit(command(context.args))


@app.command("evaluate-depth", **PASS_THROUGH)
def evaluate_depth(context: typer.Context) -> None:
    """Evaluate a depth model by the published protocol.

    simipu-hf evaluate-depth --model RUN --test_frames KITTI#val --output_dir OUT
    """
    from simipu_hf.evaluate_depth import main as command

    _exit(command(context.args))


@app.command("compare-depth", **PASS_THROUGH)
def compare_depth(context: typer.Context) -> None:
    """Does pre-training help? Depth from several encoders, all else being equal.

    simipu-hf compare-depth --image_encoders simipu=RUN --train_frames KITTI#train --test_frames KITTI#val \
--output_dir OUT
    """
    from simipu_hf.compare_depth import main as command

    _exit(command(context.args))


@app.command()
def export(
    model: Annotated[str, typer.Option("--model", help="Run, checkpoint, encoder folder, Hub id or .pth.")],
    output_dir: OutputDir,
    format: Annotated[ExportFormat, typer.Option("--format", help="Whose code is to load it.")] = ExportFormat.timm,
    prefix: Annotated[str, typer.Option("--prefix", help="Of the names in the mmdet form.")] = "img_backbone",
    channel_order: Annotated[
        ChannelOrder | None, typer.Option("--channel_order", help="Reorder the first convolution's inputs.")
    ] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Write the image encoder in a form that other code loads.

    simipu-hf export --model RUN --output_dir encoder --format timm

    simipu-hf export --model RUN --output_dir encoder.pth --format mmdet --prefix img_backbone
    """
    from simipu_hf.hub.export import export_image_encoder

    order: Literal["rgb", "bgr"] | None = None if channel_order is None else channel_order.value
    _print(export_image_encoder(model, output_dir, format.value, prefix, order, overwrite), as_json)


@app.command()
def convert(
    checkpoint: Annotated[str, typer.Option("--checkpoint", help="An official .pth file.")],
    output_dir: OutputDir,
    batch_norm_eps: Annotated[
        float | None, typer.Option("--batch_norm_eps", help="With which it was trained; found out if empty.")
    ] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Convert an official checkpoint; nothing in it is executed.

    simipu-hf convert --checkpoint SimIPU_kitti_50e.pth --output_dir encoder
    """
    from simipu_hf.hub.convert import convert_checkpoint

    _print(convert_checkpoint(checkpoint, output_dir, batch_norm_eps, overwrite), as_json)


@app.command()
def inspect(
    model: Annotated[str, typer.Option("--model", help="Run, checkpoint, encoder folder, Hub id or .pth.")],
    as_json: AsJson = False,
) -> None:
    """Say what image encoder lies somewhere, and how to feed it.

    simipu-hf inspect --model RUN
    """
    from simipu_hf.hub.image_encoder import find_image_encoder

    found = find_image_encoder(model)
    facts = {
        "found": found.description,
        "architecture": found.architecture,
        "parameters": sum(
            v.numel() for n, v in found.state_dict.items() if not n.endswith(("mean", "var", "tracked"))
        ),
        "input": str(found.input),
    }
    _print(facts, as_json)


@app.command()
def push(
    model: Annotated[str, typer.Option("--model", help="Folder of a finished run, converted model or encoder.")],
    repo_id: RepoId,
    encoder_repo_id: Annotated[
        str | None, typer.Option("--encoder_repo_id", help="Also publish the image encoder there, alone.")
    ] = None,
    private: Private = False,
    revision: Annotated[str | None, typer.Option("--revision", help="Branch; main if empty.")] = None,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """Publish a finished folder on the Hub, with a card.

    simipu-hf push --model RUN --repo_id user/simipu-kitti --encoder_repo_id user/resnet50-simipu-kitti
    """
    from simipu_hf.hub.push import push_folder

    _print(push_folder(model, repo_id, private or None, encoder_repo_id, token, revision), as_json)


@app.command()
def visualize(
    output_dir: OutputDir,
    model: Annotated[
        str | None, typer.Option("--model", help="Run, checkpoint or Hub id; data alone if empty.")
    ] = None,
    data_dir: DataDir = None,
    dataset_name: DatasetName = None,
    dataset_config_name: ConfigName = None,
    split: Split = None,
    frames: Annotated[str, typer.Option("--frames", help="Rows of the split, such as 0,3,7.")] = "0",
    point: Annotated[int | None, typer.Option("--point", help="The point to look for in the image.")] = None,
    device: Device = None,
) -> None:
    """Draw frames, and what a model makes of them.

    simipu-hf visualize --model RUN --data_dir KITTI --split val --frames 0,3 --output_dir pictures
    """
    from simipu_hf.visualization import visualize as draw

    rows = _integers(frames, "--frames")
    written = draw(output_dir, model, data_dir, dataset_name, dataset_config_name, split, rows, point, device)
    print(*written, sep="\n")


@app.command()
def demo(
    output_dir: OutputDir = "simipu_demo",
    data_dir: DataDir = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the drive, the weights and the order of frames.")] = 0,
    overwrite_output_dir: Annotated[
        bool, typer.Option("--overwrite_output_dir", help="Delete what an earlier demo left there.")
    ] = False,
) -> None:
    """The main job in minutes: data, pre-training, export, loading, a depth probe, and a report to look at.

    simipu-hf demo --output_dir simipu_demo

    simipu-hf demo --data_dir KITTI
    """
    from simipu_hf.demo import demo as run

    run(output_dir, data_dir, seed, overwrite_output_dir)


@data_app.command("inspect")
def data_inspect(
    data_dir: DataDir = None,
    dataset_name: DatasetName = None,
    dataset_config_name: ConfigName = None,
    split: Split = None,
    picture_path: Annotated[
        str | None, typer.Option("--picture_path", help="Draw one frame with its points there.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Counts, sizes, ranges, and everything that is missing or damaged. Exits with 1 where there is any.

    simipu-hf data inspect --data_dir KITTI --picture_path frame.png
    """
    from simipu_hf.data.tools import inspect_dataset

    report = inspect_dataset(dataset_name, data_dir, dataset_config_name, split, picture_path)
    _print(report, as_json)
    _exit(1 if report.problems else 0)


@data_app.command("convert")
def data_convert(
    output_dir: OutputDir,
    data_dir: DataDir = None,
    dataset_name: DatasetName = None,
    dataset_config_name: ConfigName = None,
    split: Split = None,
    to: Annotated[str, typer.Option("--to", help="parquet, the one there is.")] = "parquet",
    rows_per_shard: Annotated[int, typer.Option("--rows_per_shard", help="Rows of a file.")] = 128,
    as_json: AsJson = False,
) -> None:
    """Pack a data set into Parquet files with the images inside; goes on where it was interrupted.

    simipu-hf data convert --to parquet --data_dir KITTI --output_dir kitti_parquet
    """
    from simipu_hf.data.tools import convert_to_parquet
    from simipu_hf.errors import SimIPUError

    if to != "parquet":
        raise SimIPUError(f"--to {to}: the one form there is is parquet")
    result = convert_to_parquet(output_dir, dataset_name, data_dir, dataset_config_name, split, rows_per_shard)
    _print(result, as_json)


@data_app.command("push")
def data_push(
    data: Annotated[str, typer.Option("--data", help="Folder of Parquet files.")],
    repo_id: RepoId,
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="Of a new repository; KITTI's rows are private if empty.")
    ] = None,
    license: Annotated[str | None, typer.Option("--license", help="The Hub's name of the rows' licence.")] = None,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """Publish a folder of Parquet files as a data set.

    simipu-hf data push --data kitti_parquet --repo_id user/kitti-pairs
    """
    from simipu_hf.hub.push import push_dataset

    _print(push_dataset(data, repo_id, private, license, token), as_json)


@data_app.command("synthesize")
def data_synthesize(
    output_dir: OutputDir,
    num_frames: Annotated[int, typer.Option("--num_frames")] = 200,
    image_size: Annotated[tuple[int, int], typer.Option("--image_size", help="Height and width.")] = (375, 1242),
    seed: Annotated[int, typer.Option("--seed")] = 0,
    num_workers: Annotated[int | None, typer.Option("--num_workers", help="Processes; by core if empty.")] = None,
) -> None:
    """Generate a drive with camera, LiDAR, labels and dense depth, in KITTI's layout. No download.

    simipu-hf data synthesize --output_dir DRIVE --num_frames 200 --image_size 96 320
    """
    from simipu_hf.data.synthetic import synthesize_drive

    print(synthesize_drive(output_dir, num_frames, image_size, seed, num_workers))


Preset = Annotated[str, typer.Option("--preset", help="recommended or official.")]
BatchSize = Annotated[int, typer.Option("--batch_size", help="Rows in a batch.")]
NumPoints = Annotated[int, typer.Option("--num_points", help="Points of a scan.")]
ImageSize = Annotated[tuple[int, int], typer.Option("--image_size", help="Height and width.")]
Repeats = Annotated[int, typer.Option("--repeats", help="Measurements; the median counts.")]
Overrides = Annotated[str | None, typer.Option("--config_overrides", help="As of simipu-hf pretrain.")]
JsonPath = Annotated[str | None, typer.Option("--json_path", help="Also write the result there.")]


@benchmark_app.command("ops")
def benchmark_ops(
    data_dir: DataDir = None,
    dataset_name: DatasetName = None,
    preset: Preset = "official",
    batch_size: BatchSize = 2,
    num_points: NumPoints = 16384,
    config_overrides: Overrides = None,
    device: Device = None,
    repeats: Repeats = 5,
    json_path: JsonPath = None,
    as_json: AsJson = False,
) -> None:
    """Sampling, ball query, grouped maximum, point encoder: every backend against its plain PyTorch definition.

    simipu-hf benchmark ops --data_dir KITTI
    """
    from simipu_hf.benchmark import benchmark_ops as measure

    result = measure(
        data_dir=data_dir,
        dataset_name=dataset_name,
        preset=preset,
        batch_size=batch_size,
        num_points=num_points,
        config_overrides=_overrides(config_overrides),
        device=device,
        repeats=repeats,
        json_path=json_path,
    )
    _print(result, as_json)


@benchmark_app.command("step")
def benchmark_step(
    data_dir: DataDir = None,
    dataset_name: DatasetName = None,
    preset: Preset = "recommended",
    image_encoder: Annotated[str, typer.Option("--image_encoder", help="timm model name.")] = "resnet50",
    point_encoder: Annotated[str, typer.Option("--point_encoder", help="pointnet2 or sparse_conv.")] = "pointnet2",
    batch_size: BatchSize = 2,
    image_size: ImageSize = (384, 1248),
    num_points: NumPoints = 16384,
    dtype: Annotated[str, typer.Option("--dtype", help="float32 or bfloat16.")] = "float32",
    config_overrides: Overrides = None,
    device: Device = None,
    repeats: Repeats = 5,
    json_path: JsonPath = None,
    as_json: AsJson = False,
) -> None:
    """A pre-training step, beside the forward and backward of its image encoder alone.

    simipu-hf benchmark step --image_encoder resnet18 --image_size 96 320 --num_points 4096
    """
    from simipu_hf.benchmark import benchmark_step as measure

    result = measure(
        data_dir=data_dir,
        dataset_name=dataset_name,
        preset=preset,
        image_encoder=image_encoder,
        point_encoder=point_encoder,
        batch_size=batch_size,
        image_size=image_size,
        num_points=num_points,
        dtype=dtype,
        config_overrides=_overrides(config_overrides),
        device=device,
        repeats=repeats,
        json_path=json_path,
    )
    _print(result, as_json)


@benchmark_app.command("data")
def benchmark_data(
    data_dir: DataDir = None,
    dataset_name: DatasetName = None,
    preset: Preset = "recommended",
    image_size: ImageSize = (384, 1248),
    num_points: NumPoints = 16384,
    num_rows: Annotated[int, typer.Option("--num_rows", help="Rows per measurement.")] = 16,
    num_workers: Annotated[int | None, typer.Option("--num_workers", help="Of the loader; by core if empty.")] = None,
    batch_size: BatchSize = 2,
    repeats: Repeats = 5,
    json_path: JsonPath = None,
    as_json: AsJson = False,
) -> None:
    """Rows per second of the two-view batches, against decoding and resizing their images alone.

    simipu-hf benchmark data --data_dir KITTI
    """
    from simipu_hf.benchmark import benchmark_data as measure

    result = measure(
        data_dir=data_dir,
        dataset_name=dataset_name,
        preset=preset,
        image_size=image_size,
        num_points=num_points,
        num_rows=num_rows,
        num_workers=num_workers,
        batch_size=batch_size,
        repeats=repeats,
        json_path=json_path,
    )
    _print(result, as_json)


def _overrides(text: str | None) -> dict[str, Any] | None:
    from simipu_hf.training.arguments import parse_overrides

    return parse_overrides(text) or None


def _print(result: Any, as_json: bool) -> None:
    """A report as text, or as JSON where a program reads it."""
    if as_json:
        to_dict = getattr(result, "to_dict", None)
        values = to_dict() if to_dict else asdict(result) if is_dataclass(type(result)) else result
        print(json.dumps(values, indent=2, default=str))
    elif isinstance(result, dict):
        width = max(len(name) for name in result)
        print("\n".join(f"{name:{width}}  {value}" for name, value in result.items()))
    else:
        print(result)


def _integers(text: str, flag: str) -> list[int]:
    from simipu_hf.errors import SimIPUError

    try:
        return [int(part) for part in text.replace(",", " ").split()]
    except ValueError as error:
        raise SimIPUError(f"{flag} {text!r}: expected numbers such as 0,3,7") from error


def _exit(code: int) -> None:
    raise typer.Exit(code)


if __name__ == "__main__":
    main()
