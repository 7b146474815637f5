"""Is this machine ready? Every kernel, precision and service that training may use, tried in about a minute.

simipu-hf check
simipu-hf check --device cuda:1 --json
"""

import functools
import importlib
import importlib.metadata
import math
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from huggingface_hub import HfApi, constants, get_token
from torch import Tensor, nn
from tqdm.auto import tqdm

from .benchmark.inputs import two_view_dataset
from .errors import first_line
from .modeling import point_ops
from .modeling.configuration_simipu import SimIPUConfig
from .modeling.layers import all_gather_rows
from .modeling.modeling_simipu import SimIPUForPreTraining, build_point_encoder
from .training.arguments import BenchmarkArguments, CheckArguments
from .training.batch_norm import synchronize_batch_norm
from .training.distributed import choose_device
from .training.run_folder import package_version, versions

OPTIONAL = ("numba", "triton", "spconv", "torchdata", "onnx", "onnxruntime", "tensorboard", "trackio")
POINTS, CENTRES = 16_384, 1_024
RINGS, SLOTS = [(0.0, 0.4), (0.4, 0.8), (0.8, 1.6)], [32, 32, 64]
# relative difference of a step's losses from the same step on the CPU in float64
TOLERANCES = {"float32": 0.01, "bf16": 0.1, "fp16": 0.1}
GIB = 2**30


@dataclass
class Finding:
    """What one check found. `advice` says what to do about a failure or to get what is absent."""

    name: str
    status: Literal["pass", "fail", "absent"]
    detail: str
    advice: str = ""
    seconds: float = 0.0


@dataclass
class CheckReport:
    """All findings; prints as a table."""

    findings: list[Finding]

    @property
    def passed(self) -> bool:
        return all(finding.status != "fail" for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        return {"passed": self.passed, "findings": [asdict(finding) for finding in self.findings]}

    def __str__(self) -> str:
        width = max(len(finding.name) for finding in self.findings)
        lines = []
        for finding in self.findings:
            lines.append(f"{finding.status:6}  {finding.name:{width}}  {finding.detail}")
            if finding.advice:
                lines.append(f"{'':6}  {'':{width}}  -> {finding.advice}")
        failed = sum(finding.status == "fail" for finding in self.findings)
        lines.append(f"{failed} failed" if failed else "everything that is there works")
        return "\n".join(lines)


class Absent(Exception):  # noqa: N818 (not an error)
    """What a check is about is not on this machine: what was looked for, and what to do."""


class Failed(Exception):  # noqa: N818
    """It is there, and does not do what it should: what it does, and what to do."""


def check(arguments: CheckArguments | None = None) -> CheckReport:
    """Try everything and report; nothing that fails ends it.

        >>> report = check()
        >>> print(report)

    Raises:
        SimIPUError: `arguments.device` does not exist.
    """
    arguments = arguments or CheckArguments()
    device = choose_device(arguments.device)
    everything = tqdm(list(checks(device)), unit="check", leave=False)
    return CheckReport([_run(name, function) for name, function in everything])


def checks(device: torch.device) -> Iterator[tuple[str, Callable[[], str]]]:
    """Name and function of every check. A function returns its detail, or raises `Absent`, `Failed` or anything."""
    yield "versions", _versions
    yield "optional packages", _optional_packages
    yield "device", lambda: _device(device)
    for compare, backends in (
        (_furthest_point_sample, ("numba", "triton")),
        (_furthest_point_sample_features, ("numba", "triton")),
        (_ball_query, ("numba", "triton")),
        (_group_max, ("numba",)),
    ):
        for backend in backends:
            name = f"{compare.__name__.removeprefix('_')}, {backend}"
            yield name, functools.partial(_kernel, compare, backend, device)
    yield "point encoder, backward", lambda: _point_encoder(device)
    yield "sparse convolution (spconv)", lambda: _sparse_convolution(device)
    for preset in ("official", "recommended"):
        for precision in TOLERANCES:
            yield f"step, {preset}, {precision}", functools.partial(_step, preset, precision, device)
    yield "two processes", lambda: _two_processes(device)
    yield "loader", lambda: _loader(device)
    yield "Hub", _hub
    yield "disk", lambda: _space(Path.cwd(), 10, "make room: 10 GiB or more in this folder")
    room = "make room: 1 GiB or more in the folder of temporary files"
    yield "temporary files", lambda: _space(Path(tempfile.gettempdir()), 1, room)
    yield "shared memory", _shared_memory


def _run(name: str, function: Callable[[], str]) -> Finding:
    started = time.perf_counter()
    try:
        finding = Finding(name, "pass", function())
    except Absent as error:
        finding = Finding(name, "absent", *error.args)
    except Failed as error:
        finding = Finding(name, "fail", *error.args)
    except Exception as error:  # whatever a driver, a compiler or a network raises
        advice = "please report it, with the whole output of this command"
        finding = Finding(name, "fail", f"{type(error).__name__}: {error}", advice)
    finding.seconds = round(time.perf_counter() - started, 2)
    return finding


# --- the machine ----------------------------------------------------------------------------------------------------


def _versions() -> str:
    found = ", ".join(f"{name} {version}" for name, version in versions().items())
    return f"{platform.system()} {platform.machine()}; {found}"


def _optional_packages() -> str:
    # what is imported as spconv is installed as spconv-cu126, or for another version of CUDA
    distributions = importlib.metadata.packages_distributions()
    found = {name: package_version(distributions.get(name, [name])[0]) for name in OPTIONAL}
    there = ", ".join(f"{name} {version}" for name, version in found.items() if version)
    absent = ", ".join(name for name, version in found.items() if not version)
    return f"{there or 'none'}" + (f"; absent: {absent}" if absent else "")


def _device(device: torch.device) -> str:
    if device.type != "cuda":
        memory = psutil.virtual_memory().total / GIB
        raise Absent(f"no CUDA device in use; {torch.get_num_threads()} CPU threads, {memory:.0f} GiB")
    properties = torch.cuda.get_device_properties(device)
    precisions = "float32, fp16" + (", bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "")
    return (
        f"{torch.cuda.device_count()} x {properties.name}, {properties.total_memory / GIB:.0f} GiB, "
        f"capability {properties.major}.{properties.minor}, CUDA {torch.version.cuda}; {precisions}"
    )


def _space(path: Path, needed: float, advice: str) -> str:
    free = shutil.disk_usage(path).free / GIB
    if free < needed:
        raise Failed(f"{free:.2f} GiB free in {path}", advice)
    return f"{free:.1f} GiB free in {path}"


def _shared_memory() -> str:
    path = Path("/dev/shm")
    if not path.is_dir():
        raise Absent("no /dev/shm on this system")
    advice = "start the container with --shm-size=8g or --ipc=host, or train with --dataloader_num_workers 0"
    return _space(path, 0.5, f"the loader's workers send batches through it: {advice}")


def _hub() -> str:
    if constants.HF_HUB_OFFLINE:
        raise Absent("HF_HUB_OFFLINE is set", "unset it to download and publish")
    if get_token() is None:
        raise Absent(f"{constants.ENDPOINT}: no token", "hf auth login, if you want to publish")
    try:
        return f"{constants.ENDPOINT} as {HfApi().whoami()['name']}"
    except Exception as error:
        problem = f"{constants.ENDPOINT} refuses or cannot be reached: {first_line(error)}"
        raise Failed(problem, "hf auth login") from error


# --- kernels --------------------------------------------------------------------------------------------------------


def _cloud(device: torch.device, points: int) -> Tensor:
    """A scan-like cloud (1, N, 3): dense near, sparse far, on a grid of 1/64 m, so that squares are exact."""
    generator = torch.Generator().manual_seed(0)
    distance = 3 + 60 * torch.rand(points, generator=generator).square()
    angle = math.pi * (torch.rand(points, generator=generator) - 0.5)
    height = 3 * torch.rand(points, generator=generator) - 2
    cloud = torch.stack([distance * angle.cos(), distance * angle.sin(), height], 1)
    return (cloud * 64).round().div(64)[None].to(device)


def _kernel(compare: Callable[[str, torch.device], str], backend: str, device: torch.device) -> str:
    """A backend against the plain PyTorch definition, on a cloud of real size; `compare` says where they differ."""
    operation = compare.__name__.removeprefix("_")
    needed = {"numba": "cpu", "triton": "cuda"}[backend]
    if package_version(backend) is None:
        raise Absent(f"{backend} is not installed", f"pip install {backend}")
    if device.type != needed:
        raise Absent(f"runs on {needed}, this device is {device.type}")
    if problem := compare(backend, device):
        raise Failed(
            f"{operation} with {backend} differs from its definition: {problem}",
            f"train with point_config's sampling_backend or grouping_backend set to torch, and report it ({backend})",
        )
    return "equal to the definition"


def _furthest_point_sample(backend: str, device: torch.device) -> str:
    return _first_difference(point_ops.furthest_point_sample, _cloud(device, POINTS), CENTRES, backend)


def _furthest_point_sample_features(backend: str, device: torch.device) -> str:
    cloud = _cloud(device, 4096)
    features = torch.cat([cloud, (cloud * 5).sin().mul(16).round().div(16)], 2)
    return _first_difference(point_ops.furthest_point_sample_features, features, 512, backend)


def _first_difference(sample: Callable[..., Tensor], cloud: Tensor, count: int, backend: str) -> str:
    """Where two samplings part, unless at a tie: of points equally far from the samples before, either may come."""
    (points,), (found,), (expected,) = cloud, sample(cloud, count, backend), sample(cloud, count, "torch")
    if torch.equal(found, expected):
        return ""
    at = int((found != expected).nonzero()[0])
    before = points[expected[:at]].double()
    reached, wanted = (torch.cdist(points[index[at]].double()[None], before).min() for index in (found, expected))
    if torch.isclose(reached, wanted, rtol=1e-6):
        return ""
    return f"sample {at} is point {found[at]} instead of {expected[at]}"


def _ball_query(backend: str, device: torch.device) -> str:
    cloud = _cloud(device, POINTS)
    centres = cloud[:, :: POINTS // CENTRES].contiguous()
    rings = (point_ops.ball_query(cloud, centres, RINGS, SLOTS, name) for name in (backend, "torch"))
    for ring, *neighbors in zip(RINGS, *rings, strict=True):
        slots = torch.zeros(2, CENTRES, POINTS)  # that a point holds in a group
        for counts, found in zip(slots, neighbors, strict=True):
            index, weight, offsets = (tensor.cpu() for tensor in found)
            if index.min() < 0 or index.max() >= POINTS:
                return f"an index out of range in the ring {ring} m"
            group = torch.arange(CENTRES).repeat_interleave(offsets.diff())
            counts.index_put_((group, index), weight, accumulate=True)
        wrong = int((slots[0] != slots[1]).any(dim=1).sum())
        if wrong:
            return f"{wrong} of {CENTRES} groups of the ring {ring} m"
    return ""


def _group_max(backend: str, device: torch.device) -> str:
    cloud = _cloud(device, POINTS)
    neighbors = point_ops.ball_query(cloud, cloud[:, : CENTRES // 2].contiguous(), RINGS[2:], SLOTS[2:])[0]
    rows = torch.randn(POINTS, 64, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
    (values, grad), (expected, expected_grad) = (
        (values, *torch.autograd.grad(values.square().sum(), rows))
        for values in (point_ops.group_max(rows, neighbors, name) for name in (backend, "torch"))
    )
    same = torch.equal(values, expected) and torch.allclose(grad, expected_grad, atol=1e-5)
    return "" if same else "values or gradient"


def _forward_and_backward(config: SimIPUConfig, device: torch.device) -> tuple[Tensor, list[Tensor]]:
    """Features of a cloud by a new point encoder, and the gradients of its parameters."""
    torch.manual_seed(0)
    encoder = build_point_encoder(config.point_encoder_config).to(device)
    features = encoder(torch.cat([_cloud(device, 4096), torch.rand(1, 4096, 1, device=device)], 2)).features
    features.square().mean().backward()
    return features.detach(), [p.grad for p in encoder.parameters() if p.grad is not None]


def _point_encoder(device: torch.device) -> str:
    """Fast backends against the plain ones, forward and backward, in float32 on the device."""
    results = []
    for backend in ("auto", "torch"):
        config = _small_config("recommended", sampling_backend=backend, grouping_backend=backend)
        features, grads = _forward_and_backward(config, device)
        results.append((features, torch.cat([grad.flatten() for grad in grads])))
    errors = [float((a - b).norm() / b.norm()) for a, b in zip(*results, strict=True)]
    # where two rows of a maximum are equal but for rounding, the gradient takes one or the other: a few in a million
    if errors[0] > 1e-3 or errors[1] > 3e-2:
        raise Failed(f"features and gradients differ by {errors[0]:.1e} and {errors[1]:.1e}", "please report it")
    return f"features and gradients equal the plain backends' to {errors[0]:.0e} and {errors[1]:.0e}"


def _sparse_convolution(device: torch.device) -> str:
    try:
        importlib.import_module("spconv.pytorch")
    except Exception as error:
        advice = 'pip install "simipu-hf[spconv]" (Linux, x86-64), if you want --point_encoder sparse_conv'
        raise Absent(f"cannot be imported: {error}", advice) from error
    config = SimIPUConfig.from_preset("recommended", point_encoder="sparse_conv")
    features, grads = _forward_and_backward(config, device)
    norms = torch.stack([grad.norm() for grad in grads])
    if not (torch.isfinite(features).all() and torch.isfinite(norms).all() and (norms > 0).all()):
        raise Failed("its features or gradients are not finite, or zero", "train with --point_encoder pointnet2")
    return f"forward and backward run, {len(grads)} parameters have a gradient"


# --- one training step ----------------------------------------------------------------------------------------------


def _small_config(preset: str, **point_config: Any) -> SimIPUConfig:
    return SimIPUConfig.from_preset(
        preset,
        image_config={"architecture": "resnet18"},
        point_config={
            "num_points": [[512], [256], [128, 128]],
            "fps_sample_ranges": [[-1], [-1], [128, -1]],
            **point_config,
        },
    )


def _small_batch() -> dict[str, Tensor]:
    """Made-up rows in float64: points ahead of a pinhole camera that looks along x, and a turned view of them."""
    points = _cloud(torch.device("cpu"), 2048).double().repeat(2, 1, 1)
    points += torch.arange(2)[:, None, None] * torch.tensor([0.5, 0.25, 0.125])
    reflectance = (points.sum(2, keepdim=True) * 7).sin().abs()
    camera = torch.tensor([[96, -96, 0, 0], [32, 0, -96, 0], [1, 0, 0, 0]], dtype=torch.float64)
    turn = torch.tensor([[0.8, 0.6, 0, 1], [0.6, -0.8, 0, 2], [0, 0, 1, 0], [0, 0, 0, 1]], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(points.shape[1], generator=generator)
    return {
        "pixel_values": torch.randn(2, 3, 64, 192, generator=generator, dtype=torch.float64),
        "points": torch.cat([points, reflectance], 2),
        "points_aug": torch.cat([points @ turn[:3, :3].T + turn[:3, 3], reflectance], 2)[:, order],
        "lidar_to_aug": turn.repeat(2, 1, 1),
        "lidar_to_pixel": camera.repeat(2, 1, 1),
    }


def _step(preset: str, precision: str, device: torch.device) -> str:
    """One step's losses and gradient norm on the device, against the CPU in float64."""
    if precision == "fp16" and device.type != "cuda":
        raise Absent("fp16 needs a GPU")
    if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise Absent("this GPU has no bf16", "use fp16")
    expected = _exact_losses(preset)
    torch.manual_seed(0)
    model = SimIPUForPreTraining(_small_config(preset))
    model.to(device)  # type: ignore[arg-type]  # transformers' decorator hides the method
    batch = {name: tensor.float().to(device) for name, tensor in _small_batch().items()}
    found = _losses(model, batch, {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision))
    errors = {name: abs(found[name] - value) / abs(value) for name, value in expected.items()}
    said = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
    worst = max(value for name, value in errors.items() if name != "gradient")
    if not worst <= TOLERANCES[precision] or not math.isfinite(found["gradient"]):
        raise Failed(
            f"differs from the CPU in float64 by {said}; allowed is {TOLERANCES[precision]}",
            "train with another --mixed_precision, and report it",
        )
    return f"relative differences from the CPU in float64: {said}"


@functools.cache
def _exact_losses(preset: str) -> dict[str, float]:
    torch.manual_seed(0)
    return _losses(SimIPUForPreTraining(_small_config(preset)).double(), _small_batch())


def _losses(model: nn.Module, batch: dict[str, Tensor], autocast: torch.dtype | None = None) -> dict[str, float]:
    device = batch["points"].device.type
    with torch.autocast(device, dtype=autocast, enabled=autocast is not None):
        output = model(**batch)
    output.loss.backward()
    grads = [p.grad.detach().double().norm() for p in model.parameters() if p.grad is not None]
    return {
        "intra-modal": output.intra_modal_loss.item(),
        "inter-modal": output.inter_modal_loss.item(),
        "gradient": float(torch.stack(grads).norm()),
    }


# --- several devices, and the loader --------------------------------------------------------------------------------


def _two_processes(device: torch.device) -> str:
    count = torch.cuda.device_count()
    if device.type != "cuda" or count < 2:
        raise Absent(f"{count} CUDA devices, two are needed")
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (Path(folder) / "meeting",), nprocs=2)
    return "gathered rows have their gradient, synchronised batch norm the statistics of both"


def _rank(rank: int, meeting: Path) -> None:
    """Both processes compute what one process computes of all rows."""
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", init_method=meeting.as_uri(), rank=rank, world_size=2)
    rows = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)).to(device)
    own = rows[rank * 4 : rank * 4 + 4].clone().requires_grad_()
    all_gather_rows(own).pow(3).sum().backward()
    torch.testing.assert_close(own.grad, 2 * 3 * rows[rank * 4 : rank * 4 + 4].square())  # both sums reach each row
    norm = synchronize_batch_norm(nn.Sequential(nn.BatchNorm1d(4)).to(device))
    torch.testing.assert_close(norm(own.detach()), nn.BatchNorm1d(4).to(device)(rows)[rank * 4 : rank * 4 + 4])
    dist.destroy_process_group()


def _loader(device: torch.device) -> str:
    """Samples a second of one worker, against what the device takes of the image encoder's forward and backward."""
    with two_view_dataset(BenchmarkArguments(), (384, 1248)) as dataset:
        dataset[0]
        started = time.perf_counter()
        for epoch in range(4):
            dataset[epoch, 1]
        worker = 4 / (time.perf_counter() - started)
    model = SimIPUForPreTraining(_small_config("recommended")).simipu.image_encoder.to(device)
    images = torch.randn(2, 3, 384, 1248, device=device)
    for _ in range(2):  # the first one also chooses algorithms
        started = time.perf_counter()
        model(images).sum().backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    encoder = 2 / (time.perf_counter() - started)
    workers = math.ceil(encoder / worker)
    return (
        f"one worker makes {worker:.0f} samples a second, a ResNet-18 takes {encoder:.0f} at 384 x 1248: "
        f"--dataloader_num_workers {workers} or more keeps it busy"
    )
