"""What the models return. B: clouds in the batch, M: points the point encoder keeps per cloud."""

from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput


@dataclass
class PointEncoderOutput(ModelOutput):
    """What every point encoder returns.

    Args:
        coordinates (`(B, M, 3)`): where the kept points lie, metres, in the frame of the input cloud.
        features (`(B, M, C)`): their features.
        indices (`(B, M)`, int64, *optional*): their rows in the input cloud; `None` where they are not rows of it.
        mask (`(B, M)`, bool): false for slots that hold no point.
    """

    coordinates: torch.Tensor = None  # type: ignore[assignment]  # always given, but ModelOutput asks for a default
    features: torch.Tensor = None  # type: ignore[assignment]  # likewise
    indices: torch.Tensor | None = None
    mask: torch.Tensor = None  # type: ignore[assignment]  # likewise


@dataclass
class SimIPUModelOutput(ModelOutput):
    """Output of [`SimIPUModel`].

    Args:
        image_features (tuple of `(B, C_s, H_s, W_s)`, *optional*): the stages `config.image_config.out_indices`.
        point_output ([`PointEncoderOutput`], *optional*): the point encoder's output.
    """

    image_features: tuple[torch.Tensor, ...] | None = None
    point_output: PointEncoderOutput | None = None


@dataclass
class SimIPUForPreTrainingOutput(ModelOutput):
    """Output of [`SimIPUForPreTraining`]. Scalars are means over this process's batch.

    Args:
        loss: weighted sum of the two losses.
        intra_modal_loss, inter_modal_loss: each unweighted.
        anchor_loss: unweighted; `None` without `config.anchor_weight`.
        intra_modal_chance, inter_modal_chance: ln(number of candidates), the loss of a uniform guess.
        intra_modal_top1, intra_modal_top5, inter_modal_top1, inter_modal_top5: share of anchors, 0 to 1, whose
            positive is among the 1 or 5 most similar candidates; these and the next two only with `return_metrics`.
        inter_modal_top10_percent, inter_modal_top50_percent: the same for the most similar 10 % and 50 % (the
            official log's `cross_acc_top1` and `cross_acc_top5`).
        match_distance: mean distance of the matched pairs in metres.
        pairs_in_image: share of points that project into their image.
        image_embeds, point_embeds (`(B, M, projection_dim)`): inter-modal projections before normalisation.
        match (`(B, M)`, int64): for each un-augmented point the index of its match in the augmented view.
        image_features: as in [`SimIPUModelOutput`].
        point_output, point_aug_output ([`PointEncoderOutput`]): un-augmented and augmented view.
    """

    loss: torch.Tensor | None = None
    intra_modal_loss: torch.Tensor | None = None
    inter_modal_loss: torch.Tensor | None = None
    anchor_loss: torch.Tensor | None = None
    intra_modal_chance: torch.Tensor | None = None
    inter_modal_chance: torch.Tensor | None = None
    intra_modal_top1: torch.Tensor | None = None
    intra_modal_top5: torch.Tensor | None = None
    inter_modal_top1: torch.Tensor | None = None
    inter_modal_top5: torch.Tensor | None = None
    inter_modal_top10_percent: torch.Tensor | None = None
    inter_modal_top50_percent: torch.Tensor | None = None
    match_distance: torch.Tensor | None = None
    pairs_in_image: torch.Tensor | None = None
    image_embeds: torch.Tensor | None = None
    point_embeds: torch.Tensor | None = None
    match: torch.Tensor | None = None
    image_features: tuple[torch.Tensor, ...] | None = None
    point_output: PointEncoderOutput | None = None
    point_aug_output: PointEncoderOutput | None = None
