"""Optimizers and schedules: several optimizers that step together, each over named parts of the model."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import SchedulerType, get_scheduler

from simipu_hf.errors import SimIPUError

SCHEDULES = ("exponential", *(kind.value for kind in SchedulerType if kind.value in (
    "constant", "constant_with_warmup", "linear", "cosine", "polynomial", "inverse_sqrt"
)))  # fmt: skip


@dataclass(frozen=True)
class OptimizerSettings:
    """One optimizer. `kind` is `"sgd"` or `"adamw"`; `betas` belong to AdamW, `momentum` to SGD."""

    kind: str
    learning_rate: float
    weight_decay: float
    betas: tuple[float, float] = (0.9, 0.999)
    momentum: float = 0.9


def create_optimizer(settings: OptimizerSettings, parts: Mapping[str, Iterable[nn.Parameter]]) -> Optimizer:
    """An optimizer with one parameter group, named `group["name"]`, for each part that has trainable parameters."""
    groups = [
        {"name": name, "params": trainable}
        for name, parameters in parts.items()
        if (trainable := [p for p in parameters if p.requires_grad])
    ]
    rate, decay = settings.learning_rate, settings.weight_decay
    if settings.kind == "adamw":
        return AdamW(groups, lr=rate, betas=settings.betas, weight_decay=decay)
    if settings.kind == "sgd":
        return torch.optim.SGD(groups, lr=rate, momentum=settings.momentum, weight_decay=decay)
    raise SimIPUError(f"unknown optimizer {settings.kind!r}: choose from sgd, adamw")


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
    if name == "exponential":

        def factor(step: int) -> float:
            warmup = min(1.0, (step + 1) / (warmup_steps + 1))
            return warmup * decay_per_epoch ** (step // steps_per_epoch)

        return LambdaLR(optimizer, factor)
    if name not in SCHEDULES:
        raise SimIPUError(f"unknown schedule {name!r}: choose from {', '.join(SCHEDULES)}")
    return get_scheduler(name, optimizer, num_warmup_steps=warmup_steps, num_training_steps=total_steps)


class Optimization:
    """Optimizers and schedules that step together, with gradient clipping and fp16 loss scaling done once for all.

    accelerate's own wrapper updates the loss scale after each optimizer, which unscales the second one's gradients
    twice; so the optimizers stay plain ones here and share one update.

    Args:
        accelerator: whose gradient scaler is used where it has one (fp16).
        optimizers: over disjoint parameters, each group with a `"name"`.
        schedules: one for each optimizer.
        max_grad_norm: clip the gradient of each optimizer step to this norm over all parameters together;
            0 does not clip.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        optimizers: list[Optimizer],
        schedules: list[LRScheduler],
        max_grad_norm: float = 0.0,
    ):
        self.scaler = accelerator.scaler
        self.optimizers = optimizers
        self.schedules = schedules
        self.max_grad_norm = max_grad_norm

    @property
    def parts(self) -> dict[str, list[nn.Parameter]]:
        return {group["name"]: group["params"] for optimizer in self.optimizers for group in optimizer.param_groups}

    def gradient_norms(self) -> dict[str, float]:
        """The L2 norm of each part's gradient, loss scaling removed. Call once per step, before `step`."""
        if self.scaler is not None:
            for optimizer in self.optimizers:
                self.scaler.unscale_(optimizer)
        norms = [
            nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
            for parameters in self.parts.values()
        ]
        device = self.optimizers[0].param_groups[0]["params"][0].device
        values = torch.stack([norm.to(device, torch.float64) for norm in norms]).tolist()
        return dict(zip(self.parts, values, strict=True))

    def step(self) -> None:
        """Clip, step every optimizer and schedule, and drop the gradients. `gradient_norms` comes first."""
        if self.max_grad_norm:
            nn.utils.clip_grad_norm_([p for part in self.parts.values() for p in part], self.max_grad_norm)
        for optimizer in self.optimizers:
            optimizer.step() if self.scaler is None else self.scaler.step(optimizer)
        if self.scaler is not None:
            self.scaler.update()
        for schedule in self.schedules:
            schedule.step()
        self.zero_grad()

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def learning_rates(self) -> dict[str, float]:
        """The learning rate of each part in the coming step."""
        return {group["name"]: group["lr"] for optimizer in self.optimizers for group in optimizer.param_groups}

    def state_dict(self) -> dict[str, Any]:
        return {
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "schedules": [schedule.state_dict() for schedule in self.schedules],
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        for schedule, saved in zip(self.schedules, state["schedules"], strict=True):
            schedule.load_state_dict(saved)
        if self.scaler is not None and state["scaler"] is not None:
            self.scaler.load_state_dict(state["scaler"])
