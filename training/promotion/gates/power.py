"""The power of a file of gates: the chance that each gate passes, by the true difference of two models.

    milonga promote gates --gates gates.toml --power

Promotions are simulated with the gates' own looks and intervals; only the clips' figures are drawn. For a
rate each clip is right or wrong for champion and challenger, and discordant if they differ. The figures of
other means are normal, with a standard deviation that must be given.

Shape legend: T simulated promotions, P prompts, C clips of a prompt.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

import numpy as np
from numpy.typing import NDArray

from services.api.reading import compare
from services.errors import invalid
from services.models.mini.tagger import Detection
from training.evaluation.bootstrap import PromptSums, rate_difference_ends
from training.evaluation.events import EVENT_METRICS, compare_events, event_metrics
from training.evaluation.prompts import SPLITS, Prompt
from training.evaluation.round_trip import ROUND_TRIP_METRICS, round_trip_metrics
from training.evaluation.sources import PlannedClip, make_plan
from training.promotion.gates.gates import HUMAN_PREFERENCE, Gate, GatesConfig
from training.promotion.gates.human import power_rows
from training.promotion.gates.looks import critical_values
from training.soundworld.reading import truth_reading

Array = NDArray[np.float64]
Ends = Callable[[PromptSums, PromptSums, float], tuple[Array, Array]]
"""Function of two models' figures and a critical value to the ends of their difference's interval, [T]."""

RATES: Final = (*EVENT_METRICS, *ROUND_TRIP_METRICS, "silent", "clipped", "overshoot")
"""Figures that are rates of clips."""
CHAMPIONS: Final = (0.9, 0.95, 0.98, 1.0)
"""The champion's rates that are tabulated unless one is given."""
STEPS: Final = (1.0, 0.0, -0.5, -1.0, -1.5, -2.0)
"""True differences that are tabulated, in margins; negative for a worse challenger."""
SUPERIORITY_STEPS: Final = (3.0, 2.0, 1.5, 1.0, 0.5, 0.0)
"""The same, in units of a bound that asks for an improvement."""
_SEED: Final = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Assumptions:
    """What the simulation takes for granted, beyond the gates and the number of prompts and seeds."""

    rate: float | None = None
    """The champion's rate; None: each of `CHAMPIONS`."""
    discordant: float | None = None
    """Share of clips that one of two equally good models gets right and the other wrong; None: as if they
    erred independently, 2 rate (1 - rate). Models trained from one another differ less."""
    dependence: float = 0.5
    """Share of prompts whose clips all have the same result; matters with several seeds only."""
    deviations: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    """Standard deviation of challenger - champion over prompts, by figure that is no rate."""
    trials: int = 2_000
    """Simulated promotions for each chance: its standard error is below 0.011."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chance:
    """The result of simulated promotions."""

    passes: float
    """Share in which the gate passed."""
    prompts: float
    """Prompts of the file that were evaluated, on average, if this gate decided alone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cells:
    """The four results of a clip for champion and challenger, as probabilities."""

    both: float
    champion: float
    """Only the champion is right."""
    challenger: float
    """Only the challenger is right."""

    @classmethod
    def of(cls, rate: float, difference: float, discordant: float | None = None) -> "Cells":
        """Return the results for a champion's rate and the true difference, which is cut to what is possible.

        `discordant` is as in `Assumptions`.
        """
        other = min(1.0, max(0.0, rate + difference))
        if discordant is None:
            return cls(both=rate * other, champion=rate * (1 - other), challenger=other * (1 - rate))
        # Half of it on each side, as far as the rates allow.
        shared = min(discordant / 2, rate, other, 1 - rate, 1 - other)
        champion, challenger = shared + max(0.0, rate - other), shared + max(0.0, other - rate)
        return cls(both=rate - champion, champion=champion, challenger=challenger)


def draw_rates(
    cells: Cells, *, prompts: int, seeds: int, trials: int, dependence: float = 0.5
) -> tuple[PromptSums, PromptSums]:
    """Draw the results of champion and challenger, [T, P]: sums over the clips of each prompt."""
    rng = np.random.default_rng(_SEED)
    sums = [np.zeros((trials, prompts)) for _ in range(2)]
    common_TP = rng.random((trials, prompts))
    alike_TP = rng.random((trials, prompts)) < dependence
    edges = np.cumsum([cells.both, cells.champion, cells.challenger])
    for clip in range(seeds):
        place_TP = common_TP if clip == 0 else np.where(alike_TP, common_TP, rng.random((trials, prompts)))
        sums[0] += place_TP < edges[1]
        sums[1] += (place_TP < edges[0]) | ((place_TP >= edges[1]) & (place_TP < edges[2]))
    counts = np.full((trials, prompts), seeds)
    first, second = (PromptSums(sums_P=side, counts_P=counts) for side in sums)
    return first, second


def simulate_rates(
    limits: tuple[float, float],
    cells: Cells,
    *,
    prompts: int,
    seeds: int,
    looks: int,
    trials: int,
    dependence: float = 0.5,
    ends: Ends = rate_difference_ends,
) -> Chance:
    """Return the chance of a gate of a rate.

    Args:
        limits: lower and upper bound of the difference, as `Gate.limits`.
        cells: the true results of a clip.
        prompts: prompts that the figure is defined for, at the last look.
        seeds: clips per prompt.
        looks: as `GatesConfig.looks`.
        trials: simulated promotions.
        dependence: as in `Assumptions`.
        ends: the interval of the difference.
    """
    first, second = draw_rates(cells, prompts=prompts, seeds=seeds, trials=trials, dependence=dependence)
    at_looks = []
    for number, quantile in enumerate(critical_values(looks), 1):
        end = math.ceil(prompts * number / looks)
        one, other = (
            PromptSums(sums_P=side.sums_P[:, :end], counts_P=side.counts_P[:, :end])
            for side in (first, second)
        )
        at_looks.append(ends(one, other, quantile))
    return _chance(limits, at_looks, prompts)


def simulate_means(
    limits: tuple[float, float], difference: float, deviation: float, *, prompts: int, looks: int, trials: int
) -> Chance:
    """Return the chance of a gate of another mean, whose difference has a standard deviation over prompts."""
    drawn_TP = np.random.default_rng(_SEED).normal(difference, deviation, (trials, prompts))
    at_looks = []
    for number, quantile in enumerate(critical_values(looks), 1):
        part_TP = drawn_TP[:, : math.ceil(prompts * number / looks)]
        half = quantile * part_TP.std(axis=1, ddof=1) / part_TP.shape[1] ** 0.5
        at_looks.append((part_TP.mean(axis=1) - half, part_TP.mean(axis=1) + half))
    return _chance(limits, at_looks, prompts)


def _chance(limits: tuple[float, float], at_looks: Sequence[tuple[Array, Array]], prompts: int) -> Chance:
    """Return the result of trials that stop at the look at which the gate is decided."""
    low, high = limits
    trials, looks = len(at_looks[0][0]), len(at_looks)
    passed_T, stopped_T, seen_T = np.zeros(trials, bool), np.zeros(trials, bool), np.zeros(trials)
    for number, (low_T, high_T) in enumerate(at_looks, 1):
        seen_T[~stopped_T] = math.ceil(prompts * number / looks)
        passes_T = (low_T >= low) & (high_T <= high)
        passed_T |= passes_T & ~stopped_T
        stopped_T |= passes_T | (high_T < low) | (low_T > high)
    return Chance(passes=float(passed_T.mean()), prompts=float(seen_T.mean()))


def defined_for(figure: str, prompt: Prompt) -> bool:
    """Return whether a figure is defined for a perfect clip of a prompt: order only for sequences.

    Figures of the round trip are counted as defined if the prompt's events are not known.
    """
    if figure in ROUND_TRIP_METRICS and prompt.truth is not None:
        reading = truth_reading(prompt.truth)
        return not math.isnan(round_trip_metrics(compare(reading, reading))[figure])
    if figure not in EVENT_METRICS:
        return True
    if prompt.truth is None:
        return False
    perfect = {
        name: Detection(onset=n, offset=n + 1.0, centre=n + 0.5, seconds=math.inf)
        for n, name in enumerate(prompt.truth.classes)
    }
    return not math.isnan(event_metrics(compare_events(prompt.truth, perfect))[figure])


def prompts_of(gate: Gate, plan: Sequence[PlannedClip]) -> int:
    """Return the number of prompts that a gate compares; that people must rate, if they decide."""
    if gate.prompts is not None:
        return gate.prompts
    prompts = {planned.prompt.text: planned.prompt for planned in plan}.values()
    return sum(SPLITS[gate.split](prompt) and defined_for(gate.figure, prompt) for prompt in prompts)


def read_deviations(texts: Sequence[str], config: GatesConfig) -> dict[str, float]:
    """Return the standard deviations of ``FIGURE=SD``. Raises `InvalidInputError` for unknown figures."""
    figures = [gate.figure for gate in config.clip_gates if gate.figure not in RATES]
    found = {}
    for text in texts:
        name, _, number = text.partition("=")
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if name not in figures:
            raise invalid(
                "--deviation", f"names {name!r}; the figures that are no rates: {', '.join(figures)}"
            )
        if not (math.isfinite(value) and value > 0):
            raise invalid("--deviation", f"is {text!r}, must be {name}=SD, a number above 0")
        found[name] = value
    return found


def gate_lines(config: GatesConfig) -> list[str]:
    """Return the looks and the gates of a file as lines of text."""
    plan = make_plan(config.evaluation, [])
    return [
        f"{_looks_line(config, plan)}.",
        *(f"{_title(gate, plan)} of the split {gate.split}" for gate in config.gates),
    ]


def _looks_line(config: GatesConfig, plan: Sequence[PlannedClip]) -> str:
    seeds, looks, budget = config.evaluation.seeds, config.looks, _budget(plan)
    at = ", ".join(str(math.ceil(budget * number / looks)) for number in range(1, looks + 1))
    shown = f"looks at {at} prompts" if looks > 1 else "one look"
    return f"{budget} prompts × {seeds} seed{'s' * (seeds > 1)}, {shown}"


def _budget(plan: Sequence[PlannedClip]) -> int:
    return len({planned.prompt.text for planned in plan})


def _title(gate: Gate, plan: Sequence[PlannedClip]) -> str:
    name, limit = gate.bound
    return f"{gate.figure}: {name} {limit:g}, {prompts_of(gate, plan)} prompts"


def power_lines(config: GatesConfig, assumptions: Assumptions) -> list[str]:
    """Return the power of each gate as lines of text: a table by champion and true difference."""
    plan = make_plan(config.evaluation, [])
    equal = (
        "err independently"
        if assumptions.discordant is None
        else f"differ on {assumptions.discordant:g} of the clips, or as far as their rates allow"
    )
    alike = f"; on {assumptions.dependence:g} of the prompts the clips of all seeds are alike"
    lines = [
        f"{_looks_line(config, plan)}; {assumptions.trials:,} simulated promotions per chance.",
        f"Assumed: two equally good models {equal}{alike if config.evaluation.seeds > 1 else ''}.",
        "A column is a true difference, challenger − champion: the chance to pass, of how many prompts that "
        "are evaluated on average.",
    ]
    for gate in config.gates:
        lines += ["", *_gate_lines(gate, plan, config, assumptions)]
    return lines


def _gate_lines(
    gate: Gate, plan: Sequence[PlannedClip], config: GatesConfig, assumptions: Assumptions
) -> list[str]:
    prompts, title = prompts_of(gate, plan), _title(gate, plan)
    title += "" if gate.split == "all" else f" of the split {gate.split}"
    deviation = assumptions.deviations.get(gate.figure)
    if gate.bound[0] in ("minimum", "maximum"):
        return [f"{title}: a bound of the challenger's own figure, no comparison"]
    if gate.figure not in (*RATES, HUMAN_PREFERENCE) and deviation is None:
        return [f"{title}: give --deviation {gate.figure}=SD"]
    bound = next(bound for bound in gate.limits if math.isfinite(bound))
    if gate.metric == HUMAN_PREFERENCE:
        rows = power_rows(gate, SUPERIORITY_STEPS if bound > 0 else STEPS)
        return [f"{title}; by people, one look, every prompt with a winner", *_table(rows)]
    # Of a figure of which lower is better, a loss is a positive difference.
    sign = 1.0 if math.isfinite(gate.limits[0]) else -1.0
    steps = SUPERIORITY_STEPS if sign * bound > 0 else STEPS
    differences = [sign * step * (abs(bound) or 0.02) for step in steps]
    rows = [["champion", *(f"{difference + 0.0:+.3g}" for difference in differences)]]
    looks, trials, factor = config.looks, assumptions.trials, _budget(plan) / max(1, prompts)

    def chance(rate: float, difference: float) -> Chance | None:
        if not 0 <= rate + difference <= 1 + 1e-9:
            return None
        return simulate_rates(
            gate.limits,
            Cells.of(rate, difference, assumptions.discordant),
            prompts=prompts,
            seeds=config.evaluation.seeds,
            looks=looks,
            trials=trials,
            dependence=assumptions.dependence,
        )

    if deviation is None:
        rates = CHAMPIONS if assumptions.rate is None else (assumptions.rate,)
        rows += [
            [f"{rate:.2f}", *(_shown(chance(rate, one), factor) for one in differences)]
            for rate in (rates if sign > 0 else [1 - rate for rate in rates])
        ]
    else:
        found = [
            simulate_means(gate.limits, one, deviation, prompts=prompts, looks=looks, trials=trials)
            for one in differences
        ]
        rows.append([f"SD {deviation:g}", *(_shown(one, factor) for one in found)])
    return [title, *_table(rows)]


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  " + "  ".join(map(str.rjust, row, widths)) for row in rows]


def _shown(chance: Chance | None, factor: float) -> str:
    """Return a chance in percent with the prompts of the file; a dash for what is impossible."""
    return "–" if chance is None else f"{chance.passes:.0%} of {chance.prompts * factor:.0f}"
