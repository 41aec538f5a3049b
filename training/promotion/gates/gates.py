"""Gates: bounds on the figures of an evaluation, from a file, and their verdicts.

    looks = 4                          # after a quarter of the prompts, a half, …: more where undecided

    [evaluation]                       # training.evaluation.config.EvaluationConfig, by its field names
    recipe = "mini"
    seeds = 1
    world = { count = 640 }            # the budget

    [[gate]]
    metric = "present_and_in_order"
    margin = 0.05                      # the challenger may be worse by less than this: non-inferiority

Differences are paired: prompts and seeds are the same for both models. A margin or a bound of a difference
holds at 97.5 % confidence: it is compared with the end of a two-sided 95 % interval, at each look with that
of `training.promotion.gates.looks`.
"""

import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import Field, FiniteFloat
from pydantic.json_schema import SkipJsonSchema

from services.errors import FieldViolation, InvalidInputError, invalid
from training.evaluation.config import EVALUATIONS, EvaluationConfig, label_of
from training.evaluation.events import EVENT_METRICS
from training.evaluation.prompts import SPLITS
from training.evaluation.report import LOWER_IS_BETTER, UNDIRECTED, Metrics, frechet_name
from training.evaluation.round_trip import ROUND_TRIP_METRICS
from training.evaluation.sources import PlannedClip, make_plan
from training.loop.checks import LARGE
from training.loop.config import validated
from training.objectives.statistics import Interval

DEFAULT_GATES: Final = Path(__file__).with_name("mini.toml")
"""Gates of the mini family, on the sound world."""
LATENCY: Final = "latency"
"""Metric: time from request to clip, measured by the service. Its figure is the natural logarithm."""
HUMAN_PREFERENCE: Final = "human_preference"
"""Metric: share of the prompts on which people prefer the challenger to the champion, less a half. A prompt
without a winner counts half."""
CAPTIONER: Final = "captioner"
"""Name of the captioner in ``independent``."""
JUDGE: Final = "judge"
"""Name of the tagger in ``independent``."""

BOUNDS: Final = ("margin", "minimum_difference", "maximum_difference", "minimum", "maximum", "maximum_ratio")


@dataclass(frozen=True, kw_only=True, slots=True)
class Gate:
    """One bound on a figure, of exactly one of five kinds."""

    metric: str
    """A figure of `milonga train evaluate`, ``latency`` or ``human_preference``."""
    scorer: str | None = None
    """Scorer of ``clap``, or embedding space of ``fad``, ``kad``, ``kl`` and ``inception``."""
    split: str = "all"
    """Split of the prompts, one of `training.evaluation.prompts.SPLITS`."""
    margin: Annotated[FiniteFloat, Field(gt=0)] | None = None
    """Loss that is tolerated: the whole interval of challenger - champion must be better than a loss of this
    size. The figure's own direction decides what a loss is."""
    minimum_difference: FiniteFloat | None = None
    """Lower bound of challenger - champion, compared with the lower end of its interval."""
    maximum_difference: FiniteFloat | None = None
    """Upper bound of challenger - champion, compared with the upper end of its interval."""
    minimum: FiniteFloat | None = None
    """Lower bound of the challenger's figure itself, not of its interval: no test, at whichever look."""
    maximum: FiniteFloat | None = None
    """Upper bound of the challenger's figure."""
    maximum_ratio: FiniteFloat | None = None
    """Upper bound of challenger / champion, paired by clip, for ``latency``: upper end of the interval."""
    prompts: Annotated[int, Field(ge=1)] | None = None
    """For ``human_preference``: prompts that people must have rated. Fewer are refused."""

    @property
    def figure(self) -> str:
        """Name of the figure."""
        return f"{self.metric}.{self.scorer}" if self.scorer else self.metric

    @property
    def bound(self) -> tuple[str, float]:
        """Name and value of the bound."""
        return next((name, value) for name in BOUNDS if (value := getattr(self, name)) is not None)

    @property
    def limits(self) -> tuple[float, float]:
        """Lower and upper bound of challenger - champion, each infinite if there is none.

        The bounds of latency are those of the logarithm of the ratio.
        """
        name, limit = self.bound
        if name == "margin":
            lower_is_better = self.figure.startswith(LOWER_IS_BETTER)
            return (-math.inf, limit) if lower_is_better else (-limit, math.inf)
        if name == "maximum_ratio":
            return -math.inf, math.log(limit)
        low = limit if name == "minimum_difference" else -math.inf
        return low, (limit if name == "maximum_difference" else math.inf)

    def __post_init__(self) -> None:
        given = [name for name in BOUNDS if getattr(self, name) is not None]
        found = []
        if len(given) != 1:
            found.append(f"has {' and '.join(given) or 'no bound'}; give one of {', '.join(BOUNDS)}")
        if ("maximum_ratio" in given) != (self.metric == LATENCY):
            found.append(f"maximum_ratio is for the metric {LATENCY}, whose only bound it is")
        if self.margin is not None and self.figure.startswith(UNDIRECTED):
            found.append(f"margin needs a figure with a better end, which {self.metric} has not; give bounds")
        human = self.metric == HUMAN_PREFERENCE
        if human and (self.scorer or self.split != "all" or not {*given} & {"margin", "minimum_difference"}):
            found.append(
                f"{HUMAN_PREFERENCE} is of all prompts; give margin or minimum_difference, no scorer"
            )
        if human != (self.prompts is not None):
            found.append(f"prompts is for the metric {HUMAN_PREFERENCE}, which needs it")
        if self.split not in SPLITS:
            found.append(f"has the split {self.split!r}, must be one of {', '.join(SPLITS)}")
        if found:
            raise ValueError("; ".join(found))


@dataclass(frozen=True, kw_only=True, slots=True)
class GatesConfig:
    """A file of gates."""

    evaluation: EvaluationConfig
    """Prompts, seeds, generation settings, scorers and metrics."""
    gates: Annotated[tuple[Gate, ...], Field(alias="gate")] = ()
    independent: tuple[str, ...] = ()
    """Names of scorers, ``judge`` or ``captioner``, that training has never used."""
    looks: Annotated[int, Field(ge=1, le=10)] = 1
    """Times that the gates are decided, at equal shares of the prompts: the next share is evaluated only if
    the gates are undecided. The prompts of the evaluation are the budget."""
    in_flight: Annotated[int, Field(gt=0, le=4096)] = 4
    """Concurrent requests, the same for champion and challenger."""
    timeout: Annotated[FiniteFloat, Field(gt=0, le=LARGE)] = 600.0
    """Seconds per clip."""
    text: Annotated[SkipJsonSchema[str], Field(max_length=0)] = ""
    """Content of the file, for the ledger. Not a key of the file."""

    def __post_init__(self) -> None:
        if not self.gates:
            raise ValueError("has no [[gate]]; give at least one")
        if len(self.human_gates) > 1:
            raise ValueError(f"has {len(self.human_gates)} gates of {HUMAN_PREFERENCE}; give one")

    @property
    def human_gates(self) -> tuple[Gate, ...]:
        """The gate that people's ratings decide, if there is one."""
        return tuple(gate for gate in self.gates if gate.metric == HUMAN_PREFERENCE)

    @property
    def clip_gates(self) -> tuple[Gate, ...]:
        """The gates that the evaluation of clips decides."""
        return tuple(gate for gate in self.gates if gate.metric != HUMAN_PREFERENCE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """The result of a gate."""

    gate: Gate
    champion: Interval | None
    challenger: Interval | None
    difference: Interval | None
    """Challenger - champion, with the interval of its look; for latency the ratio."""
    passed: bool
    hopeless: bool = False
    """Whether the whole interval is beyond the bound: more prompts would not help."""
    note: str = ""
    """What is missing, for a reader."""

    def __str__(self) -> str:
        name, limit = self.gate.bound
        split = "" if self.gate.split == "all" else f" ({self.gate.split})"
        words = {
            "margin": f"no worse by {limit:g} or more",
            "minimum_difference": f"difference at least {limit:+g}",
            "maximum_difference": f"difference at most {limit:+g}",
            "minimum": f"at least {limit:g}",
            "maximum": f"at most {limit:g}",
            "maximum_ratio": f"ratio at most {limit:g}",
        }[name]
        seen = self.challenger if name in ("minimum", "maximum") else self.difference
        if seen is None or math.isnan(seen.value):
            found = "not measurable on these clips"
        elif name == "maximum_ratio":
            found = f"{seen.value:.2f} [{seen.low:.2f}, {seen.high:.2f}]"
        elif name in ("minimum", "maximum"):
            found = f"{seen.value:.4g}"
        else:
            found = f"{seen.value:+.4f} [{seen.low:+.4f}, {seen.high:+.4f}]"
        return f"{self.gate.figure}{split}: {words}, found {found}{self.note and f'; {self.note}'}"

    def row(self) -> dict[str, Any]:
        """Return the verdict as JSON values, for the evidence."""
        name, limit = self.gate.bound
        return {
            "metric": self.gate.figure,
            "split": self.gate.split,
            "bound": name,
            "limit": limit,
            "champion": _plain(self.champion),
            "challenger": _plain(self.challenger),
            "ratio" if name == "maximum_ratio" else "difference": _plain(self.difference),
            "passed": self.passed,
            **({"note": self.note} if self.note else {}),
        }


def read_gates(path: Path) -> GatesConfig:
    """Read a file of gates.

    Raises `InvalidInputError` with all violations: no TOML, unknown keys, values of another type, a metric
    that these settings don't compute (the known ones are listed), a split without prompts, a gate without
    exactly one bound, or no gate of an independent judge or scorer.
    """
    try:
        text = path.read_text(encoding="utf-8")
        content = tomllib.loads(text)
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise invalid("--gates", f"{path} can't be read: {reason}") from error
    table = content.get("evaluation", {})
    if isinstance(table, dict):
        content["evaluation"] = _with_recipe(path, table)
    config = replace(validated(GatesConfig, content, path.name), text=text)
    if violations := _unmeasurable(path, config):
        raise InvalidInputError(*violations)
    return config


def known_figures(config: EvaluationConfig, plan: Sequence[PlannedClip]) -> tuple[str, ...]:
    """Return the names of the figures that an evaluation of `plan` computes."""
    found = [f"clap.{scorer.partition('=')[0]}" for scorer in config.scorers]
    found += ["reward"] if config.reward else []
    found += ["silent", "clipped", "overshoot", "loudness_db", LATENCY]
    if config.judge is not None and any(planned.prompt.truth for planned in plan):
        found += EVENT_METRICS
    found += ROUND_TRIP_METRICS if config.captioner is not None else ()
    has_references = any(planned.prompt.reference for planned in plan)
    for embedder in config.embedders:
        label = label_of(embedder)
        if has_references:
            found += [frechet_name(label), f"kad.{label}"]
        if not embedder.startswith("clap:"):
            found += [f"inception.{label}", *([f"kl.{label}"] if has_references else [])]
    return tuple(found)


def decide(
    gates: Sequence[Gate],
    champion: Mapping[str, Metrics],
    challenger: Mapping[str, Metrics],
    differences: Mapping[str, Metrics],
) -> list[Verdict]:
    """Return the verdict of each gate on figures by split and name. A missing figure does not pass."""
    verdicts = []
    for gate in gates:
        old, new, difference = (
            figures.get(gate.split, {}).get(gate.figure) for figures in (champion, challenger, differences)
        )
        low, high = gate.limits
        passed = _passes(gate, new, difference)
        hopeless = difference is not None and (difference.high < low or difference.low > high)
        if gate.metric == LATENCY:
            old, new, difference = map(_exponential, (old, new, difference))
        verdicts.append(
            Verdict(
                gate=gate,
                champion=old,
                challenger=new,
                difference=difference,
                passed=passed,
                hopeless=hopeless,
            )
        )
    return verdicts


def _passes(gate: Gate, challenger: Interval | None, difference: Interval | None) -> bool:
    name, limit = gate.bound
    if name in ("minimum", "maximum"):
        value = math.nan if challenger is None else challenger.value
        return value >= limit if name == "minimum" else value <= limit
    if difference is None:
        return False
    low, high = gate.limits
    if name == "margin":
        return difference.low > low and difference.high < high
    return difference.low >= low and difference.high <= high


def _unmeasurable(path: Path, config: GatesConfig) -> list[FieldViolation]:
    """Return violations by gates that can't be measured, or that are not independent of training."""
    plan = make_plan(config.evaluation, [])
    known = known_figures(config.evaluation, plan)
    found = []
    for number, gate in enumerate(config.gates, 1):
        if gate.metric == HUMAN_PREFERENCE:
            continue
        if gate.figure not in known:
            found.append(
                FieldViolation(
                    f"{path.name}: gate {number}",
                    f"has the metric {gate.figure!r}, which this evaluation lacks; known: {', '.join(known)}",
                )
            )
        if not any(SPLITS[gate.split](planned.prompt) for planned in plan):
            found.append(
                FieldViolation(f"{path.name}: gate {number}", f"no prompt is in the split {gate.split!r}")
            )
    scorers = [scorer.partition("=")[0] for scorer in config.evaluation.scorers]
    foreign = [name for name in config.independent if name not in (*scorers, JUDGE, CAPTIONER)]
    if foreign:
        found.append(
            FieldViolation(
                f"{path.name}: independent",
                f"has {', '.join(foreign)}, must be of {', '.join([*scorers, JUDGE, CAPTIONER])}",
            )
        )
    judges = dict.fromkeys(EVENT_METRICS, JUDGE) | dict.fromkeys(ROUND_TRIP_METRICS, CAPTIONER)
    used = {gate.scorer or judges.get(gate.figure, "") for gate in config.gates}
    if not used & set(config.independent):
        found.append(
            FieldViolation(
                f"{path.name}: independent",
                "names no scorer of a gate; at least one gate must use a scorer that was never used in "
                f"training (here one of {', '.join([*scorers, JUDGE, CAPTIONER])})",
            )
        )
    return found


def _with_recipe(path: Path, table: Mapping[str, Any]) -> dict[str, Any]:
    """Return an evaluation's settings: its recipe's, overridden by `table`. "none" is TOML's null."""
    recipe = table.get("recipe", "mini")
    if recipe not in EVALUATIONS:
        raise invalid(
            f"{path.name}: evaluation.recipe", f"is {recipe!r}, must be one of {', '.join(EVALUATIONS)}"
        )
    settings = asdict(EVALUATIONS[recipe]())
    for name, value in table.items():
        if isinstance(value, dict) and isinstance(settings.get(name), dict):
            settings[name] |= value
        elif name == "prompts" and isinstance(value, str) and value != "none":
            settings[name] = path.parent.resolve() / value  # relative to the file
        elif name != "recipe":
            settings[name] = None if value == "none" else value
    return settings


def _exponential(interval: Interval | None) -> Interval | None:
    if interval is None:
        return None
    value, low, high = (math.exp(x) for x in (interval.value, interval.low, interval.high))
    return Interval(value=value, low=low, high=high, count=interval.count)


def _plain(interval: Interval | None) -> dict[str, float | int | None] | None:
    """Return `value` as JSON values: null for NaN and infinity."""
    if interval is None:
        return None
    return {key: value if math.isfinite(value) else None for key, value in asdict(interval).items()}
