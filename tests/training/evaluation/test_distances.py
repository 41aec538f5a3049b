"""FAD, KAD, KL and the inception score: by hand, in closed form, and against other implementations."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.linalg import sqrtm

from tests.training.evaluation import fixtures
from training.evaluation.distances import (
    KAD_SCALE,
    Gaussian,
    frechet_distance,
    gaussian_kernel,
    median_bandwidth,
    squared_mmd,
)
from training.evaluation.divergence import inception_score, kl_divergence

REFERENCES: dict[str, Any] = json.loads(Path(__file__).with_name("references.json").read_text())
"""Written by `tests.training.evaluation.references`, in an environment of its own."""


def kad(generated: fixtures.Array, reference: fixtures.Array, bandwidth: float) -> float:
    """KAD of independent sets, as kadtk computes it: no groups of dependent clips."""
    pairs = ((generated, generated), (reference, reference), (generated, reference))
    return KAD_SCALE * squared_mmd(*(gaussian_kernel(x, y, bandwidth) for x, y in pairs))


def fad(first: fixtures.Array, second: fixtures.Array) -> float:
    return frechet_distance(Gaussian.fit(first), Gaussian.fit(second))


@pytest.mark.parametrize("case", ["many clips", "equal counts"])
def test_the_frechet_distance_is_torch_fidelitys(case: str) -> None:
    assert fad(*fixtures.SETS[case]) == pytest.approx(
        REFERENCES["distances"][case]["torch-fidelity"], rel=1e-9
    )


def test_with_fewer_clips_than_dimensions_the_frechet_distance_is_still_exact() -> None:
    # torch-fidelity takes roots of the eigenvalues of a singular product: there rounding counts.
    case = "fewer clips than dimensions"
    expected = REFERENCES["distances"][case]["torch-fidelity"]
    assert fad(*fixtures.SETS[case]) == pytest.approx(expected, rel=1e-6)
    # In a larger space the covariances are singular, and the distance is what it was.
    generated, reference = fixtures.SETS["many clips"]
    turned = np.linalg.qr(np.random.RandomState(9).randn(400, 24))[0].T
    assert fad(generated @ turned, reference @ turned) == pytest.approx(fad(generated, reference), rel=1e-9)


def test_the_frechet_distance_of_known_gaussians() -> None:
    # Diagonal covariances commute: |m|² + sum (s1 - s2)².
    first = Gaussian(mean_D=np.array([1.0, 0.0]), root_KD=np.diag([2.0, 3.0]))
    second = Gaussian(mean_D=np.array([0.0, 2.0]), root_KD=np.diag([1.0, 0.0]))
    assert frechet_distance(first, second) == pytest.approx(1 + 4 + 1 + 9)
    assert frechet_distance(second, first) == pytest.approx(15)
    assert frechet_distance(first, first) == 0.0


def test_the_frechet_distance_is_scipys_matrix_root() -> None:
    generated, reference = fixtures.SETS["many clips"]
    covariances = [np.cov(x, rowvar=False) for x in (generated, reference)]
    gap = generated.mean(0) - reference.mean(0)
    root = np.real(sqrtm(covariances[0] @ covariances[1]))
    expected = gap @ gap + np.trace(covariances[0] + covariances[1] - 2 * root)
    assert fad(generated, reference) == pytest.approx(expected, rel=1e-8)


def test_equal_sets_have_no_distance_and_one_clip_has_no_covariance() -> None:
    generated, _ = fixtures.SETS["fewer clips than dimensions"]
    assert fad(generated, generated) == pytest.approx(0.0, abs=1e-9)
    assert fad(np.zeros((5, 3)), np.zeros((4, 3))) == 0.0
    with pytest.raises(ValueError, match="two clips"):
        Gaussian.fit(generated[:1])


@pytest.mark.parametrize("case", fixtures.SETS)
def test_kad_is_kadtks(case: str) -> None:
    generated, reference = fixtures.SETS[case]
    # It takes the bandwidth from its second argument, and in single precision.
    expected = REFERENCES["distances"][case]
    width = median_bandwidth(reference)
    assert kad(generated, reference, width) == pytest.approx(expected["kadtk"], rel=1e-6)
    assert kad(generated, reference, 3.0) == pytest.approx(expected["kadtk bandwidth 3"], rel=1e-7)


def test_pairs_of_one_group_are_left_out_as_in_torch_fidelity() -> None:
    generated, reference = fixtures.SETS["equal counts"]
    groups = np.arange(len(generated))
    found = squared_mmd(
        gaussian_kernel(generated, generated, 3.0),
        gaussian_kernel(reference, reference, 3.0),
        gaussian_kernel(generated, reference, 3.0),
        groups_N=groups,
        groups_M=groups,
    )
    expected = REFERENCES["distances"]["equal counts"]["torch-fidelity u-statistic 3"]
    assert found == pytest.approx(expected, rel=1e-7)


def test_clips_of_the_same_captions_bias_kad_downwards_without_groups() -> None:
    """Generated clips near their references, both from one distribution: only with groups is KAD 0."""
    random = np.random.RandomState(11)
    plain, grouped = [], []
    for _ in range(40):
        captions = random.randn(20, 4)
        sets = [captions + 0.1 * random.randn(20, 4) for _ in range(2)]
        width = median_bandwidth(sets[1])
        kernels = [gaussian_kernel(x, y, width) for x, y in ((sets[0],) * 2, (sets[1],) * 2, sets)]
        plain.append(squared_mmd(*kernels))
        numbers = np.arange(20)
        grouped.append(squared_mmd(*kernels, groups_N=numbers, groups_M=numbers))
    assert np.mean(plain) < -0.03
    assert np.mean(grouped) == pytest.approx(0.0, abs=0.003)


def test_a_clip_that_counts_twice_is_two_clips() -> None:
    generated, reference = fixtures.SETS["equal counts"]
    generated, reference = generated[:6], reference[:7]
    twice = np.vstack([generated, generated[:1]])
    groups = np.array([0, 1, 2, 3, 4, 5, 0])
    kernels = [gaussian_kernel(x, y, 2.0) for x, y in ((twice, twice), (reference,) * 2, (twice, reference))]
    expected = squared_mmd(*kernels, groups_N=groups, groups_M=np.arange(10, 17))
    kernels = [
        gaussian_kernel(x, y, 2.0) for x, y in ((generated,) * 2, (reference,) * 2, (generated, reference))
    ]
    found = squared_mmd(*kernels, counts_N=[2, 1, 1, 1, 1, 1])
    assert found == pytest.approx(expected, rel=1e-12)


def test_the_bandwidth_is_the_median_distance() -> None:
    assert median_bandwidth([[0.0], [1.0], [3.0]]) == 2.0  # of 1, 2 and 3
    with pytest.raises(ValueError, match="two clips"):
        median_bandwidth([[0.0]])


def test_kl_is_audioldm_evals() -> None:
    generated, reference = fixtures.PAIRED
    for convention in ("softmax", "sigmoid"):
        found = kl_divergence(reference, generated, convention).mean()
        assert found == pytest.approx(REFERENCES["posteriors"][f"audioldm-eval kl {convention}"], rel=1e-9)


def test_kl_by_hand() -> None:
    reference, generated = np.log([[0.5, 0.25, 0.25]]), np.log([[0.25, 0.25, 0.5]])
    assert kl_divergence(reference, generated)[0] == pytest.approx(0.25 * np.log(2), abs=1e-5)
    assert kl_divergence(reference, reference)[0] == pytest.approx(0.0, abs=1e-5)
    certain = np.array([[1e3, 0.0]])
    assert kl_divergence(certain, -certain)[0] == pytest.approx(-np.log(1e-6))  # the floor
    with pytest.raises(ValueError, match="equal shapes"):
        kl_divergence(reference, np.zeros((2, 3)))


@pytest.mark.parametrize("splits", [1, 10])
def test_the_inception_score_is_torch_fidelitys(splits: int) -> None:
    expected = REFERENCES["posteriors"][f"torch-fidelity is {splits}"]
    assert inception_score(fixtures.SCORED, splits=splits) == pytest.approx(expected, rel=1e-9)


def test_the_inception_score_lies_between_one_and_the_number_of_classes() -> None:
    assert inception_score(np.zeros((8, 5))) == pytest.approx(1.0)
    assert inception_score(np.tile(np.eye(5), (4, 1)) * 1e4) == pytest.approx(5.0)
    assert inception_score(np.tile(np.eye(5)[:1], (4, 1)) * 1e4) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="parts"):
        inception_score(np.zeros((3, 5)), splits=4)
