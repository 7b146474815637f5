"""`simipu-hf benchmark ops`: every index operation, every backend, against its plain PyTorch definition."""

import copy
import functools
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from simipu_hf.grouped_pointnet2 import GroupedPointNet2
from simipu_hf.modeling.configuration_simipu import SimIPUPointNet2Config
from simipu_hf.modeling.layers import LinearBlock
from simipu_hf.modeling.geometry import invert_transform, transform_points
from simipu_hf.modeling.matching import PendingMatch
from simipu_hf.modeling.point_ops import (
    Neighbors,
    ball_query,
    furthest_point_sample,
    furthest_point_sample_features,
    group_max,
)
from simipu_hf.modeling.pointnet2 import PointNet2Encoder, SetAbstraction

from .inputs import benchmark_rows, check_at_least_one, create_config, training_batch, two_view_dataset
from .measure import BenchmarkResult, Function, Timing, choose_device, conclude, time_interleaved
from .memory import peak_memories

ENCODER = "point encoder, forward + backward"
FAST, GROUPED = "fast path", "grouped, plain torch"


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

    def run_each(self) -> tuple[dict[str, Any], dict[str, str]]:
        """Results by backend, of those that apply on this device, and why others cannot be imported."""
        results, missing = {}, {}
        for backend in self.backends:
            try:
                results[backend] = self.run(backend)
            except ImportError as error:
                missing[backend] = str(error)
            except ValueError:  # made for another device
                continue
        return results, missing


def benchmark_ops(
    *,
    data_dir: str | None = None,
    dataset_name: str | None = None,
    preset: str = "official",
    batch_size: int = 2,
    num_points: int = 16384,
    config_overrides: dict | None = None,
    device: str | None = None,
    repeats: int = 5,
    seed: int = 0,
    json_path: str | os.PathLike | None = None,
) -> BenchmarkResult:
    """Time, peak memory and agreement of the point operations, on the inputs they get in a preset's point encoder.

    Every operation runs with each backend that is installed and applies; the plain PyTorch definition comes first.
    Last the whole PointNet++ encoder, forward and backward with all its index operations, against the grouped
    definition (`simipu_hf.grouped_pointnet2`). float32, but for the agreement of the encoders.

    Args:
        data_dir, dataset_name: clouds to run on, as in `load_pretraining_dataset`; synthetic ones where neither is
            given.
        preset: `"official"` (features alone are grouped) or `"recommended"` (offsets from the centre as well).
        batch_size, num_points: clouds, and points in each.
        config_overrides: fields of `SimIPUConfig` to change, such as `{"point_config": {...}}`.
        device: as `torch.device`; CUDA where there is one.
        repeats: of which the medians are taken, after one run that is not counted.
        seed: of the weights and the augmentation.
        json_path: where to write the result as JSON.

    Raises:
        SimIPUError: an unknown preset, or data that cannot be used.
    """
    check_at_least_one(batch_size=batch_size, num_points=num_points, repeats=repeats)
    target = choose_device(device)
    with benchmark_rows(data_dir, dataset_name, batch_size) as (rows, source):
        batch = training_batch(two_view_dataset(rows, preset, (32, 32), num_points, seed), batch_size, target)
    encoder = create_encoder(preset, config_overrides, batch, seed)
    arguments = {"preset": preset, "config_overrides": config_overrides, "batch": batch, "seed": seed}
    peaks = peak_memories(__name__, arguments, target)

    table = []
    for operation in create_operations(encoder, batch):
        table += measure_operation(operation, target, repeats)
    table += measure_encoder(encoder, batch["points"], target, repeats)
    for row in table:
        if "seconds" in row:
            row["peak_bytes"] = peaks.get(_case(row["part"], row["backend"]))
    fast, grouped = table[-2:]
    summary = {"encoder_speedup": fast["speedup"]}
    if peaks:
        summary["encoder_memory_ratio"] = grouped["peak_bytes"] / max(1, fast["peak_bytes"])
    return conclude(
        name="point operations",
        settings={
            "data": source,
            "preset": preset,
            "batch_size": batch_size,
            "num_points": num_points,
            "dtype": "float32",
            "repeats": repeats,
            "seed": seed,
        },
        rows=table,
        summary=summary,
        device=target,
        json_path=json_path,
    )


def create_encoder(
    preset: str, config_overrides: dict | None, batch: dict[str, Tensor], seed: int
) -> PointNet2Encoder:
    """A preset's PointNet++ with random weights."""
    torch.manual_seed(seed)
    config = create_config(preset, config_overrides).point_encoder_config
    assert isinstance(config, SimIPUPointNet2Config)
    return PointNet2Encoder(config).to(batch["points"].device).train()


def create_operations(encoder: PointNet2Encoder, batch: dict[str, Tensor]) -> list[Operation]:
    """Every operation of a training step, on the inputs it gets there."""
    return [*_level_operations(encoder, batch["points"]), _assignment(encoder, batch)]


def memory_functions(
    preset: str, config_overrides: dict | None, batch: dict[str, Tensor], seed: int
) -> dict[str, Function]:
    """What the rows of the table run, by the row's part and backend."""
    encoder = create_encoder(preset, config_overrides, batch, seed)
    functions: dict[str, Function] = {}
    for operation in create_operations(encoder, batch):
        for backend in operation.run_each()[0]:
            functions[_case(operation.name, backend)] = functools.partial(operation.run, backend)
    for backend, function in encoder_functions(encoder, batch["points"]).items():
        functions[_case(ENCODER, backend)] = function
    return functions


def _case(part: str, backend: str) -> str:
    return f"{part}, {backend}"


def measure_operation(operation: Operation, device: torch.device, repeats: int) -> list[dict[str, Any]]:
    """One row a backend that applies on this device; one that is not installed says so."""
    results, missing = operation.run_each()
    functions = {backend: functools.partial(operation.run, backend) for backend in results}
    timings = time_interleaved(functions, device, repeats, warmup=0)  # each has run above
    definition = operation.backends[0]
    rows = [
        {
            "part": operation.name,
            "backend": backend,
            **_columns(timings[backend], timings[definition]),
            **operation.agreement(results[backend], results[definition]),
        }
        for backend in results
    ]
    return rows + [{"part": operation.name, "backend": backend, "note": note} for backend, note in missing.items()]


def _columns(timing: Timing, definition: Timing) -> dict[str, Any]:
    return {
        **asdict(timing),
        "speedup": definition.seconds / timing.seconds,
        "peak_bytes": None,  # filled in later
    }


def _level_operations(encoder: PointNet2Encoder, points: Tensor) -> list[Operation]:
    """The operations of every level on what reaches them when the encoder runs."""
    operations = []
    coordinates, features = points[..., :3], points[..., 3:]
    for number, level in enumerate(encoder.levels, start=1):
        assert isinstance(level, SetAbstraction)
        with torch.no_grad():
            centers, summary, _ = level(coordinates, features)
        operations += _sampling_operations(level, f"level {number}: ", coordinates, features)
        operations += _grouping_operations(level, f"level {number}: ", coordinates, centers)
        coordinates, features = centers, summary
    return operations


def _sampling_operations(level: SetAbstraction, prefix: str, coordinates: Tensor, features: Tensor) -> list[Operation]:
    operations, start = [], 0
    for num_points, mod, sample_range in zip(level.num_points, level.fps_mods, level.fps_sample_ranges, strict=True):
        stop = coordinates.shape[1] if sample_range == -1 else start + sample_range
        xyz = coordinates[:, start:stop].contiguous()
        joint = torch.cat([xyz, features[:, start:stop]], dim=2)
        counts = f"{xyz.shape[1]} -> {num_points}"
        start = stop
        if mod in ("F-FPS", "FS"):
            operations.append(
                Operation(
                    f"{prefix}furthest_point_sample_features {counts}",
                    functools.partial(furthest_point_sample_features, joint, num_points),
                    ("torch", "numba", "triton"),
                    _same_indices,
                )
            )
        if mod in ("D-FPS", "FS"):
            operations.append(
                Operation(
                    f"{prefix}furthest_point_sample {counts}",
                    functools.partial(furthest_point_sample, xyz, num_points),
                    ("torch", "numba", "quickfps", "triton"),
                    _same_indices,
                )
            )
    return operations


def _grouping_operations(level: SetAbstraction, prefix: str, coordinates: Tensor, centers: Tensor) -> list[Operation]:
    query = Operation(
        f"{prefix}ball_query, {len(level.radii)} rings",
        lambda backend: ball_query(coordinates, centers, level.radii, level.num_samples, backend),
        ("torch", "numba", "triton"),
        lambda found, expected: _same_groups(found, expected, level.num_samples),
    )
    groups = ball_query(coordinates, centers, level.radii, level.num_samples)
    *_, block = level.mlps[-1].children()
    assert isinstance(block, LinearBlock)
    width = block.linear.out_features
    rows = torch.randn(coordinates.shape[0] * coordinates.shape[1], width, device=coordinates.device)
    pooling = Operation(
        f"{prefix}group_max forward + backward, {width} channels",
        lambda backend: _pool_and_back(rows, groups[-1], backend),
        ("torch", "numba"),
        _largest_difference,
    )
    return [query, pooling]


def _pool_and_back(rows: Tensor, neighbors: Neighbors, backend: str) -> tuple[Tensor, Tensor]:
    rows = rows.detach().requires_grad_()
    pooled = group_max(rows, neighbors, backend)
    pooled.backward(torch.ones_like(pooled))
    assert rows.grad is not None
    return pooled.detach(), rows.grad


def _assignment(encoder: PointNet2Encoder, batch: dict[str, Tensor]) -> Operation:
    """SciPy's solver for the clouds of a batch in turn and in threads, on the points that the encoder keeps."""
    with torch.no_grad():
        view, augmented = encoder(batch["points"]).coordinates, encoder(batch["points_aug"]).coordinates
    other = transform_points(augmented, invert_transform(batch["lidar_to_aug"]).to(augmented.dtype))

    def run(backend: str) -> Tensor:
        if backend == "in turn":
            return torch.cat([PendingMatch(a[None], b[None]).result()[1] for a, b in zip(view, other, strict=True)])
        return PendingMatch(view, other).result()[1]

    return Operation(
        f"assignment {view.shape[1]} x {other.shape[1]}",
        run,
        ("in turn", "threads"),
        lambda found, expected: {"difference": (found.sum() - expected.sum()).abs().item()},
    )


def measure_encoder(
    encoder: PointNet2Encoder, points: Tensor, device: torch.device, repeats: int
) -> list[dict[str, Any]]:
    """The whole encoder and its grouped definition, forward and backward.

    They are compared on the first cloud in float64: in float32 a rounding error can change which point is drawn
    next, and with it everything that follows.
    """
    with torch.no_grad():
        wide = _both_encoders(copy.deepcopy(encoder).double()).values()
        found, expected = (module(points[:1].double()) for module in wide)
    agreement = {
        **_same_indices(found.indices, expected.indices),
        "difference": (found.features - expected.features).abs().max().item(),
        "note": "agreement in float64",
    }
    timings = time_interleaved(encoder_functions(encoder, points), device, repeats)
    return [
        {"part": ENCODER, "backend": name, **_columns(timing, timings[GROUPED]), **(agreement if name == FAST else {})}
        for name, timing in timings.items()
    ]


def _both_encoders(encoder: PointNet2Encoder) -> dict[str, torch.nn.Module]:
    """Both forms of an encoder, each with its own copy of the weights."""
    return {FAST: copy.deepcopy(encoder), GROUPED: GroupedPointNet2(copy.deepcopy(encoder))}


def encoder_functions(encoder: PointNet2Encoder, points: Tensor) -> dict[str, Function]:
    """Forward and backward of both forms of an encoder."""
    with torch.no_grad():
        gradient = torch.randn_like(encoder(points).features)
    return {name: _forward_backward(module, points, gradient) for name, module in _both_encoders(encoder).items()}


def _forward_backward(module: torch.nn.Module, points: Tensor, gradient: Tensor) -> Function:
    def run() -> None:
        module.zero_grad(set_to_none=True)
        module(points).features.backward(gradient)

    return run


def _same_indices(found: Tensor, expected: Tensor) -> dict[str, float]:
    return {"identical": (found == expected).float().mean().item()}


def _same_groups(
    found: list[Neighbors], expected: list[Neighbors], num_samples: list[int] | tuple[int, ...]
) -> dict[str, float]:
    """Share of slots with the same member, members sorted: backends list or count repetitions as they like."""
    same = [
        (_slots(a, k) == _slots(b, k)).float().mean().item()
        for a, b, k in zip(found, expected, num_samples, strict=True)
    ]
    return {"identical": sum(same) / len(same)}


def _slots(neighbors: Neighbors, k: int) -> Tensor:
    return neighbors.index.repeat_interleave(neighbors.weight.long()).view(-1, k).sort(dim=1).values


def _largest_difference(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> dict[str, float]:
    return {"difference": max((a - b).abs().max().item() for a, b in zip(found, expected, strict=True))}
