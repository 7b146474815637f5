"""`simipu-hf benchmark step`: a whole pre-training step against its image encoder alone, and where the time goes."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.profiler import profile, record_function

from simipu_hf.errors import SimIPUError
from simipu_hf.modeling.image_encoder import pad_divisor
from simipu_hf.modeling.matching import PendingMatch
from simipu_hf.modeling.modeling_simipu import SimIPUForPreTraining
from simipu_hf.training.arguments import BenchmarkStepArguments
from simipu_hf.training.distributed import choose_device, compile_image_encoder

from .inputs import create_config, described, training_batch, two_view_dataset
from .measure import BenchmarkResult, Function, median_seconds, peak_bytes

STEP = "pre-training step, forward + backward"
IMAGE = "image encoder, forward + backward"
POINTS = "point encoder, forward + backward"
OPTIMIZER = "optimizer step (AdamW)"
FORWARD, BACKWARD = "forward", "backward"
WAITING = "waiting for the matching"


def benchmark_step(arguments: BenchmarkStepArguments) -> BenchmarkResult:
    """What a pre-training step costs beside the forward and backward of its image encoder alone.

    Both run in turn on the same batch, at the same size and precision. Then the profiler splits steps into parts.

    Raises:
        SimIPUError: an unknown encoder, or data that cannot be used.
    """
    device = choose_device(arguments.device)
    model = create_model(arguments, device)
    divisor = pad_divisor(model.simipu.image_encoder)
    with two_view_dataset(arguments, arguments.image_size, arguments.batch_size, divisor) as dataset:
        batch = training_batch(dataset, arguments.batch_size, device)
    functions = step_functions(model, batch, arguments.mixed_precision, device)
    seconds = median_seconds(functions, arguments.repeats)
    rows = [
        {
            "part": name,
            "seconds": taken,
            "of_image_encoder": taken / seconds[IMAGE],
            "peak_bytes": peak_bytes(functions[name], device),
        }
        for name, taken in seconds.items()
    ]
    parts = profile_parts(model, functions[STEP], device, arguments.repeats)
    rows += [{**part, "of_image_encoder": part["seconds"] / seconds[IMAGE]} for part in parts]
    waiting = sum(part["seconds"] for part in parts if part["part"] == WAITING)
    summary = {
        "step_over_image_encoder": seconds[STEP] / seconds[IMAGE],
        "images_per_second": arguments.batch_size / seconds[STEP],
        "share_of_time_waiting": waiting / seconds[STEP],
    }
    settings = {**described(arguments), "pixel_values": list(batch["pixel_values"].shape)}
    return BenchmarkResult("pre-training step", settings, rows, summary)


def create_model(arguments: BenchmarkStepArguments, device: torch.device) -> SimIPUForPreTraining:
    """The model in training mode, with random weights."""
    config = create_config(
        arguments.preset,
        arguments.config_overrides,
        point_encoder=arguments.point_encoder,
        image_config={"architecture": arguments.image_encoder, "image_size": list(arguments.image_size)},
    )
    torch.manual_seed(arguments.seed)
    try:
        model = SimIPUForPreTraining(config).train()
    except (ValueError, ImportError) as error:
        raise SimIPUError(str(error)) from error
    model.to(device)  # type: ignore[arg-type]  # transformers' decorator hides the signature
    if arguments.torch_compile:
        compile_image_encoder(model)
    return model


def step_functions(
    model: SimIPUForPreTraining, batch: dict[str, torch.Tensor], mixed_precision: str, device: torch.device
) -> dict[str, Function]:
    """What is timed as a whole. Each starts without gradients; the optimizer steps on those of the step before it."""
    encoders = model.simipu
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)
    dtype = torch.float16 if mixed_precision == "fp16" else torch.bfloat16
    # it adds its operation, and no overflow that would be skipped in training
    scaler = torch.amp.GradScaler(device.type, init_scale=1.0, enabled=mixed_precision == "fp16")

    def autocast() -> torch.autocast:
        return torch.autocast(device.type, dtype, enabled=mixed_precision != "no")

    def step() -> None:
        model.zero_grad(set_to_none=True)
        with record_function(FORWARD), autocast():
            loss = scaler.scale(model(**batch).loss)
        with record_function(BACKWARD):
            loss.backward()

    def alone(forward: Callable[[], Sequence[torch.Tensor]]) -> Function:
        with torch.no_grad(), autocast():
            gradients = [torch.randn_like(output) for output in forward()]

        def run() -> None:
            model.zero_grad(set_to_none=True)
            with autocast():
                outputs = forward()
            torch.autograd.backward(outputs, gradients)

        return run

    image = alone(lambda: encoders.get_image_features(batch["pixel_values"]))
    points = alone(lambda: [encoders.get_point_features(batch["points"]).features])
    return {IMAGE: image, POINTS: points, STEP: step, OPTIMIZER: optimizer.step}


def profile_parts(
    model: SimIPUForPreTraining, step: Function, device: torch.device, repeats: int
) -> list[dict[str, Any]]:
    """The parts of a step, means over some steps: `seconds` of the host, and `device_seconds` of its kernels on CUDA.

    The host runs ahead of the device, but for where it waits: so both columns are needed there.
    """
    with labelled_parts(model), profile() as profiler:
        for _ in range(repeats):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    events = {event.key: event for event in profiler.key_averages() if event.cpu_time_total > 0}
    clocks = {"seconds": "cpu_time_total"}
    if device.type == "cuda":
        clocks["device_seconds"] = "device_time_total"

    def mean(name: str) -> dict[str, float]:  # of microseconds; none where the matching never waited
        event = events.get(name)
        totals = {clock: getattr(event, total) if event else 0.0 for clock, total in clocks.items()}
        return {clock: total / 1e6 / repeats for clock, total in totals.items()}

    parts = {name: mean(name) for name in ("point encoder", "image encoder", WAITING)}
    rest = {clock: whole - sum(part[clock] for part in parts.values()) for clock, whole in mean(FORWARD).items()}
    parts |= {"heads, sampling and losses": rest, BACKWARD: mean(BACKWARD)}
    return [{"part": name, **part} for name, part in parts.items()]


@contextmanager
def labelled_parts(model: SimIPUForPreTraining) -> Iterator[None]:
    """Gives the calls inside the forward names for the profiler, until the block ends."""
    encoders = model.simipu
    with ExitStack() as patches:
        for owner, method, name in (
            (encoders, "get_point_features", "point encoder"),
            (encoders, "get_image_features", "image encoder"),
            (PendingMatch, "result", WAITING),
        ):
            labelled = record_function(name)(getattr(owner, method))
            patches.enter_context(patch.object(owner, method, labelled))
        yield
