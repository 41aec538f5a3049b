"""The power of gates, by simulation."""

import math

import numpy as np
import pytest
from scipy.stats import norm

from services.cli import run
from services.errors import InvalidInputError
from training.evaluation.bootstrap import PromptSums, bootstrap_difference
from training.promotion.gates.gates import DEFAULT_GATES, Gate, read_gates
from training.promotion.gates.power import (
    Array,
    Assumptions,
    Cells,
    draw_rates,
    power_lines,
    read_deviations,
    simulate_means,
    simulate_rates,
)


def by_bootstrap(first: PromptSums, second: PromptSums, quantile: float) -> tuple[Array, Array]:
    """The ends of the percentile bootstrap, which gates of rates were decided by before."""
    found = [
        bootstrap_difference(
            PromptSums(sums_P=one, counts_P=first.counts_P[0]),
            PromptSums(sums_P=other, counts_P=second.counts_P[0]),
            quantile,
        )
        for one, other in zip(first.sums_P, second.sums_P, strict=True)
    ]
    return np.array([one.low for one in found]), np.array([one.high for one in found])


@pytest.mark.parametrize(("rate", "difference", "expected"), [(1.0, -0.01, 0.45), (0.95, 0.0, 0.07)])
def test_the_former_default_gate(rate: float, difference: float, expected: float) -> None:
    """`present_and_in_order` at least the champion's, on 80 prompts: a worse challenger passed six times as
    often as an equal one, since a bootstrap of values that are all alike has no width."""
    found = simulate_rates(
        (0.0, math.inf),
        Cells.of(rate, difference),
        prompts=80,
        seeds=1,
        looks=1,
        trials=400,
        ends=by_bootstrap,
    )
    assert found.passes == pytest.approx(expected, abs=3 * (expected * (1 - expected) / 400) ** 0.5)


@pytest.mark.parametrize("rate", [0.9, 0.95, 0.98, 1.0])
@pytest.mark.parametrize("metric", ["present_and_in_order", "presence", "round_trip_present_and_in_order"])
def test_the_default_gates_pass_equals_and_refuse_a_loss_of_the_margin(rate: float, metric: str) -> None:
    config = read_gates(DEFAULT_GATES)
    (gate,) = (gate for gate in config.gates if gate.metric == metric)
    assert gate.margin is not None

    def passes(difference: float) -> float:
        found = simulate_rates(
            gate.limits,
            Cells.of(rate, difference),
            prompts=config.evaluation.world.count,
            seeds=config.evaluation.seeds,
            looks=config.looks,
            trials=1_000,
        )
        return found.passes

    assert passes(0.0) >= 0.8
    assert passes(-gate.margin) <= 0.04  # 0.025, and three standard errors of a simulation
    assert passes(-1.5 * gate.margin) <= 0.01


@pytest.mark.parametrize("looks", [1, 2, 5])
@pytest.mark.parametrize(
    ("rate", "discordant", "seeds", "dependence"),
    [
        (0.85, None, 1, 0.0),
        (0.97, None, 1, 0.0),
        (0.9, 0.02, 1, 0.0),
        (0.9, None, 4, 0.0),
        (0.9, None, 4, 0.8),
    ],
)
def test_looks_and_stopping_hold_the_error(
    looks: int, rate: float, discordant: float | None, seeds: int, dependence: float
) -> None:
    """At a true loss of exactly the margin: with few prompts, clips that depend on each other, and models
    that hardly differ otherwise."""
    found = simulate_rates(
        (-0.06, math.inf),
        Cells.of(rate, -0.06, discordant),
        prompts=200,
        seeds=seeds,
        looks=looks,
        trials=2_000,
        dependence=dependence,
    )
    assert found.passes <= 0.04


def test_looking_without_correction_would_not_hold_it() -> None:
    found = simulate_rates(
        (-0.06, math.inf),
        Cells.of(0.85, -0.06),
        prompts=1_000,
        seeds=1,
        looks=5,
        trials=2_000,
        ends=lambda first, second, _: by_normal(first, second),
    )
    assert found.passes > 0.05


def by_normal(first: PromptSums, second: PromptSums) -> tuple[Array, Array]:
    differences_TP = second.sums_P - first.sums_P
    half = 1.96 * differences_TP.std(axis=1) / differences_TP.shape[1] ** 0.5
    return differences_TP.mean(axis=1) - half, differences_TP.mean(axis=1) + half


def test_stopping_early_saves_prompts_where_the_case_is_clear() -> None:
    def prompts(difference: float) -> float:
        cells = Cells.of(0.9, difference)
        return simulate_rates((-0.05, math.inf), cells, prompts=640, seeds=1, looks=4, trials=500).prompts

    assert prompts(0.05) < 300  # clearly better
    assert prompts(-0.2) < 250  # clearly worse
    assert prompts(-0.05) > 600  # the hardest case


def test_drawn_clips_have_the_assumed_rates_and_dependence() -> None:
    first, second = draw_rates(Cells.of(0.9, -0.1, 0.06), prompts=500, seeds=2, trials=100, dependence=0.7)
    rates = [side.sums_P.sum() / side.counts_P.sum() for side in (first, second)]
    assert rates == pytest.approx([0.9, 0.8], abs=0.005)
    alike = np.mean((second.sums_P == 0) | (second.sums_P == 2))
    assert alike == pytest.approx(0.7 + 0.3 * (0.8**2 + 0.2**2), abs=0.01)


@pytest.mark.parametrize(
    ("rate", "difference", "discordant", "champion", "challenger"),
    [
        (0.9, 0.0, None, 0.09, 0.09),
        (0.9, 0.0, 0.04, 0.02, 0.02),
        (0.9, -0.1, 0.04, 0.12, 0.02),
        (1.0, 0.0, 0.04, 0.0, 0.0),
        (1.0, -0.01, None, 0.01, 0.0),
        (0.9, 0.2, 0.04, 0.0, 0.1),
    ],
)
def test_the_cells_of_two_models(
    rate: float, difference: float, discordant: float | None, champion: float, challenger: float
) -> None:
    cells = Cells.of(rate, difference, discordant)
    assert (cells.champion, cells.challenger) == pytest.approx((champion, challenger))
    assert cells.both + cells.champion == pytest.approx(rate)


def test_the_power_of_a_mean_is_that_of_a_normal_test() -> None:
    found = simulate_means((-0.5, math.inf), 0.0, 3.0, prompts=200, looks=1, trials=4_000)
    assert found.passes == pytest.approx(norm.sf(1.96 - 0.5 / (3 / 200**0.5)), abs=0.025)
    lower_is_better = simulate_means((-math.inf, 0.5), 0.5, 3.0, prompts=200, looks=3, trials=4_000)
    assert lower_is_better.passes <= 0.035


def test_the_lines_name_assumptions_prompts_and_what_is_missing() -> None:
    config = read_gates(DEFAULT_GATES)
    lines = power_lines(config, Assumptions(rate=0.95, trials=200, deviations={"reward": 2.0}))
    text = "\n".join(lines)
    assert "640 prompts × 1 seed, looks at 160, 320, 480, 640 prompts; 200 simulated promotions" in text
    assert "two equally good models err independently" in text
    assert "present_and_in_order: margin 0.05, 640 prompts" in lines
    assert "clap.clap-b: margin 0.03, 640 prompts: give --deviation clap.clap-b=SD" in lines
    assert any(line.startswith("order_given_presence: margin 0.1, ") for line in lines)
    row = lines[lines.index("present_and_in_order: margin 0.05, 640 prompts") + 2]
    assert row.split()[:3] == ["0.95", "100%", "of"]


def test_deviations_are_checked() -> None:
    config = read_gates(DEFAULT_GATES)
    assert read_deviations(["reward=2", "clap.clap-b=.1"], config) == {"reward": 2.0, "clap.clap-b": 0.1}
    with pytest.raises(
        InvalidInputError, match=r"names 'presence'; the figures that are no rates: clap.clap-b"
    ):
        read_deviations(["presence=2"], config)
    with pytest.raises(InvalidInputError, match=r"is 'reward=-1', must be reward=SD, a number above 0"):
        read_deviations(["reward=-1"], config)


def test_the_command_prints_gates_and_power(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["promote", "gates"]) == 0
    printed = capsys.readouterr().out
    assert "present_and_in_order: margin 0.05, 640 prompts" in printed
    words = ["promote", "gates", "--power", "--rate", "0.95", "--discordant", "0.04", "--trials", "100"]
    assert run(words) == 0
    assert "differ on 0.04 of the clips" in capsys.readouterr().out
    assert run(["promote", "gates", "--power", "--deviation", "x=1"]) == 2
    assert "--deviation: names 'x'" in capsys.readouterr().err


def test_a_loss_is_positive_where_lower_is_better() -> None:
    assert Gate(metric="silent", margin=0.01).limits == (-math.inf, 0.01)
    assert Gate(metric="presence", margin=0.01).limits == (-0.01, math.inf)
    assert Gate(metric="latency", maximum_ratio=2.0).limits == (-math.inf, math.log(2.0))
