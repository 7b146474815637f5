"""`simipu-hf benchmark step`: a whole pre-training step against its image encoder alone, and where the time goes."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from time import perf_counter, process_time
from typing import Any

import torch
from torch import nn

from simipu_hf.errors import SimIPUError
from simipu_hf.modeling.matching import PendingMatch
from simipu_hf.modeling.modeling_simipu import SimIPUForPreTraining
from simipu_hf.modeling.outputs_simipu import PointEncoderOutput

from .inputs import (
    DTYPES,
    benchmark_rows,
    check_at_least_one,
    choose,
    create_config,
    training_batch,
    two_view_dataset,
)
from .measure import (
    BenchmarkResult,
    Function,
    Timing,
    choose_device,
    conclude,
    median_timing,
    synchronize,
    time_interleaved,
)
from .memory import peak_memories

STEP = "pre-training step, forward + backward"
IMAGE = "image encoder, forward + backward"
POINTS = "point encoder, forward + backward"
OPTIMIZER = "optimizer step (AdamW)"


def benchmark_step(
    *,
    data_dir: str | None = None,
    dataset_name: str | None = None,
    preset: str = "recommended",
    image_encoder: str = "resnet50",
    point_encoder: str = "pointnet2",
    batch_size: int = 2,
    image_size: Sequence[int] = (384, 1248),
    num_points: int = 16384,
    dtype: str = "float32",
    config_overrides: dict | None = None,
    device: str | None = None,
    repeats: int = 5,
    seed: int = 0,
    json_path: str | os.PathLike | None = None,
) -> BenchmarkResult:
    """What a pre-training step costs beside the forward and backward of its image encoder alone.

    Both run in turn on the same batch, at the same size and precision. A second pass splits the step into its parts,
    waiting for the device after each, so on CUDA the parts add up to more than the step.

    Args:
        data_dir, dataset_name: frames to run on, as in `load_pretraining_dataset`; synthetic ones where neither is
            given.
        preset: `"recommended"` or `"official"`.
        image_encoder: timm model name.
        point_encoder: `"pointnet2"` or `"sparse_conv"`.
        batch_size, num_points: image and cloud pairs, and points in each cloud.
        image_size: height and width of the images, before padding to multiples of 32.
        dtype: `"float32"`, or `"bf16"` for autocast as in training with `--mixed_precision bf16`.
        config_overrides: fields of `SimIPUConfig` to change, such as `{"point_config": {...}}`.
        device: as `torch.device`; CUDA where there is one.
        repeats: of which the medians are taken, after one run that is not counted.
        seed: of the weights and the augmentation.
        json_path: where to write the result as JSON.

    Raises:
        SimIPUError: an unknown preset, encoder or dtype, or data that cannot be used.
    """
    choose("dtype", dtype, tuple(DTYPES))
    check_at_least_one(batch_size=batch_size, num_points=num_points, repeats=repeats)
    target = choose_device(device)
    with benchmark_rows(data_dir, dataset_name, batch_size) as (rows, source):
        batch = training_batch(two_view_dataset(rows, preset, image_size, num_points, seed), batch_size, target)
    settings: dict[str, Any] = {
        "preset": preset,
        "image_encoder": image_encoder,
        "point_encoder": point_encoder,
        "config_overrides": config_overrides,
        "seed": seed,
    }
    model = create_model(**settings, device=target)
    peaks = peak_memories(__name__, {"batch": batch, "dtype": dtype, **settings}, target)

    timings = time_interleaved(step_functions(model, batch, DTYPES[dtype], target), target, repeats)
    table = [
        {"part": name, **_columns(timing, timings[IMAGE]), "peak_bytes": peaks.get(name)}
        for name, timing in timings.items()
    ]
    parts = time_parts(model, batch, DTYPES[dtype], target, repeats)
    table += [{"part": f"  {name}", **_columns(timing, timings[IMAGE])} for name, timing in parts.items()]
    summary = {"step_over_image_encoder": timings[STEP].seconds / timings[IMAGE].seconds}
    if target.type == "cuda":
        summary["reserved_on_device_bytes"] = torch.cuda.max_memory_reserved(target)
    return conclude(
        name="pre-training step",
        settings={
            "data": source,
            "preset": preset,
            "image_encoder": image_encoder,
            "point_encoder": point_encoder,
            "batch_size": batch_size,
            "pixel_values": list(batch["pixel_values"].shape),
            "num_points": num_points,
            "dtype": dtype,
            "repeats": repeats,
            "seed": seed,
        },
        rows=table,
        summary=summary,
        device=target,
        json_path=json_path,
    )


def _columns(timing: Timing, image: Timing) -> dict[str, float]:
    return {**asdict(timing), "of_image_encoder": timing.seconds / image.seconds}


def create_model(
    preset: str,
    image_encoder: str,
    point_encoder: str,
    config_overrides: dict | None,
    seed: int,
    device: torch.device,
) -> SimIPUForPreTraining:
    """The model in training mode, with random weights."""
    config = create_config(
        preset, config_overrides, point_encoder=point_encoder, image_config={"architecture": image_encoder}
    )
    torch.manual_seed(seed)
    try:
        model = SimIPUForPreTraining(config).train()
    except (ValueError, ImportError) as error:
        raise SimIPUError(str(error)) from error
    return model.to(device)


def memory_functions(batch: dict[str, torch.Tensor], dtype: str, **settings: Any) -> dict[str, Function]:
    """What the first rows of the table run, by the row's part."""
    device = batch["points"].device
    model = create_model(**settings, device=device)
    return step_functions(model, batch, DTYPES[dtype], device)


def step_functions(
    model: SimIPUForPreTraining, batch: dict[str, torch.Tensor], dtype: torch.dtype, device: torch.device
) -> dict[str, Function]:
    """What is timed as a whole. Each starts without gradients; the optimizer steps on those of the step before it."""
    encoders = model.simipu
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)
    with torch.no_grad(), autocast(dtype, device):
        map_gradients = [torch.randn_like(m) for m in encoders.get_image_features(batch["pixel_values"])]
        point_gradient = torch.randn_like(encoders.get_point_features(batch["points"]).features)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        with autocast(dtype, device):
            loss = model(**batch).loss
        loss.backward()

    def image() -> None:
        model.zero_grad(set_to_none=True)
        with autocast(dtype, device):
            maps = encoders.get_image_features(batch["pixel_values"])
        torch.autograd.backward(maps, map_gradients)

    def points() -> None:
        model.zero_grad(set_to_none=True)
        with autocast(dtype, device):
            features = encoders.get_point_features(batch["points"]).features
        features.backward(point_gradient)

    return {IMAGE: image, POINTS: points, STEP: step, OPTIMIZER: optimizer.step}


def time_parts(
    model: SimIPUForPreTraining,
    batch: dict[str, torch.Tensor],
    dtype: torch.dtype,
    device: torch.device,
    repeats: int,
) -> dict[str, Timing]:
    """Medians of the parts of a step, in the order in which they run."""
    watch = Stopwatch(device)
    with watch.on_methods_of(model):
        for _ in range(repeats):
            model.zero_grad(set_to_none=True)
            with autocast(dtype, device):
                output = watch.run("rest of the forward", model, **batch)
            watch.run("backward", output.loss.backward)
    return {name: median_timing(timings) for name, timings in watch.timings.items()}


class Stopwatch:
    """Times named calls, each without the named calls inside it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.timings: dict[str, list[Timing]] = {}
        self._inner = [Timing(0.0, 0.0)]  # what named calls took inside each call that is still running

    def run(self, name: str, function: Callable, *args: Any, **kwargs: Any) -> Any:
        """`function(*args, **kwargs)`, timed as `name`."""
        synchronize(self.device)
        self._inner.append(Timing(0.0, 0.0))
        start, cpu_start = perf_counter(), process_time()
        result = function(*args, **kwargs)
        synchronize(self.device)
        seconds, cpu_seconds = perf_counter() - start, process_time() - cpu_start
        inner, outer = self._inner.pop(), self._inner.pop()
        self._inner.append(Timing(outer.seconds + seconds, outer.cpu_seconds + cpu_seconds))
        own = Timing(seconds - inner.seconds, cpu_seconds - inner.cpu_seconds)
        self.timings.setdefault(name, []).append(own)
        return result

    @contextmanager
    def on_methods_of(self, model: SimIPUForPreTraining) -> Iterator[None]:
        """Times the methods that the forward calls, in this one object, until the block ends."""
        encode_points, start_matching = model.simipu.get_point_features, model._start_matching

        def get_point_features(points: torch.Tensor) -> PointEncoderOutput:
            with_gradient = torch.is_grad_enabled()
            name = "point encoder forward" if with_gradient else "point encoder forward, augmented view"
            return self.run(name, encode_points, points)

        def _start_matching(*args: torch.Tensor) -> PendingMatch:
            pending = self.run("starting the matching", start_matching, *args)
            pending.result = self._timed("waiting for the matching", pending.result)
            return pending

        replaced: dict[nn.Module, dict[str, Callable[..., Any]]] = {
            model.simipu: {
                "get_point_features": get_point_features,
                "get_image_features": self._timed("image encoder forward", model.simipu.get_image_features),
            },
            model: {
                "_start_matching": _start_matching,
                "_inter_modal": self._timed("sampling, inter-modal heads and loss", model._inter_modal),
                "_intra_modal": self._timed("intra-modal head and loss", model._intra_modal),
            },
        }
        for owner, methods in replaced.items():
            vars(owner).update(methods)
        try:
            yield
        finally:
            for owner, methods in replaced.items():
                for name in methods:
                    del vars(owner)[name]

    def _timed(self, name: str, function: Callable) -> Callable:
        return lambda *args, **kwargs: self.run(name, function, *args, **kwargs)


def autocast(dtype: torch.dtype, device: torch.device) -> torch.autocast:
    """Mixed precision as accelerate sets it, or nothing for float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)
