"""Run all stages in order, each in a folder named by a digest of all that determines its content.

    make_preferences(preferences_mini(), Path("build/preferences/mini"))

A changed setting runs only the stages that depend on it again. A killed stage resumes.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Final, Literal, get_args

from services.client import ServiceOptions
from training.data.store import REPORT, Row, digest_of_value
from training.loop.config import Plain
from training.preferences.candidates import (
    FREE as CANDIDATES_FREE,
)
from training.preferences.candidates import (
    CandidatesConfig,
    candidates_identity,
    make_candidates,
)
from training.preferences.captions import (
    FREE as CAPTIONS_FREE,
)
from training.preferences.captions import (
    CaptionsConfig,
    SoundworldCaptions,
    captions_identity,
    select_captions,
)
from training.preferences.dataset import DatasetConfig, dataset_identity, write_dataset
from training.preferences.embedders import resolve_embedder
from training.preferences.pairs import PairsConfig, Quantiles, Thresholds, make_pairs, pairs_identity
from training.preferences.perturb import FREE as PERTURB_FREE
from training.preferences.perturb import PerturbConfig, perturb_captions, perturb_identity
from training.preferences.scores import FREE as SCORES_FREE
from training.preferences.scores import (
    ScoresConfig,
    resolve_scorers,
    score_candidates,
    scorer_digests,
    scores_identity,
)
from training.preferences.sources import SourceConfig, model_of

Stage = Literal["captions", "perturb", "candidates", "scores", "pairs", "dataset"]
STAGES: Final[tuple[Stage, ...]] = get_args(Stage)


@dataclass(frozen=True, kw_only=True, slots=True)
class PreferencesConfig:
    """Settings of the stages that make preference data."""

    name: str
    """Name of the data set, and of its folder."""
    candidates: CandidatesConfig
    """Settings of the clips to generate."""
    captions: CaptionsConfig = field(default_factory=CaptionsConfig)
    """Settings of the captions to select."""
    perturb: PerturbConfig = field(default_factory=PerturbConfig)
    """Settings of the perturbation of captions."""
    scores: ScoresConfig = field(default_factory=ScoresConfig)
    """Settings of the scorers of the clips."""
    pairs: PairsConfig = field(default_factory=PairsConfig)
    """Settings of the filter of pairs."""
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    """Settings of the data set's files."""
    ratings: str | None = None
    """People's ratings, for `milonga train run`: URL of a database, or what `milonga ratings export` wrote.
    The reward model and the denoiser learn from them too."""


def make_preferences(
    config: PreferencesConfig,
    output: Path,
    *,
    shard: tuple[int, int] = (0, 1),
    until: Stage = "dataset",
    on_stage: Callable[[Stage, Path, Row], None] | None = None,
) -> dict[Stage, Path]:
    """Run the stages up to `until`; return their folders under `output`, by name.

    With one of several shards the stages end after its candidates, unless those of all others exist as well.
    `on_stage` is called with each stage's folder and report when it is done.

    Raises the errors of the stages.
    """
    run = _Run(output, until, on_stage)
    embedder = resolve_embedder(config.captions.embedder)
    captions = run.stage(
        "captions",
        captions_identity(config.captions, embedder),
        CAPTIONS_FREE,
        partial(select_captions, config.captions, model=embedder),
    )
    perturbed: Path | None = None
    if run.continues and {"2", "3"} & set(config.candidates.strategies):
        perturbed = run.stage(
            "perturb",
            perturb_identity(config.perturb, captions),
            PERTURB_FREE,
            partial(perturb_captions, config.perturb, captions),
        )
    if not run.continues:
        return run.folders
    model = model_of(config.candidates.source)
    candidates = run.stage(
        "candidates",
        candidates_identity(config.candidates, captions, perturbed, model),
        CANDIDATES_FREE,
        partial(make_candidates, config.candidates, captions, perturbed, shard=shard, model=model),
    )
    if not run.continues:
        return run.folders
    models = resolve_scorers(config.scores)
    digests = scorer_digests(config.scores, models)
    scores = run.stage(
        "scores",
        scores_identity(config.scores, candidates, digests),
        SCORES_FREE,
        partial(score_candidates, config.scores, candidates, models=models, digests=digests),
    )
    if not run.continues:
        return run.folders
    pairs = run.stage(
        "pairs",
        pairs_identity(config.pairs, candidates, scores),
        (),
        partial(make_pairs, config.pairs, candidates, scores),
    )
    if run.continues:
        run.stage(
            "dataset",
            dataset_identity(config.dataset, candidates, pairs),
            (),
            partial(write_dataset, config.dataset, candidates, scores, pairs),
        )
    return run.folders


def connected(config: PreferencesConfig, options: ServiceOptions) -> PreferencesConfig:
    """Return `config` whose services are reached by the `options` that were given."""
    source = replace(config.candidates.source, **options.given)
    return replace(
        config,
        candidates=replace(config.candidates, source=source),
        scores=replace(config.scores, **options.given),
    )


def uses_services(config: PreferencesConfig) -> bool:
    """Return whether a stage calls a service."""
    scores = config.scores
    return any((config.candidates.source.server, scores.server, scores.reward_server))


class _Run:
    """The stages of one call."""

    def __init__(
        self, output: Path, until: Stage, on_stage: Callable[[Stage, Path, Row], None] | None
    ) -> None:
        self.folders: dict[Stage, Path] = {}
        self.continues = True
        """Whether the last stage is complete, and not `until`."""
        self._output, self._until, self._on_stage = output, until, on_stage

    def stage(
        self,
        stage: Stage,
        identity: Mapping[str, Plain],
        free: Collection[str],
        work: Callable[[Path], Row],
    ) -> Path:
        """Run one stage; return its folder."""
        content = {name: value for name, value in identity.items() if name not in free}
        folder = self.folders[stage] = self._output / f"{stage}-{digest_of_value(content)[:12]}"
        report = work(folder)
        if self._on_stage is not None:
            self._on_stage(stage, folder, report)
        self.continues = stage != self._until and (folder / REPORT).exists()
        return folder


def preferences_tango2() -> PreferencesConfig:
    """The paper's: AudioCaps' captions, Tango-full-FT, LAION's two CLAP models.

    Give ``captions.source`` (a CSV of AudioCaps' training split), ``candidates.source.model`` or ``.server``,
    and the address, model and key of an LLM in the environment.
    """
    return PreferencesConfig(
        name="tango2",
        captions=CaptionsConfig(source=Path("audiocaps_train.csv")),
        perturb=PerturbConfig(perturber="llm"),
        candidates=CandidatesConfig(
            source=SourceConfig(
                model="file:tango-full-ft-audiocaps", dtype="bfloat16", in_flight=64, batch=16
            )
        ),
        scores=ScoresConfig(scorers=("laion:630k-audioset-best.pt", "laion:630k-best.pt")),
        pairs=PairsConfig(thresholds=Thresholds()),
    )


def preferences_mini() -> PreferencesConfig:
    """The mini family's: the sound world's captions, `mini-base`, thresholds from quantiles."""
    return PreferencesConfig(
        name="mini",
        captions=CaptionsConfig(
            embedder="tango:mini",
            clusters=40,
            per_cluster=10,
            temporal_limit=300,
            soundworld=SoundworldCaptions(count=4_000),
        ),
        perturb=PerturbConfig(concept=1, temporal=2, temporal_kinds=("swap", "replace")),
        candidates=CandidatesConfig(
            source=SourceConfig(model="mini-base"), steps=10, varied_steps=(3, 6, 10, 15), guidance_scale=3.0
        ),
        # No floor for rejected clips: those with the order of events reversed score lowest of all here.
        pairs=PairsConfig(calibrate=True, quantiles=Quantiles(alpha=0.2, beta=0.0, delta_max=1.0)),
    )


def preferences_smoke() -> PreferencesConfig:
    """A few clips of a few captions, in seconds."""
    mini = preferences_mini()
    return replace(
        mini,
        name="smoke",
        captions=replace(
            mini.captions,
            clusters=2,
            per_cluster=2,
            temporal_limit=2,
            soundworld=SoundworldCaptions(count=30),
        ),
        candidates=replace(mini.candidates, steps=2, varied_steps=(1, 2), clips=2),
        pairs=replace(
            mini.pairs, quantiles=Quantiles(alpha=0.0, beta=0.0, delta_min=0.0, delta_max=1.0), rank_by="mean"
        ),
    )


PREFERENCES: Final[Mapping[str, Callable[[], PreferencesConfig]]] = {
    "mini": preferences_mini,
    "smoke": preferences_smoke,
    "tango2": preferences_tango2,
}
"""Recipes of `milonga train preferences`."""
