"""`simipu-hf benchmark ops`: every index operation, every backend, against its plain PyTorch definition."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from simipu_hf.modeling.configuration_simipu import SimIPUPointNet2Config
from simipu_hf.modeling.layers import LinearBlock
from simipu_hf.modeling.matching import PendingMatch
from simipu_hf.modeling.point_ops import Neighbors, ball_query, group_max
from simipu_hf.modeling.pointnet2 import PointNet2Encoder, SetAbstraction
from simipu_hf.training.arguments import BenchmarkOpsArguments
from simipu_hf.training.distributed import choose_device

from .inputs import create_config, described, training_batch, two_view_dataset
from .measure import BenchmarkResult, median_seconds, peak_bytes


class Operation(NamedTuple):
    """One operation on fixed inputs: backend -> its result. The first backend is the definition."""

    name: str
    run: Callable[[str], Any]
    backends: tuple[str, ...] = ("torch", "numba", "triton")


def benchmark_ops(arguments: BenchmarkOpsArguments) -> BenchmarkResult:
    """Time and peak memory of the point operations, on the inputs they get in a preset's point encoder.

    Every operation runs with each backend that is installed and applies; the plain PyTorch definition comes first.
    Last the whole PointNet++ encoder, forward and backward. All in float32. Whether backends agree with their
    definitions is what `simipu-hf check` says.

    Raises:
        SimIPUError: data that cannot be used.
    """
    device = choose_device(arguments.device)
    with two_view_dataset(arguments, (32, 32), arguments.batch_size) as dataset:
        batch = training_batch(dataset, arguments.batch_size, device)
    encoder = create_encoder(arguments, device)
    encode = Operation("point encoder", lambda _: _encode_and_back(encoder, batch["points"]), ("auto",))
    rows = []
    for operation in (*operations(encoder, batch), encode):
        rows += measure(operation, device, arguments.repeats)
    return BenchmarkResult("point operations", described(arguments), rows)


def create_encoder(arguments: BenchmarkOpsArguments, device: torch.device) -> PointNet2Encoder:
    """A preset's PointNet++ with random weights."""
    torch.manual_seed(arguments.seed)
    config = create_config(arguments.preset, arguments.config_overrides).point_encoder_config
    assert isinstance(config, SimIPUPointNet2Config)
    return PointNet2Encoder(config).to(device).train()


def operations(encoder: PointNet2Encoder, batch: dict[str, Tensor]) -> Iterator[Operation]:
    """Every operation of a training step, on what reaches it when the encoder runs."""
    coordinates, features = batch["points"][..., :3], batch["points"][..., 3:]
    for number, level in enumerate(encoder.levels, start=1):
        assert isinstance(level, SetAbstraction)
        with torch.no_grad():
            centers, summary, _ = level(coordinates, features)
        for sample, values, count, _ in level.samplers(coordinates, features):
            name = f"level {number}: {sample.__name__} {values.shape[1]} -> {count}"
            yield Operation(name, partial(sample, values, count))
        yield from _grouping(f"level {number}", level, coordinates, centers)
        coordinates, features = centers, summary
    yield _assignment(encoder, batch)


def measure(operation: Operation, device: torch.device, repeats: int) -> list[dict[str, Any]]:
    """One row a backend that is installed and applies on this device."""
    functions = {}
    for backend in operation.backends:
        try:
            operation.run(backend)
        except (ImportError, ValueError):  # not installed, or made for another device
            continue
        functions[backend] = partial(operation.run, backend)
    seconds = median_seconds(functions, repeats)
    return [
        {
            "part": operation.name,
            "backend": backend,
            "seconds": seconds[backend],
            "speedup": seconds[operation.backends[0]] / seconds[backend],
            "peak_bytes": peak_bytes(function, device),
        }
        for backend, function in functions.items()
    ]


def _grouping(name: str, level: SetAbstraction, coordinates: Tensor, centers: Tensor) -> Iterator[Operation]:
    query = partial(ball_query, coordinates, centers, level.radii, level.num_samples)
    yield Operation(f"{name}: ball_query, {len(level.radii)} rings", query)

    *_, block = level.mlps[-1].children()
    assert isinstance(block, LinearBlock)
    width = len(block.linear.weight)
    rows = torch.randn(coordinates.shape[0] * coordinates.shape[1], width, device=coordinates.device)
    pool = partial(_pool_and_back, rows, query()[-1])
    yield Operation(f"{name}: group_max forward + backward, {width} channels", pool, ("torch", "numba"))


def _assignment(encoder: PointNet2Encoder, batch: dict[str, Tensor]) -> Operation:
    """SciPy's solver on the points that the encoder keeps, the clouds of a batch in threads."""
    with torch.no_grad():
        view, augmented = encoder(batch["points"]), encoder(batch["points_aug"])
    name = f"assignment {view.mask.shape[1]} x {augmented.mask.shape[1]}"
    return Operation(name, lambda _: PendingMatch(view, augmented, batch["lidar_to_aug"]).result(), ("scipy",))


def _pool_and_back(rows: Tensor, neighbors: Neighbors, backend: str) -> None:
    pooled = group_max(rows.detach().requires_grad_(), neighbors, backend)
    pooled.backward(torch.ones_like(pooled))


def _encode_and_back(encoder: PointNet2Encoder, points: Tensor) -> None:
    encoder.zero_grad(set_to_none=True)
    encoder(points).features.sum().backward()
