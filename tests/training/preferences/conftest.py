"""Tiny models in folders, and every stage run once on them. All of it is read only."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from services.models.manifest import write_manifest
from tests.tiny import WORDS, tiny_clap, tiny_pipeline, tiny_reward
from training.preferences.candidates import CandidatesConfig, make_candidates
from training.preferences.captions import CaptionsConfig, select_captions
from training.preferences.pairs import PairsConfig, Quantiles, make_pairs
from training.preferences.perturb import PerturbConfig, perturb_captions
from training.preferences.scores import ScoresConfig, score_candidates
from training.preferences.sources import SourceConfig
from training.soundworld.scenes import SceneConfig, draw_caption

WIDE = Quantiles(alpha=0.0, beta=0.0, delta_min=0.0, delta_max=1.0)
"""Quantiles that remove nothing but what the scorers disagree on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Models:
    tango: str
    clap_a: str
    clap_b: str
    reward: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Stages:
    """Folders of the stages, and the configs that made them."""

    captions: Path
    perturbed: Path
    candidates: Path
    scores: Path
    pairs: Path
    captions_config: CaptionsConfig
    candidates_config: CandidatesConfig
    scores_config: ScoresConfig
    pairs_config: PairsConfig


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    root = tmp_path_factory.mktemp("models")
    tiny_pipeline().save_pretrained(root / "tango")
    write_manifest(root / "tango", "tiny-tango", "1", "Apache-2.0")
    digests = {}
    for seed, name in enumerate(("clap-a", "clap-b")):
        tiny_clap(seed).save(root / name)
        digests[name] = write_manifest(root / name, name, "1", "Apache-2.0").digest
    tiny_reward(tiny_clap(0), digests["clap-a"]).save(root / "reward")
    write_manifest(root / "reward", "tiny-reward", "1", "Apache-2.0")
    return Models(
        tango=f"file:{root / 'tango'}",
        clap_a=f"file:{root / 'clap-a'}",
        clap_b=f"file:{root / 'clap-b'}",
        reward=f"file:{root / 'reward'}",
    )


@pytest.fixture(scope="session")
def candidates_config(models: Models) -> CandidatesConfig:
    return CandidatesConfig(
        source=SourceConfig(model=models.tango, device="cpu", threads=1, batch=4, in_flight=4),
        steps=2,
        varied_steps=(1, 2),
        clips=2,
        duration=0.32,
    )


@pytest.fixture(scope="session")
def stages(
    models: Models, candidates_config: CandidatesConfig, tmp_path_factory: pytest.TempPathFactory
) -> Stages:
    root = tmp_path_factory.mktemp("stages")
    # Of words that the tiny scorers know.
    known = set(WORDS)
    drawn = (draw_caption(np.random.default_rng([4, i]), SceneConfig(sequence=0.6))[0] for i in range(40_000))
    captions = list(dict.fromkeys(one for one in drawn if set(one.lower().replace(",", "").split()) <= known))
    (root / "captions.csv").write_text("".join(f'"{one}"\n' for one in ["caption", *captions]))
    captions_config = CaptionsConfig(
        source=root / "captions.csv",
        embedder=f"tango:{models.tango}",
        clusters=3,
        per_cluster=1,
        temporal_limit=3,
        device="cpu",
    )
    scores_config = ScoresConfig(
        scorers=(models.clap_a, models.clap_b),
        reward=models.reward,
        clap=models.clap_a,
        device="cpu",
        batch=8,
    )
    made = Stages(
        captions=root / "captions",
        perturbed=root / "perturb",
        candidates=root / "candidates",
        scores=root / "scores",
        pairs=root / "pairs",
        captions_config=captions_config,
        candidates_config=candidates_config,
        scores_config=scores_config,
        pairs_config=PairsConfig(calibrate=True, quantiles=WIDE),
    )
    select_captions(captions_config, made.captions)
    perturb_captions(PerturbConfig(concept=2, temporal=2), made.captions, made.perturbed)
    make_candidates(candidates_config, made.captions, made.perturbed, made.candidates)
    score_candidates(scores_config, made.candidates, made.scores)
    # Random models like no clip much better than another: what both agree on is kept.
    make_pairs(replace(made.pairs_config, rank_by="mean"), made.candidates, made.scores, made.pairs)
    return made
