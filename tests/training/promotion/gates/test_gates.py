"""Files of gates, and the verdicts of gates."""

import json
import math
from pathlib import Path

import pytest

from services.errors import InvalidInputError
from training.objectives.statistics import Interval
from training.promotion.gates.gates import DEFAULT_GATES, Gate, decide, read_gates


def interval(value: float, low: float, high: float) -> Interval:
    return Interval(value=value, low=low, high=high, count=9)


BETTER, WORSE = interval(0.1, 0.02, 0.2), interval(0.1, -0.02, 0.2)


@pytest.mark.parametrize(
    ("gate", "difference", "own", "passed"),
    [
        (Gate(metric="presence", minimum_difference=0.0), BETTER, None, True),
        (Gate(metric="presence", minimum_difference=0.0), interval(0.0, 0.0, 0.0), None, True),
        (Gate(metric="presence", minimum_difference=0.0), WORSE, None, False),
        (Gate(metric="presence", minimum_difference=-0.05), WORSE, None, True),
        (
            Gate(metric="presence", minimum_difference=0.0),
            interval(math.nan, math.nan, math.nan),
            None,
            False,
        ),
        (Gate(metric="presence", minimum_difference=0.0), None, None, False),
        (Gate(metric="presence", margin=0.05), WORSE, None, True),
        (Gate(metric="presence", margin=0.02), WORSE, None, False),  # exactly the margin
        (Gate(metric="silent", margin=0.1), BETTER, None, False),  # of which lower is better
        (Gate(metric="silent", margin=0.3), BETTER, None, True),
        (Gate(metric="presence", margin=0.05), None, None, False),
        (Gate(metric="kad", scorer="clap-b", maximum_difference=0.2), BETTER, None, True),
        (Gate(metric="kad", scorer="clap-b", maximum_difference=0.1), BETTER, None, False),
        (Gate(metric="silent", maximum=0.02), None, interval(0.02, 0.0, 0.2), True),
        (Gate(metric="silent", maximum=0.02), None, interval(0.03, 0.0, 0.2), False),
        (Gate(metric="presence", minimum=0.9), None, interval(0.95, 0.8, 1.0), True),
        (Gate(metric="presence", minimum=0.9), None, None, False),
        (Gate(metric="latency", maximum_ratio=1.5), interval(0.2, 0.1, math.log(1.49)), None, True),
        (Gate(metric="latency", maximum_ratio=1.5), interval(0.2, 0.1, math.log(1.51)), None, False),
    ],
)
def test_a_bound_holds_or_not(
    gate: Gate, difference: Interval | None, own: Interval | None, passed: bool
) -> None:
    differences = {"all": {gate.figure: difference} if difference else {}}
    challenger = {"all": {gate.figure: own} if own else {}}
    (verdict,) = decide([gate], {"all": {}}, challenger, differences)
    assert verdict.passed is passed
    json.dumps(verdict.row(), allow_nan=False)
    assert gate.figure in str(verdict)


@pytest.mark.parametrize(
    ("gate", "hopeless"),
    [
        (Gate(metric="presence", margin=0.05), True),
        (Gate(metric="presence", margin=0.15), False),
        (Gate(metric="presence", minimum_difference=-0.05), True),
        (Gate(metric="silent", margin=0.05), False),
        (Gate(metric="kad", scorer="clap-b", maximum_difference=-0.35), True),
        (Gate(metric="presence", minimum=0.9), False),
    ],
)
def test_a_gate_is_hopeless_if_the_whole_interval_is_beyond_its_bound(gate: Gate, hopeless: bool) -> None:
    difference = {"all": {gate.figure: interval(-0.2, -0.3, -0.1)}}
    (verdict,) = decide([gate], {}, {"all": {gate.figure: interval(0.5, 0.4, 0.6)}}, difference)
    assert verdict.hopeless is hopeless


def test_a_gate_measures_its_own_split() -> None:
    gate = Gate(metric="presence", split="temporal", minimum_difference=0.0)
    differences = {"all": {"presence": BETTER}, "temporal": {"presence": WORSE}}
    (verdict,) = decide([gate], {}, {}, differences)
    assert not verdict.passed
    assert str(verdict) == ("presence (temporal): difference at least +0, found +0.1000 [-0.0200, +0.2000]")


def test_the_default_gates_use_independent_scorers() -> None:
    config = read_gates(DEFAULT_GATES)
    assert {gate.figure for gate in config.gates} >= {
        *("present_and_in_order", "order_given_presence", "presence", "clap.clap-b", "reward"),
        *("silent", "clipped", "latency", "round_trip_present_and_in_order"),
    }
    assert config.independent == ("judge", "clap-b", "captioner")
    assert (config.evaluation.seeds, config.evaluation.world.split) == (1, "validation")
    assert (config.looks, config.evaluation.world.count) == (4, 640)
    assert config.text == DEFAULT_GATES.read_text()


HEAD = 'independent = ["judge"]\n[evaluation.world]\ncount = 6\n'
GOOD = '[[gate]]\nmetric = "presence"\nminimum_difference = 0\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gate = [", "can't be read"),
        (HEAD, r"has no \[\[gate\]\]"),
        (
            "colour = 1\n" + HEAD + GOOD,
            "colour: is not known; known: evaluation, gate, in_flight, independent, looks",
        ),
        (
            HEAD + GOOD + '[[gate]]\nmetric = "loudness"\nmaximum = 1\n',
            r"gate 2: has the metric 'loudness', which this evaluation lacks; known: clap.clap-a, clap",
        ),
        (HEAD + GOOD + '[[gate]]\nmetric = "clap"\nscorer = "x"\nminimum = 1\n', "has the metric 'clap.x'"),
        (HEAD + '[[gate]]\nmetric = "presence"\n', "gate 1: has no bound; give one of margin, minimum_diff"),
        (HEAD + '[[gate]]\nmetric = "presence"\nmargin = 0\n', "gate 1.margin: is 0, must be greater than 0"),
        (
            HEAD + '[[gate]]\nmetric = "loudness_db"\nmargin = 1\n',
            "gate 1: margin needs a figure with a better end, which loudness_db has not; give bounds",
        ),
        ("looks = 0\n" + HEAD + GOOD, "looks: is 0, must be greater than or equal to 1"),
        (HEAD + GOOD + "maximum = 1\n", "has minimum_difference and maximum; give one"),
        (HEAD + GOOD + 'split = "long"\n', "has the split 'long', must be one of all, temporal"),
        (
            HEAD + GOOD + "colour = 1\n",
            r"gate 1.colour: is not known; known: margin, maximum, maximum_difference, .*, metric, minimum",
        ),
        (
            HEAD + '[[gate]]\nmetric = "presence"\nminimum = "x"\n',
            "gate 1.minimum: is 'x', must be a valid number",
        ),
        (
            HEAD + '[[gate]]\nmetric = "presence"\nminimum = nan\n',
            "gate 1.minimum: is nan, must be a finite number",
        ),
        (HEAD + '[[gate]]\nmetric = "latency"\nmaximum = 2\n', "maximum_ratio is for the metric latency"),
        (
            HEAD + '[[gate]]\nmetric = "presence"\nmaximum_ratio = 2\n',
            "maximum_ratio is for the metric latency",
        ),
        (HEAD + '[[gate]]\nmetric = "reward"\nminimum = 0\n', "names no scorer of a gate; at least one"),
        ('independent = ["reward"]\n' + GOOD, "independent: has reward, must be of clap-a, clap-b, judge"),
        ("in_flight = 0\n" + HEAD + GOOD, "in_flight: is 0, must be greater than 0"),
        (HEAD + "[evaluation]\nseeds = 0\n" + GOOD, "seeds is 0, must be 1 or more"),
        (HEAD + "[evaluation]\nrecipe = 'x'\n" + GOOD, "recipe: is 'x', must be one of mini"),
        (HEAD + "[evaluation]\nseeds = '2'\n" + GOOD, "evaluation.seeds: is '2', must be a valid integer"),
        (HEAD + "[evaluation.sampling]\nduration = true\n" + GOOD, "evaluation.sampling.duration: is True"),
        (HEAD + "[evaluation.sampling]\nsteps = 2\n" + GOOD, "sampling.steps: is not known; known: duration"),
        ("evaluation = 3\n" + GOOD, "gates.toml: evaluation: is 3, must be"),
        ("text = 'x'\n" + HEAD + GOOD, "gates.toml: text: "),
        (HEAD + "[[gate]]\nminimum = 0\n", "gate 1.metric: is missing"),
        (HEAD + '[[gate]]\nmetric = "presence"\nminimum = true\n', "gate 1.minimum: is True, must be"),
        (
            HEAD + "[evaluation]\ncolour = 0\n" + GOOD,
            "evaluation.colour: is not known; known: .*caption_column",
        ),
    ],
)
def test_a_wrong_file_says_what_is_wrong(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "gates.toml"
    path.write_text(text)
    with pytest.raises(InvalidInputError, match=message):
        read_gates(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"--gates: .*gates.toml can't be read: No such file"):
        read_gates(tmp_path / "gates.toml")


def test_all_violations_are_reported_at_once(tmp_path: Path) -> None:
    path = tmp_path / "gates.toml"
    path.write_text(HEAD + '[[gate]]\nmetric = "x"\nmaximum = 1\n[[gate]]\nmetric = "y"\nmaximum = 1\n')
    with pytest.raises(InvalidInputError) as caught:
        read_gates(path)
    assert len(caught.value.violations) == 3  # no gate measures by an independent judge or scorer
    gates = '[[gate]]\nmetric = "x"\n[[gate]]\nmetric = 3\nmaximum = "y"\n'
    path.write_text('colour = 1\ntimeout = 0\n[evaluation]\nseeds = "x"\n' + gates)
    with pytest.raises(InvalidInputError) as caught:
        read_gates(path)
    assert {violation.field.removeprefix("gates.toml: ") for violation in caught.value.violations} == {
        *("colour", "timeout", "evaluation.seeds", "gate 1", "gate 2.metric", "gate 2.maximum")
    }


def test_prompts_of_a_file_are_found_next_to_it(tmp_path: Path) -> None:
    (tmp_path / "captions.csv").write_text("prompt\nA dog barks\nA siren wails then rain falls\n")
    path = tmp_path / "gates.toml"
    path.write_text(
        'independent = ["clap-b"]\n[evaluation]\nprompts = "captions.csv"\n'
        '[[gate]]\nmetric = "clap"\nscorer = "clap-b"\nsplit = "temporal"\nminimum_difference = -1\n'
    )
    assert read_gates(path).evaluation.prompts == (tmp_path / "captions.csv").resolve()
