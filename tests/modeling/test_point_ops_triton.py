"""The Triton kernels: in Triton's interpreter, compiled for CUDA without a device, and on a device where there is one.

The interpreter must be chosen before Triton is imported, so these tests run in a process of their own
(`test_in_the_interpreter` starts it).
"""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from simipu_hf.modeling import point_ops, point_ops_triton

pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
RINGS = [(0.0, 0.8), (0.8, 2.0), (0.0, 100.0), (50.0, 60.0)]
SLOTS = [3, 8, 33, 2]


def random_points(seed, batch, n, channels, grid):
    points = 2 * torch.randn(batch, n, channels, generator=torch.Generator().manual_seed(seed))
    return points.round() if grid else points


if INTERPRETED:
    properties = settings(derandomize=True, deadline=None, max_examples=8)
    seeds = st.integers(0, 2**16)

    @properties
    @given(seeds, st.integers(1, 2), st.integers(1, 200), st.integers(1, 24), st.booleans())
    def test_sampling(seed, batch, n, num_samples, grid):
        points = random_points(seed, batch, n, 3, grid)
        expected = point_ops.furthest_point_sample(points, num_samples, backend="torch")
        assert torch.equal(point_ops_triton.furthest_point_sample(points, num_samples), expected)

    def test_sampling_in_several_blocks():
        points = random_points(0, 1, 8192 + 100, 3, grid=True)
        points[0, -1] = 40.0  # the furthest point lies in the second block
        expected = point_ops.furthest_point_sample(points, 6, backend="torch")
        assert expected[0, 1] == 8192 + 99
        assert torch.equal(point_ops_triton.furthest_point_sample(points, 6), expected)

    @properties
    @given(seeds, st.integers(1, 2), st.integers(1, 100), st.integers(1, 40), st.booleans())
    def test_sampling_on_features(seed, batch, n, channels, grid):
        features = random_points(seed, batch, n, channels, grid)
        num_samples = 1 + n // 2  # real distances stay clear of ties
        expected = point_ops.furthest_point_sample_features(features, num_samples, backend="torch")
        assert torch.equal(point_ops_triton.furthest_point_sample_features(features, num_samples), expected)

    @properties
    @given(seeds, st.integers(1, 2), st.integers(1, 200), st.integers(1, 20), st.booleans())
    def test_ball_query(seed, batch, n, m, grid):
        points = random_points(seed, batch, n, 3, grid)
        centers = torch.cat([points[:, :m], random_points(seed + 1, batch, m, 3, grid)], dim=1)
        expected = point_ops.ball_query_padded(points, centers, RINGS, SLOTS)
        radii_squared = [(float(np.float32(low) ** 2), float(np.float32(high) ** 2)) for low, high in RINGS]
        found = point_ops_triton.ball_query_padded(points, centers, radii_squared, SLOTS)
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b)

else:

    def test_in_the_interpreter():
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
        environment = {**os.environ, "TRITON_INTERPRET": "1"}
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout + result.stderr
        assert "4 passed" in result.stdout

    @pytest.mark.parametrize("name", ["_sample_coordinates", "_sample_distances", "_pairwise", "_query"])
    @pytest.mark.parametrize("size", ["i32", "constexpr"])
    def test_compiles_for_cuda(name, size):
        """The interpreter forgives types that the compiler does not. Arguments equal to 1 become constants."""
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource, compile

        kernel = getattr(point_ops_triton, name)
        values = {
            "BLOCK": 1024,
            "TILE": 64,
            "CHANNELS": 32,
            "LOW": (0.0, 0.04),
            "HIGH": (0.04, 0.16),
            "SLOTS": (32, 64),
            "MAX_SLOTS": 64,
            "CENTERS": 16,
            "POINTS": 128,
        }
        pointers = {"samples": "*i64", "out": "*i64"} | dict.fromkeys(
            ("axes", "nearest", "squared", "features", "norms", "centers"), "*fp32"
        )
        signature, constants = {}, {}
        for argument in kernel.arg_names:
            signature[argument] = pointers.get(argument, "constexpr" if argument in values else size)
            if signature[argument] == "constexpr":
                constants[argument] = values.get(argument, 1)
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
        compiled = compile(source, target=GPUTarget("cuda", 80, 32), options={"enable_fp_fusion": False})
        assert name == "_pairwise" or "fma.rn.f32" not in compiled.asm["ptx"]

    @pytest.mark.cuda
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    @pytest.mark.parametrize("grid", [False, True])
    def test_on_the_device(grid):
        operations = ("furthest_point_sample", "furthest_point_sample_features", "ball_query")
        assert all(point_ops.triton_works(operation) for operation in operations)  # which waits, once
        points = random_points(0, 2, 5000, 3, grid)
        features = random_points(1, 2, 700, 40, grid)
        on_device, features_on_device = points.cuda(), features.cuda()
        torch.cuda.set_sync_debug_mode("error")
        try:
            samples = point_ops.furthest_point_sample(on_device, 300)
            feature_samples = point_ops.furthest_point_sample_features(features_on_device, 90)
            centers = on_device.take_along_dim(samples[..., None], 1)
            rings = point_ops.ball_query(on_device, centers, RINGS, SLOTS)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(samples.cpu(), point_ops.furthest_point_sample(points, 300, backend="torch"))
        expected = point_ops.furthest_point_sample_features(features, 90, backend="torch")
        assert torch.equal(feature_samples.cpu(), expected)
        expected = point_ops.ball_query(points, centers.cpu(), RINGS, SLOTS, backend="torch")
        for ring, other in zip(rings, expected, strict=True):
            assert torch.equal(ring.index.cpu(), other.index)
