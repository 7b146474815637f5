"""Optimizers and schedules: which parameters follow which rule, and how fast."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import get_scheduler

from .arguments import PreTrainingArguments, refuse_without_effect


@dataclass(frozen=True)
class Recipe:
    """How a part of the model is optimised, with every default resolved."""

    optimizer: str
    learning_rate: float
    weight_decay: float
    layer_decay: float = 1.0
    warmup_steps: int = 0


def choose_recipe(arguments: PreTrainingArguments, image_encoder: nn.Module, total_steps: int) -> Recipe:
    """The flags, and where they are `None` the values that suit the encoder's family.

    Networks with batch norm (ResNet, RegNet, EfficientNet) take the official SGD. The others (ViT, Swin, ConvNeXt)
    take AdamW with warm-up, as they were published, and from pretrained weights a tenth of the learning rate with
    layer-wise decay (BEiT's fine-tuning recipe, Bao et al. 2022).
    """
    has_batch_norm = any(isinstance(module, _BatchNorm) for module in image_encoder.modules())
    optimizer = arguments.optimizer or ("sgd" if has_batch_norm else "adamw")
    if optimizer == "sgd":
        defaults = Recipe("sgd", learning_rate=0.03, weight_decay=1e-4)
    elif arguments.pretrained_image_encoder or arguments.model_name_or_path:
        defaults = Recipe("adamw", 1e-4, weight_decay=0.05, layer_decay=0.75, warmup_steps=total_steps // 20)
    else:
        defaults = Recipe("adamw", 1e-3, weight_decay=0.05, warmup_steps=total_steps // 20)
    if arguments.lr_scheduler_type == "constant":
        defaults = replace(defaults, warmup_steps=0)
    kinds = {optimizer, arguments.point_optimizer}
    refuse_without_effect(arguments, optimizer == "adamw", "with sgd: add --optimizer adamw", "layer_decay")
    refuse_without_effect(arguments, "sgd" in kinds, "with adamw", "momentum")
    refuse_without_effect(arguments, "adamw" in kinds, "with sgd", "adam_beta1", "adam_beta2")
    given = {name: value for name in vars(defaults) if (value := getattr(arguments, name)) is not None}
    return replace(defaults, **given)


class ChainedOptimizer(Optimizer):
    """Several optimizers over disjoint parameters as one.

    accelerate updates the fp16 loss scale after each optimizer that it steps, and would unscale the gradients of a
    second one twice. So it gets one, and one schedule serves all groups.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self.optimizers = list(optimizers)
        super().__init__([group for optimizer in self.optimizers for group in optimizer.param_groups], {})
        self.defaults = {"lr": self.optimizers[0].defaults["lr"]}  # the polynomial schedule reads it

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for optimizer in self.optimizers:
            optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for optimizer, saved in zip(self.optimizers, state_dict["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.param_groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]


def learning_rates(optimizer: Optimizer) -> dict[str, float]:
    """`learning_rate/<name>` -> the highest one of the groups of that name in the coming step."""
    rates: dict[str, float] = {}
    for group in optimizer.param_groups:
        name = f"learning_rate/{group['name']}"
        rates[name] = max(group["lr"], rates.get(name, 0.0))
    return rates


def create_optimizer(
    arguments: PreTrainingArguments, recipe: Recipe, modules: Mapping[str, Sequence[nn.Module]]
) -> Optimizer:
    """SGD or AdamW over the trainable parameters of named modules.

    AdamW decays no norms, biases and embeddings, and multiplies the learning rate by `layer_decay` for every layer
    that lies further from the output, both by timm's rules. SGD treats all parameters alike, as the official code.
    """
    groups: list[dict[str, Any]] = []
    for name, parts in modules.items():
        for module in parts:
            undecayed: Any = getattr(module, "no_weight_decay", set)()
            found: list[dict[str, Any]]
            if recipe.optimizer == "sgd":
                found = [{"params": [p for p in module.parameters() if p.requires_grad]}]
            elif recipe.layer_decay < 1 and hasattr(module, "group_matcher"):
                found = param_groups_layer_decay(
                    module, recipe.weight_decay, no_weight_decay_list=undecayed, layer_decay=recipe.layer_decay
                )
            else:
                found = param_groups_weight_decay(module, recipe.weight_decay, no_weight_decay_list=undecayed)
            for group in found:
                groups.append({**group, "name": name, "lr": recipe.learning_rate * group.get("lr_scale", 1.0)})
    groups = [group for group in groups if group["params"]]
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=arguments.momentum, weight_decay=recipe.weight_decay)
    return AdamW(groups, betas=(arguments.adam_beta1, arguments.adam_beta2), weight_decay=recipe.weight_decay)


def create_schedule(
    arguments: PreTrainingArguments, recipe: Recipe, optimizer: Optimizer, total_steps: int, steps_per_epoch: int
) -> LRScheduler:
    """A schedule that is stepped once per optimizer step.

    `"exponential"` multiplies by `lr_decay_per_epoch` after every epoch (the official `Exp` policy) following a linear
    warm-up; the other names are those of `transformers.get_scheduler`.
    """
    name, warmup_steps = arguments.lr_scheduler_type, recipe.warmup_steps
    if name != "exponential":
        return get_scheduler(name, optimizer, num_warmup_steps=warmup_steps, num_training_steps=total_steps)

    def factor(step: int) -> float:
        warmup = min(1.0, (step + 1) / (warmup_steps + 1))
        return warmup * arguments.lr_decay_per_epoch ** (step // steps_per_epoch)

    return LambdaLR(optimizer, factor)


def clip_gradients(accelerator: Accelerator, optimizer: Optimizer, max_norm: float) -> dict[str, torch.Tensor]:
    """Clip all gradients together to `max_norm` (0 does not), after removing the loss scale of fp16.

    Returns:
        `grad_norm/<name>` -> the L2 norm of the part's gradient before clipping, a scalar on the device.
    """
    accelerator.unscale_gradients()
    parts: dict[str, list[nn.Parameter]] = {}
    for group in optimizer.param_groups:
        parts.setdefault(group["name"], []).extend(group["params"])
    norms = {
        f"grad_norm/{name}": nn.utils.get_total_norm([p.grad for p in part if p.grad is not None])
        for name, part in parts.items()
    }
    if max_norm:
        total = torch.linalg.vector_norm(torch.stack(list(norms.values())))
        nn.utils.clip_grads_with_norm_([p for part in parts.values() for p in part], max_norm, total)
    return norms
