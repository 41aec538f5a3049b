"""The programs of the mini AudioGen: codec, language model, and the figures of AudioGenX."""

import math

import numpy as np
import pytest
import torch

from services.models.architectures import load_generator
from services.models.audiogen.explainer import AudioGenExplainer
from services.models.audiogen.pattern import delayed
from services.models.audiogen.pipeline import AudioGenPipeline
from services.models.mini import mini_folder
from tests.tiny import tiny_audiogen
from training.mini.audiogen import TokenModel, tokens_of
from training.mini.codec import fit_quantiser
from training.mini.evaluate_audiogenx import (
    Judge,
    examine,
    kl_divergence,
    label_distribution,
    shuffled,
    summary,
)
from training.mini.latents import LatentSet


@pytest.fixture(scope="module")
def shipped() -> AudioGenPipeline:
    pipeline = load_generator(mini_folder("audiogen"))
    assert isinstance(pipeline, AudioGenPipeline)
    return pipeline


def test_codebooks_are_fitted_to_what_is_left_over() -> None:
    codec = tiny_audiogen(codes=8).codec
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(8, 64, generator=generator)
    frames = centres[torch.randint(8, (256,), generator=generator)]
    assert fit_quantiser(codec, frames + 0.01 * torch.randn(256, 64, generator=generator)) < 1e-3
    latents = frames[:12].reshape(3, 4, 4, 16).permute(0, 2, 1, 3)
    codes = tokens_of(LatentSet(latents_BCTF=latents.half(), truths=[]), codec).long()
    assert codes.shape == (3, 4, 4)
    assert torch.allclose(codec.dequantise(codes), latents, atol=0.05)


def test_the_loss_is_the_cross_entropy_of_codes_and_of_no_corner() -> None:
    torch.manual_seed(0)
    model = TokenModel(8, 16, 4)
    sequence = delayed(torch.randint(16, (3, 4, 6)), 16)
    loss, by_codebook = model.loss(sequence, torch.randn(3, 5, 8))
    assert by_codebook.keys() == {f"codebook_{k}" for k in range(4)}
    assert all(value == pytest.approx(math.log(16), rel=0.1) for value in by_codebook.values())
    weights = (0.55, 0.2, 0.15, 0.1)
    total = sum(weight * value for weight, value in zip(weights, by_codebook.values(), strict=True))
    assert loss.item() == pytest.approx(total, rel=1e-5)


def test_kl_is_upstreams_formula_of_shares() -> None:
    silent, loud = torch.full((10, 3), -20.0), torch.tensor([[20.0, -20.0, -20.0]]).expand(10, 3)
    assert torch.allclose(label_distribution(silent), torch.tensor([0.0, 0.0, 0.0, 1.0]), atol=1e-6)
    p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.75])
    wanted = 0.25 * math.log(0.25 / 0.500001) + 0.75 * math.log(0.75 / 0.500001)
    assert kl_divergence(p, q) == pytest.approx(wanted, rel=1e-5)
    halves = label_distribution(torch.cat([silent, loud]))
    assert kl_divergence(halves, halves) == pytest.approx(0.0, abs=1e-5)
    assert kl_divergence(label_distribution(silent), label_distribution(loud)) > 10


def test_a_random_mask_has_the_same_entries() -> None:
    mask = torch.rand(5, 7)
    other = shuffled(mask, 3)
    assert not torch.equal(mask, other)
    assert torch.equal(mask.flatten().sort().values, other.flatten().sort().values)


def test_one_clip_is_examined(shipped: AudioGenPipeline) -> None:
    row = examine(AudioGenExplainer(shipped), Judge(), "a dog barks", 0, history=True, iterations=2)
    assert 0 < row["size"] < 1 and row["factual_cosine"] > row["counterfactual_cosine"]
    assert 0 < row["mass_inside"] <= 1
    figures = summary([dict(row), dict(row)])
    difference = row["learned_kl_factual"] - row["random_kl_factual"]
    assert figures["difference_kl_factual"]["value"] == pytest.approx(difference)
    assert np.isfinite(figures["learned_fid_f"]["value"])
