"""Training curves from `metrics.jsonl`."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .style import BLUE, FAINT, ORANGE, add_legend, new_figure, style_axes


def draw_training_curves(metrics: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Losses over optimizer steps, each with its chance level as a dashed line and the evaluation's values.

    Args:
        metrics: lines of a `metrics.jsonl` (`simipu_hf.training.metrics.read_metrics`): `step`, and values under
            names such as `inter_modal_loss`, `inter_modal_chance` and `eval/inter_modal_loss`.

    Returns:
        One panel per loss; the total, which has no chance level of its own, only where there is no other. `None`
        where no loss was logged.
    """
    logged = dict.fromkeys(name.removeprefix("eval/") for line in metrics for name in line if name.endswith("loss"))
    names = [name for name in logged if name != "loss"] or list(logged)
    if not names:
        return None
    figure = new_figure(5.2 * len(names), 3.4)
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        unit = "nats" if name.endswith("modal_loss") else "loss"
        style_axes(axes, name.replace("_modal", "-modal").replace("_", " "), "optimizer step", unit, grid=True)
        _plot(axes, metrics, name, "training", color=BLUE, linewidth=1.6)
        _plot(axes, metrics, f"eval/{name}", "evaluation", color=ORANGE, marker="o", markersize=3.5)
        chance = name.removesuffix("loss") + "chance"
        _plot(axes, metrics, chance, "chance: ln(candidates)", color=FAINT, linestyle="--")
        add_legend(axes)
    return figure


def _plot(axes: Axes, metrics: Sequence[Mapping[str, Any]], name: str, label: str, **style: Any) -> None:
    # a value that was not finite is written as null
    values = [(line["step"], line[name]) for line in metrics if line.get(name) is not None]
    if values:
        axes.plot(*zip(*values, strict=True), label=label, **style)
