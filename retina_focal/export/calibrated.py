"""Calibrated scores in the graph: what `OperatingPoints.calibrate` computes, in tensors."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn


class CalibratedScores(nn.Module):
    """Straight lines between the knots of each class; a class without a map keeps its scores."""

    def __init__(self, calibration: Mapping[str, Mapping], classes: Sequence[str]):
        """
        Args:
            calibration: by class, {"scores": rising, "values": not falling}, in [0, 1].
            classes: K names, in the order of their numbers.
        """
        super().__init__()
        identity = {"scores": [0.0, 1.0], "values": [0.0, 1.0]}
        maps = [calibration.get(name, identity) for name in classes]
        most = max(len(x["scores"]) for x in maps)
        # The last knot again, until all classes have as many.
        for name in ("scores", "values"):
            rows = [[*x[name], *[x[name][-1]] * (most - len(x[name]))] for x in maps]
            self.register_buffer(f"knot_{name}", torch.tensor(rows))  # (K, S)

    def forward(self, scores: Tensor, classes: Tensor) -> Tensor:
        """(N, D) probabilities of (N, D) scores of (N, D) classes."""
        knots, values = self.knot_scores[classes], self.knot_values[classes]  # (N, D, S)
        # The segment that the score lies on; outside of all, the first or the last knot's value.
        after = (scores[..., None] >= knots).sum(-1).clamp(max=knots.shape[-1] - 1)
        ends = torch.stack([(after - 1).clamp(min=0), after], -1)
        (low, high), (first, last) = (x.gather(-1, ends).unbind(-1) for x in (knots, values))
        share = (scores - low) / (high - low).clamp(min=torch.finfo(scores.dtype).tiny)
        return first + share.clamp(0, 1) * (last - first)
