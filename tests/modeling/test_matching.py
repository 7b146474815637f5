import itertools
import multiprocessing
import os

import pytest
import torch

from simipu_hf.modeling.matching import PendingMatch
from simipu_hf.modeling.outputs_simipu import PointEncoderOutput


def matched(a, b, mask=None, other_mask=None):
    """The result for two views in one frame."""
    masks = (torch.ones(a.shape[:2], dtype=torch.bool) if m is None else m for m in (mask, other_mask))
    views = (PointEncoderOutput(coordinates=points, mask=m) for points, m in zip((a, b), masks, strict=True))
    return PendingMatch(*views, torch.eye(4).expand(len(a), 4, 4)).result()


def test_matching_finds_the_cheapest_assignment():
    torch.manual_seed(0)
    a, b = torch.rand(3, 6, 3), torch.rand(3, 6, 3)
    match, distance = matched(a, b)
    for item in range(3):
        cost = (a[item, :, None] - b[item]).norm(dim=-1)
        best = min(itertools.permutations(range(6)), key=lambda p: sum(cost[i, j].item() for i, j in enumerate(p)))
        assert match[item].tolist() == list(best)
        torch.testing.assert_close(distance[item], cost[torch.arange(6), list(best)])


def test_empty_slots_are_not_matched():
    torch.manual_seed(0)
    a, b = torch.rand(1, 5, 3), torch.rand(1, 5, 3)
    mask = torch.tensor([[True, True, True, True, False]])
    other_mask = torch.tensor([[False, True, False, True, True]])
    match, distance = matched(a, b, mask, other_mask)
    found = distance[0].isfinite()
    assert found.sum() == 3
    assert not found[4]
    assert set(match[0, found].tolist()) == {1, 3, 4}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process")  # of a fork beside threads: that is the case here
def test_a_forked_process_has_solvers_of_its_own():
    points = torch.rand(1, 4, 3, generator=torch.Generator().manual_seed(0))
    expected = matched(points, points)[0]  # starts the threads of this process

    def child(results):
        results.put(matched(points, points)[0].tolist())

    context = multiprocessing.get_context("fork")
    results = context.Queue()
    process = context.Process(target=child, args=(results,), daemon=True)
    process.start()
    try:
        assert results.get(timeout=60) == expected.tolist()
    finally:
        process.kill()


def test_distances_of_coinciding_points_far_away_are_exact():
    points = torch.tensor([[[70.1, 39.3, 1.2], [70.2, 39.3, 1.2]]])
    _, distance = matched(points, points.clone())
    assert distance.abs().max() == 0
