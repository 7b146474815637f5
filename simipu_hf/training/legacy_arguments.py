"""The flags of a pre-training run: dataclasses, their YAML form, and the recipes behind the presets."""

# ruff: noqa: RUF009 (`flag` returns a dataclass field)

import dataclasses
import difflib
import json
import sys
from argparse import ArgumentDefaultsHelpFormatter
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser

from simipu_hf.errors import SimIPUError

from .fields import flag
from .optimization import SCHEDULES

# Optimisation of each `--preset`, used where a flag is not given. Both are the official schedule
# (simipu_kitti.py: 100 epochs, 8 GPUs x 4 images), whose learning rates belong to a total batch of 32.
RECIPES: dict[str, dict[str, Any]] = {
    "official": {
        "optimizer": "sgd",
        "learning_rate": 0.03,
        "momentum": 0.9,
        "weight_decay": 1e-4,
        "point_optimizer": "adamw",
        "point_learning_rate": 1e-3,
        "point_weight_decay": 0.01,
        "adam_beta1": 0.95,
        "adam_beta2": 0.99,
        "lr_scheduler_type": "exponential",
        "lr_decay_per_epoch": 0.99,
        "warmup_steps": 0,
        "max_grad_norm": 0.0,
        "num_train_epochs": 100.0,
    },
}
RECIPES["recommended"] = {**RECIPES["official"]}


@dataclass
class ModelArguments:
    """What is trained."""

    _argument_group_name = "model"

    preset: str = flag("recommended", "Model, processor and recipe to start from: recommended or official.")
    image_encoder: str = flag("resnet50", "timm model name of the image encoder.")
    point_encoder: str = flag("pointnet2", "pointnet2 or sparse_conv (needs spconv).")
    pretrained_image_encoder: bool = flag(
        False, "Start from timm's pretrained weights (ImageNet) instead of random ones."
    )
    model_name_or_path: str | None = flag(
        None, "Start from the weights and configuration of this SimIPU folder or Hub id instead of a preset's."
    )
    config_overrides: str | None = flag(
        None,
        "Fields of SimIPUConfig to change, for example "
        "'max_match_distance=2.0,image_config.out_indices=[-1],point_config.use_xyz=false'.",
    )
    gradient_checkpointing: bool = flag(
        False, "Recompute the image encoder's activations in the backward pass to save memory."
    )
    torch_compile: bool = flag(False, "Compile the image encoder with torch.compile.")


@dataclass
class DataArguments:
    """What it is trained on."""

    _argument_group_name = "data"

    data_dir: str | None = flag(None, "KITTI object or raw folder, folder of Parquet files, or save_to_disk folder.")
    dataset_name: str | None = flag(None, "Hub id, or a folder as for --data_dir.")
    dataset_config_name: str | None = flag(None, "Configuration of the data set: object or raw for KITTI.")
    train_split: str | None = flag(
        None, "Split to train on, such as trainval or train[:50%%]; train, or the only one, if empty."
    )
    validation_split: str = flag("validation", "Split for --eval_steps.")
    image_size: list[int] | None = flag(
        None, "Height and width of all images; what the preset says if empty: official draws sizes.", metavar="PIXELS"
    )
    num_points: int = flag(16384, "Points drawn from each scan.")
    augmentation_overrides: str | None = flag(
        None,
        "Fields of TwoViewAugmentation to change, for example 'random_zoom=[1.0,1.5],brightness=0.4,hue=0.1'.",
    )
    on_bad_row: str = flag("error", "What to do with a damaged row: error stops, skip takes another and counts it.")


@dataclass
class TrainingArguments:
    """How it is trained. Empty values are those of the preset's recipe, which `PreTrainingArguments` fills in."""

    _argument_group_name = "training"

    output_dir: str = flag("", "Folder of the run.")
    overwrite_output_dir: bool = flag(False, "Delete what an earlier run left in --output_dir.")
    resume_from_checkpoint: str | None = flag(None, "latest, or the path of a checkpoint.", metavar="latest|PATH")
    per_device_train_batch_size: int = flag(4, "Rows per process and forward pass.")
    gradient_accumulation_steps: int = flag(1, "Forward passes per optimizer step.")
    num_train_epochs: float = flag(None, "Passes over the data set.")
    max_steps: int = flag(-1, "Optimizer steps; overrides --num_train_epochs when above 0.")
    optimizer: str = flag(None, "Of image encoder and heads: sgd or adamw.")
    learning_rate: float = flag(
        None, "Of image encoder and heads. Used as it is; the official one belongs to 32 rows per step in all."
    )
    momentum: float = flag(None, "Of sgd.")
    weight_decay: float = flag(None, "Of image encoder and heads.")
    point_optimizer: str = flag(None, "Of the point encoder: adamw or sgd.")
    point_learning_rate: float = flag(None, "Of the point encoder.")
    point_weight_decay: float = flag(None, "Of the point encoder.")
    adam_beta1: float = flag(None, "Of adamw.")
    adam_beta2: float = flag(None, "Of adamw.")
    lr_scheduler_type: str = flag(None, f"One of {', '.join(SCHEDULES)}.")
    lr_decay_per_epoch: float = flag(None, "Factor per epoch of the schedule exponential.")
    warmup_steps: int = flag(None, "Optimizer steps of linear warm-up.")
    max_grad_norm: float = flag(None, "Clip gradients to this norm; 0 does not.")
    mixed_precision: str = flag("no", "no, bf16, or fp16 (GPU only).")
    sync_batch_norm: bool = flag(True, "Batch statistics over all processes; nothing changes on one.")
    seed: int = flag(0, "Of weights, row order and augmentation.")
    dataloader_num_workers: int = flag(2, "Processes that load data; the result does not depend on it.")
    logging_steps: int = flag(10, "Optimizer steps per logged line.")
    eval_steps: int = flag(0, "Evaluate on --validation_split every so many steps; 0 never.")
    per_device_eval_batch_size: int | None = flag(None, "As --per_device_train_batch_size if empty.")
    checkpointing_steps: int = flag(500, "Optimizer steps per checkpoint; 0 only at the end.")
    save_total_limit: int = flag(2, "Checkpoints to keep, the newest; 0 keeps all.")
    report_to: list[str] = flag(["tensorboard"], "Trackers: tensorboard, trackio, wandb, …, or none.")
    push_to_hub: bool = flag(False, "Publish checkpoints and the result on the Hub.")
    hub_model_id: str | None = flag(None, "Repository, user/name.")
    encoder_repo_id: str | None = flag(None, "At the end, also publish the image encoder there, alone.")
    hub_private_repo: bool = flag(False, "Create repositories private.")
    hub_strategy: str = flag("every_save", "end, every_save, or checkpoint (which can be resumed from).")
    hub_token: str | None = flag(None, "Token; the logged-in user's if empty.")


@dataclass
class PreTrainingArguments:
    """Everything `simipu_hf.pretrain.pretrain` needs; one field for each group of flags."""

    model: ModelArguments = field(default_factory=ModelArguments)
    data: DataArguments = field(default_factory=DataArguments)
    training: TrainingArguments = field(default_factory=TrainingArguments)

    def __post_init__(self) -> None:
        check_choice("--preset", self.model.preset, RECIPES)
        self.training = fill_in_recipe(self.training, RECIPES[self.model.preset])
        check_training_arguments(self.training)
        check_choice("--on_bad_row", self.data.on_bad_row, ("error", "skip"))
        if not (self.data.data_dir or self.data.dataset_name):
            raise SimIPUError("no data: give --data_dir, a KITTI folder, or --dataset_name")
        size = self.data.image_size
        if size is not None and (len(size) != 2 or any(length < 32 or length % 32 for length in size)):
            raise SimIPUError(f"--image_size takes a height and a width, multiples of 32, found {size}")
        if self.data.num_points < 1:
            raise SimIPUError(f"--num_points must be at least 1, found {self.data.num_points}")

    def to_dict(self) -> dict[str, Any]:
        """All flags by name, for `run.yaml`, but for the Hub token and what belongs to one start of the run."""
        flat = {**vars(self.model), **vars(self.data), **vars(self.training)}
        left_out = ("hub_token", "resume_from_checkpoint", "overwrite_output_dir")
        return {name: value for name, value in flat.items() if name not in left_out}


def fill_in_recipe(arguments: TrainingArguments, recipe: dict[str, Any]) -> TrainingArguments:
    """A copy of `arguments` in which every field that is `None` and that `recipe` has takes the recipe's value."""
    return dataclasses.replace(
        arguments, **{name: value for name, value in recipe.items() if getattr(arguments, name) is None}
    )


def check_training_arguments(arguments: TrainingArguments) -> None:
    """Raises a `SimIPUError` that names the first flag with an impossible value."""
    if not arguments.output_dir:
        raise SimIPUError("--output_dir is missing: the folder to write the run to")
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "logging_steps"):
        _check_at_least(arguments, name, 1)
    for name in (
        "learning_rate", "point_learning_rate", "weight_decay", "point_weight_decay", "warmup_steps", "max_grad_norm",
        "eval_steps", "checkpointing_steps", "save_total_limit", "dataloader_num_workers", "seed",
    ):  # fmt: skip
        _check_at_least(arguments, name, 0)
    if arguments.max_steps <= 0 and not arguments.num_train_epochs > 0:
        raise SimIPUError(f"--num_train_epochs must be above 0, found {arguments.num_train_epochs}")
    check_choice("--optimizer", arguments.optimizer, ("sgd", "adamw"))
    check_choice("--point_optimizer", arguments.point_optimizer, ("sgd", "adamw"))
    check_choice("--lr_scheduler_type", arguments.lr_scheduler_type, SCHEDULES)
    check_choice("--mixed_precision", arguments.mixed_precision, ("no", "bf16", "fp16"))
    check_choice("--hub_strategy", arguments.hub_strategy, ("end", "every_save", "checkpoint"))
    if arguments.push_to_hub and not arguments.hub_model_id:
        raise SimIPUError("--push_to_hub needs --hub_model_id user/name")


def as_size(values: Sequence[int] | None) -> tuple[int, int] | None:
    """A flag's height and width; `None` where it was not given."""
    return (values[0], values[1]) if values else None


def check_choice(flag: str, value: Any, choices: Sequence[str] | dict[str, Any]) -> None:
    """Raises a `SimIPUError` that lists the choices unless `value` is one."""
    if value not in choices:
        raise SimIPUError(f"{flag} {value!r}: choose from {', '.join(choices)}")


def _check_at_least(arguments: Any, name: str, lowest: float) -> None:
    value = getattr(arguments, name)
    if not value >= lowest:
        raise SimIPUError(f"--{name} must be at least {lowest}, found {value}")


def parse_pretraining_arguments(argv: Sequence[str] | None = None, prog: str | None = None) -> PreTrainingArguments:
    """Parse command-line flags (`sys.argv` where `argv` is `None`); see [`parse_flags`] for `--config`."""
    groups = parse_flags((ModelArguments, DataArguments, TrainingArguments), argv, prog, description=_DESCRIPTION)
    return PreTrainingArguments(*groups)


_DESCRIPTION = """Pre-train SimIPU on camera + LiDAR pairs. No labels are needed.

accelerate launch -m simipu_hf.pretrain --data_dir KITTI --output_dir OUT
accelerate launch -m simipu_hf.pretrain --config two_cores --data_dir KITTI --output_dir OUT"""


def parse_flags(
    dataclass_types: Sequence[type], argv: Sequence[str] | None, prog: str | None = None, description: str = ""
) -> tuple[Any, ...]:
    """Dataclasses from flags, with `--config FILE` underneath: flags on the command line win.

    Args:
        dataclass_types: as for `transformers.HfArgumentParser`.
        argv: flags; `sys.argv[1:]` where `None`.
        prog: the command as it stands in messages.
        description: for `--help`.

    Raises:
        SimIPUError: a configuration file that is missing or names an unknown flag.
        SystemExit: a flag that argparse refuses (code 2), and `--help`.
    """
    usage = "%(prog)s [--config FILE] [flags]"
    parser = _Parser(dataclass_types, prog=prog, usage=usage, description=description, formatter_class=_HelpFormatter)
    parser.add_argument(
        "--config",
        default=None,
        metavar="FILE",
        help=f"YAML or JSON file with flags, a run's run.yaml, or one of {', '.join(packaged_configs())}",
    )
    argv = list(sys.argv[1:] if argv is None else argv)
    config, _ = _config_parser().parse_known_args(argv)
    if config.config is not None:
        known = {f.name for dataclass_type in dataclass_types for f in dataclasses.fields(dataclass_type)}
        argv = _as_flags(read_config(config.config), known, config.config) + argv
    *parsed, unknown = parser.parse_args_into_dataclasses(
        args=argv, look_for_args_file=False, return_remaining_strings=True
    )
    if unknown:
        close = difflib.get_close_matches(unknown[0].split("=")[0], parser._option_string_actions, n=1)
        parser.error(f"unknown argument {unknown[0]}" + (f"; did you mean {close[0]}?" if close else ""))
    return tuple(parsed[: len(dataclass_types)])


def packaged_configs() -> list[str]:
    """Names of the configuration files that come with the package."""
    folder = resources.files("simipu_hf.training") / "presets"
    return sorted(p.name.removesuffix(".yaml") for p in folder.iterdir() if p.name.endswith(".yaml"))


def read_config(name: str) -> dict[str, Any]:
    """Flags from a YAML or JSON file, a `run.yaml` (its `arguments`), or a packaged configuration.

    Raises:
        SimIPUError: there is no such file, or it holds something else.
    """
    path = Path(name)
    if path.is_file():
        text = path.read_text(encoding="utf-8")
    elif name in packaged_configs():
        text = (resources.files("simipu_hf.training") / "presets" / f"{name}.yaml").read_text(encoding="utf-8")
    else:
        raise SimIPUError(f"--config {name}: no such file; the packaged ones are {', '.join(packaged_configs())}")
    try:
        values = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (yaml.YAMLError, json.JSONDecodeError) as error:
        raise SimIPUError(f"--config {name} cannot be read: {error}") from error
    if isinstance(values, dict) and isinstance(values.get("arguments"), dict):
        values = values["arguments"]
    if not isinstance(values, dict):
        raise SimIPUError(f"--config {name}: expected names and values of flags, found {type(values).__name__}")
    return values


def parse_overrides(
    text: str | None,
    name_of_flag: str = "--config_overrides",
    sections: Sequence[str] = ("image_config", "point_config"),
) -> dict[str, Any]:
    """`"a=1,image_config.b=[1,2]"` to `{"a": 1, "image_config": {"b": [1, 2]}}`; values are YAML.

    Raises:
        SimIPUError: a part without `=`, or a dotted name that does not start with one of `sections`.
    """
    overrides: dict[str, Any] = {}
    for part in _split_outside_brackets(text or ""):
        name, equals, value = part.partition("=")
        section, _, inner = name.strip().rpartition(".")
        if not equals or (section and section not in sections):
            nested = "".join(f" or {known}.name=value" for known in sections)
            raise SimIPUError(f"{name_of_flag} {part.strip()!r}: expected name=value{nested}")
        target = overrides.setdefault(section, {}) if section else overrides
        target[inner] = yaml.safe_load(value)
    return overrides


def _split_outside_brackets(text: str) -> list[str]:
    parts, depth = [""], 0
    for character in text:
        depth += (character in "[{(") - (character in "]})")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part for part in parts if part.strip()]


def _as_flags(values: dict[str, Any], known: set[str], source: str) -> list[str]:
    flags = []
    for name, value in values.items():
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            raise SimIPUError(
                f"--config {source}: unknown flag {name!r}" + (f"; did you mean {close[0]!r}?" if close else "")
            )
        if value is None or value == []:
            continue
        flags.append(f"--{name}")
        flags += [str(item) for item in (value if isinstance(value, list) else [value])]
    return flags


class _HelpFormatter(ArgumentDefaultsHelpFormatter):
    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text  # keep the examples' line breaks

    def _get_help_string(self, action: Any) -> str | None:
        return action.help if action.default in (None, "") else super()._get_help_string(action)


class _Parser(HfArgumentParser):
    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see --help)\n")


def _config_parser() -> HfArgumentParser:
    parser = HfArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", default=None)
    return parser
