"""The losses of the training programs: pure functions of tensors.

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
    """Mean cross-entropy of absolute labels, the objective of BATON's reward model (arXiv 2402.00744).

    ``-w(y) [y log s(z) + (1 - y) log s(-z)]`` with s the sigmoid. With equal weights its minimum for a share
    p of positive labels lies at ``z = log(p / (1 - p))``.

    Args:
        logits_B: rewards z.
        labels_B: 1 where people liked the clip for the prompt, 0 where not; shares of annotators in between.
        label_smoothing: labels are drawn towards 1/2: ``y (1 - e) + e / 2``.
        class_weights: w of labels 0 and 1 (in between: interpolated). The sum is divided by B and not by the
            sum of weights, so that a batch and its parts have one mean, however it is split up.
    """
    negative, positive = class_weights
    weights_B = negative + (positive - negative) * labels_B
    soft_B = labels_B * (1 - label_smoothing) + label_smoothing / 2
    losses_B = nn.functional.binary_cross_entropy_with_logits(logits_B, soft_B, reduction="none")
    return (weights_B * losses_B).mean()


def bradley_terry(chosen_B: Tensor, rejected_B: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Mean negative log-likelihood of preferences: ``-log s(r_chosen - r_rejected)``.

    Equation 12 of the Tango 2 paper (arXiv 2404.09956), the loss of the Bradley-Terry model. log 2 where both
    rewards are equal. Only the difference counts, so rewards trained by this alone have no absolute zero.

    Args:
        chosen_B: rewards of the clips that were preferred.
        rejected_B: rewards of the others.
        label_smoothing: probability e that an annotator took the wrong one (conservative form: the loss is
            (1 - e) times that of the pair and e times that of the pair exchanged); the margin it strives for
            is then ``log((1 - e) / e)`` instead of infinity.
    """
    margins_B = chosen_B - rejected_B
    right_B = nn.functional.logsigmoid(margins_B)
    wrong_B = nn.functional.logsigmoid(-margins_B)
    return -((1 - label_smoothing) * right_B + label_smoothing * wrong_B).mean()
