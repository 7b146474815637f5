"""Early warning: what goes wrong quietly in contrastive training, said while there is time to act."""

import math
from collections import deque
from collections.abc import Callable

import torch


class Watch:
    """Looks at every step's values and warns, once per kind until it recovers.

    - a loss that stays within `chance_margin` of chance level for `patience` steps after the first `grace` steps,
    - features whose spread over the batch vanishes, so that all points look alike,
    - a device that spends more than `max_data_wait` of its time waiting for data.

    Args:
        warn: is given each warning.
        patience: steps over which a condition must hold.
        grace: steps at the start in which losses are expected to be at chance.
        chance_margin: nats.
        min_spread: of [`feature_spread`].
        max_data_wait: share of time, 0 to 1.
    """

    def __init__(
        self,
        warn: Callable[[str], None],
        *,
        patience: int = 100,
        grace: int = 200,
        chance_margin: float = 0.1,
        min_spread: float = 0.05,
        max_data_wait: float = 0.5,
    ):
        self.warn = warn
        self.patience = patience
        self.grace = grace
        self.chance_margin = chance_margin
        self.min_spread = min_spread
        self.max_data_wait = max_data_wait
        self._warned: set[str] = set()
        self._recent: dict[str, deque[float]] = {}

    def look(self, step: int, values: dict[str, float], data_wait_share: float) -> None:
        """`values` may hold `X_loss` with `X_chance`, and `X_spread`."""
        for name in [n.removesuffix("_loss") for n in values if n.endswith("_loss")]:
            if f"{name}_chance" in values and step > self.grace:
                below = values[f"{name}_chance"] - values[f"{name}_loss"]
                self._report(
                    f"{name}_loss",
                    self._mean(f"{name}_loss", below) < self.chance_margin,
                    f"step {step}: the {name.replace('_', '-')} loss is still at chance level "
                    f"({values[f'{name}_chance']:.2f}): nothing is learnt there. Check the learning rates, and with "
                    "simipu-hf data inspect that points and image belong together",
                )
        for name in [n.removesuffix("_spread") for n in values if n.endswith("_spread")]:
            spread = self._mean(f"{name}_spread", values[f"{name}_spread"])
            self._report(
                f"{name}_spread",
                spread < self.min_spread,
                f"step {step}: the {name.replace('_', ' ')} features are collapsing: their spread is {spread:.3f} "
                "(1 is uniform, 0 all alike). Lower the learning rate",
            )
        waiting = self._mean("data_wait", data_wait_share)
        self._report(
            "data_wait",
            waiting > self.max_data_wait,
            f"step {step}: {waiting:.0%} of the time is spent waiting for data; raise --dataloader_num_workers",
        )

    def _mean(self, name: str, value: float) -> float:
        """The mean over the last `patience` steps; NaN, which compares false, until there are that many."""
        recent = self._recent.setdefault(name, deque(maxlen=self.patience))
        recent.append(value)
        return sum(recent) / len(recent) if len(recent) == self.patience else math.nan

    def _report(self, kind: str, is_bad: bool, text: str) -> None:
        if is_bad and kind not in self._warned:
            self._warned.add(kind)
            self.warn(text)
        elif not is_bad:
            self._warned.discard(kind)


@torch.no_grad()
def feature_spread(embeds: torch.Tensor) -> torch.Tensor:
    """How different the rows of `embeds` (..., D) are: the standard deviation of the unit vectors' coordinates,
    averaged over D and times sqrt(D). 1 for directions spread evenly, 0 where all rows point the same way."""
    unit = torch.nn.functional.normalize(embeds.detach().float().flatten(0, -2), dim=-1)
    return unit.std(0).mean() * math.sqrt(unit.shape[-1])
