"""Calibration of next-token predictions: whether a model is right as often as it is sure."""

import torch
from torch import Tensor

BINS = 15
"""Number of bins of equal width, (0, 1/15] to (14/15, 1], as in Guo et al. 2017."""


class Calibration:
    """Counts, confidences and hits of predictions by bin of confidence, added up as they come."""

    def __init__(self) -> None:
        self._sums = torch.zeros(3, BINS, dtype=torch.float64)

    def add(self, confidence: Tensor, correct: Tensor) -> None:
        """Adds predictions. confidence: [n], probability of the likeliest token; correct: [n], whether it was the label."""
        places = (confidence.double().cpu() * BINS).ceil().long().sub_(1).clamp_(0, BINS - 1)
        values = torch.stack([torch.ones(len(places)), confidence.cpu(), correct.cpu()]).double()
        self._sums.index_add_(1, places, values)

    def error(self) -> float:
        """Expected calibration error: sum over bins of the share of predictions times |accuracy - mean confidence|.

        NaN without predictions.
        """
        counts, confidence, correct = self._sums
        return float((correct - confidence).abs().sum() / counts.sum())

    def bins(self) -> list[dict[str, float]]:
        """Lists the bins that hold predictions: upper end, count, mean confidence, accuracy."""
        counts, confidence, correct = self._sums.tolist()
        return [
            {
                "up_to": (number + 1) / BINS,
                "count": count,
                "confidence": confidence[number] / count,
                "accuracy": correct[number] / count,
            }
            for number, count in enumerate(counts)
            if count
        ]
