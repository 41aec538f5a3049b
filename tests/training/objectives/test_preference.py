import math

import pytest
import torch

from training.objectives.preference import binary_cross_entropy, bradley_terry


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_cross_entropy_by_hand() -> None:
    loss = binary_cross_entropy(torch.tensor([2.0, -1.0]), torch.tensor([1.0, 0.0]))
    expected = -(math.log(_sigmoid(2)) + math.log(1 - _sigmoid(-1))) / 2
    assert loss.item() == pytest.approx(expected)
    assert loss.item() == pytest.approx(0.2200950)  # (0.1269280 + 0.3132617) / 2


def test_cross_entropy_of_an_undecided_model_is_log_2_whatever_the_label() -> None:
    for label in (0.0, 0.3, 1.0):
        loss = binary_cross_entropy(torch.zeros(3), torch.full((3,), label), label_smoothing=0.2)
        assert loss.item() == pytest.approx(math.log(2))


def test_label_smoothing_moves_labels_towards_one_half() -> None:
    # y = 1 becomes 0.9 at 0.2; the minimum then lies at log(0.9 / 0.1), where the gradient is zero.
    best = torch.tensor([math.log(9.0)], requires_grad=True)
    binary_cross_entropy(best, torch.ones(1), label_smoothing=0.2).backward()
    assert best.grad is not None
    assert best.grad.item() == pytest.approx(0.0, abs=1e-7)


def test_class_weights_count_each_class_and_do_not_change_the_divisor() -> None:
    logits, labels = torch.tensor([0.0, 0.0]), torch.tensor([0.0, 1.0])
    loss = binary_cross_entropy(logits, labels, class_weights=(1.0, 3.0))
    assert loss.item() == pytest.approx((1 + 3) / 2 * math.log(2))
    halves = [binary_cross_entropy(logits[i], labels[i], class_weights=(1.0, 3.0)) for i in (0, 1)]
    assert loss.item() == pytest.approx(sum(half.item() for half in halves) / 2)


def test_gradients_pull_liked_clips_up_and_others_down() -> None:
    logits = torch.zeros(2, requires_grad=True)
    binary_cross_entropy(logits, torch.tensor([1.0, 0.0])).backward()
    # (sigmoid(z) - y) / B
    assert logits.grad is not None
    assert logits.grad.tolist() == pytest.approx([-0.25, 0.25])


def test_bradley_terry_by_hand() -> None:
    loss = bradley_terry(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 3.0]))
    assert loss.item() == pytest.approx((-math.log(_sigmoid(1)) - math.log(_sigmoid(-3))) / 2)
    assert loss.item() == pytest.approx(1.6809245)  # (0.3132617 + 3.0485874) / 2


def test_bradley_terry_of_equal_rewards_is_log_2_and_only_the_difference_counts() -> None:
    rewards = torch.tensor([-4.0, 0.0, 7.0])
    assert bradley_terry(rewards, rewards, label_smoothing=0.1).item() == pytest.approx(math.log(2))
    shifted = bradley_terry(rewards + 100, rewards.flip(0) + 100)
    assert shifted.item() == pytest.approx(bradley_terry(rewards, rewards.flip(0)).item())


def test_bradley_terry_is_finite_for_large_margins() -> None:
    assert bradley_terry(torch.tensor([1e4]), torch.tensor([-1e4])).item() == 0
    assert bradley_terry(torch.tensor([-1e4]), torch.tensor([1e4])).item() == pytest.approx(2e4)


def test_bradley_terry_pushes_the_chosen_up_and_the_rejected_down() -> None:
    chosen, rejected = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    bradley_terry(chosen, rejected).backward()
    assert chosen.grad is not None and rejected.grad is not None
    assert (chosen.grad.item(), rejected.grad.item()) == pytest.approx((-0.5, 0.5))


def test_label_smoothing_bounds_the_margin() -> None:
    margin = torch.tensor([math.log(9.0)], requires_grad=True)
    bradley_terry(margin, torch.zeros(1), label_smoothing=0.1).backward()
    assert margin.grad is not None
    assert margin.grad.item() == pytest.approx(0.0, abs=1e-7)
