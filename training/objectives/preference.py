"""Losses of reward models: binary cross-entropy and Bradley-Terry. Pure functions of tensors.

Shape legend: B batch.
"""

from torch import Tensor, nn


def binary_cross_entropy(
    logits_B: Tensor,
    labels_B: Tensor,
    *,
    label_smoothing: float = 0.0,
    class_weights: tuple[float, float] = (1.0, 1.0),
) -> Tensor:
    """Return the mean cross-entropy of labels, the objective of BATON's reward model (arXiv 2402.00744).

    It is ``-w(y) [y log s(z) + (1 - y) log s(-z)]`` with s the sigmoid. With equal weights, its minimum for a
    share p of positive labels is at ``z = log(p / (1 - p))``.

    Args:
        logits_B: rewards z.
        labels_B: 1 if the clip was liked for the prompt, 0 if not; in between, the share of annotators.
        label_smoothing: e in the smoothed labels ``y (1 - e) + e / 2``.
        class_weights: w of labels 0 and 1 (in between: interpolated). The sum is divided by B, not by the sum
            of weights, so that the loss does not depend on how a batch is split.
    """
    negative, positive = class_weights
    weights_B = negative + (positive - negative) * labels_B
    soft_B = labels_B * (1 - label_smoothing) + label_smoothing / 2
    losses_B = nn.functional.binary_cross_entropy_with_logits(logits_B, soft_B, reduction="none")
    return (weights_B * losses_B).mean()


def bradley_terry(chosen_B: Tensor, rejected_B: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Return the mean negative log-likelihood of preferences: ``-log s(r_chosen - r_rejected)``.

    The loss of the Bradley-Terry model, equation 12 of the Tango 2 paper (arXiv 2404.09956); log 2 if both
    rewards are equal. It depends on the difference alone, so the zero of the rewards is arbitrary.

    Args:
        chosen_B: rewards of the chosen clips.
        rejected_B: rewards of the rejected clips.
        label_smoothing: probability e that the annotator erred: the loss is (1 - e) times that of the pair
            plus e times that of the swapped pair; the optimal margin is ``log((1 - e) / e)``, not infinite.
    """
    margins_B = chosen_B - rejected_B
    correct_B, swapped_B = nn.functional.logsigmoid(margins_B), nn.functional.logsigmoid(-margins_B)
    return -((1 - label_smoothing) * correct_B + label_smoothing * swapped_B).mean()
