"""The router's scores of a step, as a policy is told of them: live and in a replay by the same arithmetic."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def mean_scores(scores: npt.NDArray[np.float32]) -> list[float]:
    """[T, E] of a step's tokens, in the order of the batch's rows -> [E]: their averages, summed in 64 bits."""
    average: list[float] = (np.add.reduce(scores.astype(np.float64), axis=0) / len(scores)).tolist()
    return average
