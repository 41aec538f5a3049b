import pytest
import torch

from training.data.specaugment import SpecAugmentConfig, spec_augment

SEEDS = [(7, 0), (7, 1), (7, 2)]
MELS_BTM = torch.rand(3, 512, 128) + 0.5


def test_stripes_are_zeros_over_whole_frames_or_bins_and_narrow_enough() -> None:
    config = SpecAugmentConfig()
    augmented = spec_augment(MELS_BTM, config, SEEDS)
    zero = augmented == 0
    assert torch.equal(augmented[~zero], MELS_BTM[~zero])
    for row in zero:
        frames, bins = row.all(dim=1), row.all(dim=0)
        assert torch.equal(row, frames[:, None] | bins[None])
        assert frames.sum() <= config.time_stripes * (config.time_width - 1)
        assert bins.sum() <= config.mel_stripes * (config.mel_width - 1)
    assert zero.any()


def test_stripes_depend_on_the_seed_of_their_mel_alone() -> None:
    augmented = spec_augment(MELS_BTM, SpecAugmentConfig(), SEEDS)
    again = spec_augment(MELS_BTM[1:2], SpecAugmentConfig(), SEEDS[1:2])
    assert torch.equal(again[0], augmented[1])
    assert not torch.equal(augmented[0] == 0, augmented[1] == 0)
    assert MELS_BTM.min() > 0  # the input is unchanged


def test_widths_reach_their_bound_and_short_mels_are_augmented_too() -> None:
    config = SpecAugmentConfig(time_stripes=1, time_width=4, mel_stripes=0)
    seeds = [(number,) for number in range(200)]
    widths = (spec_augment(torch.ones(200, 16, 8), config, seeds) == 0).all(dim=2).sum(dim=1)
    assert set(widths.tolist()) == {0, 1, 2, 3}
    assert spec_augment(torch.ones(1, 2, 2), SpecAugmentConfig(), [(1,)]).shape == (1, 2, 2)


def test_without_stripes_nothing_changes() -> None:
    config = SpecAugmentConfig(time_stripes=0, mel_stripes=0)
    assert torch.equal(spec_augment(MELS_BTM, config, SEEDS), MELS_BTM)
    with pytest.raises(ValueError, match="time_width is 0"):
        SpecAugmentConfig(time_width=0)
