"""Worlds of a study: what its prompts, its pairs and its judge are.

`SoundWorld` is the procedural one. `benchmarks.study2.recorded` has the one of recordings.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from benchmarks.study2.config import Data, StudyRun
from benchmarks.study2.judge import load_judge
from benchmarks.study2.recorded import RecordedStudy, RecordedWorld
from benchmarks.study2.scoring import ClipJudge, Kind, sampled, study_plan
from training.evaluation.config import EvaluationConfig
from training.evaluation.sources import PlannedClip
from training.preferences.pipeline import make_preferences


class World(Protocol):
    """What a study asks of its world."""

    def plan(self, kind: Kind) -> tuple[PlannedClip, ...]:
        """Return the prompts and seeds of one kind; none if the study has no prompts of it."""

    def sampled(self, kind: Kind) -> EvaluationConfig:
        """Return the settings of the evaluation of clips of one kind."""

    def make_pairs(self, data: Data, model: str, output: Path) -> Path:
        """Return the file or folder of the pairs of a data set; `model` is the URI of what samples them."""

    def judge(self) -> ClipJudge:
        """Return the judge, trained first if it is not there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SoundWorld:
    """The procedural world. Pairs are clips of a model, ranked by the embedded reward model."""

    config: StudyRun
    output: Path

    def plan(self, kind: Kind) -> tuple[PlannedClip, ...]:
        """See `World`."""
        return study_plan(self.config.prompts, kind, self.config.scoring.seeds)

    def sampled(self, kind: Kind) -> EvaluationConfig:
        """See `World`."""
        return sampled(self.config.scoring, kind)

    def make_pairs(self, data: Data, model: str, output: Path) -> Path:
        """See `World`."""
        source = replace(data.config.candidates.source, model=model)
        config = replace(data.config, candidates=replace(data.config.candidates, source=source))
        # Candidates of one model are shared by all data sets that want the same ones.
        return make_preferences(config, output)["dataset"]

    def judge(self) -> ClipJudge:
        """See `World`: the second judge. The first one is the tagger of the evaluation's settings."""
        return load_judge(self.output / "judge", self.config.judge_clips)


def world_of(config: StudyRun, output: Path) -> World:
    """Return the world of a study, whose stages are in `output`."""
    if isinstance(config, RecordedStudy):
        return RecordedWorld(config=config, output=output)
    return SoundWorld(config=config, output=output)
