"""Backbone and head: from images to what loss and detections are made of."""

from torch import Tensor, nn

from retina_focal.box_tower import PendingDeltas
from retina_focal.folding import FoldedWeights


def run_network(
    backbone: nn.Module,
    head: nn.Module,
    in_features: list[str],
    folded_weights: FoldedWeights,
    images: Tensor,
) -> tuple[list[Tensor], list[Tensor], list[Tensor] | PendingDeltas]:
    """
    Args:
        in_features: names of the backbone's outputs that the head sees.
        folded_weights: of the backbone.
        images: (N, C, H, W).
    Returns:
        Features of the backbone, and logits and deltas as the head gives them, per level.
    """
    with folded_weights.folded():
        features = backbone(images)
    features = [features[name] for name in in_features]
    return features, *head(features)
