"""A study on recorded sounds: prompts, pairs and judge of a folder of recordings.

Prompts describe scenes of held-out recordings, which are the references too. Pairs are scenes of training
recordings: the chosen one is as its caption says; the rejected one has a mistake (two events in the other
order, one missing, or one of another class) and otherwise the same recordings. So a pair's label is known
without a reward model: for one's own sounds there is none. The judge is a probe on YAMNet's features
(`training.evaluation.probe`), fitted on training recordings; no training uses it.

Shape legend: N samples.
"""

import hashlib
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import soundfile
from numpy.typing import NDArray

from benchmarks.study2.config import BASE, Data, Method, StudyRun
from benchmarks.study2.scoring import ClipJudge, Kind
from services.errors import invalid
from training.data.recorded_scenes import (
    RecordedScene,
    RecordedSceneClip,
    RecordedSceneConfig,
    RecordedScenes,
)
from training.data.recordings import Recording, read_recordings
from training.data.splits import SplitConfig, Splits, split_recordings
from training.evaluation.config import EvaluationConfig
from training.evaluation.probe import Probe, SceneJudgement, load_probe, save_probe
from training.evaluation.prompts import Prompt
from training.evaluation.recorded import make_judge
from training.evaluation.sources import PlannedClip, clip_seed
from training.evaluation.yamnet import Yamnet, load_yamnet
from training.loop.checks import Count
from training.loop.progress import progress
from training.soundworld.captions import CaptionTruth

POSSIBLE: Final[tuple[Method, ...]] = ("sft", "dpo", "sft-dpo", "safeguarded", "crpo")
"""Methods that learn from pairs alone. The others rank clips by a reward model."""
PAIR_SEED, PROMPT_SEED = 41_017, 90_212
"""Seeds of the scenes, which no training of the start and no judge uses."""
MISTAKES: Final[Mapping[str, tuple[tuple[str, float], ...]]] = {
    "then": (("swapped", 0.5), ("replaced", 0.3), ("missing", 0.2)),
    "while": (("replaced", 0.6), ("missing", 0.4)),
    "single": (("replaced", 1.0),),
}
"""Mistakes by the relation of the events, with their probabilities."""
GROUP: Final = 32
"""Pairs of a row group, which is read at once for one clip."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordedSounds:
    """The recordings of a study, and its judge's."""

    recordings: Path = Path("my-sounds")
    """Recordings with classes (`training.data.recordings`). Their parts are those of the start's training."""
    split: SplitConfig = field(default_factory=SplitConfig)
    scenes: RecordedSceneConfig = field(
        default_factory=lambda: RecordedSceneConfig(duration=2.56, single=0.0, sequence=0.7)
    )
    """Scenes of prompts and pairs, as long as the start's clips."""
    yamnet: Path = Path("yamnet.tflite")
    judge: Path | None = None
    """A probe that `milonga train new --judge` fitted; None: it is fitted first, on the training part."""
    fitting: Count = 1_000
    """Scenes that the probe learns from."""
    calibration: Count = 300
    """Scenes that its thresholds are chosen on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordedStudy(StudyRun):
    """A study on recordings. Settings of the sound world's candidates, judge and kinds are not used."""

    world: RecordedSounds = field(default_factory=RecordedSounds)

    def __post_init__(self) -> None:
        StudyRun.__post_init__(self)
        if impossible := [method for method in self.methods if method not in POSSIBLE]:
            raise ValueError(
                f"methods has {impossible[0]}, which needs a reward model; of recordings there are "
                f"{', '.join(POSSIBLE)}"
            )
        if self.prompts.long or self.prompts.held_out:
            raise ValueError("prompts.long and prompts.held_out must be 0: prompts of recordings are short")
        if not self.pairs:
            raise ValueError("pairs is 0, must be the number of pairs to make")

    @property
    def made_pairs(self) -> int:
        """Return the number of pairs that are made."""
        return max(self.pairs, *self.growth_pairs, 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordedWorld:
    """Implements `World`."""

    config: RecordedStudy
    output: Path

    def splits(self) -> Splits:
        """Return the recordings, divided. Raises `InvalidInputError`."""
        sounds = self.config.world
        read = [one for one in read_recordings(sounds.recordings, unusable={}) if one.captions]
        if without := [one.clip.name for one in read if one.sound is None]:
            raise invalid(
                "world.recordings", f"{without[0]} has no class, which the judge needs; give a column class"
            )
        return split_recordings(read, sounds.split)

    def plan(self, kind: Kind) -> tuple[PlannedClip, ...]:
        """See `World`. Captions of the two splits of prompts differ; recordings are the same."""
        if kind != "short":
            return ()
        prompts = self.config.prompts
        scenes = RecordedScenes(
            self.splits().held_out, replace(self.config.world.scenes, seed=PROMPT_SEED, single=0.0)
        )
        found: dict[str, Prompt] = {}
        for index in range(200 * prompts.short):
            one = scenes.scene(index)
            if (prompts.split == "test") == is_for_tests(one.caption):
                found.setdefault(one.caption, Prompt(text=one.caption, truth=one.truth, reference=one.clip))
            if len(found) == prompts.short:
                break
        else:
            raise invalid(
                "prompts.short",
                f"is {prompts.short}, and the recordings give {len(found)} captions; ask for fewer",
            )
        seeds = range(self.config.scoring.seeds)
        return tuple(
            PlannedClip(prompt=one, seed=clip_seed(one.text, number))
            for one in found.values()
            for number in seeds
        )

    def sampled(self, kind: Kind) -> EvaluationConfig:
        """See `World`: FAD and KAD are on YAMNet's features."""
        scoring, sounds = self.config.scoring, self.config.world
        return replace(
            scoring,
            prompts=sounds.recordings,
            sampling=replace(scoring.sampling, duration=sounds.scenes.duration),
            embedders=(f"yamnet:{sounds.yamnet.resolve()}",),
        )

    def make_pairs(self, data: Data, model: str, output: Path) -> Path:
        """See `World`. No model is asked."""
        assert data.model == BASE
        scenes = replace(self.config.world.scenes, seed=PAIR_SEED)
        path = output / "recorded.parquet"
        write_pairs(
            pairs_of(self.splits().train, scenes, self.config.made_pairs), self.config.made_pairs, path
        )
        return path

    def judge(self) -> ClipJudge:
        """See `World`."""
        sounds = self.config.world
        yamnet = load_yamnet(sounds.yamnet)
        path = sounds.judge or self.output / "judge" / "judge.json"
        if not path.exists():
            counts = {"fitting": sounds.fitting, "calibration": sounds.calibration}
            probe = make_judge(yamnet, sounds.yamnet, self.splits().train, sounds.scenes, **counts)
            path.parent.mkdir(parents=True, exist_ok=True)
            save_probe(probe, path)
        return ProbeJudge(yamnet, load_probe(path, sounds.yamnet))


@dataclass(frozen=True, slots=True)
class ProbeJudge:
    """Implements `ClipJudge`."""

    yamnet: Yamnet
    probe: Probe

    def figures(
        self, truth: CaptionTruth, waveform_N: NDArray[np.float32], sampling_rate: int
    ) -> dict[str, float]:
        """See `ClipJudge`."""
        return figures_of(self.probe.judge(self.yamnet.windows(waveform_N, sampling_rate), truth))


def figures_of(judgement: SceneJudgement) -> dict[str, float]:
    """Return what a judge found as figures; order is NaN unless all events of a sequence are there."""

    def known(value: bool | None) -> float:
        return float("nan") if value is None else float(value)

    right = judgement.present and judgement.in_order is not False
    return {
        "presence": float(judgement.present),
        "order_given_presence": known(judgement.in_order),
        "reversed_given_presence": known(judgement.reversed),
        "present_and_in_order": float(right),
        "as_described": float(right and not judgement.others),
        "others": float(judgement.others),
    }


def is_for_tests(caption: str) -> bool:
    """Return whether a caption is one of the split test; the others are of validation."""
    return hashlib.sha256(caption.lower().encode()).digest()[0] % 2 == 0


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordedPair:
    """A caption, the scene that it describes, and one with a mistake."""

    caption: str
    chosen: RecordedSceneClip
    rejected: RecordedSceneClip
    mistake: str


def pairs_of(
    recordings: Sequence[Recording], config: RecordedSceneConfig, count: int
) -> Iterator[RecordedPair]:
    """Yield the first pairs of recordings. Raises `InvalidInputError` if there are too few classes."""
    scenes = RecordedScenes(recordings, config)
    by_sound: dict[str, list[Recording]] = {}
    for one in recordings:
        by_sound.setdefault(one.sound or one.captions[0], []).append(one)
    if len(by_sound) < 3:
        raise invalid("world.recordings", f"has {len(by_sound)} classes; mistakes need a third one")
    for index in range(count):
        scene = scenes.scene(index)
        rng = np.random.default_rng([PAIR_SEED, config.seed, index])
        rejected, mistake = mistaken(scene, by_sound, rng)
        yield RecordedPair(caption=scene.caption, chosen=scene.clip, rejected=rejected, mistake=mistake)


def mistaken(
    scene: RecordedScene, by_sound: Mapping[str, Sequence[Recording]], rng: np.random.Generator
) -> tuple[RecordedSceneClip, str]:
    """Return a scene with one mistake, and what it is: see `MISTAKES`."""
    kinds, shares = zip(*MISTAKES[scene.truth.relation], strict=True)
    mistake = str(rng.choice(kinds, p=shares))
    parts = list(scene.clip.parts)
    position = int(rng.integers(len(parts)))
    match mistake:
        case "swapped":
            sounds = [(one.clip, one.sound, one.level) for one in reversed(parts)]
            parts = [
                replace(part, clip=clip, sound=sound, level=level)
                for part, (clip, sound, level) in zip(parts, sounds, strict=True)
            ]
        case "missing":
            del parts[position]
        case _:
            others = sorted(by_sound.keys() - set(scene.truth.classes))
            sound = others[int(rng.integers(len(others)))]
            one = by_sound[sound][int(rng.integers(len(by_sound[sound])))]
            parts[position] = replace(parts[position], clip=one.clip, sound=sound)
    return replace(scene.clip, parts=tuple(parts)), mistake


def write_pairs(pairs: Iterator[RecordedPair], count: int, path: Path) -> None:
    """Write pairs to a Parquet file with Audio-alpaca's columns, atomically."""
    clip = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema(
        [("prompt", pa.string()), ("chosen", clip), ("rejected", clip), ("strategy", pa.string())]
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    with (
        pq.ParquetWriter(temporary, schema) as writer,
        progress(total=count, desc="pairs", unit="pair") as bar,
    ):
        rows: list[dict[str, Any]] = []
        for number, pair in enumerate(pairs, start=1):
            sides = {
                side: {"bytes": _flac(getattr(pair, side)), "path": None} for side in ("chosen", "rejected")
            }
            rows.append({"prompt": pair.caption, **sides, "strategy": pair.mistake})
            bar.update()
            if len(rows) == GROUP or number == count:
                writer.write_table(pa.Table.from_pylist(rows, schema=schema))
                rows = []
    temporary.replace(path)


def _flac(clip: RecordedSceneClip) -> bytes:
    waveform_N, rate = clip.read()
    content = io.BytesIO()
    soundfile.write(content, waveform_N, rate, format="FLAC", subtype="PCM_16")
    return content.getvalue()
