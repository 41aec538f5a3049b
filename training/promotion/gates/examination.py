"""The gates' evaluation: the metrics of `milonga train evaluate` on clips of champion and challenger.

Scorers and reward model run in this process, or as services (``--scoring``, ``--reward-server``). The judge
is among the metrics, so no training stage may import this module.

Shapes: N clips, B elements of a call, W windows, S samples, D width.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

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
from training.promotion.gates.clips import clips_folder, served_clips
from training.promotion.gates.gates import LATENCY, GatesConfig, Verdict, decide
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


class Examination:
    """An evaluation that is ready: models loaded, prompts and seeds known. Created before any change."""

    def __init__(self, config: GatesConfig, services: ScorerServices | None = None) -> None:
        """Load scorers, reward model and judge. Raises `ModelError`, and what the services raise."""
        self.config, self._services = config, services or ScorerServices()
        self.plan: Sequence[PlannedClip] = make_plan(config.evaluation, [])
        self._evaluators = self._open_evaluators()
        self._references: References | None = None

    def examine(
        self,
        champion: RegisteredVersion,
        candidate: RegisteredVersion,
        target: Target,
        seconds: float,
        report: Report,
        *,
        check: Callable[[], None] = lambda: None,
    ) -> tuple[list[Verdict], dict[str, Any]]:
        """Return the verdicts on `candidate` against `champion`, and the evidence.

        The challenger serves the champion first, if clips of it are missing, and then the candidate, on which
        it is left running.

        Args:
            champion: the served version.
            candidate: the version to promote.
            target: the target, whose challenger generates the clips.
            seconds: time for the challenger to become ready.
            report: prints a line of progress.
            check: called before each change of the target.

        Raises:
            RolloutError: the challenger does not become ready, or fails.
            ServiceUnavailableError: the target, or a scorer's service, can't be reached.
        """
        serving = target.serving
        scores: dict[str, ClipScores] = {}
        facts: dict[str, dict[str, Any]] = {}
        for role, version in (("champion", champion), ("challenger", candidate)):
            start = time.monotonic()
            challenger = _Challenger(target, version, seconds, report, check)
            if role == "challenger":
                # Even if its clips are cached: a candidate that does not start is not promoted.
                challenger.start()
            clips = served_clips(
                *(role, version.digest, self.plan, clips_folder(version.digest, serving, self.config)),
                *(self.config, partial(challenger.client, self.config.timeout)),
            )
            report(f"{role}: {clips.made} of {len(self.plan)} clips generated, the others were cached")
            one = self._score(role, clips.files)
            scores[role] = replace(one, values={**one.values, LATENCY: np.log(clips.seconds_N)})
            facts[role] = {
                "version": version.version,
                "digest": version.digest,
                "clips_made": clips.made,
                "ready_seconds": challenger.ready_seconds,
                "mean_seconds_a_clip": round(float(clips.seconds_N.mean()), 4),
                "seconds": round(time.monotonic() - start, 1),
            }
        verdicts, figures = self._decide(scores)
        evidence = {
            "gates": [verdict.row() for verdict in verdicts],
            "passed": all(verdict.passed for verdict in verdicts),
            "figures": figures,
            **facts,
            "prompts": {
                "clips": len(self.plan),
                "digest": digest_of_value([[planned.prompt.text, planned.seed] for planned in self.plan]),
            },
            "heard_by": self._evaluators.digests(),
            "independent": list(self.config.independent),
            "serving": serving,
        }
        return verdicts, evidence

    def _score(self, name: str, files: Sequence[Path]) -> ClipScores:
        config = self.config.evaluation
        if self._references is None:
            self._references = embed_references(self.plan, self._evaluators, config)
        return score_clips(name, files, self.plan, self._evaluators, self._references, config)

    def _decide(self, scores: Mapping[str, ClipScores]) -> tuple[list[Verdict], dict[str, Any]]:
        config, references = self.config.evaluation, self._references
        assert references is not None
        readable_N = np.logical_and.reduce([found.readable_N for found in scores.values()])
        splits = split_indices(self.plan, readable_N)
        gated = {gate.split for gate in self.config.gates}
        metrics = {
            role: {
                split: compute_metrics(found, references, self.plan, indices, config)
                for split, indices in splits.items()
                if split in gated
            }
            for role, found in scores.items()
        }
        champion = {split: metric_intervals(part) for split, part in metrics["champion"].items()}
        challenger = {split: metric_intervals(part) for split, part in metrics["challenger"].items()}
        differences = {
            split: metric_differences(part, metrics["challenger"][split])
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
        return decide(self.config.gates, champion, challenger, differences), figures

    def _open_evaluators(self) -> Evaluators:
        """Open what the config names, with the services in place of its scorers and its reward model."""
        services = self._services
        connection = services.connection
        scoring = connection.open(scoring=services.scoring) if services.scoring else None
        reward = connection.open(reward=services.reward) if services.reward else None
        return open_evaluators(self.config.evaluation, scoring=scoring, reward=reward)


class _Challenger:
    """A challenger that is started when it is first used."""

    def __init__(
        self,
        target: Target,
        version: RegisteredVersion,
        seconds: float,
        report: Report,
        check: Callable[[], None],
    ) -> None:
        self._target, self._version, self._seconds = target, version, seconds
        self._report, self._check = report, check
        self._address: str | None = None
        self.ready_seconds: float | None = None

    def start(self) -> str:
        """Start it, unless it runs; return its address."""
        if self._address is None:
            self._check()
            self._report(f"starting a challenger on {self._version}")
            start = time.monotonic()
            self._address = self._target.start_challenger(self._version.uri, self._seconds)
            self.ready_seconds = round(time.monotonic() - start, 2)
            self._report(f"the challenger serves, after {self.ready_seconds:.1f} s")
        return self._address

    def client(self, timeout: float) -> ClipMaker:
        """Return a client of it, with `timeout` in seconds per clip."""
        return self._target.clip_client(self.start(), timeout)
