"""The gate that people decide: how often they prefer the challenger to the champion, in blind pairs.

    [[gate]]
    metric = "human_preference"
    margin = 0.1          # may lose by less than this: the win rate is certain to be above .4
    prompts = 200         # that must be rated: fix the number before the test

Ratings are those of listening tests (`milonga ratings plan`) of exactly these two versions, by their digests.
The interval is Wilson's over the prompts (`services.ratings.store.win_rate`), less a half. There is one look:
whoever asks again and again, as ratings come in, passes a worse challenger more often than 2.5 %.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from scipy.stats import binom

from services.api.model import ModelVersion
from services.errors import invalid
from services.ratings.agreement import wilson_interval
from training.objectives.statistics import Interval
from training.promotion.gates.gates import HUMAN_PREFERENCE, Gate, Verdict

LARGEST: Final = 100_000
"""Number of prompts up to which the missing ones are counted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RatingsSource:
    """The database of ratings, and whose ratings count."""

    url: str
    """``sqlite:///FILE`` or ``postgresql://USER@HOST/NAME``."""
    min_known: float = 0.0
    """Share of the known pairs that a rater must answer right."""


def decide_by_people(
    gates: Sequence[Gate], source: RatingsSource | None, champion: ModelVersion, challenger: ModelVersion
) -> tuple[list[Verdict], dict[str, Any]]:
    """Return the verdicts of gates of people's ratings, and the evidence as JSON values.

    Raises:
        InvalidInputError: there are such gates, and no database is named.
        ServiceUnavailableError: the database can't be reached.
    """
    check_source(gates, source)
    if not gates or source is None:
        return [], {}
    from services.ratings.export import reliable
    from services.ratings.store import RatingStore, win_rate

    store = RatingStore(source.url, "--ratings", create=False)
    try:
        studies = store.comparisons(champion.digest, challenger.digest)
        # Reliability is measured on all that a rater has rated.
        rated = [one for one in reliable(store.ratings(), source.min_known) if one.study in studies]
    finally:
        store.close()
    sides = [
        win_rate((one for one in rated if studies[one.study] == swapped), "a" if swapped else "b")
        for swapped in (False, True)
    ]
    wins, prompts = sum(side.wins for side in sides), sum(side.prompts for side in sides)
    evidence = {
        "studies": sorted(studies),
        "raters": sorted({one.rater for one in rated}),
        "ratings": len(rated),
        "prompts": prompts,
        "decided": sum(side.decided for side in sides),
        "wins": wins,
        "min_known": source.min_known,
    }
    return [decide_win_rate(gate, wins, prompts, studies=len(studies)) for gate in gates], evidence


def check_source(gates: Sequence[Gate], source: RatingsSource | None) -> None:
    """Raise `InvalidInputError` if there are gates of people's ratings, and no database is named."""
    if gates and source is None:
        raise invalid(
            "--ratings",
            f"is missing; the gate {HUMAN_PREFERENCE} needs the database of ratings (MILONGA_RATINGS)",
        )


def decide_win_rate(gate: Gate, wins: float, prompts: int, *, studies: int = 1) -> Verdict:
    """Return the verdict on a challenger that wins on `wins` of `prompts` rated prompts."""
    assert gate.prompts is not None
    difference, missing = None, max(0, gate.prompts - prompts)
    if prompts:
        low, high = wilson_interval(wins, prompts)
        difference = Interval(value=wins / prompts - 0.5, low=low - 0.5, high=high - 0.5, count=prompts)
    passed = not missing and difference is not None and above(gate, difference.low)
    note = ""
    if not studies:
        note = "no listening test compares these two versions; plan one with milonga ratings plan"
    elif missing:
        note = f"{prompts} of {gate.prompts} prompts are rated: {missing} are missing"
    elif not passed and difference is not None:
        needed = prompts_needed(gate, difference.value)
        note = f"refused on {prompts} prompts"
        if needed is not None:
            more = needed - prompts
            note = (
                f"undecided on {prompts} prompts: with this win rate {more} more would pass; plan a new test"
            )
    return Verdict(
        gate=gate,
        champion=None,
        challenger=None,
        difference=difference,
        passed=passed,
        hopeless=not passed,
        note=note,
    )


def above(gate: Gate, low: float) -> bool:
    """Return whether the lower end of win rate less a half is above the gate's bound."""
    name, _ = gate.bound
    bound = gate.limits[0]
    return low > bound if name == "margin" else low >= bound


def prompts_needed(gate: Gate, difference: float) -> int | None:
    """Return the prompts with which a win rate less a half passes; None if none do up to `LARGEST`."""
    share = difference + 0.5

    def passes(prompts: int) -> bool:
        return above(gate, wilson_interval(share * prompts, prompts)[0] - 0.5)

    if not passes(LARGEST):
        return None
    low, high = 1, LARGEST
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if passes(middle) else (middle + 1, high)
    return low


def chance(gate: Gate, difference: float) -> float:
    """Return the chance to pass by the true win rate less a half, if every prompt has a winner. Exact."""
    assert gate.prompts is not None
    passing = [
        wins for wins in range(gate.prompts + 1) if above(gate, wilson_interval(wins, gate.prompts)[0] - 0.5)
    ]
    if not passing:
        return 0.0
    return float(binom.sf(passing[0] - 1, gate.prompts, min(1.0, max(0.0, difference + 0.5))))


def power_rows(gate: Gate, steps: Sequence[float]) -> list[list[str]]:
    """Return the table of chances to pass: a column per true difference, in units of the bound."""
    bound = gate.limits[0]
    differences = [step * (abs(bound) or 0.02) for step in steps]
    possible = [one for one in differences if math.fabs(one) <= 0.5]
    return [
        ["win rate", *(f"{0.5 + one:.3g}" for one in possible)],
        ["passes", *(f"{chance(gate, one):.0%}" for one in possible)],
    ]


def ledger_row(evidence: Mapping[str, Any], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Return the evidence of a promotion that people's ratings refuse."""
    return {
        "gates": [verdict.row() for verdict in verdicts],
        "passed": all(verdict.passed for verdict in verdicts),
        "ratings": dict(evidence),
    }
