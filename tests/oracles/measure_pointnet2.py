"""How much faster, and in how much less memory, the point encoder runs than its grouped definition.

    python tests/oracles/measure_pointnet2.py --data_dir KITTI --preset official

Takes the flags of `simipu-hf benchmark ops`. Prints both, forward and backward, and how far their features are apart
in float64 on the first cloud; in float32 a rounding error can change which point is drawn next, and all that follows.
"""

import copy
from functools import partial

import torch
from grouped_pointnet2 import GroupedPointNet2

from simipu_hf.benchmark.inputs import described, training_batch, two_view_dataset
from simipu_hf.benchmark.measure import BenchmarkResult, median_seconds, peak_bytes
from simipu_hf.benchmark.ops import create_encoder
from simipu_hf.training.arguments import BenchmarkOpsArguments, parse_arguments
from simipu_hf.training.distributed import choose_device


def measure(arguments: BenchmarkOpsArguments) -> BenchmarkResult:
    device = choose_device(arguments.device)
    with two_view_dataset(arguments, (32, 32), arguments.batch_size) as dataset:
        points = training_batch(dataset, arguments.batch_size, device)["points"]
    encoder = create_encoder(arguments, device)
    networks = {"grouped": GroupedPointNet2(copy.deepcopy(encoder)), "per point": encoder}

    def run(network: torch.nn.Module) -> None:
        network.zero_grad(set_to_none=True)
        network(points).features.sum().backward()

    functions = {name: partial(run, network) for name, network in networks.items()}
    seconds = median_seconds(functions, arguments.repeats)
    rows = [
        {"part": name, "seconds": seconds[name], "peak_bytes": peak_bytes(function, device)}
        for name, function in functions.items()
    ]
    with torch.no_grad():
        expected, found = (copy.deepcopy(network).double()(points[:1].double()) for network in networks.values())
    summary = {
        "speedup": seconds["grouped"] / seconds["per point"],
        "largest_difference_in_float64": (found.features - expected.features).abs().max().item(),
    }
    if rows[0]["peak_bytes"]:
        summary["share_of_memory"] = rows[1]["peak_bytes"] / rows[0]["peak_bytes"]
    return BenchmarkResult("point encoder against its grouped definition", described(arguments), rows, summary)


if __name__ == "__main__":
    print(measure(parse_arguments(BenchmarkOpsArguments)))
