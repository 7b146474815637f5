"""The arguments of every command: dataclasses whose fields are the flags, read from the command line and from files.

    arguments = parse_arguments(PreTrainingArguments, ["--data_dir", "KITTI", "--output_dir", "OUT"])
    arguments = PreTrainingArguments(data_dir="KITTI", output_dir="OUT")        # the same, from Python

Nothing here imports torch or transformers, so that `--help` answers at once.
"""

import argparse
import dataclasses
import difflib
import importlib.util
import inspect
import json
import math
import os
import re
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, get_args, get_origin

import tyro
import yaml

from simipu_hf.errors import SimIPUError

Schedule = Literal["exponential", "constant", "constant_with_warmup", "linear", "cosine", "polynomial", "inverse_sqrt"]
Tracker = Literal["tensorboard", "trackio", "wandb", "mlflow", "comet_ml", "aim", "clearml", "swanlab", "none"]
ArgumentsT = TypeVar("ArgumentsT")
NULLS = (None, "null", "Null", "NULL", "~", "")  # as YAML has them
CONFIGS = Path(__file__).parent / "presets"  # configuration files that come with the package


class Rule(NamedTuple):
    """A rule for the values of a flag, as part of its type, and how an error says it."""

    expected: str
    holds: Callable[[Any], bool]

    def allows(self, value: Any) -> bool:
        try:
            return self.holds(value)
        except TypeError:  # None, or one number for a list
            return False


AT_LEAST_0 = Rule("at least 0", lambda value: value >= 0)
AT_LEAST_1 = Rule("at least 1", lambda value: value >= 1)
BELOW_1 = Rule("at least 0 and below 1", lambda value: 0 <= value < 1)
BETWEEN_0_AND_1 = Rule("above 0 and below 1", lambda value: 0 < value < 1)
EACH_ONCE = Rule("one or more, each once", lambda values: 0 < len(values) == len(set(values)))
UP_TO_1 = Rule("above 0 and at most 1", lambda value: 0 < value <= 1)
NEAR_AND_FAR = Rule(
    "the nearest depth, at least 0, and a farther one", lambda depths: len(depths) == 2 and 0 <= depths[0] < depths[1]
)
Seed = Annotated[int, Rule("at least 0 and below 2**32", lambda seed: 0 <= seed < 2**32)]  # as NumPy takes it
Size = Annotated[
    tuple[int, int],
    Rule("a height and a width of at least 32 pixels", lambda size: len(size) == 2 and min(size) >= 32),
]
Depth = Annotated[float, Rule("a number of metres above 0", lambda depth: 0 < depth < math.inf)]


@dataclass(kw_only=True)
class Arguments:
    """What all have in common: every class checks its own fields, and those of the classes that it is made of."""

    def __post_init__(self) -> None:
        with_rules = typing.get_type_hints(type(self), include_extras=True)
        for name, hint in typing.get_type_hints(type(self)).items():
            value = _plain(getattr(self, name))
            kinds = [get_origin(kind) or kind for kind in (get_args(hint) if _is_union(hint) else [hint])]
            if isinstance(value, str) and list in kinds and str not in kinds:  # one name, from Python
                value = [value]
            setattr(self, name, value)
            check_value(name, value, with_rules[name])


def check_value(name: str, value: Any, hint: Any) -> None:
    """Raises a `SimIPUError` for a value of the flag `name` that its type `hint` rules out: a choice, or a rule."""
    kind, parts = get_origin(hint), get_args(hint)
    if kind is Annotated:
        for rule in parts[1:]:
            if not rule.allows(value):
                raise SimIPUError(f"--{name} must be {rule.expected}, found {value}")
        check_value(name, value, parts[0])
    elif kind is Literal and value not in parts:
        raise SimIPUError(f"--{name} {value!r}: choose from {', '.join(parts)}")
    elif kind is list and isinstance(value, list | tuple):
        for item in value:
            check_value(name, item, parts[0])
    elif _is_union(hint) and value is not None:
        for part in parts:
            check_value(name, value, part)


def _is_union(hint: Any) -> bool:
    return get_origin(hint) in (typing.Union, types.UnionType)


def _plain(value: Any) -> Any:
    """Paths as text, and NumPy's numbers and arrays as Python's: what YAML and JSON can write."""
    if isinstance(value, list | tuple):
        return type(value)(map(_plain, value))
    return os.fspath(value) if isinstance(value, os.PathLike) else getattr(value, "tolist", lambda: value)()


@dataclass(kw_only=True)
class RunArguments(Arguments):
    """What every training command takes. The names are those of `transformers.TrainingArguments` and examples."""

    output_dir: str
    """Folder of the run."""
    resume_from_checkpoint: str | None = None
    """latest, or the path of a checkpoint."""
    per_device_train_batch_size: Annotated[int, AT_LEAST_1] = 4
    """Rows per process and forward pass."""
    gradient_accumulation_steps: Annotated[int, AT_LEAST_1] = 1
    """Forward passes per optimizer step."""
    num_train_epochs: float = 100.0
    """Passes over the training rows."""
    max_steps: int = -1
    """Optimizer steps; overrides --num_train_epochs when above 0."""
    max_grad_norm: Annotated[float, AT_LEAST_0] = 0.0
    """Clip gradients to this norm; 0 does not."""
    adam_beta2: Annotated[float, BELOW_1] = 0.99
    """Of AdamW."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """fp16 needs a GPU."""
    gradient_checkpointing: bool = False
    """Recompute the image encoder's activations in the backward pass: less memory, more time."""
    sync_batch_norm: bool = True
    """Batch statistics over all processes; nothing changes on one."""
    seed: Seed = 0
    """Of new weights, row order and augmentation."""
    dataloader_num_workers: Annotated[int, AT_LEAST_0] = 2
    """Processes that load data."""
    logging_steps: Annotated[int, AT_LEAST_1] = 10
    """Optimizer steps per logged line."""
    eval_steps: Annotated[int, AT_LEAST_0] = 0
    """Evaluate every so many optimizer steps; 0 does not."""
    checkpointing_steps: Annotated[int, AT_LEAST_0] = 500
    """Optimizer steps per checkpoint; 0 only at the end."""
    save_total_limit: Annotated[int, AT_LEAST_0] = 2
    """Checkpoints to keep, the newest; 0 keeps all."""
    report_to: list[Tracker] = field(default_factory=lambda: ["tensorboard"])
    """Where curves go beside metrics.jsonl."""
    push_to_hub: bool = False
    """Publish checkpoints and the result on the Hub."""
    hub_model_id: str | None = None
    """Repository, user/name."""
    hub_private_repo: bool = False
    """Create repositories private."""
    hub_strategy: Literal["end", "every_save", "checkpoint"] = "every_save"
    """Publish at the end, every checkpoint, or every checkpoint with what resumes the run."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_steps <= 0 and not self.num_train_epochs > 0:
            raise SimIPUError(f"--num_train_epochs must be above 0, found {self.num_train_epochs}")
        if self.push_to_hub and not self.hub_model_id:
            raise SimIPUError("--push_to_hub needs --hub_model_id user/name")
        hub = ("hub_model_id", "hub_private_repo", "hub_strategy")
        refuse_without_effect(self, self.push_to_hub, "without --push_to_hub", *hub)

    def trackers(self) -> list[str]:
        """What curves go to; a `SimIPUError` where one is not installed, which accelerate would drop silently."""
        names: list[str] = [name for name in self.report_to if name != "none"]
        for name in names:
            spec = importlib.util.find_spec(name)
            if spec is None or spec.origin is None:  # a mere folder: wandb leaves one of its name where it runs
                raise SimIPUError(
                    f"--report_to {name}: the package is not installed; pip install {name}, or choose another"
                )
        return names

    def to_dict(self) -> dict[str, Any]:
        """All flags for `run.yaml`, but for what belongs to one start of the run."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "resume_from_checkpoint"}


@dataclass(kw_only=True)
class PreTrainingArguments(RunArguments):
    """Pre-train SimIPU on camera + LiDAR pairs. No labels are needed.

    accelerate launch -m simipu_hf.pretrain --data_dir KITTI --output_dir OUT

    accelerate launch -m simipu_hf.pretrain --config two_cores --data_dir KITTI --output_dir OUT
    """

    preset: Literal["recommended", "official"] | None = None
    """Model, processor and augmentation to start from; recommended, or that of --model_name_or_path, if None."""
    image_encoder: str | None = None
    """timm model name of the image encoder; resnet50 if None."""
    point_encoder: Literal["pointnet2", "sparse_conv"] | None = None
    """pointnet2 if None; sparse_conv needs spconv."""
    pretrained_image_encoder: bool = False
    """Start from timm's pretrained weights instead of random ones."""
    anchor_weight: Annotated[float, AT_LEAST_0] | None = None
    """Weight of a term that keeps the image features close to those at the start; 0 if None."""
    freeze: list[str] | None = None
    """Parts of the image encoder to keep as they are, by timm's names: conv1 layer1, or patch_embed blocks.0."""
    model_name_or_path: str | None = None
    """Start from the weights, configuration and processor of this SimIPU folder or Hub id."""
    config_overrides: str | None = None
    """Fields of SimIPUConfig to change: 'max_match_distance=2.0,image_config.out_indices=[-1]'."""
    torch_compile: bool = False
    """Compile the image encoder with torch.compile."""

    data_dir: str | list[str] | None = None
    """Folders of KITTI, nuScenes, Waymo, Argoverse 2, Parquet or save_to_disk; SOURCE#SPLIT takes a split."""
    dataset_name: str | list[str] | None = None
    """Hub ids, addresses of Parquet files (s3://, gs://, hf://), or folders as for --data_dir."""
    dataset_config_name: str | None = None
    """Configuration of the data set: object, odometry or raw for KITTI."""
    mixture: list[float] | None = None
    """Weight of each of several data sets; by size if None, which --streaming does not know."""
    streaming: bool = False
    """Read while training, prepare nothing on disk; needs --max_steps and --lr_scheduler_type cosine, say. The result
    depends on --dataloader_num_workers."""
    cameras: list[int | str] | None = None
    """Cameras of a published data set, by its own names; its default ones if None."""
    scenes: list[str] | None = None
    """Drives, logs or segments of a published data set; all if None."""
    train_split: str | None = None
    """Split to train on, such as trainval or train[:50%]; train, or the only one, if None."""
    validation_split: str = "validation"
    """Split for --eval_steps; none of its frames may be a training frame."""
    validation_share: Annotated[float, BETWEEN_0_AND_1] | None = None
    """Hold out this share of the scenes as the validation split of a data set that has none."""
    per_device_eval_batch_size: Annotated[int, AT_LEAST_1] | None = None
    """As --per_device_train_batch_size if None."""
    image_size: Size | None = None
    """Height and width of all images; what the preset says if None: official draws sizes."""
    num_points: Annotated[int, AT_LEAST_1] | None = None
    """Points drawn from each scan; 16384, or as saved with --model_name_or_path, if None."""
    depth_range: Annotated[tuple[float, float], NEAR_AND_FAR] | None = None
    """Nearest and farthest depth of the points that are used, in metres; 1 80 with the recommended preset if None."""
    augmentation_overrides: str | None = None
    """Fields of TwoViewAugmentation to change: 'random_zoom=[1.0,1.5],brightness=0.4,hue=0.1'."""
    on_bad_row: Literal["error", "skip"] = "error"
    """Stop at an invalid row, or take another one and count it."""

    optimizer: Literal["sgd", "adamw"] | None = None
    """Of image encoder and heads; sgd for encoders with batch norm (ResNets), adamw for the others, if None."""
    learning_rate: Annotated[float, AT_LEAST_0] | None = None
    """Of image encoder and heads, for 32 rows per optimizer step in all; sgd 0.03, adamw 1e-3 (1e-4 where the image
    encoder starts from pretrained weights) if None."""
    weight_decay: Annotated[float, AT_LEAST_0] | None = None
    """Of image encoder and heads; sgd 1e-4, adamw 0.05 without norms, biases and embeddings, if None."""
    layer_decay: Annotated[float, UP_TO_1] | None = None
    """adamw: factor on the learning rate for each layer of the image encoder further from its output; 0.75 for
    pretrained starts, else 1, if None."""
    momentum: Annotated[float, BELOW_1] = 0.9
    """Of sgd."""
    point_optimizer: Literal["sgd", "adamw"] = "adamw"
    """Of the point encoder."""
    point_learning_rate: Annotated[float, AT_LEAST_0] = 1e-3
    """Of the point encoder."""
    point_weight_decay: Annotated[float, AT_LEAST_0] = 0.01
    """Of the point encoder."""
    adam_beta1: Annotated[float, BELOW_1] = 0.95
    """Of adamw."""
    lr_scheduler_type: Schedule = "exponential"
    """exponential multiplies by --lr_decay_per_epoch; the others are those of transformers.get_scheduler."""
    lr_decay_per_epoch: float = 0.99
    """Factor per epoch of the schedule exponential."""
    warmup_steps: Annotated[int, AT_LEAST_0] | None = None
    """Optimizer steps of linear warm-up; sgd 0, adamw 5 % of all steps, if None."""
    encoder_repo_id: str | None = None
    """At the end, also publish the image encoder in this repository, alone."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.streaming and (self.max_steps <= 0 or self.lr_scheduler_type == "exponential"):
            raise SimIPUError(
                "--streaming does not know the length of an epoch: it needs --max_steps and a --lr_scheduler_type "
                "other than exponential, such as cosine"
            )
        if self.pretrained_image_encoder and self.preset == "official":
            raise SimIPUError(
                "--pretrained_image_encoder: timm's weights take RGB images divided by their deviation, those of "
                "--preset official are BGR and are not: leave one of the two out"
            )
        refuse_without_effect(self, self.push_to_hub, "without --push_to_hub", "encoder_repo_id")
        if self.push_to_hub and self.encoder_repo_id == self.hub_model_id:
            raise SimIPUError("--encoder_repo_id and --hub_model_id must differ: the encoder would replace the model")
        evaluation = ("per_device_eval_batch_size", "validation_split")
        refuse_without_effect(self, self.eval_steps, "without --eval_steps", *evaluation)
        start, schedule = self.model_name_or_path, self.lr_scheduler_type
        refuse_without_effect(self, not start, "with --model_name_or_path", "pretrained_image_encoder")
        refuse_without_effect(self, schedule != "constant", "with --lr_scheduler_type constant", "warmup_steps")
        refuse_without_effect(
            self, schedule == "exponential", "without --lr_scheduler_type exponential", "lr_decay_per_epoch"
        )


@dataclass(kw_only=True)
class FineTuningArguments(Arguments):
    """How an encoder is fine-tuned, in every task: AdamW and a one-cycle schedule over all steps."""

    learning_rate: Annotated[float, AT_LEAST_0] = 1e-4
    """Peak of the one-cycle schedule, which starts at 1/25 of it and falls towards 1/100 of that."""
    weight_decay: Annotated[float, AT_LEAST_0] = 0.01
    """Of AdamW."""
    warmup_ratio: Annotated[float, BETWEEN_0_AND_1] = 0.3
    """Share of the steps in which the learning rate rises."""
    encoder_learning_rate: Annotated[float, AT_LEAST_0] | None = None
    """Peak for the image encoder; as --learning_rate if None."""
    decoder_first: Annotated[float, BELOW_1] = 0.0
    """Share of the steps, at the start, in which the image encoder's weights are frozen."""


@dataclass(kw_only=True)
class FineTuningRunArguments(RunArguments, FineTuningArguments):
    """What every fine-tuning command takes, whatever the task."""

    image_encoder: str = "random:resnet50"
    """Run or encoder folder, Hub id, .pth, timm name (its ImageNet weights), or random:<timm name>."""
    freeze_image_encoder: bool = False
    """Train the decoder or head alone, as a probe of the encoder's features."""
    train_frames: list[str] = field(default_factory=list)
    """Frames to train on."""
    test_frames: list[str] = field(default_factory=list)
    """Frames to evaluate on; none may be a training frame."""
    keep_frames: bool = False
    """Keep decoded frames in memory, for small sets."""
    per_device_train_batch_size: Annotated[int, AT_LEAST_1] = 8
    """Frames per process and forward pass."""
    num_train_epochs: float = 24.0
    """Passes over the training frames."""
    max_grad_norm: Annotated[float, AT_LEAST_0] = 35.0
    """Clip gradients to this norm; 0 does not."""
    adam_beta1: Annotated[float, Rule("at least 0.1 and below 1", lambda beta: 0.1 <= beta < 1)] = 0.95
    """Of AdamW; the schedule lowers it by 0.1 while the learning rate rises."""

    def __post_init__(self) -> None:
        super().__post_init__()
        of_encoder = ("decoder_first", "encoder_learning_rate")
        refuse_without_effect(self, not self.freeze_image_encoder, "with --freeze_image_encoder", *of_encoder)
        if self.eval_steps and not (self.test_frames or getattr(self, "test_list", None)):
            raise SimIPUError("--eval_steps needs --test_frames, or --test_list of depth")


@dataclass(kw_only=True)
class DepthTaskArguments(Arguments):
    """What a depth model sees and is measured on. The defaults are the published KITTI recipe."""

    kb_crop: bool = True
    """Keep the bottom centre of 352 x 1216 pixels of every image."""
    image_size: Size | None = None
    """Height and width to resize to after that."""
    crop_size: Size | None = None
    """Height and width of the random training window; 352 704 or the same share of --image_size if None, the whole
    image for encoders that take one size."""
    max_depth: Depth = 80.0
    """Largest depth that is predicted and evaluated, in metres."""
    evaluation_crop: Literal["garg", "eigen", "none"] = "garg"
    """Part of the ground truth that counts."""
    flip_test: bool = True
    """Evaluate the mean of the predictions for the image and its mirror image."""
    on_bad_row: Literal["error", "skip"] = "error"
    """Stop at an invalid frame when it is read, or leave it out; in training another takes its place."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image_size is None and not self.kb_crop:
            raise SimIPUError("--no_kb_crop needs --image_size: a batch holds images of one size")


@dataclass(kw_only=True)
class DepthArguments(FineTuningRunArguments, DepthTaskArguments):
    """Fine-tune an image encoder for monocular depth, and evaluate it by the published protocol.

    accelerate launch -m simipu_hf.finetune_depth --image_encoder RUN --train_frames KITTI#train \\
        --test_frames KITTI#val --output_dir OUT

    accelerate launch -m simipu_hf.finetune_depth --image_encoder resnet50 --train_list eigen_train.txt \\
        --test_list eigen_test.txt --image_dir KITTI_RAW --depth_dir KITTI_DEPTH --output_dir OUT

    Frames are named SOURCE, SOURCE#SPLIT or SOURCE#SPLIT:ID,ID,... where SOURCE is a KITTI folder, a folder of Parquet
    files, a save_to_disk folder or a Hub id; the ids may also be lines of a file, written SOURCE#SPLIT:@FILE.
    """

    train_list: str | None = None
    """Eigen file list to train on, instead of --train_frames."""
    test_list: str | None = None
    """Eigen file list to evaluate on, instead of --test_frames."""
    image_dir: str | None = None
    """Folder the image paths of the lists start from (KITTI raw)."""
    depth_dir: str | None = None
    """Folder the depth paths of the lists start from (annotated depth)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.train_frames) == bool(self.train_list):
            raise SimIPUError("give the frames to train on: either --train_frames or --train_list")
        if self.test_frames and self.test_list:
            raise SimIPUError("give either --test_frames or --test_list, not both")
        if (self.train_list or self.test_list) and not (self.image_dir and self.depth_dir):
            raise SimIPUError("--train_list and --test_list need --image_dir and --depth_dir")
        lists = self.train_list or self.test_list
        refuse_without_effect(self, lists, "without --train_list or --test_list", "image_dir", "depth_dir")


@dataclass(kw_only=True)
class EvaluateArguments(Arguments):
    """What every evaluation takes, whatever the task."""

    model: str | None
    """Folder or Hub id of the model."""
    test_frames: list[str] = field(default_factory=list)
    """Frames to evaluate on: SOURCE, SOURCE#SPLIT or SOURCE#SPLIT:ID,ID,..."""
    on_bad_row: Literal["error", "skip"] = "error"
    """Stop at an invalid frame, or leave it out."""
    output_dir: str | None = None
    """Where the result as JSON, pictures/ and detections in KITTI's format are written; nowhere if None."""
    num_pictures: int = 8
    """Frames of which a picture is written."""
    update_card: bool = False
    """Add the result to the model card of the folder --model."""
    device: str | None = None
    """Such as cuda; a GPU where there is one if None."""
    json: bool = False
    """Print the result as JSON."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.update_card and not (self.model and Path(self.model).is_dir()):
            raise SimIPUError(f"--update_card needs a folder, found --model {self.model}")
        refuse_without_effect(self, self.output_dir, "without --output_dir", "num_pictures")


@dataclass(kw_only=True)
class EvaluateDepthArguments(EvaluateArguments):
    """Evaluate a depth model by the published protocol: nine metrics, overall and by range.

    simipu-hf evaluate-depth --model RUN --test_frames KITTI#val --output_dir OUT

    simipu-hf evaluate-depth --model RUN --test_list eigen_test.txt --image_dir KITTI_RAW --depth_dir KITTI_DEPTH
    """

    model: str
    """Folder or Hub id of a depth model."""
    test_list: str | None = None
    """Eigen file list to evaluate on, instead of --test_frames."""
    image_dir: str | None = None
    """Folder the image paths of the list start from (KITTI raw)."""
    depth_dir: str | None = None
    """Folder the depth paths of the list start from (annotated depth)."""
    kb_crop: bool = True
    """Evaluate on the bottom centre of 352 x 1216 pixels of every image; the model's own crop is saved with it."""
    evaluation_crop: Literal["garg", "eigen", "none"] = "garg"
    """Part of that which counts."""
    min_depth: Annotated[float, AT_LEAST_0] = 1e-3
    """In metres; smaller depths are not evaluated."""
    max_depth: Depth = 80.0
    """In metres; larger depths are not evaluated."""
    flip_test: bool = True
    """Evaluate the mean of the predictions for the image and its mirror image."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_depth >= self.max_depth:
            raise SimIPUError(f"--max_depth must be above --min_depth {self.min_depth:g}, found {self.max_depth}")
        if bool(self.test_frames) == bool(self.test_list):
            raise SimIPUError("give the frames to evaluate on: either --test_frames or --test_list")
        if self.test_list and not (self.image_dir and self.depth_dir):
            raise SimIPUError("--test_list needs --image_dir and --depth_dir")
        refuse_without_effect(self, self.test_list, "without --test_list", "image_dir", "depth_dir")


@dataclass(kw_only=True)
class DetectionTaskArguments(Arguments):
    """What a detector sees, finds and is measured on."""

    image_size: Size = (384, 1248)
    """Height and width that images are resized to; intrinsics follow."""
    classes: Annotated[
        list[Literal["Car", "Van", "Truck", "Pedestrian", "Person_sitting", "Cyclist", "Tram", "Misc"]], EACH_ONCE
    ] = field(default_factory=lambda: ["Car", "Pedestrian", "Cyclist"])
    """What is detected."""
    hidden_size: Annotated[int, AT_LEAST_1] = 128
    """Width of the feature pyramid and the head, which on the CPU cost as much as a small encoder."""
    zoom: Annotated[float, AT_LEAST_1] = 1.2
    """Largest factor by which a random window of a training image is enlarged; 1 does not."""
    min_overlap: Annotated[float, BETWEEN_0_AND_1] | None = None
    """Intersection over union that a match exceeds; KITTI's own, 0.7 for cars and 0.5 for the others, if None."""
    on_bad_row: Literal["error", "skip"] = "error"
    """Stop at an invalid frame, or leave it out."""


@dataclass(kw_only=True)
class DetectionArguments(FineTuningRunArguments, DetectionTaskArguments):
    """Fine-tune an image encoder for monocular 3-D detection, and evaluate it by KITTI's protocol.

    accelerate launch -m simipu_hf.finetune_detection --image_encoder RUN --train_frames KITTI#train \\
        --test_frames KITTI#val --output_dir OUT

    Frames, named as for finetune-depth, need labels in the column `objects`, which KITTI's object benchmark,
    nuScenes' annotations and a synthetic drive have.
    """


@dataclass(kw_only=True)
class EvaluateDetectionArguments(EvaluateArguments):
    """Evaluate a 3-D detector, or detections in KITTI's text format, by KITTI's protocol: AP at 40 recall positions.

    simipu-hf evaluate-detection --model RUN --test_frames KITTI#val --output_dir OUT

    simipu-hf evaluate-detection --predictions OUT/predictions --labels KITTI/training/label_2 --json
    """

    model: str | None = None
    """Folder or Hub id of a detector."""
    predictions: str | None = None
    """Folder of detections, a text file for each frame, instead of --model."""
    labels: str | None = None
    """Folder of the frames' label files, with --predictions."""
    min_overlap: Annotated[float, BETWEEN_0_AND_1] | None = None
    """Intersection over union that a match exceeds; KITTI's own, 0.7 for cars and 0.5 for the others, if None."""

    def __post_init__(self) -> None:
        super().__post_init__()
        given = tuple(map(bool, (self.model, self.test_frames, self.predictions, self.labels)))
        if given not in ((True, True, False, False), (False, False, True, True)):
            raise SimIPUError("give either --model and --test_frames, or --predictions and --labels")
        refuse_without_effect(self, self.model, "with --predictions", "device", "on_bad_row")


@dataclass(kw_only=True)
class CompareArguments(FineTuningArguments):
    """What every comparison of image encoders takes, whatever the task."""

    image_encoders: Annotated[list[str], EACH_ONCE]
    """NAME=SOURCE ..., SOURCE being whatever the task's --image_encoder takes. Each is compared with
    random weights of its architecture, added where missing: scratch, and scratch-ARCHITECTURE of a further one."""
    train_frames: Annotated[list[str], EACH_ONCE]
    """Frames with labels: SOURCE, SOURCE#SPLIT or SOURCE#SPLIT:ID,ID,..."""
    test_frames: Annotated[list[str], EACH_ONCE]
    """Frames to evaluate on; none may be a training frame, and no drive should be on both sides."""
    output_dir: str
    """Folder of the results; runs that it already holds are not repeated."""
    modes: Annotated[list[Literal["full", "frozen"]], EACH_ONCE] = field(default_factory=lambda: ["full"])
    """full: all weights are trained; frozen: the decoder alone."""
    label_fractions: Annotated[list[Annotated[float, UP_TO_1]], EACH_ONCE] = field(default_factory=lambda: [1.0])
    """Shares of the training frames; smaller ones are part of larger ones."""
    seeds: Annotated[list[Seed], EACH_ONCE] = field(default_factory=lambda: [0, 1, 2])
    """Of the decoder, of random encoders, of frame order and augmentation."""
    max_steps: Annotated[int, AT_LEAST_1] = 400
    """Optimizer steps of every run."""
    batch_size: Annotated[int, AT_LEAST_1] = 8
    """Frames per step."""
    num_evaluations: Annotated[int, AT_LEAST_1] = 8
    """Evaluations during every run, evenly spaced, the last at its end; they are the curve that speed is read from."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """Of fine-tuning and its evaluations; fp16 needs a GPU."""
    device: Literal["cpu", "cuda"] | None = None
    """A GPU where there is one if None; CUDA_VISIBLE_DEVICES chooses among several."""
    json: bool = False
    """Print the result as JSON."""

    def __post_init__(self) -> None:
        super().__post_init__()
        of_encoder = ("decoder_first", "encoder_learning_rate")
        refuse_without_effect(self, "full" in self.modes, "with --modes frozen", *of_encoder)
        for encoder in self.image_encoders:
            # the name becomes part of a folder's and of a link
            if not re.fullmatch(r"[\w.+-]+=.+", encoder):
                raise SimIPUError(
                    f"--image_encoders {encoder}: expected NAME=SOURCE, a NAME of letters, digits and . _ + -"
                )
        names = [encoder.partition("=")[0] for encoder in self.image_encoders]
        if len(set(names)) < len(names):
            raise SimIPUError(f"--image_encoders: expected each NAME once, found {' '.join(names)}")

    def recipe(self) -> dict[str, Any]:
        """What all runs share; runs of another recipe in the same folder are not reused."""
        free = ("image_encoders", "output_dir", "modes", "label_fractions", "seeds", "device", "json")
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in free}


@dataclass(kw_only=True)
class CompareDepthArguments(CompareArguments, DepthTaskArguments):
    """Does pre-training help here? Fine-tune for depth from several encoders, all else being equal.

    simipu-hf compare-depth --image_encoders simipu=RUN imagenet=resnet18 --train_frames KITTI#train \\
        --test_frames KITTI#val --image_size 96 320 --modes full frozen --label_fractions 0.25 1 --output_dir OUT
    """


@dataclass(kw_only=True)
class CompareDetectionArguments(CompareArguments, DetectionTaskArguments):
    """Does pre-training help here? Fine-tune for 3-D detection from several encoders, all else being equal.

    simipu-hf compare-detection --image_encoders simipu=RUN imagenet=resnet18 --train_frames KITTI#train \\
        --test_frames KITTI#val --image_size 192 640 --label_fractions 0.25 1 --output_dir OUT
    """


@dataclass(kw_only=True)
class CheckArguments(Arguments):
    """Is this machine ready? Kernels, precisions, a training step, the loader, the Hub, disk and memory.

    simipu-hf check

    simipu-hf check --device cuda:1
    """

    device: str | None = None
    """Such as cuda:1; a GPU where there is one if None."""
    json: bool = False
    """Print JSON, for programs."""


@dataclass(kw_only=True)
class BenchmarkArguments(Arguments):
    """What every benchmark takes."""

    data_dir: str | None = None
    """Folder to read rows from, as for pretrain; synthetic frames if neither is given."""
    dataset_name: str | None = None
    """Hub id, or a folder."""
    preset: Literal["recommended", "official"] = "recommended"
    """Model, processor and augmentation."""
    batch_size: Annotated[int, AT_LEAST_1] = 2
    """Rows in a batch."""
    num_points: Annotated[int, AT_LEAST_1] = 16384
    """Points of a scan."""
    repeats: Annotated[int, AT_LEAST_1] = 5
    """Measurements of which the median counts, at least."""
    seed: Seed = 0
    """Of the weights and the augmentation."""
    json: bool = False
    """Print JSON, for programs."""


@dataclass(kw_only=True)
class BenchmarkOpsArguments(BenchmarkArguments):
    """Sampling, ball query, grouped maximum, assignment: every backend against its plain PyTorch definition.

    simipu-hf benchmark ops --data_dir KITTI
    """

    preset: Literal["recommended", "official"] = "official"
    """official groups features alone, recommended offsets from the centres as well."""
    config_overrides: str | None = None
    """Fields of SimIPUConfig to change, as for pretrain."""
    device: str | None = None
    """Such as cuda; a GPU where there is one if None."""


@dataclass(kw_only=True)
class BenchmarkStepArguments(BenchmarkArguments):
    """A pre-training step beside the forward and backward of its image encoder alone, and where its time goes.

    simipu-hf benchmark step --image_encoder resnet18 --image_size 96 320 --num_points 4096
    """

    image_encoder: str = "resnet50"
    """timm model name."""
    point_encoder: Literal["pointnet2", "sparse_conv"] = "pointnet2"
    """sparse_conv needs spconv."""
    image_size: Size = (384, 1248)
    """Height and width of the images."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """fp16 needs a GPU."""
    torch_compile: bool = False
    """Compile the image encoder with torch.compile."""
    config_overrides: str | None = None
    """Fields of SimIPUConfig to change, as for pretrain."""
    device: str | None = None
    """Such as cuda; a GPU where there is one if None."""


@dataclass(kw_only=True)
class BenchmarkDataArguments(BenchmarkArguments):
    """Rows a second of the two-view batches, against decoding and resizing their images alone.

    simipu-hf benchmark data --data_dir KITTI
    """

    image_size: Size = (384, 1248)
    """Height and width of the images."""
    num_rows: Annotated[int, AT_LEAST_1] = 16
    """Rows in one pass; a smaller data set is read several times over."""
    num_workers: Annotated[int, AT_LEAST_1] | None = None
    """Processes of the loader; one per processor if None."""


def refuse_without_effect(arguments: Any, has_effect: Any, reason: str, *names: str) -> None:
    """Raises a `SimIPUError` where one of the flags `names` is given but ignored; their defaults are plain values."""
    for name in names:
        if not has_effect and getattr(arguments, name) != getattr(type(arguments), name):  # a field's default
            raise SimIPUError(f"--{name} does nothing {reason}")


def parse_arguments(cls: type[ArgumentsT], argv: Sequence[str] | None = None, prog: str | None = None) -> ArgumentsT:
    """Command-line flags to an instance of the dataclass `cls`, whose docstrings are the help.

    Every `--config FILE` is read, in order, as if its flags stood before those of the command line, which therefore
    win.

    Raises:
        SimIPUError: a configuration file that is missing or names an unknown flag, or a value that `cls` refuses.
        SystemExit: a flag that is not known or cannot be read (code 2), and `--help`.
    """
    packaged = f", or one of {', '.join(packaged_configs())}" if hasattr(cls, "preset") else ""
    about_config = f"--config FILE reads flags from YAML, JSON or a run.yaml{packaged}."
    description = f"{inspect.cleandoc(cls.__doc__ or '')}\n\n{about_config}"
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", action="append", default=[])
    known, flags = parser.parse_known_args(argv)
    flags = [flag for config in known.config for flag in _flags_of(config, cls)] + flags
    # what `cls` refuses is for the caller: tyro would print it in a form of its own
    unchecked = type(cls.__name__, (cls,), {"__post_init__": lambda self: None, "__doc__": cls.__doc__})
    values: Any = tyro.cli(unchecked, prog=prog, description=description, args=flags, use_underscores=True)
    return cls(**vars(values))


def _flags_of(config: str, cls: type) -> list[str]:
    """The flags in a file; of a packaged one the benchmarks take those that they share with `pretrain`."""
    kinds = {field.name: str(field.type) for field in dataclasses.fields(cls)}
    packaged = hasattr(cls, "preset") and not Path(config).is_file() and config in packaged_configs()
    from_file = []
    for name, value in read_config(config).items():
        if name not in kinds:
            if packaged:
                continue
            close = difflib.get_close_matches(str(name), kinds, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise SimIPUError(f"--config {config}: unknown flag {name!r}{hint}")
        if "bool" in kinds[name] and isinstance(value, str):
            value = yaml.SafeLoader.bool_values.get(value.lower(), value)
        if isinstance(value, bool):
            from_file.append(f"--{name}" if value else f"--no_{name}")
        else:
            values = value if isinstance(value, list) else [value]
            from_file += [f"--{name}", *("None" if one in NULLS else str(one) for one in values)]
    return from_file


def packaged_configs() -> list[str]:
    return sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def read_config(name: str) -> dict[str, Any]:
    """Flags from a YAML or JSON file, a `run.yaml` (its `arguments`), or a packaged configuration.

    Returns:
        name -> the value as text, or a list of texts; from JSON as they are.

    Raises:
        SimIPUError: there is no such file, or it holds something else.
    """
    file = Path(name) if Path(name).is_file() else CONFIGS / f"{name}.yaml"
    if not file.is_file():
        raise SimIPUError(f"--config {name}: no such file; the packaged ones are {', '.join(packaged_configs())}")
    try:
        text = file.read_text(encoding="utf-8-sig")
        # all as it is written: a scene's name may look like a number (010), and `no` is the name of a precision
        values = json.loads(text) if name.endswith(".json") else yaml.load(text, yaml.BaseLoader)
    except (yaml.YAMLError, json.JSONDecodeError, UnicodeDecodeError) as error:
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
        SimIPUError: a part without `=`, a dotted name that does not start with one of `sections`, a name given twice,
            or a value that is no YAML.
    """
    overrides: dict[str, Any] = {}
    parts = re.split(r",+(?=\s*[\w.]+\s*=)", (text or "").strip(" ,"))  # at the commas before another name
    for part in filter(None, parts):
        name, equals, value = part.partition("=")
        section, _, inner = name.strip().rpartition(".")
        is_known = section in sections if section else inner not in sections
        if not equals or not is_known or re.fullmatch(r"[^\[{'\"]*,.*", value.strip()):  # no value has a bare comma
            nested = "".join(f" or {known}.name=value" for known in sections)
            raise SimIPUError(f"{name_of_flag} {part.strip()!r}: expected name=value{nested}")
        target = overrides.setdefault(section, {}) if section else overrides
        if inner in target:
            raise SimIPUError(f"{name_of_flag}: {name.strip()} is given twice")
        try:
            target[inner] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            found = " ".join(str(error).split())
            raise SimIPUError(f"{name_of_flag} {part.strip()!r}: the value cannot be read ({found})") from error
    return overrides
