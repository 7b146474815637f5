"""Which image encoder is the better start? What the comparisons of all tasks share.

Every combination of encoder, mode (all weights trained, or the decoder alone), share of the labels and seed is one run
of the task's recipe on the same frames with the same number of steps. Each encoder is compared with scratch, random
weights of its architecture (`scratch`; of a further architecture `scratch-resnet18`), seed by seed, and two claims are
kept apart:

- speed: the share of scratch's steps after which the encoder reaches scratch's final value;
- level: the difference at the end, which says what the encoder is worth where scratch has stopped improving, and what
  it saves where scratch has not.
"""

import hashlib
import itertools
import json
import math
import re
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn
from torch.optim.swa_utils import update_bn
from tqdm.auto import tqdm
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from .data.frames import FrameDataset
from .errors import SimIPUError
from .files import atomic_path, atomic_write, check_target, write_json
from .finetuning import FineTuningTrainer, find_rgb_encoder, recipe
from .hub.weights import EncoderWeights
from .modeling.dense_model import SimIPUDenseModel
from .modeling.image_encoder import image_feature_maps, pad_to_divisor
from .training.arguments import CompareArguments
from .training.distributed import choose_device
from .training.logging import read_metrics
from .training.run_folder import short_digest, weights_fingerprint
from .training.sampling import TRAINING_VERSION

RUNS_FILE, RESULT_FILE, TABLE_FILE, PLOT_FILE = "runs.jsonl", "comparison.json", "comparison.md", "comparison.png"
BASELINE = "scratch"
# scratch has converged when its mean improves by less than this share since the last evaluation within three quarters
# of the steps
CONVERGED = 0.01


def compare(arguments: CompareArguments, task_class: type["Task"]) -> dict[str, Any]:
    """Run every combination and compare; runs that `output_dir` already holds are not repeated.

    Writes `runs.jsonl` (a line per run, as it ends), `comparison.json`, `comparison.md` (table and claims),
    `comparison.png`, and `pictures/` of every encoder's predictions with all labels and the first seed.

    Returns:
        `table`: see [`summarize`]; `runs`: every run; `encoders`: what was loaded; `guess`: see [`Task`]; `recipe`,
        `num_test_frames` and `num_test_frames_without_target`.

    Raises:
        SimIPUError: unusable arguments, encoders, frames or labels, or a frame on both sides.
    """
    output_dir, task_name = Path(arguments.output_dir), task_class.trainer_class.task
    known = earlier_runs(output_dir / RUNS_FILE, task_name)
    task = task_class(arguments)  # type: ignore[call-arg]  # each one reads its own frames
    encoders = load_encoders(arguments.image_encoders)
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / RUNS_FILE).touch()
    settings = arguments.recipe() | task.data
    counted = {name: value for name, value in settings.items() if name not in ("train_frames", "test_frames")}
    recipe = short_digest(counted | {"training_version": TRAINING_VERSION})
    fractions = sorted(arguments.label_fractions, reverse=True)
    finished, identities, pictures = [], {}, []
    for name, encoder in encoders.items():
        about = [encoder.architecture, encoder.model_args, encoder.input.mean, encoder.input.std]
        weights = weights_fingerprint(encoder.state_dict, about)
        identities[name] = {"task": task_name, "encoder": name, "recipe": recipe, "weights": weights}
    plan = list(itertools.product(encoders, arguments.modes, fractions, arguments.seeds))
    for name, mode, fraction, seed in tqdm(plan, desc="runs", unit="run"):
        key = identities[name] | {"mode": mode, "label_fraction": fraction, "seed": seed}
        encoder = encoders[name]
        run = next((run for run in known if key.items() <= run.items()), None)
        folder = None
        if (fraction, seed) == (fractions[0], arguments.seeds[0]):
            folder = output_dir / "pictures" / short_digest(key) / f"{name}_{mode}"
            pictures.append(folder)
        if run is None:
            run = key | task.run(encoder, mode, fraction, seed, folder)
            with (output_dir / RUNS_FILE).open("a", encoding="utf-8") as file:
                file.write("\n" + json.dumps(run))  # in front: a line that was cut short does not spoil this one
        finished.append(run | {"baseline": baseline_of(encoder, encoders)})
    result = {
        "recipe": settings,
        "encoders": {name: encoder.description for name, encoder in encoders.items()},
        "num_test_frames": len(task.test_frames),
        "num_test_frames_without_target": task.num_without_target,
        "guess": task.guess,
        "table": summarize(finished, task),
        "runs": finished,
    }
    write_json(output_dir / RESULT_FILE, result)
    with atomic_write(output_dir / TABLE_FILE) as stream:
        stream.write(format_table(result, task) + list_pictures(pictures, output_dir))
    plot_comparison(result, task, output_dir / PLOT_FILE)
    if not arguments.json:
        print((output_dir / TABLE_FILE).read_text(encoding="utf-8"))
    return result


def earlier_runs(file: Path, task_name: str) -> list[dict[str, Any]]:
    """The runs of an earlier comparison; a `SimIPUError` where they are of another task, or the folder holds something
    else."""
    check_target(file.parent, overwrite=True, is_earlier_output=lambda folder: file.is_file())
    runs = read_metrics(file) if file.is_file() else []
    for run in runs:
        if run.get("task", task_name) != task_name:
            raise SimIPUError(
                f"{file}: expected runs of {task_name}, found runs of {run['task']}; choose another --output_dir"
            )
    return runs


def load_encoders(named_sources: Iterable[str]) -> dict[str, EncoderWeights]:
    """The encoders of `NAME=SOURCE` arguments by name, `scratch` first; what they are compared with is added where it
    is missing: `scratch`, of the first one's network, and one for every further network."""
    sources = dict(entry.split("=", 1) for entry in named_sources)
    encoders = {name: find_rgb_encoder(source) for name, source in sources.items()}
    if BASELINE not in encoders:
        encoders[BASELINE] = random_encoder(next(iter(encoders.values())))
    encoders = {BASELINE: encoders.pop(BASELINE), **encoders}
    for encoder in list(encoders.values()):
        baseline = baseline_of(encoder, encoders)
        if baseline not in encoders:
            encoders[baseline] = random_encoder(encoder)
        if encoders[baseline].state_dict:
            raise SimIPUError(f"--image_encoders: {baseline} is the name of random weights, found trained ones")
    return encoders


def random_encoder(encoder: EncoderWeights) -> EncoderWeights:
    """Random weights of an encoder's network, with timm's normalisation of images for the architecture."""
    random = find_rgb_encoder(f"random:{encoder.architecture}")
    settings = network_settings(encoder)
    description = f"{random.description}, {settings}" if settings else random.description
    return replace(encoder, state_dict={}, model_args=settings, input=random.input, description=description)


def fingerprint(frames: Iterable[Any]) -> str:
    """A short digest of what frames hold, names, images and labels: the same wherever their files lie."""
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if is_dataclass(value):
            for field in fields(value):
                add(getattr(value, field.name))
        else:
            digest.update(value.tobytes() if isinstance(value, np.ndarray) else repr(value).encode())

    for frame in frames:
        add(frame)
    return digest.hexdigest()[:16]


def network_settings(encoder: EncoderWeights) -> dict[str, Any]:
    """The arguments of timm that an encoder was made with, without the image size, which every task sets."""
    sizes = ("img_size", "dynamic_img_size")
    return {name: value for name, value in sorted(encoder.model_args.items()) if name not in sizes}


def network_name(encoder: EncoderWeights) -> str:
    """Architecture and settings of an encoder's network, as part of a file's name."""
    settings = (f"-{name}={value}" for name, value in network_settings(encoder).items())
    return re.sub(r"[^\w.=-]+", "_", encoder.architecture + "".join(settings))


def baseline_of(encoder: EncoderWeights, encoders: Mapping[str, EncoderWeights]) -> str:
    """Name of the random weights of an encoder's network."""
    name = network_name(encoder)
    return BASELINE if name == network_name(encoders[BASELINE]) else f"{BASELINE}-{name}"


def label_subset(num_frames: int, fraction: float, seed: int) -> list[int]:
    """A random share of the frames, at least one; for one seed a smaller share is part of every larger one."""
    order = torch.randperm(num_frames, generator=torch.Generator().manual_seed(seed)).tolist()
    return order[: max(1, round(fraction * num_frames))]


# --- one run --------------------------------------------------------------------------------------------------------


class Task:
    """What is compared on: runs of the trainer of a task, without a run folder. A task adds `parts`.

    Args:
        arguments: of the comparison.
        train, test: whose frames are read once, and kept in memory.

    Attributes:
        data: fingerprints of the frames on both sides; runs on other frames are not reused.
        shown: the metrics in the table, the first being the one that the claims are about.
        higher_is_better: the metrics of which that is true.
        num_without_target: how many test frames are in no average, as nothing in them counts.
        guess: `name` and `metrics` of a prediction that does not look at the image.
    """

    trainer_class: type[FineTuningTrainer]
    shown: tuple[str, ...]
    higher_is_better: tuple[str, ...]
    num_without_target = 0
    guess: dict[str, Any]

    def __init__(self, arguments: CompareArguments, train: FrameDataset, test: FrameDataset):
        self.arguments = arguments
        self.train_frames, self.test_frames = (
            list(data.usable_frames(tqdm(range(len(data)), what, leave=False)))
            for what, data in (("training frames", train), ("test frames", test))
        )
        self.data = {"train": fingerprint(self.train_frames), "test": fingerprint(self.test_frames)}

    @property
    def sign(self) -> int:
        """1 where lower values of the first metric are better, else -1."""
        return -1 if self.shown[0] in self.higher_is_better else 1

    def parts(self, encoder: EncoderWeights, frames: Sequence[Any], seed: int) -> dict[str, Any]:
        """Keyword arguments of the trainer: a new model with the encoder's weights, `frames` to train on, the test
        frames to evaluate on."""
        raise NotImplementedError

    def run(
        self, encoder: EncoderWeights, mode: str, fraction: float, seed: int, picture_dir: Path | None = None
    ) -> dict[str, Any]:
        """One run: `metrics` at its end, `num_frames` it was trained on, and `curve`, a list of `step` and the value
        of the first metric; further entries are kept. What its model predicts for two test frames is drawn into
        `picture_dir`."""
        arguments, started, metric = self.arguments, time.perf_counter(), self.shown[0]
        labelled = [self.train_frames[index] for index in label_subset(len(self.train_frames), fraction, seed)]
        with TemporaryDirectory() as folder:
            trainer = self.trainer_class(
                args=run_settings(arguments, folder, len(labelled), seed),
                callbacks=[EvaluateEvenly(arguments.num_evaluations)],
                encoder_learning_rate=arguments.encoder_learning_rate,
                decoder_first=arguments.decoder_first if mode == "full" else 0.0,
                **self.parts(encoder, labelled, seed),
            )
            if mode == "frozen":
                if not encoder.state_dict:
                    estimate_batch_norm(trainer.model, trainer.train_dataset)
                trainer.model.freeze_image_encoder()
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        history = trainer.state.log_history
        evaluated = [entry for entry in history if f"eval_{metric}" in entry]
        result = {
            "metrics": trainer.evaluation["metrics"],
            "curve": [{"step": entry["step"], metric: entry[f"eval_{metric}"]} for entry in evaluated],
            "num_frames": len(labelled),
            "train_loss": next(entry["loss"] for entry in reversed(history) if "loss" in entry),
            "seconds": time.perf_counter() - started,
        }
        if picture_dir is not None:
            data = trainer.eval_dataset
            data.rows = data.rows[:2]
            with suppress(SimIPUError):  # after drawing: neither frame may have a target that counts
                trainer.evaluate_frames(data, picture_dir)
        return result


def run_settings(arguments: CompareArguments, folder: str, num_frames: int, seed: int) -> TrainingArguments:
    """Arguments of a Trainer that writes nothing."""
    return recipe(
        folder,
        arguments.mixed_precision,
        max_steps=arguments.max_steps,
        per_device_train_batch_size=min(arguments.batch_size, num_frames),
        learning_rate=arguments.learning_rate,
        weight_decay=arguments.weight_decay,
        warmup_steps=arguments.warmup_ratio,
        seed=seed,
        save_strategy="no",
        logging_steps=max(1, arguments.max_steps // 10),
        disable_tqdm=True,
        **({"use_cpu": choose_device(arguments.device).type == "cpu"} if arguments.device else {}),
    )


class EvaluateEvenly(TrainerCallback):
    """Evaluates `times` times, evenly over the run, the last time at its end."""

    def __init__(self, times: int):
        self.times = times

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        at = {math.ceil(state.max_steps * (k + 1) / self.times) for k in range(self.times)}
        control.should_evaluate = state.global_step in at


def estimate_batch_norm(model: SimIPUDenseModel, dataset: Any) -> None:
    """Set the running statistics of the image encoder's batch norms to those of a data set's frames, not augmented.

    Random weights come with statistics that fit nothing; frozen like that they would be an unfairly weak baseline.
    """

    def batches() -> Iterator[torch.Tensor]:
        for first in range(0, len(dataset), 8):
            indices = range(first, min(first + 8, len(dataset)))
            yield torch.stack([dataset.pixel_values(index) for index in indices]).to(model.device)

    update_bn(batches(), UsedStages(model))


class UsedStages(nn.Module):
    """The image encoder as a model uses it: without the layers behind the last stage of its pyramid."""

    def __init__(self, model: SimIPUDenseModel):
        super().__init__()
        self.encoder, self.stages = model.image_encoder, model.pyramid.stages
        self.training = self.encoder.training

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return image_feature_maps(self.encoder, pad_to_divisor(pixel_values, self.encoder), self.stages)


# --- what the runs say ----------------------------------------------------------------------------------------------


def summarize(runs: Sequence[dict[str, Any]], task: Task) -> list[dict[str, Any]]:
    """Mean and spread over seeds per encoder, mode and label fraction, and the two claims against scratch.

    Returns:
        One entry each, with `num_frames`, `num_seeds`, `mean` and `std` of every metric and `curve` (`step`, mean and
        all values of the first metric), and `baseline`, the name of its scratch. Beside scratch also `level` and
        `speed`, see [`level`] and [`speed`]; scratch itself has what [`late_improvement`] returns.
    """
    groups: dict[tuple, dict[int, dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault((run["mode"], run["label_fraction"], run["encoder"]), {})[run["seed"]] = run
    metric, sign = task.shown[0], task.sign
    table = []
    for (mode, fraction, encoder), group in groups.items():
        first = next(iter(group.values()))
        values = {name: [run["metrics"][name] for run in group.values()] for name in runs[0]["metrics"]}
        points = zip(*(run["curve"] for run in group.values()), strict=True)
        entry = {
            "encoder": encoder,
            "mode": mode,
            "label_fraction": fraction,
            "num_frames": first["num_frames"],
            "num_seeds": len(group),
            "mean": {name: statistics.fmean(of_metric) for name, of_metric in values.items()},
            "std": {name: spread(of_metric) for name, of_metric in values.items()},
            "curve": [{"step": point[0]["step"], "values": [p[metric] for p in point]} for point in points],
            "baseline": first["baseline"],
        }
        baseline = groups[mode, fraction, entry["baseline"]]
        pairs = [(run, baseline[seed]) for seed, run in group.items()]
        if encoder == entry["baseline"]:
            entry |= late_improvement(entry["curve"], sign)
        else:
            entry["level"] = level([(run["metrics"][metric], base["metrics"][metric]) for run, base in pairs], sign)
            entry["speed"] = speed([(run["curve"], base["curve"][-1]) for run, base in pairs], metric, sign)
        table.append(entry)
    return sorted(table, key=lambda entry: (entry["mode"] != "full", -entry["label_fraction"]))


def spread(values: Sequence[float]) -> float | None:
    """Standard deviation of the sample; `None` for a single value."""
    return statistics.stdev(values) if len(values) > 1 else None


def level(pairs: Sequence[tuple[float, float]], sign: int = 1) -> dict[str, Any]:
    """The difference to scratch of the same seed at the end: of errors in percent; scores may be 0: in points.

    Args:
        pairs: value of the encoder and of scratch, for each seed.
        sign: 1 where lower values are better, else -1.
    """
    if sign < 0:
        unit, differences = "points", [value - base for value, base in pairs]
    else:
        unit, differences = "percent", [100 * (value / base - 1) for value, base in pairs]
    better = sum(sign * value < sign * base for value, base in pairs)
    return {
        unit: differences, "mean": statistics.fmean(differences), "std": spread(differences), "seeds_better": better,
    }  # fmt: skip


def speed(
    curves: Sequence[tuple[Sequence[dict[str, float]], dict[str, float]]], metric: str, sign: int = 1
) -> dict[str, Any]:
    """After which share of scratch's steps its final value is reached, between two evaluations by interpolation.

    Args:
        curves: the encoder's curve and the last point of scratch's, for each seed.
        metric: name of the value in a point.
        sign: 1 where lower values are better, else -1.

    Returns:
        `share` of each seed, `None` where it is not reached or scratch found nothing (0, higher being better); `mean`
        and `std` of those that reach it; `seeds_reached`.
    """
    shares: list[float | None] = []
    for curve, last in curves:
        target, steps = sign * last[metric], [point["step"] for point in curve]
        values = [sign * point[metric] for point in curve]
        first = next((index for index, value in enumerate(values) if value <= target), None)
        if first is None or target == 0:
            shares.append(None)
            continue
        step = steps[first]
        if first > 0:
            part = (values[first - 1] - target) / (values[first - 1] - values[first])
            step = steps[first - 1] + part * (step - steps[first - 1])
        shares.append(step / last["step"])
    reached = [share for share in shares if share is not None]
    mean = statistics.fmean(reached) if reached else None
    return {"share": shares, "mean": mean, "std": spread(reached), "seeds_reached": len(reached)}


def late_improvement(curve: Sequence[dict[str, Any]], sign: int = 1) -> dict[str, Any]:
    """Has scratch converged?

    Returns:
        `late_improvement`: how much its mean improves, relatively, since the last evaluation within three quarters of
        the steps (rounded up); `late_share`: the share of the steps since then, a quarter where one lies there;
        `converged`. All `None` where it was evaluated less than twice, or found nothing (0, higher being better).
    """
    if len(curve) < 2 or not any(curve[-1]["values"]):
        return {"late_improvement": None, "late_share": None, "converged": None}
    start = math.ceil(0.75 * curve[-1]["step"])  # evaluations are rounded up to whole steps
    earlier = [point for point in curve[:-1] if point["step"] <= start] or curve[:1]
    before, after = (statistics.fmean(point["values"]) for point in (earlier[-1], curve[-1]))
    improvement = sign * (before - after) / max(before, after)
    share = 1 - earlier[-1]["step"] / curve[-1]["step"]
    return {"late_improvement": improvement, "late_share": share, "converged": improvement < CONVERGED}


def format_table(result: dict[str, Any], task: Task) -> str:
    """Table and claims as Markdown."""
    shown = task.shown
    heads = [f"{name} {'↑' if name in task.higher_is_better else '↓'}" for name in shown]
    lines = [
        "| weights trained | labelled frames | image encoder | " + " | ".join(heads) + " |",
        "| --- " * (3 + len(shown)) + "|",
    ]
    for entry in result["table"]:
        cells = [f"{entry['mean'][name]:.4f}{_plus_minus(entry['std'][name], '.4f')}" for name in shown]
        lines.append(f"| {_MODES[entry['mode']]} | {entry['num_frames']} | {entry['encoder']} | {' | '.join(cells)} |")
    name, metrics = result["guess"]["name"], result["guess"]["metrics"]
    lines.append(f"| none | | {name} | {' | '.join(f'{metrics[metric]:.4f}' for metric in shown)} |")
    recipe, num_frames = result["recipe"], result["num_test_frames"]
    num_counted = num_frames - result["num_test_frames_without_target"]
    num_seeds = max(entry["num_seeds"] for entry in result["table"])
    about = (
        f"{num_counted} of {num_frames} test frames, {recipe['max_steps']} steps of at most {recipe['batch_size']} "
        f"frames, mean ± standard deviation (seeds: {num_seeds})."
    )
    claims = [f"- {claim}" for claim in describe_claims(result, task)]
    encoders = [f"- {name}: {description}" for name, description in result["encoders"].items()]
    return "\n".join([*lines, "", about, "", *claims, "", *encoders, ""])


_MODES = {"full": "all", "frozen": "decoder"}


def describe_claims(result: dict[str, Any], task: Task) -> list[str]:
    """Speed and level of every encoder in words; of scratch, whether it had converged, and whether it is no better
    than a prediction that does not look at the image."""
    metric, guess = task.shown[0], result["guess"]
    claims = []
    for entry in result["table"]:
        who = f"{entry['encoder']} ({_MODES[entry['mode']]} weights, {entry['num_frames']} frames)"
        if "speed" in entry:
            claims.append(f"{who}: {_speed_in_words(entry, metric)} {_level_in_words(entry)}")
        elif task.sign * entry["mean"][metric] >= task.sign * guess["metrics"][metric]:
            yet = "nothing to compare with yet (--max_steps, --learning_rate)"
            claims.append(f"{who} is no better than {guess['name']}: {yet}.")
        if entry.get("late_improvement") is not None:
            state = "converged" if entry["converged"] else "not converged: the level says what this budget gives"
            claims.append(
                f"{who} improved by {100 * entry['late_improvement']:.1f} % over the last "
                f"{100 * entry['late_share']:.0f} % of the steps, {state} (rule: less than {CONVERGED:.0%})."
            )
    return claims


def _speed_in_words(entry: dict[str, Any], metric: str) -> str:
    speed = entry["speed"]
    if len(entry["curve"]) < 2:
        return "SPEED is not known from one evaluation (--num_evaluations)."
    if speed["mean"] is None:
        return f"SPEED: {entry['baseline']}'s final {metric} is not reached, or 0."
    std = None if speed["std"] is None else 100 * speed["std"]
    return (
        f"SPEED: {entry['baseline']}'s final {metric} after {100 * speed['mean']:.0f}{_plus_minus(std, '.0f')} % of "
        f"its steps ({speed['seeds_reached']} of {entry['num_seeds']} seeds reach it)."
    )


def _level_in_words(entry: dict[str, Any]) -> str:
    level = entry["level"]
    unit = "%" if "percent" in level else "points"
    differences = level["percent" if unit == "%" else "points"]
    seeds = ", ".join(f"{difference:+.1f}" for difference in differences)
    return (
        f"LEVEL at the end: {level['mean']:+.1f}{_plus_minus(level['std'], '.1f')} {unit} (by seed {seeds}; better "
        f"for {level['seeds_better']} of {len(differences)})."
    )


def list_pictures(folders: Iterable[Path], output_dir: Path) -> str:
    """The pictures of a comparison's runs as Markdown, frame by frame."""
    paths = [path for folder in folders for path in folder.glob("*.png")]
    paths.sort(key=lambda path: (path.name, path.parent.name))
    return "".join(
        f"\n{path.parent.name}:\n![{path.stem}]({path.relative_to(output_dir).as_posix()})\n" for path in paths
    )


def _plus_minus(std: float | None, form: str) -> str:
    return "" if std is None else f" ± {std:{form}}"


def plot_comparison(result: dict[str, Any], task: Task, path: Path) -> None:
    """Above, the first metric against the number of labelled frames; below, against the steps, with most labels."""
    metric, table = task.shown[0], result["table"]
    has_spread = max(entry["num_seeds"] for entry in table) > 1
    bars, band = ("; bars: standard deviation", "; band: least to greatest") if has_spread else ("", "")
    modes = list(dict.fromkeys(entry["mode"] for entry in table))
    ticks = sorted({entry["num_frames"] for entry in table})
    figure = Figure(figsize=(5 * len(modes), 8), layout="constrained")
    for mode, (upper, lower) in zip(modes, figure.subplots(2, len(modes), squeeze=False).T, strict=True):
        for position, name in enumerate(result["encoders"]):
            entries = [entry for entry in table if (entry["mode"], entry["encoder"]) == (mode, name)]
            # a little apart, so that the bars do not hide each other
            frames = [entry["num_frames"] * (1 + 0.02 * position) for entry in entries]
            means = [entry["mean"][metric] for entry in entries]
            upper.errorbar(frames, means, [e["std"][metric] or 0 for e in entries], marker="o", capsize=3, label=name)
            steps, values = zip(*((point["step"], point["values"]) for point in entries[0]["curve"]), strict=True)
            (line,) = lower.plot(steps, [statistics.fmean(v) for v in values], marker=".", label=name)
            low, high = [min(v) for v in values], [max(v) for v in values]
            lower.fill_between(steps, low, high, color=line.get_color(), alpha=0.2)
        upper.set(
            title=f"weights trained: {_MODES[mode]}{bars}", xlabel="labelled frames", ylabel=metric, xscale="log"
        )
        upper.set_xticks(ticks, [str(tick) for tick in ticks])
        upper.set_xlim(ticks[0] / 1.2, ticks[-1] * 1.2)
        upper.minorticks_off()
        lower.set(title=f"{ticks[-1]} labelled frames{band}", xlabel="optimizer step", ylabel=metric)
        for axes in (upper, lower):
            axes.grid(alpha=0.3)
            axes.legend()
    with atomic_path(path) as beside:
        figure.savefig(beside, dpi=150)
