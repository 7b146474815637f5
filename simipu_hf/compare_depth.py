"""Does pre-training help here? Depth fine-tuning from several image encoders, all else being equal.

    python -m simipu_hf.compare_depth --image_encoders simipu=RUN imagenet=resnet18 \
        --train_frames KITTI#train --test_frames KITTI#val --image_size 96 320 --output_dir OUT

Every combination of encoder, mode (all weights trained, or the decoder alone), share of the labels and seed is one
run of the published recipe on the same frames with the same number of steps. Frames are decoded and resized once and
kept in memory.
"""

# ruff: noqa: RUF009 (`flag` returns a dataclass field)

import dataclasses
import hashlib
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from .data.depth_samples import DepthAugmentation, DepthDataset, DepthFrame, DepthPreprocessing, default_crop_size
from .data.selection import select_frames
from .errors import SimIPUError
from .evaluation.depth import HIGHER_IS_BETTER, METRICS, evaluate_frames, write_json
from .finetune_depth import build_depth_model, fit, load_encoder_for_depth
from .modeling.modeling_simipu_depth import SimIPUForDepthEstimation
from .training.fields import flag
from .training.legacy_arguments import as_size, check_choice, parse_flags
from .training.loop import exit_code_of

RUNS_FILE, RESULT_FILE, TABLE_FILE, PLOT_FILE = "runs.jsonl", "comparison.json", "comparison.md", "comparison.png"
BASELINE = "scratch"


@dataclass
class CompareDepthArguments:
    """Everything [`compare_depth`] needs."""

    image_encoders: list[str] = flag(
        [],
        "NAME=SOURCE ..., SOURCE being whatever finetune_depth's --image_encoder takes. scratch, random weights of "
        "the first one's architecture, is added where missing; the others are compared with it.",
        metavar="NAME=SOURCE",
    )
    train_frames: list[str] = flag([], "Frames with labels: SOURCE[#SPLIT[:IDS]] ...", metavar="FRAMES")
    test_frames: list[str] = flag([], "Frames to evaluate on; no drive should be on both sides.", metavar="FRAMES")
    output_dir: str = flag("", "Folder of the results; runs that it already holds are not repeated.")
    modes: list[str] = flag(["full"], "full (all weights are trained), frozen (the decoder alone), or both.")
    label_fractions: list[float] = flag([1.0], "Shares of the training frames; smaller ones are part of larger ones.")
    seeds: list[int] = flag([0, 1, 2], "Of the decoder, of random encoders, of frame order and augmentation.")
    image_size: list[int] | None = flag(None, "Height and width after the crop.", metavar="PIXELS")
    crop_size: list[int] | None = flag(None, "Height and width of the random training window.", metavar="PIXELS")
    kb_crop: bool = flag(True, "Keep the bottom centre of 352 x 1216 pixels of every image.")
    max_steps: int = flag(400, "Optimizer steps of every run.")
    batch_size: int = flag(8, "Frames per step.")
    learning_rate: float = flag(1e-4, "Peak of the one-cycle schedule.")
    weight_decay: float = flag(0.01, "Of AdamW.")
    max_depth: float = flag(80.0, "Largest depth that is predicted and evaluated, in metres.")
    evaluation_crop: str = flag("garg", "garg, eigen or none.")
    flip_test: bool = flag(True, "Evaluate the mean of the predictions for the image and its mirror image.")
    num_evaluations: int = flag(
        1, "Evaluations during every run, evenly spaced, the last at its end: more give a curve."
    )
    device: str | None = flag(None, "Such as cuda; a GPU where there is one if empty.")

    def __post_init__(self) -> None:
        if not self.output_dir:
            raise SimIPUError("--output_dir is missing: the folder to write the results to")
        for name in ("image_encoders", "train_frames", "test_frames", "modes", "label_fractions", "seeds"):
            values = getattr(self, name)
            if not values:
                raise SimIPUError(f"--{name} is missing")
            if len(set(values)) < len(values):
                raise SimIPUError(f"--{name} names something twice: {' '.join(map(str, values))}")
        for encoder in self.image_encoders:
            if not all(encoder.partition("=")):
                raise SimIPUError(f"--image_encoders {encoder}: expected NAME=SOURCE")
        for mode in self.modes:
            check_choice("--modes", mode, ("full", "frozen"))
        if not all(0 < fraction <= 1 for fraction in self.label_fractions):
            raise SimIPUError(f"--label_fractions must be above 0 and at most 1, found {self.label_fractions}")
        if self.image_size is None and not self.kb_crop:
            raise SimIPUError("--no_kb_crop needs --image_size: a batch holds images of one size")
        if min(self.max_steps, self.batch_size) < 1 or not 1 <= self.num_evaluations <= self.max_steps:
            raise SimIPUError("--max_steps and --batch_size must be at least 1, --num_evaluations 1 to --max_steps")
        check_choice("--evaluation_crop", self.evaluation_crop, ("garg", "eigen", "none"))

    def recipe(self) -> dict[str, Any]:
        """What all runs share; runs of another recipe in the same folder are not reused."""
        free = ("image_encoders", "output_dir", "modes", "label_fractions", "seeds", "device")
        return {name: value for name, value in vars(self).items() if name not in free}


@dataclass(frozen=True)
class Encoder:
    """An image encoder in the comparison, its weights in memory; `weights` is `None` for random ones."""

    name: str
    image_fields: dict[str, Any]
    weights: dict[str, torch.Tensor] | None
    about: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        digest = hashlib.sha256(json.dumps(self.image_fields, sort_keys=True, default=str).encode())
        for name, value in (self.weights or {}).items():
            digest.update(name.encode() + value.detach().cpu().contiguous().view(-1).numpy().tobytes())
        return digest.hexdigest()[:16]


def compare_depth(arguments: CompareDepthArguments) -> dict[str, Any]:
    """Fine-tune for depth from every encoder, and compare.

    Writes `runs.jsonl` (a line per run, as it ends), `comparison.json`, `comparison.md` (the table) and
    `comparison.png` (where matplotlib is installed).

    Returns:
        `table`: per encoder, mode and label fraction the mean and standard deviation over seeds of every metric, and
        the change of AbsRel against `scratch` in percent; `runs`: every run; `encoders`: what was loaded.

    Raises:
        SimIPUError: unusable arguments, encoders or frames.
    """
    output_dir = Path(arguments.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    encoders = load_encoders(arguments.image_encoders)
    preprocessing = DepthPreprocessing(arguments.kb_crop, as_size(arguments.image_size))
    train_frames = load_frames(arguments.train_frames, preprocessing, "training frames")
    test_frames = load_frames(arguments.test_frames, preprocessing, "test frames")

    recipe = hashlib.sha256(json.dumps(arguments.recipe(), sort_keys=True).encode()).hexdigest()[:16]
    runs = read_runs(output_dir / RUNS_FILE)
    plan = list(
        itertools.product(encoders, arguments.modes, sorted(arguments.label_fractions, reverse=True), arguments.seeds)
    )
    finished = []
    for encoder, mode, fraction, seed in tqdm(plan, desc="runs", unit="run"):
        key = {
            "encoder": encoder.name, "mode": mode, "label_fraction": fraction, "seed": seed, "recipe": recipe,
            "weights": encoder.fingerprint,
        }  # fmt: skip
        run = next((run for run in runs if all(run.get(name) == value for name, value in key.items())), None)
        if run is None:
            run = {
                **key,
                **run_once(arguments, encoder, mode, fraction, seed, preprocessing, train_frames, test_frames),
            }
            with (output_dir / RUNS_FILE).open("a", encoding="utf-8") as file:
                file.write(json.dumps(run) + "\n")
        finished.append(run)

    result = {
        "recipe": arguments.recipe(),
        "encoders": {encoder.name: encoder.about["description"] for encoder in encoders},
        "num_train_frames": len(train_frames),
        "num_test_frames": len(test_frames),
        "table": summarize(finished),
        "runs": finished,
    }
    write_json(output_dir / RESULT_FILE, result)
    table = format_table(result)
    (output_dir / TABLE_FILE).write_text(table, encoding="utf-8")
    plot_comparison(result, output_dir / PLOT_FILE)
    print(table)
    return result


def load_encoders(named_sources: Sequence[str]) -> list[Encoder]:
    """The encoders of `NAME=SOURCE` arguments, `scratch` first; it is added where it is missing."""
    sources = dict(entry.split("=", 1) for entry in named_sources)
    encoders = {name: Encoder(name, *load_encoder_for_depth(source)) for name, source in sources.items()}
    if BASELINE not in encoders:
        image_fields = next(iter(encoders.values())).image_fields
        _, _, about = load_encoder_for_depth(f"random:{image_fields['architecture']}")
        encoders[BASELINE] = Encoder(BASELINE, image_fields, None, about)
    return [encoders.pop(BASELINE), *encoders.values()]


def load_frames(specifications: Sequence[str], preprocessing: DepthPreprocessing, what: str) -> list[DepthFrame]:
    """Frames decoded, cropped and resized once, in memory."""
    rows = select_frames(specifications)
    return [preprocessing.load(rows[index]) for index in tqdm(range(len(rows)), desc=what, unit="frame", leave=False)]


def run_once(
    arguments: CompareDepthArguments,
    encoder: Encoder,
    mode: str,
    fraction: float,
    seed: int,
    preprocessing: DepthPreprocessing,
    train_frames: list[DepthFrame],
    test_frames: list[DepthFrame],
) -> dict[str, Any]:
    """One fine-tuning run and its evaluation: `metrics`, `per_range`, `curve`, `train_loss` and `seconds`."""
    started = time.perf_counter()
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    preprocessing = dataclasses.replace(
        preprocessing, image_mean=encoder.about["image_mean"], image_std=encoder.about["image_std"]
    )
    crop_size = as_size(arguments.crop_size) or default_crop_size(preprocessing.image_size)
    labelled = label_subset(train_frames, fraction, seed)
    dataset = DepthDataset(labelled, preprocessing, DepthAugmentation(crop_size=crop_size), seed)
    model = build_depth_model(encoder.image_fields, encoder.weights, seed, max_depth=arguments.max_depth)
    model.to(device)  # type: ignore[arg-type]  # transformers' decorator hides the method
    if mode == "frozen":
        if encoder.weights is None:
            estimate_batch_norm(model, labelled, preprocessing)
        model.freeze_image_encoder()
    evaluate_at = {
        math.ceil(arguments.max_steps * (k + 1) / arguments.num_evaluations) for k in range(arguments.num_evaluations)
    }
    curve: list[dict[str, float]] = []
    evaluations: list[dict[str, Any]] = []

    def evaluate(step: int) -> None:
        if step not in evaluate_at:
            return
        result = evaluate_frames(
            model,
            test_frames,
            preprocessing,
            flip_test=arguments.flip_test,
            crop=arguments.evaluation_crop,
            max_depth=arguments.max_depth,
        )
        evaluations.append(result)
        curve.append({"step": step, "abs_rel": result["metrics"]["abs_rel"]})

    losses = fit(
        model,
        dataset,
        total_steps=arguments.max_steps,
        batch_size=arguments.batch_size,
        seed=seed,
        on_step=evaluate,
        learning_rate=arguments.learning_rate,
        weight_decay=arguments.weight_decay,
    )
    last = losses[-max(1, len(losses) // 10) :]
    return {
        "metrics": evaluations[-1]["metrics"],
        "per_range": {name: values["abs_rel"] for name, values in evaluations[-1]["per_range"].items()},
        "curve": curve,
        "num_frames": len(labelled),
        "train_loss": statistics.fmean(last),
        "seconds": time.perf_counter() - started,
    }


def label_subset(frames: list[DepthFrame], fraction: float, seed: int) -> list[DepthFrame]:
    """A random share of the frames, at least one; for one seed a smaller share is part of every larger one."""
    order = torch.randperm(len(frames), generator=torch.Generator().manual_seed(seed)).tolist()
    return [frames[index] for index in order[: max(1, round(fraction * len(frames)))]]


@torch.no_grad()
def estimate_batch_norm(
    model: SimIPUForDepthEstimation, frames: Sequence[DepthFrame], preprocessing: DepthPreprocessing
) -> None:
    """Set the running statistics of the image encoder's batch norms to those of the frames.

    Random weights come with statistics that fit nothing; frozen like that they would be an unfairly weak baseline.
    """
    norms = [m for m in model.image_encoder.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain average over all batches
    model.train()
    for start in range(0, len(frames), 8):
        batch = torch.stack([preprocessing.normalize(frame.image) for frame in frames[start : start + 8]])
        model(pixel_values=batch.to(next(model.parameters()).device))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def read_runs(path: Path) -> list[dict[str, Any]]:
    """Finished runs of an earlier call; a last line that was cut short is left out."""
    runs = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            runs.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return runs


def summarize(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and spread over seeds per encoder, mode and label fraction.

    Returns:
        One entry each, with `mean` and `std` (of the sample; `None` for a single seed) of every metric,
        `num_seeds`, `num_frames`, `abs_rel_change_percent` against `scratch` (negative is better), and
        `seeds_better`: for how many seeds AbsRel is below that of `scratch` with the same seed.
    """
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault((run["mode"], run["label_fraction"], run["encoder"]), []).append(run)
    table = []
    for (mode, fraction, encoder), group in groups.items():
        values = {name: [run["metrics"][name] for run in group] for name in METRICS}
        entry = {
            "encoder": encoder,
            "mode": mode,
            "label_fraction": fraction,
            "num_frames": group[0]["num_frames"],
            "num_seeds": len(group),
            "mean": {name: statistics.fmean(of_metric) for name, of_metric in values.items()},
            "std": {
                name: statistics.stdev(of_metric) if len(group) > 1 else None for name, of_metric in values.items()
            },
        }
        baseline = groups.get((mode, fraction, BASELINE))
        if baseline is not None and encoder != BASELINE:
            of_seed = {run["seed"]: run["metrics"]["abs_rel"] for run in baseline}
            base = statistics.fmean(of_seed.values())
            entry["abs_rel_change_percent"] = 100 * (entry["mean"]["abs_rel"] / base - 1)
            entry["seeds_better"] = sum(run["metrics"]["abs_rel"] < of_seed.get(run["seed"], -1) for run in group)
        table.append(entry)
    return sorted(table, key=lambda entry: (entry["mode"] != "full", -entry["label_fraction"]))


def format_table(result: dict[str, Any]) -> str:
    """The comparison as Markdown."""
    shown = ("abs_rel", "rmse", "silog", "a1")
    heads = [f"{name} {'↑' if name in HIGHER_IS_BETTER else '↓'}" for name in shown]
    lines = [
        "| weights trained | labelled frames | image encoder | " + " | ".join(heads) + " | AbsRel against scratch |",
        "| --- " * (4 + len(shown)) + "|",
    ]
    for entry in result["table"]:
        cells = [
            f"{entry['mean'][name]:.4f}" + ("" if entry["std"][name] is None else f" ± {entry['std'][name]:.4f}")
            for name in shown
        ]
        change = ""
        if "abs_rel_change_percent" in entry:
            change = (
                f"{entry['abs_rel_change_percent']:+.1f} % (better for {entry['seeds_better']} of "
                f"{entry['num_seeds']} seeds)"
            )
        mode = {"full": "all", "frozen": "decoder"}[entry["mode"]]
        lines.append(f"| {mode} | {entry['num_frames']} | {entry['encoder']} | {' | '.join(cells)} | {change} |")
    notes = [f"- {name}: {description}" for name, description in result["encoders"].items()]
    seeds = len({run["seed"] for run in result["runs"]})
    about = (
        f"{result['num_test_frames']} test frames, {result['recipe']['max_steps']} steps of "
        f"{result['recipe']['batch_size']} frames, mean ± standard deviation over {seeds} seeds."
    )
    return "\n".join([*lines, "", about, "", *notes, ""])


def plot_comparison(result: dict[str, Any], path: Path) -> None:
    """AbsRel against the number of labelled frames and, where runs were evaluated on the way, against the steps."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"{path.name} was not drawn: pip install matplotlib", file=sys.stderr)
        return
    modes = list(dict.fromkeys(entry["mode"] for entry in result["table"]))
    names = list(result["encoders"])
    with_curves = result["recipe"]["num_evaluations"] > 1
    figure = Figure(figsize=(5 * len(modes), 4 * (1 + with_curves)), layout="constrained")
    axes = figure.subplots(1 + with_curves, len(modes), squeeze=False)
    for column, mode in enumerate(modes):
        axis = axes[0][column]
        for position, name in enumerate(names):
            entries = [e for e in result["table"] if e["mode"] == mode and e["encoder"] == name]
            entries.sort(key=lambda entry: entry["num_frames"])
            # a little apart, so that the bars do not hide each other
            frames = [entry["num_frames"] * (1 + 0.02 * (position - len(names) / 2)) for entry in entries]
            means = [entry["mean"]["abs_rel"] for entry in entries]
            spread = [entry["std"]["abs_rel"] or 0.0 for entry in entries]
            axis.errorbar(frames, means, yerr=spread, marker="o", capsize=3, label=name)
        title = {"full": "all weights trained", "frozen": "decoder trained alone"}[mode]
        axis.set(title=title, xlabel="labelled frames", ylabel="AbsRel (lower is better)", xscale="log")
        ticks = sorted({entry["num_frames"] for entry in result["table"]})
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.set_xlim(ticks[0] / 1.2, ticks[-1] * 1.2)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend()
        if with_curves:
            _plot_curves(axes[1][column], result, mode, names)
    aside = path.with_name(f".partial.{path.name}")
    figure.savefig(aside, dpi=150)
    aside.replace(path)


def _plot_curves(axis: Any, result: dict[str, Any], mode: str, names: Sequence[str]) -> None:
    """Mean over seeds and their range, with the largest share of labels."""
    largest = max(run["label_fraction"] for run in result["runs"])
    for name in names:
        runs = [
            run
            for run in result["runs"]
            if run["mode"] == mode and run["encoder"] == name and run["label_fraction"] == largest
        ]
        steps = [point["step"] for point in runs[0]["curve"]]
        values = list(zip(*([point["abs_rel"] for point in run["curve"]] for run in runs), strict=True))
        (line,) = axis.plot(steps, [statistics.fmean(v) for v in values], marker=".", label=name)
        axis.fill_between(steps, [min(v) for v in values], [max(v) for v in values], color=line.get_color(), alpha=0.2)
    axis.set(xlabel="optimizer step", ylabel="AbsRel (lower is better)")
    axis.grid(alpha=0.3)
    axis.legend()


_DESCRIPTION = """Does pre-training help here? Fine-tune for depth from several encoders, all else being equal.

python -m simipu_hf.compare_depth --image_encoders simipu=RUN imagenet=resnet18 --train_frames KITTI#train \\
    --test_frames KITTI#val --image_size 96 320 --modes full frozen --label_fractions 0.25 1 --output_dir OUT"""


def main(argv: Sequence[str] | None = None) -> int:
    """The command: parse the flags and run; returns the exit code."""
    return exit_code_of(
        lambda: compare_depth(*parse_flags((CompareDepthArguments,), argv, "simipu-hf compare-depth", _DESCRIPTION))
    )


if __name__ == "__main__":
    sys.exit(main())
