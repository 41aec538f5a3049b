"""The gate that people decide: Wilson's interval of the win rate, its power, and what is missing."""

from pathlib import Path

import numpy as np
import pytest

from services import cli
from services.api.model import ModelVersion
from services.errors import InvalidInputError
from services.ratings.agreement import wilson_interval
from tests.services.ratings.studies import planned_store, rate_all
from training.promotion.gates.gates import DEFAULT_GATES, Gate, read_gates
from training.promotion.gates.human import (
    RatingsSource,
    above,
    chance,
    decide_by_people,
    decide_win_rate,
    prompts_needed,
)

MARGIN = Gate(metric="human_preference", margin=0.1, prompts=200)
BETTER = Gate(metric="human_preference", minimum_difference=0.0, prompts=200)
MARGIN_TOML = "margin = 0.1\nprompts = 9"
OLD, NEW, OTHER = (
    ModelVersion(name="tango", version=str(number), digest=f"sha256:{number}", license="x")
    for number in range(3)
)


@pytest.mark.parametrize(
    ("gate", "wins", "passed"),
    # Wilson's lower end of 95 of 200 is .4067, of 93 .3970, of 114 .5007, of 113 .4957.
    [(MARGIN, 95, True), (MARGIN, 93, False), (BETTER, 115, True), (BETTER, 113, False)],
)
def test_the_lower_end_of_wilsons_interval_decides(gate: Gate, wins: float, passed: bool) -> None:
    verdict = decide_win_rate(gate, wins, 200)
    assert verdict.difference is not None
    assert verdict.difference.low == pytest.approx(wilson_interval(wins, 200)[0] - 0.5)
    assert (verdict.passed, verdict.hopeless) == (passed, not passed)


def test_too_few_prompts_are_refused_however_good_the_challenger_is() -> None:
    verdict = decide_win_rate(BETTER, 60, 60)
    assert not verdict.passed
    assert "60 of 200 prompts are rated: 140 are missing" in str(verdict)
    assert "no listening test compares" in str(decide_win_rate(BETTER, 0, 0, studies=0))


def test_an_undecided_gate_says_how_many_prompts_its_win_rate_would_need() -> None:
    verdict = decide_win_rate(BETTER, 110, 200)  # .55
    needed = prompts_needed(BETTER, 0.05)
    assert needed is not None
    assert above(BETTER, wilson_interval(0.55 * needed, needed)[0] - 0.5)
    assert not above(BETTER, wilson_interval(0.55 * (needed - 1), needed - 1)[0] - 0.5)
    assert f"{needed - 200} more would pass" in str(verdict)
    assert prompts_needed(BETTER, -0.05) is None
    assert "refused on 200 prompts" in str(decide_win_rate(BETTER, 90, 200))


def test_the_chance_to_pass_is_that_of_simulated_tests() -> None:
    drawn = np.random.default_rng(0).binomial(200, 0.6, 20_000)
    lows = np.array([wilson_interval(wins, 200)[0] for wins in range(201)])
    assert chance(BETTER, 0.1) == pytest.approx((lows[drawn] >= 0.5).mean(), abs=0.01)
    assert chance(MARGIN, -0.1) < 0.035  # a challenger that is worse by the margin
    assert chance(BETTER, 0.5) == 1


@pytest.mark.parametrize("swapped", [False, True])
def test_ratings_of_exactly_these_versions_count_whichever_side_they_are(
    tmp_path: Path, swapped: bool
) -> None:
    url = f"sqlite:///{tmp_path}/ratings.db"
    store = planned_store(url, (NEW, OLD) if swapped else (OLD, NEW))
    rate_all(store, "ann", prefers_b=not swapped)
    store.close()
    source = RatingsSource(url=url)
    gate = Gate(metric="human_preference", minimum_difference=0.1, prompts=10)
    (verdict,), evidence = decide_by_people([gate], source, OLD, NEW)
    assert verdict.passed
    assert (evidence["wins"], evidence["prompts"], evidence["raters"]) == (10, 10, ["ann"])
    (verdict,), _ = decide_by_people([gate], source, NEW, OLD)
    assert not verdict.passed
    (verdict,), evidence = decide_by_people([gate], source, OLD, OTHER)
    assert "no listening test compares" in verdict.note
    assert evidence["studies"] == []


def test_without_such_a_gate_no_database_is_asked_for() -> None:
    assert decide_by_people([], None, OLD, NEW) == ([], {})
    with pytest.raises(InvalidInputError, match="MILONGA_RATINGS"):
        decide_by_people([BETTER], None, OLD, NEW)


def _file(folder: Path, gate: str) -> Path:
    path = folder / "gates.toml"
    path.write_text(f'{DEFAULT_GATES.read_text()}\n[[gate]]\nmetric = "human_preference"\n{gate}\n')
    return path


def test_power_covers_the_gate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = _file(tmp_path, "margin = 0.1\nprompts = 200")
    assert read_gates(path).human_gates[0].prompts == 200
    assert cli.run(["promote", "gates", "--gates", str(path)]) == 0
    assert "human_preference: margin 0.1, 200 prompts" in capsys.readouterr().out
    words = ["promote", "gates", "--gates", str(path), "--power", "--trials", "100", "--rate", "0.9"]
    assert cli.run(words) == 0
    found = capsys.readouterr().out.partition("human_preference")[2]
    assert "by people" in found
    assert f"{chance(MARGIN, 0.0):.0%}" in found


@pytest.mark.parametrize(
    ("gate", "says"),
    [
        ("margin = 0.1", "prompts is for the metric human_preference, which needs it"),
        ("minimum = 0.5\nprompts = 9", "give margin or minimum_difference"),
        ('margin = 0.1\nprompts = 9\nsplit = "temporal"', "is of all prompts"),
        ("margin = 0.1\nprompts = 0", "prompts"),
        (
            'margin = 0.1\nprompts = 9\n[[gate]]\nmetric = "human_preference"\nmargin = 0.2\nprompts = 9',
            "one",
        ),
    ],
)
def test_wrong_gates_are_named(tmp_path: Path, gate: str, says: str) -> None:
    with pytest.raises(InvalidInputError, match=says):
        read_gates(_file(tmp_path, gate))
