"""`simipu-hf benchmark ops`: every index operation, every backend, against its plain PyTorch definition."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from simipu_hf.modeling.configuration_simipu import SimIPUPointNet2Config
from simipu_hf.modeling.geometry import invert_transform, transform_points
from simipu_hf.modeling.layers import LinearBlock
from simipu_hf.modeling.matching import PendingMatch
from simipu_hf.modeling.point_ops import (
    Neighbors,
    ball_query,
    furthest_point_sample,
    furthest_point_sample_features,
    group_max,
)
from simipu_hf.modeling.pointnet2 import PointNet2Encoder, SetAbstraction
from simipu_hf.training.arguments import BenchmarkOpsArguments

from .inputs import choose_device, create_config, described, training_batch, two_view_dataset
from .measure import BenchmarkResult, median_seconds, peak_bytes


@dataclass(frozen=True)
class Operation:
    """One operation on fixed inputs.

    Args:
        name: what the table calls it.
        run: backend -> its result.
        backends: the definition first.
        agreement: (result, definition's result) -> columns of the table.
    """

    name: str
    run: Callable[[str], Any]
    backends: tuple[str, ...]
    agreement: Callable[[Any, Any], dict[str, float]]


def benchmark_ops(arguments: BenchmarkOpsArguments) -> BenchmarkResult:
    """Time, peak memory and agreement of the point operations, on the inputs they get in a preset's point encoder.

    Every operation runs with each backend that is installed and applies; the plain PyTorch definition comes first.
    Last the whole PointNet++ encoder, forward and backward. All in float32.

    Raises:
        SimIPUError: data that cannot be used.
    """
    device = choose_device(arguments.device)
    with two_view_dataset(arguments, (32, 32), arguments.batch_size) as dataset:
        batch = training_batch(dataset, arguments.batch_size, device)
    encoder = create_encoder(arguments, device)
    rows = [row for operation in operations(encoder, batch) for row in measure(operation, device, arguments.repeats)]
    encode = partial(_encode_and_back, encoder, batch["points"])
    seconds = median_seconds({"encoder": encode}, arguments.repeats)["encoder"]
    name = "point encoder forward + backward"
    rows.append({"part": name, "backend": "auto", "seconds": seconds, "peak_bytes": peak_bytes(encode, device)})
    return BenchmarkResult("point operations", described(arguments), rows, {"point_encoder_seconds": seconds})


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
        yield from _sampling(level, f"level {number}: ", coordinates, features)
        yield from _grouping(level, f"level {number}: ", coordinates, centers)
        coordinates, features = centers, summary
    yield _assignment(encoder, batch)


def measure(operation: Operation, device: torch.device, repeats: int) -> list[dict[str, Any]]:
    """One row a backend that applies on this device; one that is not installed says so."""
    results, rows = {}, []
    for backend in operation.backends:
        try:
            results[backend] = operation.run(backend)
        except ImportError as error:
            rows.append({"part": operation.name, "backend": backend, "note": str(error)})
        except ValueError:  # made for another device
            continue
    definition = operation.backends[0]
    functions = {backend: partial(operation.run, backend) for backend in results}
    seconds = median_seconds(functions, repeats)
    measured = [
        {
            "part": operation.name,
            "backend": backend,
            "seconds": seconds[backend],
            "speedup": seconds[definition] / seconds[backend],
            "peak_bytes": peak_bytes(functions[backend], device),
            **operation.agreement(result, results[definition]),
        }
        for backend, result in results.items()
    ]
    return measured + rows


def _sampling(level: SetAbstraction, prefix: str, coordinates: Tensor, features: Tensor) -> Iterator[Operation]:
    start = 0
    for count, mod, length in zip(level.num_points, level.fps_mods, level.fps_sample_ranges, strict=True):
        stop = coordinates.shape[1] if length == -1 else start + length
        xyz = coordinates[:, start:stop]
        size = f"{xyz.shape[1]} -> {count}"
        if mod in ("F-FPS", "FS"):
            joint = torch.cat([xyz, features[:, start:stop].to(xyz.dtype)], dim=2)
            run = partial(_call, furthest_point_sample_features, joint, count)
            name = f"{prefix}furthest_point_sample_features {size}"
            yield Operation(name, run, ("torch", "numba", "triton"), _same_indices)
        if mod in ("D-FPS", "FS"):
            run = partial(_call, furthest_point_sample, xyz, count)
            name = f"{prefix}furthest_point_sample {size}"
            yield Operation(name, run, ("torch", "numba", "triton"), _same_indices)
        start = stop


def _grouping(level: SetAbstraction, prefix: str, coordinates: Tensor, centers: Tensor) -> Iterator[Operation]:
    query = partial(_call, ball_query, coordinates, centers, level.radii, level.num_samples)
    agreement = partial(_same_groups, level.num_samples)
    yield Operation(f"{prefix}ball_query, {len(level.radii)} rings", query, ("torch", "numba", "triton"), agreement)

    *_, block = level.mlps[-1].children()
    assert isinstance(block, LinearBlock)
    width = block.linear.out_features
    rows = torch.randn(coordinates.shape[0] * coordinates.shape[1], width, device=coordinates.device)
    pool = partial(_pool_and_back, rows, query("auto")[-1])
    name = f"{prefix}group_max forward + backward, {width} channels"
    yield Operation(name, pool, ("torch", "numba"), _largest_difference)


def _assignment(encoder: PointNet2Encoder, batch: dict[str, Tensor]) -> Operation:
    """SciPy's solver for the clouds of a batch in turn and in threads, on the points that the encoder keeps."""
    with torch.no_grad():
        view, augmented = encoder(batch["points"]).coordinates, encoder(batch["points_aug"]).coordinates
    other = transform_points(augmented, invert_transform(batch["lidar_to_aug"]).to(augmented.dtype))

    def run(backend: str) -> tuple[Tensor]:
        if backend == "threads":
            return (PendingMatch(view, other).result()[1].sum(),)
        in_turn = [PendingMatch(a[None], b[None]).result()[1] for a, b in zip(view, other, strict=True)]
        return (torch.cat(in_turn).sum(),)

    name = f"assignment {view.shape[1]} x {other.shape[1]}"
    return Operation(name, run, ("in turn", "threads"), _largest_difference)


def _call(function: Callable, *arguments: Any) -> Any:
    *inputs, backend = arguments
    return function(*inputs, backend=backend)


def _pool_and_back(rows: Tensor, neighbors: Neighbors, backend: str) -> tuple[Tensor, Tensor]:
    rows = rows.detach().requires_grad_()
    pooled = group_max(rows, neighbors, backend)
    pooled.backward(torch.ones_like(pooled))
    assert rows.grad is not None
    return pooled.detach(), rows.grad


def _encode_and_back(encoder: PointNet2Encoder, points: Tensor) -> None:
    encoder.zero_grad(set_to_none=True)
    encoder(points).features.sum().backward()


def _same_indices(found: Tensor, expected: Tensor) -> dict[str, float]:
    return {"identical": (found == expected).float().mean().item()}


def _same_groups(num_samples: list[int], found: list[Neighbors], expected: list[Neighbors]) -> dict[str, float]:
    """Share of slots with the same member, members sorted: backends list or count repetitions as they like."""

    def slots(neighbors: Neighbors, k: int) -> Tensor:
        return neighbors.index.repeat_interleave(neighbors.weight.long()).view(-1, k).sort(dim=1).values

    groups = zip(found, expected, num_samples, strict=True)
    same = [(slots(a, k) == slots(b, k)).float().mean().item() for a, b, k in groups]
    return {"identical": sum(same) / len(same)}


def _largest_difference(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> dict[str, float]:
    return {"difference": max((a - b).abs().max().item() for a, b in zip(found, expected, strict=True))}
