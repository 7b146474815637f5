import math
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.multiprocessing import start_processes

from simipu_hf.modeling import losses
from simipu_hf.modeling.losses import contrastive_loss

ROWS, WIDTH, TEMPERATURE = 30, 8, 0.07


@pytest.fixture
def pairs() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    anchors = torch.randn(ROWS, WIDTH, dtype=torch.float64, requires_grad=True)
    positives = (anchors.detach() + torch.randn(ROWS, WIDTH)).requires_grad_()
    return anchors, positives


def everything() -> torch.Tensor:
    return torch.ones(ROWS, dtype=torch.bool)


def by_definition(anchors: torch.Tensor, positives: torch.Tensor) -> torch.Tensor:
    """-log of the positive's share of exp(cosine similarity / T), written out."""
    total = 0.0
    for i in range(len(anchors)):
        similarity = F.cosine_similarity(anchors[i], positives) / TEMPERATURE
        total = total - torch.log(torch.exp(similarity[i]) / torch.exp(similarity).sum())
    return total / len(anchors)


def test_loss_equals_its_definition(pairs):
    result = contrastive_loss(*pairs, TEMPERATURE, everything())
    torch.testing.assert_close(result.loss, by_definition(*pairs), rtol=1e-12, atol=0)
    assert result.chance.item() == pytest.approx(math.log(ROWS))


def test_masked_rows_are_neither_anchors_nor_candidates(pairs):
    anchors, positives = pairs
    valid = torch.arange(ROWS) % 3 != 0
    masked = contrastive_loss(anchors, positives, TEMPERATURE, valid, symmetric=True)
    masked.loss.backward()
    kept = contrastive_loss(
        anchors[valid], positives[valid], TEMPERATURE, torch.ones_like(valid[valid]), symmetric=True
    )
    torch.testing.assert_close(masked.loss, kept.loss, rtol=1e-12, atol=0)
    assert masked.num_candidates == valid.sum()
    assert anchors.grad[~valid].abs().max() == 0
    assert positives.grad[~valid].abs().max() == 0


@pytest.mark.parametrize("most", [1, 100, 10**6])
def test_symmetric_loss_averages_both_directions_whatever_is_held_at_a_time(pairs, most, monkeypatch):
    monkeypatch.setattr(losses, "MAX_SIMILARITIES", most)
    anchors, positives = pairs
    found = contrastive_loss(anchors, positives, TEMPERATURE, everything(), symmetric=True).loss
    expected = (by_definition(anchors, positives) + by_definition(positives, anchors)) / 2
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    gradients = (torch.autograd.grad(loss, pairs) for loss in (found, expected))
    for actual, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-12)


def test_accuracies_equal_top_k(pairs):
    anchors, positives = pairs
    result = contrastive_loss(anchors, positives, TEMPERATURE, everything(), return_positions=True)
    similarity = F.normalize(anchors, dim=1) @ F.normalize(positives, dim=1).T
    for k, accuracy in ((1, result.accuracy(1)), (5, result.accuracy(5)), (15, result.accuracy_percent(50))):
        hits = (similarity.topk(k).indices == torch.arange(ROWS)[:, None]).any(1)
        assert accuracy.item() == pytest.approx(hits.double().mean().item())


def test_equally_similar_candidates_rank_by_index():
    same = torch.ones(4, 2, dtype=torch.float64)
    result = contrastive_loss(same, same, TEMPERATURE, torch.ones(4, dtype=torch.bool), return_positions=True)
    assert result.positions.tolist() == [0, 1, 2, 3]


def test_a_low_temperature_keeps_its_digits():
    torch.manual_seed(0)
    anchors, positives = torch.randn(2, ROWS, 4)
    loss = contrastive_loss(anchors, positives, 0.005, everything(), symmetric=True).loss
    logits = F.normalize(anchors.double()) @ F.normalize(positives.double()).T / 0.005
    target = torch.arange(ROWS)
    expected = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def two_clouds() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    anchors, positives = torch.randn(2, 20, WIDTH, generator=generator, dtype=torch.float64)
    return anchors, positives, torch.rand(20, generator=generator) < 0.8


def one_of_two_processes(process: int, folder: Path) -> None:
    """Half of the rows in each process."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=process, world_size=2)
    own = slice(process * 10, process * 10 + 10)
    anchors, positives, valid = (rows[own] for rows in two_clouds())
    options = {"symmetric": True, "gather": True, "return_positions": True}
    result = contrastive_loss(anchors.requires_grad_(), positives.requires_grad_(), TEMPERATURE, valid, **options)
    result.loss.backward()
    torch.save([result.loss.detach(), result.positions, anchors.grad, positives.grad], folder / f"{process}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks")
def test_two_processes_compute_the_loss_of_one(tmp_path):
    start_processes(one_of_two_processes, (tmp_path,), nprocs=2, start_method="fork")
    found = [torch.load(tmp_path / f"{process}.pt") for process in range(2)]
    loss, positions, *gradients = (torch.stack(parts) for parts in zip(*found, strict=True))
    anchors, positives, valid = two_clouds()
    leaves = anchors.requires_grad_(), positives.requires_grad_()
    expected = contrastive_loss(*leaves, TEMPERATURE, valid, symmetric=True, return_positions=True)
    expected.loss.backward()
    torch.testing.assert_close(loss.mean(), expected.loss, rtol=1e-12, atol=0)
    assert torch.equal(positions.flatten()[valid], expected.positions[valid])
    for gradient, leaf in zip(gradients, leaves, strict=True):  # DistributedDataParallel averages over the processes
        torch.testing.assert_close(gradient.flatten(0, 1) / 2, leaf.grad, rtol=1e-9, atol=1e-14)


def test_gradients_are_the_same_under_autocast():
    """A caller may run the backward pass under autocast, too."""
    torch.manual_seed(0)
    pairs, gradients = torch.randn(2, ROWS, WIDTH, requires_grad=True), []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss = contrastive_loss(*pairs, 0.1, everything(), symmetric=True).loss
            gradients.append(torch.autograd.grad(loss, pairs)[0])
    torch.testing.assert_close(*gradients, rtol=0, atol=0)
