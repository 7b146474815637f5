"""Point operations: the definitions against brute force in NumPy, every backend against the definition."""

import functools
import itertools
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._pytree import tree_map

from simipu_hf.modeling import point_ops, point_ops_numba
from simipu_hf.modeling.point_ops import (
    Neighbors,
    ball_query,
    ball_query_padded,
    furthest_point_sample,
    furthest_point_sample_features,
    group_max,
)

pytest.importorskip("numba")

RINGS = [(0.0, 0.4), (0.4, 1.0), (1.0, 2.5), (50.0, 60.0)]  # the last one is always empty
DTYPES = [torch.float32, torch.float64, torch.bfloat16]
CLOUD, NOTHING = torch.zeros(1, 4, 3), torch.zeros(1, 0, 3)


@pytest.fixture(autouse=True)
def three_threads(monkeypatch):
    """Numba's kernels share even the least work among three threads; elsewhere tiny clouds have one."""
    monkeypatch.setattr(point_ops_numba, "WORK_PER_THREAD", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


properties = settings(derandomize=True, deadline=None, max_examples=40)


@st.composite
def clouds(draw, max_points=300, channels=3):
    """(B, N, C): real values, or an integer grid full of ties and duplicates, some far from the origin."""
    batch, n = draw(st.integers(1, 3)), draw(st.integers(1, max_points))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    kind = draw(st.sampled_from(["real", "grid", "repeated", "one place"]))
    if kind == "real":
        points = 3 * torch.randn(batch, n, channels, generator=generator)
    elif kind == "one place":
        points = torch.randint(-9, 9, (batch, 1, channels), generator=generator).expand(-1, n, -1).float()
    else:
        points = torch.randint(-3, 4, (batch, n, channels), generator=generator).float()
        points = points + (draw(st.sampled_from([0.0, 40.0])) if kind == "grid" else 0.0)
    if kind == "repeated":
        points = points[:, torch.randint(0, max(1, n // 3), (n,), generator=generator)]
    return points.to(draw(st.sampled_from(DTYPES)))


def as_numpy(points):
    return (points.float() if points.dtype == torch.bfloat16 else points).numpy()


def brute_force_sampling(distances_to, n, num_samples):
    picks, nearest = [0], None
    for _ in range(num_samples - 1):
        distances = [distances_to(picks[-1], i) for i in range(n)]
        nearest = distances if nearest is None else [min(a, b) for a, b in zip(nearest, distances, strict=True)]
        picks.append(max(range(n), key=lambda i: (nearest[i], -i)))
    return picks


def brute_force_ball_query(points, centers, radii, num_samples):
    """The official kernel's loop, one cloud: (rings, M, K)."""
    result = []
    for (low, high), k in zip(radii, num_samples, strict=True):
        low, high = points.dtype.type(low) ** 2, points.dtype.type(high) ** 2
        groups = np.zeros((len(centers), k), dtype=int)
        for m, (cx, cy, cz) in enumerate(centers):
            count = 0
            for i, (x, y, z) in enumerate(points):
                squared = (cx - x) * (cx - x) + (cy - y) * (cy - y) + (cz - z) * (cz - z)
                if squared == 0 or low <= squared < high:
                    if count == 0:
                        groups[m] = i
                    groups[m, count] = i
                    count += 1
                    if count == k:
                        break
        result.append(groups)
    return result


def assert_greedy(points, samples, tolerance):
    """Every pick is the furthest point up to `tolerance` (squared distance), judged in float64."""
    points = points.double()
    for cloud, picks in zip(points, samples.tolist(), strict=True):
        assert picks[0] == 0
        nearest = torch.full((len(cloud),), 1e10, dtype=torch.float64)
        for last, pick in itertools.pairwise(picks):
            nearest = torch.minimum(nearest, (cloud - cloud[last]).square().sum(-1))
            assert nearest[pick] >= nearest.max() - tolerance


def slot_counts(neighbors, num_rows):
    """(G, rows): how many slots of each group hold each row. Groups are small, so this is the function itself."""
    groups = len(neighbors.offsets) - 1
    group = torch.repeat_interleave(torch.arange(groups), neighbors.offsets.diff())
    counts = torch.zeros(groups, num_rows)
    return counts.index_put_((group, neighbors.index), neighbors.weight.float(), accumulate=True)


class TestFurthestPointSample:
    @properties
    @given(clouds(max_points=20), st.integers(1, 12))
    def test_definition_is_brute_force(self, points, num_samples):
        samples = furthest_point_sample(points, num_samples, backend="torch")
        assert samples.dtype == torch.int64
        for cloud, picks in zip(as_numpy(points), samples.tolist(), strict=True):

            def squared(i, j, cloud=cloud):
                dx, dy, dz = cloud[i] - cloud[j]
                return dx * dx + dy * dy + dz * dz

            assert picks == brute_force_sampling(squared, len(cloud), num_samples)

    @properties
    @given(clouds(max_points=600), st.floats(0.01, 1.2))
    def test_numba_is_the_definition(self, points, share):
        num_samples = max(1, int(share * points.shape[1]))
        expected = furthest_point_sample(points, num_samples, backend="torch")
        assert torch.equal(furthest_point_sample(points, num_samples, backend="numba"), expected)
        assert torch.equal(furthest_point_sample(points, num_samples), expected)

    def test_real_frame(self, kitti_mini):
        points = np.fromfile(kitti_mini / "training" / "velodyne" / "000000.bin", dtype="<f4").reshape(-1, 4)
        points = torch.from_numpy(points[np.random.default_rng(0).choice(len(points), 2 * 4096), :3]).view(2, -1, 3)
        expected = furthest_point_sample(points, 512, backend="torch")
        assert torch.equal(furthest_point_sample(points, 512, backend="numba"), expected)

    def test_any_number_of_channels_has_a_definition(self):
        points = torch.tensor([[[0.0], [1.0], [5.0], [3.0]]])
        assert furthest_point_sample(points, 4).tolist() == [[0, 2, 3, 1]]

    def test_takes_tensors_with_gradient_and_any_layout(self):
        points = torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(0)).requires_grad_().transpose(1, 2)
        expected = furthest_point_sample(points.detach().contiguous(), 9, backend="torch")
        assert torch.equal(furthest_point_sample(points, 9), expected)

    def test_an_error_in_a_thread_is_raised(self):
        def fail(number):
            if threading.current_thread() is not threading.main_thread():
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            point_ops_numba._in_threads(fail, [(1,), (2,), (3,)], threads=3)
        point_ops_numba._in_threads(fail, [(1,), (2,), (3,)], threads=1)

    def test_threads_start_where_the_work_pays(self, monkeypatch):
        monkeypatch.setattr(point_ops_numba, "WORK_PER_THREAD", 100)
        assert [point_ops_numba._threads(work) for work in (0, 99, 100, 199, 200, 9999)] == [1, 1, 2, 2, 3, 3]


class TestFurthestPointSampleFeatures:
    @properties
    @given(clouds(max_points=20, channels=5), st.integers(1, 12))
    def test_definition_is_brute_force(self, features, num_samples):
        samples = furthest_point_sample_features(features, num_samples, backend="torch")
        whole = bool((features == features.round()).all())
        if not whole:  # the order of a sum of real numbers is free
            assert_greedy(features, samples, tolerance=1e-3)
            return
        for cloud, picks in zip(as_numpy(features), samples.tolist(), strict=True):

            def squared(i, j, cloud=cloud):
                return cloud[i] @ cloud[i] + cloud[j] @ cloud[j] - 2 * (cloud[i] @ cloud[j])

            assert picks == brute_force_sampling(squared, len(cloud), num_samples)

    @properties
    @given(clouds(max_points=300, channels=7), st.floats(0.01, 0.9))
    def test_numba_is_the_definition(self, features, share):
        num_samples = max(1, int(share * features.shape[1]))
        expected = furthest_point_sample_features(features, num_samples, backend="torch")
        samples = furthest_point_sample_features(features, num_samples, backend="numba")
        whole = bool((features == features.round()).all())
        if whole or features.dtype == torch.float64:
            assert torch.equal(samples, expected)
        else:
            assert_greedy(features, samples, tolerance=1e-3)

    def test_real_values_in_float32_agree_exactly(self):
        features = torch.randn(2, 300, 131, generator=torch.Generator().manual_seed(0))
        expected = furthest_point_sample_features(features, 100, backend="torch")
        assert torch.equal(furthest_point_sample_features(features, 100, backend="numba"), expected)

    @pytest.mark.parametrize("backend", ["torch", "numba"])
    def test_autocast_changes_nothing(self, backend):
        features = 50 + torch.randn(1, 200, 16, generator=torch.Generator().manual_seed(0))
        expected = furthest_point_sample_features(features, 64, backend=backend)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(furthest_point_sample_features(features, 64, backend=backend), expected)

    @pytest.mark.parametrize("n", [1, 2, 3])
    @pytest.mark.parametrize("backend", ["torch", "numba"])
    def test_fewer_points_than_samples(self, n, backend):
        features = torch.arange(n)[None, :, None].expand(2, -1, 4).float()
        expected = {1: [0, 0, 0, 0, 0], 2: [0, 1, 0, 0, 0], 3: [0, 2, 1, 0, 0]}[n]
        assert furthest_point_sample_features(features, 5, backend=backend).tolist() == [expected] * 2


@st.composite
def ball_queries(draw, max_points=300):
    """Points, centres from the cloud and from elsewhere, some rings and their slots."""
    points = draw(clouds(max_points=max_points))
    m = draw(st.integers(1, 20))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    index = torch.randint(0, points.shape[1], (len(points), m, 1), generator=generator)
    centers = points.take_along_dim(index, 1)
    if draw(st.booleans()):
        centers = centers + 30 * torch.randn(centers.shape, generator=generator).to(points.dtype)
    radii = draw(st.lists(st.sampled_from([*RINGS, (0.0, 1.0), (0.0, 100.0)]), min_size=1, max_size=4))
    slots = draw(st.lists(st.sampled_from([1, 2, 5, 16, 70]), min_size=len(radii), max_size=len(radii)))
    return points, centers, radii, slots


class TestBallQuery:
    @properties
    @given(ball_queries(max_points=30))
    def test_definition_is_brute_force(self, query):
        points, centers, radii, slots = query
        padded = ball_query_padded(points, centers, radii, slots)
        for b in range(len(points)):
            expected = brute_force_ball_query(as_numpy(points[b]), as_numpy(centers[b]), radii, slots)
            for ring, groups in zip(padded, expected, strict=True):
                assert ring[b].tolist() == groups.tolist()

    @properties
    @given(ball_queries())
    def test_backends_are_the_definition(self, query):
        points, centers, radii, slots = query
        rows = points.shape[0] * points.shape[1]
        padded = ball_query_padded(points, centers, radii, slots)
        listed = ball_query(points, centers, radii, slots, backend="torch")
        counted = ball_query(points, centers, radii, slots, backend="numba")
        first_row = torch.arange(len(points))[:, None, None] * points.shape[1]
        for groups, torch_ring, numba_ring, k in zip(padded, listed, counted, slots, strict=True):
            groups = (groups + first_row).flatten(0, 1)
            expected = torch.zeros(len(groups), rows).scatter_add_(1, groups, torch.ones(groups.shape))
            for ring in (torch_ring, numba_ring):
                assert torch.equal(slot_counts(ring, rows), expected)
                assert ring.weight.dtype == torch.promote_types(points.dtype, torch.float32)
                assert len(ring.index) == len(ring.weight) == ring.offsets[-1]
                assert ring.offsets.diff().min() >= 1
                assert torch.equal(ring.index[ring.offsets[:-1]], groups[:, 0])  # the first hit comes first
            assert torch.equal(torch_ring.index, groups.flatten())
            assert (slot_counts(numba_ring, rows).sum(1) == k).all()
            assert len(numba_ring.index) == (expected > 0).sum()  # every member once

    @pytest.mark.parametrize("backend", ["torch", "numba"])
    def test_points_that_are_no_numbers_are_nobodys_neighbours(self, backend):
        points = torch.tensor([[[float("nan"), 0, 0], [0, 0, 0], [float("inf"), 1, 0], [0.5, 0, 0]]])
        (ring,) = ball_query(points, points[:, 1:2], [(0.0, 1.0)], [4], backend=backend)
        assert slot_counts(ring, 4).tolist() == [[0, 3, 0, 1]]


@st.composite
def grouped_rows(draw, dtypes=(*DTYPES, torch.float16)):
    """Rows with ties, and groups of them of 1 to 9 entries; rows may be in many groups or in none."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    num_rows, groups, channels = draw(st.integers(1, 40)), draw(st.integers(1, 20)), draw(st.integers(1, 9))
    sizes = torch.randint(1, 10, (groups,), generator=generator)
    index = torch.randint(0, num_rows, (int(sizes.sum()),), generator=generator)
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), sizes.cumsum(0)])
    rows = torch.randn(num_rows, channels, generator=generator)
    rows = rows.round() if draw(st.booleans()) else rows
    rows = rows.to(draw(st.sampled_from(dtypes)))
    return rows, Neighbors(index, torch.ones(len(index)), offsets)


class TestGroupMax:
    @properties
    @given(grouped_rows())
    def test_backends_are_brute_force(self, case):
        rows, neighbors = case
        bounds = neighbors.offsets.tolist()
        groups = [neighbors.index[start:end].tolist() for start, end in itertools.pairwise(bounds)]
        expected = torch.stack([torch.stack([rows[i] for i in group]).max(0).values for group in groups])
        for backend in ("torch", "numba"):
            result = group_max(rows, neighbors, backend=backend)
            assert result.dtype == rows.dtype
            assert torch.equal(result, expected)

    @properties
    @given(grouped_rows(dtypes=[torch.float32, torch.float64]))
    def test_gradients_agree(self, case):
        rows, neighbors = case
        rows.requires_grad_()
        outputs = [group_max(rows, neighbors, backend=backend) for backend in ("torch", "numba")]
        gradient = torch.randn(outputs[0].shape, dtype=rows.dtype, generator=torch.Generator().manual_seed(0))
        expected, found = (torch.autograd.grad(output, rows, gradient)[0] for output in outputs)
        torch.testing.assert_close(found, expected)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_gradient(self, dtype):
        rows = torch.arange(6.0, dtype=dtype).view(3, 2).requires_grad_()
        neighbors = Neighbors(torch.tensor([0, 1, 2, 1, 0]), torch.ones(5), torch.tensor([0, 2, 3, 5]))
        group_max(rows, neighbors).sum().backward()
        assert rows.grad.dtype == dtype
        assert rows.grad.tolist() == [[0, 0], [2, 2], [1, 1]]


@pytest.mark.parametrize(
    ("operation", "arguments", "backend", "message"),
    [
        (furthest_point_sample, (NOTHING, 1), "auto", "at least one point"),
        (furthest_point_sample, (CLOUD, 0), "auto", "0 samples"),
        (furthest_point_sample, (CLOUD, 2), "cuda", "unknown backend 'cuda': choose from auto, triton, numba, torch"),
        (furthest_point_sample, (CLOUD[..., :2], 2), "numba", "'numba': this backend takes 3 coordinates on the CPU"),
        (ball_query, (NOTHING, CLOUD, [(0, 1.0)], [2]), "torch", r"at least one point and .* found \(1, 0, 3\)"),
        (ball_query, (NOTHING, CLOUD, [(0, 1.0)], [2]), "numba", r"at least one point and .* found \(1, 0, 3\)"),
        (ball_query, (CLOUD, CLOUD, [(0, 1.0)], [2]), "triton", "CUDA"),
    ],
)
def test_what_cannot_be_computed_is_named(operation, arguments, backend, message, monkeypatch):
    monkeypatch.setattr(point_ops, "triton", object())
    with pytest.raises(ValueError, match=message):
        operation(*arguments, backend=backend)


class TestBackendChoice:
    @pytest.mark.parametrize(
        ("operation", "kernel"),
        [
            ("furthest_point_sample", "triton_sample"),
            ("furthest_point_sample_features", "triton_sample_features"),
            ("ball_query", "triton_ball_query_padded"),
        ],
    )
    def test_auto_leaves_a_triton_kernel_that_does_not_work(self, operation, kernel, monkeypatch):
        """Triton's kernels stood in for on the CPU: one that fails to compile, one that is wrong, one that works."""
        definition = getattr(point_ops, kernel.removeprefix("triton_").replace("sample", "furthest_point_sample"))

        def broken(*_):
            raise RuntimeError("no PTX for you")

        def wrong(*arguments):
            return tree_map(torch.zeros_like, right(*arguments))

        def right(*arguments):
            assert arguments[0].dtype == torch.float32  # what the kernels take, whatever the default is
            if operation == "ball_query":
                points, centers, squared, slots = arguments
                rings = [tuple(value**0.5 for value in ring) for ring in squared]
                return definition(points, centers, rings, slots)
            return definition(*arguments, backend="torch")

        obstacles = {"triton": None, "numba": ValueError("not here"), "torch": None}
        on_cpu = functools.partial(point_ops.triton_works.__wrapped__, device="cpu")
        monkeypatch.setattr(point_ops, "_obstacles", lambda *_, **__: obstacles)
        monkeypatch.setattr(point_ops, "triton_works", on_cpu)
        for stand_in, message in ((broken, "RuntimeError: no PTX"), (wrong, "not the definition's")):
            monkeypatch.setattr(point_ops, kernel, stand_in)
            with pytest.warns(RuntimeWarning, match=message):
                assert point_ops._choose(operation, "auto", **obstacles) == "torch"
            assert point_ops._choose(operation, "triton", **obstacles) == "triton"
        monkeypatch.setattr(point_ops, kernel, right)
        torch.set_default_dtype(torch.float64)
        try:
            assert point_ops._choose(operation, "auto", **obstacles) == "triton"
        finally:
            torch.set_default_dtype(torch.float32)

    def test_missing_package_is_named_and_auto_goes_on(self, monkeypatch):
        points = torch.randn(1, 40, 3, generator=torch.Generator().manual_seed(0))
        for package in ("numba", "triton"):
            monkeypatch.setattr(point_ops, package, None)
        with pytest.raises(ImportError, match="pip install numba"):
            furthest_point_sample(points, 5, backend="numba")
        assert torch.equal(furthest_point_sample(points, 5), furthest_point_sample(points, 5, backend="torch"))
        (ring,) = ball_query(points, points, [(0.0, 1.0)], [4])
        assert len(ring.index) == 160
        assert group_max(points[0], ring).shape == (40, 3)
