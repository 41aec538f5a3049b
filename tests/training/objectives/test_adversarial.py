"""Adversarial losses against their closed forms."""

import pytest
import torch

from training.objectives.adversarial import feature_matching, hinge_discriminator, hinge_generator


def test_hinge_losses_by_hand() -> None:
    real, fake = torch.tensor([0.5, 2.0]), torch.tensor([-3.0, 0.0])
    # Real: (1 - 0.5) and 0, mean 0.25; fake: 0 and (1 + 0), mean 0.5; half of their sum.
    assert hinge_discriminator(real, fake).item() == pytest.approx(0.375)
    assert hinge_generator(fake).item() == pytest.approx(1.5)


def test_a_discriminator_that_is_right_by_a_margin_has_no_gradient() -> None:
    real = torch.tensor([1.5], requires_grad=True)
    fake = torch.tensor([-1.5], requires_grad=True)
    hinge_discriminator(real, fake).backward()
    assert real.grad is not None and fake.grad is not None
    assert real.grad.item() == fake.grad.item() == 0.0


def test_feature_matching_weighs_layers_equally_and_moves_the_fake_side_alone() -> None:
    real = [torch.tensor([1.0, 3.0], requires_grad=True), torch.tensor([100.0])]
    fake = [torch.tensor([2.0, 3.0], requires_grad=True), torch.tensor([150.0])]
    loss = feature_matching(real, fake)
    # Layer 1: mean gap 0.5 over mean size 2; layer 2: 50 over 100.
    assert loss.item() == pytest.approx((0.25 + 0.5) / 2)
    loss.backward()
    assert fake[0].grad is not None and fake[0].grad.abs().sum() > 0
    assert real[0].grad is None
