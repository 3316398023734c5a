"""Images from a normal distribution, for which the ideal prediction is known."""

from __future__ import annotations

from collections.abc import Callable

import torch

from dit.model.objectives import Objective

MEAN, DEVIATION = 2.0, 0.5


def ideal(objective: Objective) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The best prediction there is for images from N(MEAN, DEVIATION^2): it follows from E[image | x_t]."""

    def predict(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        alpha, sigma = objective.alpha_sigma(t)
        surprise = (x - alpha * MEAN) / (alpha**2 * DEVIATION**2 + sigma**2)
        image, noise = MEAN + alpha * DEVIATION**2 * surprise, sigma * surprise
        return {
            "flow_prediction": noise - image,
            "epsilon": noise,
            "v_prediction": alpha * noise - sigma * image,
        }[objective.prediction_type]

    return predict
