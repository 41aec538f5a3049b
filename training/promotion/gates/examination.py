"""The gates' evaluation: the metrics of `milonga train evaluate`, on clips as they are served.

Scorers and reward model are in this process, or services (``--scoring``, ``--reward``). This module hears the
judge, so no training stage may import it.

Shapes: N clips, B elements of a call, W windows, S samples, D width.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from services.api.generation import ClipMaker
from services.client import TLS, AudioClient
from training.data.store import digest_of
from training.evaluation.clip_scores import (
    ClipScores,
    Evaluators,
    References,
    embed_references,
    open_evaluators,
    score_clips,
)
from training.evaluation.report import differences_of, figures_of, measure, split_units
from training.evaluation.sources import Asked, make_plan
from training.promotion.gates.clips import clips_folder, served_clips
from training.promotion.gates.gates import LATENCY, GatesConfig, Verdict, decide
from training.promotion.registry import Version
from training.promotion.target import Target, Tell


@dataclass(frozen=True, kw_only=True, slots=True)
class Judges:
    """Who hears beside the judge, where it is not this process."""

    scoring: str | None = None
    """Address of a scoring service."""
    reward: str | None = None
    """Address of a reward service."""
    tls: TLS | None = None


class Examination:
    """Ears that are open, and questions that are known: made before anything is changed."""

    def __init__(self, config: GatesConfig, judges: Judges | None = None) -> None:
        """Load who hears. Raises `ModelError` where one was refused, and what the services raise."""
        self.config, self._judges = config, judges or Judges()
        self.plan: Sequence[Asked] = make_plan(config.evaluation, [])
        self._evaluators = self._open_evaluators()
        self._references: References | None = None

    def examine(
        self,
        champion: Version,
        candidate: Version,
        target: Target,
        seconds: float,
        tell: Tell,
        *,
        check: Callable[[], None] = lambda: None,
    ) -> tuple[list[Verdict], dict[str, Any]]:
        """What the gates say of `candidate` against `champion`, and the evidence.

        The challenger is left running on the candidate; for the champion's clips, if some are missing, it
        runs on the champion before that.

        Args:
            champion: what is served.
            candidate: what is to be.
            target: whose challenger generates.
            seconds: that the challenger may take to be ready.
            tell: says what goes on.
            check: called before each change of the target.

        Raises:
            RolloutError: the challenger does not come up, or fails.
            ServiceUnavailableError: the target, or a judge, can't be reached.
        """
        serving = target.serving
        heard: dict[str, ClipScores] = {}
        facts: dict[str, dict[str, Any]] = {}
        for role, version in (("champion", champion), ("challenger", candidate)):
            begun = time.monotonic()
            challenger = _Challenger(target, version, seconds, tell, check)
            if role == "challenger":
                # One that does not come up is not promoted, whatever its clips of an earlier day were.
                challenger.start()
            clips = served_clips(
                *(role, version.digest, self.plan, clips_folder(version.digest, serving, self.config)),
                *(self.config, partial(challenger.client, self.config.timeout)),
            )
            tell(f"{role}: {clips.made} of {len(self.plan)} clips made, the others were there")
            one = self._hear(role, clips.files)
            heard[role] = replace(one, values={**one.values, LATENCY: np.log(clips.seconds_N)})
            facts[role] = {
                "version": version.version,
                "digest": version.digest,
                "clips_made": clips.made,
                "ready_seconds": challenger.ready_seconds,
                "mean_seconds_a_clip": round(float(clips.seconds_N.mean()), 4),
                "seconds": round(time.monotonic() - begun, 1),
            }
        verdicts, figures = self._decide(heard)
        evidence = {
            "gates": [verdict.row() for verdict in verdicts],
            "passed": all(verdict.passed for verdict in verdicts),
            "figures": figures,
            **facts,
            "prompts": {
                "clips": len(self.plan),
                "digest": digest_of([[asked.prompt.text, asked.seed] for asked in self.plan]),
            },
            "heard_by": self._evaluators.digests(),
            "independent": list(self.config.independent),
            "serving": serving,
        }
        return verdicts, evidence

    def _hear(self, name: str, files: Sequence[Path]) -> ClipScores:
        config = self.config.evaluation
        if self._references is None:
            self._references = embed_references(self.plan, self._evaluators, config)
        return score_clips(name, files, self.plan, self._evaluators, self._references, config)

    def _decide(self, heard: Mapping[str, ClipScores]) -> tuple[list[Verdict], dict[str, Any]]:
        config, references = self.config.evaluation, self._references
        assert references is not None
        splits = split_units(self.plan, np.logical_and.reduce([one.readable_N for one in heard.values()]))
        asked = {gate.split for gate in self.config.gates}
        measured = {
            role: {
                split: measure(one, references, self.plan, units, config)
                for split, units in splits.items()
                if split in asked
            }
            for role, one in heard.items()
        }
        champion = {split: figures_of(one) for split, one in measured["champion"].items()}
        challenger = {split: figures_of(one) for split, one in measured["challenger"].items()}
        differences = {
            split: differences_of(one, measured["challenger"][split])
            for split, one in measured["champion"].items()
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
        """Open what the config names, with the services in the place of its scorers and its reward model."""
        services = self._judges
        scoring = AudioClient(scoring=services.scoring, tls=services.tls) if services.scoring else None
        reward = AudioClient(reward=services.reward, tls=services.tls) if services.reward else None
        return open_evaluators(self.config.evaluation, scoring=scoring, reward=reward)


class _Challenger:
    """A challenger that is started when it is first needed."""

    def __init__(
        self, target: Target, version: Version, seconds: float, tell: Tell, check: Callable[[], None]
    ) -> None:
        self._target, self._version, self._seconds = target, version, seconds
        self._tell, self._check = tell, check
        self._address: str | None = None
        self.ready_seconds: float | None = None

    def start(self) -> str:
        """Its address."""
        if self._address is None:
            self._check()
            self._tell(f"a challenger is started on {self._version}")
            begun = time.monotonic()
            self._address = self._target.start_challenger(self._version.pin, self._seconds)
            self.ready_seconds = round(time.monotonic() - begun, 2)
            self._tell(f"it serves, after {self.ready_seconds:.1f} s")
        return self._address

    def client(self, timeout: float) -> ClipMaker:
        """Who asks it for clips, in up to `timeout` seconds each."""
        return self._target.clip_client(self.start(), timeout)
