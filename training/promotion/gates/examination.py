"""The gates' evaluation: the metrics of `milonga train evaluate` on clips of champion and challenger.

The gates are decided at one or more looks (`GatesConfig.looks`): where they are undecided, the next share of
the prompts is evaluated. Clips are cached, so a promotion that starts again repeats the same looks.

Scorers and reward model run in this process, or as services (``--scoring``, ``--reward-server``). The judge
is among the metrics, so no training stage may import this module.

Shapes: N clips, B elements of a call, W windows, S samples, D width.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import numpy as np

from services.api.generation import ClipMaker
from services.client import ServiceOptions
from services.weights.registry import RegisteredVersion
from training.data.store import digest_of_value
from training.evaluation.clip_scores import (
    ClipScores,
    Evaluators,
    References,
    embed_references,
    open_evaluators,
    score_clips,
)
from training.evaluation.report import compute_metrics, metric_differences, metric_intervals, split_indices
from training.evaluation.sources import PlannedClip, make_plan
from training.promotion.gates.clips import ServedClips, clips_folder, served_clips
from training.promotion.gates.gates import LATENCY, GatesConfig, Verdict, decide
from training.promotion.gates.looks import critical_values
from training.promotion.target import Report, Target


@dataclass(frozen=True, kw_only=True, slots=True)
class ScorerServices:
    """Services that compute scores and rewards instead of models in this process."""

    scoring: str | None = None
    """Address of a scoring service; None: in this process."""
    reward: str | None = None
    """Address of a reward service; None: in this process."""
    connection: ServiceOptions = field(default_factory=ServiceOptions)
    """How both are reached."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Look:
    """The gates as they stand on a share of the prompts."""

    number: int
    """From 1."""
    of: int
    prompts: int
    """Prompts that the two models are compared on."""
    quantile: float
    """Critical value of the differences' intervals: 1.96 for a single look."""
    verdicts: tuple[Verdict, ...]

    @property
    def outcome(self) -> Literal["passed", "refused", "undecided"]:
        """Passed with all gates; refused with one that is certain not to, or at the last look."""
        if all(verdict.passed for verdict in self.verdicts):
            return "passed"
        hopeless = any(verdict.hopeless for verdict in self.verdicts)
        return "refused" if hopeless or self.number == self.of else "undecided"

    def __str__(self) -> str:
        undecided = [verdict.gate.figure for verdict in self.verdicts if not verdict.passed]
        names = f" by {', '.join(undecided)}" if undecided else ""
        return f"look {self.number} of {self.of}, {self.prompts} prompts: {self.outcome}{names}"

    def row(self) -> dict[str, Any]:
        """Return the look as JSON values, for the ledger."""
        return {
            "look": self.number,
            "of": self.of,
            "prompts": self.prompts,
            "quantile": round(self.quantile, 4),
            "outcome": self.outcome,
            "gates": [verdict.row() for verdict in self.verdicts],
        }


class Examination:
    """An evaluation that is ready: models loaded, prompts and seeds known. Created before any change."""

    def __init__(self, config: GatesConfig, services: ScorerServices | None = None) -> None:
        """Load scorers, reward model and judge. Raises `ModelError`, and what the services raise."""
        self.config, self._services = config, services or ScorerServices()
        self.plan: Sequence[PlannedClip] = mixed(make_plan(config.evaluation, []))
        self._evaluators = self._open_evaluators()

    def examine(
        self,
        champion: RegisteredVersion,
        candidate: RegisteredVersion,
        target: Target,
        seconds: float,
        report: Report,
        *,
        check: Callable[[], None] = lambda: None,
        record: Callable[[Look], None] = lambda look: None,
    ) -> tuple[Sequence[Verdict], dict[str, Any]]:
        """Return the verdicts on `candidate` against `champion`, and the evidence.

        At each look the challenger serves the champion first, if clips of it are missing, and then the
        candidate, on which it is left running.

        Args:
            champion: the served version.
            candidate: the version to promote.
            target: the target, whose challenger generates the clips.
            seconds: time for the challenger to become ready.
            report: prints a line of progress.
            check: called before each change of the target.
            record: called after each look.

        Raises:
            RolloutError: the challenger does not become ready, or fails.
            ServiceUnavailableError: the target, or a scorer's service, can't be reached.
        """
        config, serving = self.config, target.serving
        references = embed_references(self.plan, self._evaluators, config.evaluation)
        challenger = _Challenger(target, seconds, report, check)
        sides = {"champion": _Side(version=champion), "challenger": _Side(version=candidate)}
        looks: list[Look] = []
        for number, quantile in enumerate(critical_values(config.looks), 1):
            done, end = (self._clips_at(n) for n in (number - 1, number))
            part = replace(references, row_N=references.row_N[done:end])
            for role, side in sides.items():
                began = time.monotonic()
                if role == "challenger":
                    # Even if its clips are cached: a candidate that does not start is not promoted.
                    challenger.start(side.version)
                clips = served_clips(
                    *(role, side.version.digest, self.plan[done:end]),
                    *(clips_folder(side.version.digest, serving, config), config),
                    partial(challenger.client, side.version, config.timeout),
                )
                report(f"{role}: {clips.made} of {end - done} clips generated, the others were cached")
                scores = score_clips(
                    role, clips.files, self.plan[done:end], self._evaluators, part, config.evaluation
                )
                side.add(scores, clips, time.monotonic() - began)
                side.ready_seconds = challenger.ready_seconds.get(side.version.digest)
            verdicts, figures = self._decide(
                sides, replace(references, row_N=references.row_N[:end]), quantile
            )
            prompts = len({planned.prompt.text for planned in self.plan[:end]})
            look = Look(
                number=number, of=config.looks, prompts=prompts, quantile=quantile, verdicts=tuple(verdicts)
            )
            looks.append(look)
            report(str(look))
            record(look)
            if look.outcome != "undecided":
                break
        return look.verdicts, self._evidence(looks, sides, figures, end) | {"serving": serving}

    def _evidence(
        self, looks: Sequence[Look], sides: "Mapping[str, _Side]", figures: Mapping[str, Any], clips: int
    ) -> dict[str, Any]:
        """Return the evidence as JSON values; `clips` of each model were compared at the last look."""
        plan = [[planned.prompt.text, planned.seed] for planned in self.plan[:clips]]
        return {
            "gates": [verdict.row() for verdict in looks[-1].verdicts],
            "passed": looks[-1].outcome == "passed",
            "looks": [look.row() for look in looks],
            "figures": figures,
            **{role: side.facts() for role, side in sides.items()},
            "prompts": {"clips": clips, "budget": len(self.plan), "digest": digest_of_value(plan)},
            "heard_by": self._evaluators.digests(),
            "independent": list(self.config.independent),
        }

    def _clips_at(self, look: int) -> int:
        """Return the number of clips of each model at a look; 0 before the first."""
        texts = list(dict.fromkeys(planned.prompt.text for planned in self.plan))
        counted = set(texts[: math.ceil(len(texts) * look / self.config.looks)])
        return sum(planned.prompt.text in counted for planned in self.plan)

    def _decide(
        self, sides: "Mapping[str, _Side]", references: References, quantile: float
    ) -> tuple[list[Verdict], dict[str, Any]]:
        """Return the verdicts on the clips so far, and all figures as text."""
        config = self.config.evaluation
        scores = {role: side.scores() for role, side in sides.items()}
        readable_N = np.logical_and.reduce([found.readable_N for found in scores.values()])
        plan = self.plan[: len(readable_N)]
        splits = split_indices(plan, readable_N)
        gated = {gate.split for gate in self.config.clip_gates}
        metrics = {
            role: {
                split: compute_metrics(found, references, plan, indices, config)
                for split, indices in splits.items()
                if split in gated
            }
            for role, found in scores.items()
        }
        champion = {split: metric_intervals(part) for split, part in metrics["champion"].items()}
        challenger = {split: metric_intervals(part) for split, part in metrics["challenger"].items()}
        differences = {
            split: metric_differences(part, metrics["challenger"][split], quantile)
            for split, part in metrics["champion"].items()
        }
        figures = {
            split: {
                name: {"champion": str(champion[split].get(name)), "difference": str(interval)}
                for name, interval in found.items()
                if name != LATENCY
            }
            for split, found in differences.items()
        }
        return decide(self.config.clip_gates, champion, challenger, differences), figures

    def _open_evaluators(self) -> Evaluators:
        """Open what the config names, with the services in place of its scorers and its reward model."""
        services = self._services
        connection = services.connection
        scoring = connection.open(scoring=services.scoring) if services.scoring else None
        reward = connection.open(reward=services.reward) if services.reward else None
        return open_evaluators(self.config.evaluation, scoring=scoring, reward=reward)


def mixed(plan: Sequence[PlannedClip]) -> list[PlannedClip]:
    """Return the plan with its prompts in a fixed random order, so that each look has all kinds."""
    return sorted(plan, key=lambda planned: digest_of_value(planned.prompt.text))


@dataclass(kw_only=True, slots=True)
class _Side:
    """What is known of one of the two versions so far."""

    version: RegisteredVersion
    parts: list[ClipScores] = field(default_factory=list)
    generation_seconds: list[float] = field(default_factory=list)
    clips_made: int = 0
    seconds: float = 0.0
    """Time that generation and scoring took."""
    ready_seconds: float | None = None
    """Time of the challenger's first start on this version; None: it was not needed."""

    def add(self, scores: ClipScores, clips: ServedClips, seconds: float) -> None:
        """Add the clips of a look."""
        self.parts.append(replace(scores, values={**scores.values, LATENCY: np.log(clips.seconds_N)}))
        self.generation_seconds += clips.seconds_N.tolist()
        self.clips_made += clips.made
        self.seconds += seconds

    def scores(self) -> ClipScores:
        """Return the scores of all clips so far."""
        return ClipScores.joined(self.parts)

    def facts(self) -> dict[str, Any]:
        """Return JSON values, for the evidence."""
        return {
            "version": self.version.version,
            "digest": self.version.digest,
            "clips_made": self.clips_made,
            "ready_seconds": self.ready_seconds,
            "mean_seconds_a_clip": round(float(np.mean(self.generation_seconds)), 4),
            "seconds": round(self.seconds, 1),
        }


class _Challenger:
    """The challenger, which is started on a version when that is first needed."""

    def __init__(self, target: Target, seconds: float, report: Report, check: Callable[[], None]) -> None:
        self._target, self._seconds, self._report, self._check = target, seconds, report, check
        self._running: tuple[RegisteredVersion, str] | None = None
        self.ready_seconds: dict[str, float] = {}
        """Time of the first start on a version, by its digest."""

    def start(self, version: RegisteredVersion) -> str:
        """Start it on `version`, unless it runs on that; return its address."""
        if self._running is None or self._running[0] != version:
            self._check()
            self._report(f"starting a challenger on {version}")
            start = time.monotonic()
            self._running = (version, self._target.start_challenger(version.uri, self._seconds))
            ready = round(time.monotonic() - start, 2)
            self.ready_seconds.setdefault(version.digest, ready)
            self._report(f"the challenger serves, after {ready:.1f} s")
        return self._running[1]

    def client(self, version: RegisteredVersion, timeout: float) -> ClipMaker:
        """Return a client of it on `version`, with `timeout` in seconds per clip."""
        return self._target.clip_client(self.start(version), timeout)
