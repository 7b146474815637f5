"""Optimizers and schedules: which parameters follow which rule, and how fast."""

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import get_scheduler


class ChainedOptimizer(Optimizer):
    """Several optimizers over disjoint parameters as one; every parameter group has a `"name"`.

    accelerate updates the fp16 loss scale after each optimizer that it steps, and would unscale the gradients of a
    second one twice. So it gets one, and one schedule serves all groups.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self.optimizers = list(optimizers)
        super().__init__([group for optimizer in self.optimizers for group in optimizer.param_groups], {})

    def step(self, closure: Any = None) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for optimizer, saved in zip(self.optimizers, state_dict["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.param_groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """Name -> the parameters of all groups of that name."""
        parts: dict[str, list[nn.Parameter]] = {}
        for group in self.param_groups:
            parts.setdefault(group["name"], []).extend(group["params"])
        return parts

    def learning_rates(self) -> dict[str, float]:
        """Name -> the highest learning rate of the groups of that name in the coming step."""
        return {
            name: max(group["lr"] for group in self.param_groups if group["name"] == name) for name in self.parts()
        }


def create_optimizer(
    kind: str,
    modules: dict[str, Sequence[nn.Module]],
    *,
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float],
    momentum: float,
    layer_decay: float = 1.0,
) -> Optimizer:
    """SGD or AdamW over the trainable parameters of named modules.

    AdamW decays no norms, biases and embeddings, and multiplies the learning rate by `layer_decay` for every layer
    that lies further from the output, both by timm's rules. SGD treats all parameters alike, as the official code.
    """
    if kind == "sgd":
        groups = [
            {"name": name, "params": [p for m in parts for p in m.parameters() if p.requires_grad]}
            for name, parts in modules.items()
        ]
        groups = [group for group in groups if group["params"]]
        return torch.optim.SGD(groups, lr=learning_rate, momentum=momentum, weight_decay=weight_decay)
    groups = []
    for name, parts in modules.items():
        for module in parts:
            if layer_decay < 1 and hasattr(module, "group_matcher"):
                found = param_groups_layer_decay(module, weight_decay=weight_decay, layer_decay=layer_decay)
            else:
                kept = getattr(module, "no_weight_decay", set)()
                found = param_groups_weight_decay(module, weight_decay=weight_decay, no_weight_decay_list=kept)
            for group in found:
                scale = group.get("lr_scale", 1.0)
                groups.append(
                    {
                        "name": name,
                        "params": group["params"],
                        "lr": learning_rate * scale,
                        "weight_decay": group["weight_decay"],
                    }
                )
    return AdamW([group for group in groups if group["params"]], betas=betas)


def create_schedule(
    name: str,
    optimizer: Optimizer,
    *,
    warmup_steps: int,
    total_steps: int,
    steps_per_epoch: int,
    decay_per_epoch: float,
) -> LRScheduler:
    """A schedule that is stepped once per optimizer step.

    `"exponential"` multiplies by `decay_per_epoch` after every epoch (the official `Exp` policy) following a linear
    warm-up; the other names are those of `transformers.get_scheduler`.
    """
    if name != "exponential":
        return get_scheduler(name, optimizer, num_warmup_steps=warmup_steps, num_training_steps=total_steps)

    def factor(step: int) -> float:
        warmup = min(1.0, (step + 1) / (warmup_steps + 1))
        return warmup * decay_per_epoch ** (step // steps_per_epoch)

    return LambdaLR(optimizer, factor)


def clip_gradients(accelerator: Accelerator, optimizer: ChainedOptimizer, max_norm: float) -> dict[str, torch.Tensor]:
    """Clip all gradients together to `max_norm` (0 does not), after removing the loss scale of fp16.

    Returns:
        name -> the L2 norm of the part's gradient before clipping, a scalar on the device: nothing waits for it.
    """
    accelerator.unscale_gradients()
    parts = optimizer.parts()
    norms = {
        name: nn.utils.get_total_norm([p.grad for p in part if p.grad is not None]) for name, part in parts.items()
    }
    if max_norm:
        total = torch.linalg.vector_norm(torch.stack(list(norms.values())))
        nn.utils.clip_grads_with_norm_([p for part in parts.values() for p in part], max_norm, total)
    return norms
