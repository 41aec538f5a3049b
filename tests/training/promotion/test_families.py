"""A second family through evaluation, registry, gates and promotion, with real models."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch

from services.api.generation import ClipMaker
from services.engine import EngineConfig
from services.errors import ModelFormatError
from services.local import open_clip_maker
from services.models.manifest import write_manifest
from services.models.mini import mini_folder
from services.models.mini.tagger import EventTagger
from services.models.pipelines import read_index
from services.models.tango.distilled import student_of
from services.models.tango.loading import TANGO
from services.weights.registry import RegisteredVersion
from services.weights.uri import resolve
from tests.tiny import tiny_pipeline, tiny_tangoflux
from tests.training.promotion.fixtures import MemoryTarget, make_promoter
from training.evaluation.config import EvaluationConfig, Sampling, WorldPrompts
from training.evaluation.evaluate import evaluate
from training.promotion.errors import GatesRefusedError
from training.promotion.gates.examination import Examination, Look
from training.promotion.gates.gates import Gate, GatesConfig
from training.promotion.ledger import EVIDENCE
from training.promotion.promote import promote
from training.promotion.registry import Registry
from training.soundworld.synthesis import CLASSES
from training.tracking.register import register

PROMPT = "a dog barks then a siren wails"


class ServingTarget(MemoryTarget):
    """Its challenger generates on an engine in this process."""

    def clip_client(self, address: str, timeout: float) -> ClipMaker:
        assert self.challenger is not None
        config = EngineConfig(threads=1, batch_shapes=(4,), exact=True)
        return open_clip_maker(resolve(self.challenger), device="cpu", config=config)


def _flux(folder: Path, seed: int) -> Path:
    tiny_tangoflux(seed).save_pretrained(folder)
    write_manifest(folder, name=folder.name, version="1", license="Apache-2.0")
    return folder


@pytest.fixture
def config(tmp_path: Path) -> EvaluationConfig:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tagger = tmp_path / "tagger"
    EventTagger(classes=list(CLASSES), width=8, hidden=4).save_pretrained(tagger)
    write_manifest(tagger, name="tagger", version="1", license="Apache-2.0")
    return EvaluationConfig(
        name="tiny",
        world=WorldPrompts(count=4),
        sampling=Sampling(num_inference_steps=2, duration=2.56),
        batch=4,
        device="cpu",
        scorers=(),
        reward=None,
        embedders=(),
        judge=f"file:{tagger}",
        sheet=2,
    )


def test_two_models_are_compared(config: EvaluationConfig, tmp_path: Path) -> None:
    first, second = (_flux(tmp_path / name, seed) for seed, name in enumerate(("first", "second")))
    report = evaluate(config, [f"file:{first}", f"other=file:{second}"], tmp_path / "evaluation")
    assert [model["name"] for model in report["models"]] == ["first", "other"]
    assert report["prompts"]["clips"] == 4 * config.seeds
    (comparison,) = report["comparisons"]
    assert (comparison["name"], comparison["against"]) == ("other", "first")


def test_registered_versions_generate_pass_gates_and_are_promoted(
    store: str, config: EvaluationConfig, tmp_path: Path
) -> None:
    champion, _ = register(_flux(tmp_path / "base", 0), alias="champion")
    candidate, created = register(_flux(tmp_path / "tuned", 1))
    assert (champion.version, candidate.version, created) == ("1", "2", True)
    assert resolve(candidate.uri).identity.name == "milonga-tango"
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("MLFLOW_TRACKING_URI", store)
        loaded = mlflow.pyfunc.load_model("models:/milonga-tango@challenger")
    [clip] = loaded.predict({"prompt": PROMPT, "seed": 7, "num_inference_steps": 2})
    maker = open_clip_maker(resolve(candidate.uri), device="cpu", config=EngineConfig(threads=1))
    expected = maker.generate(PROMPT, seed=7, num_inference_steps=2, encoding="float32").clips[0]
    maker.close()
    np.testing.assert_allclose(clip["audio"], expected.waveform(), atol=1e-6)

    target = ServingTarget(champion.uri)
    promoter, reported = make_promoter(target, Registry())
    gates = GatesConfig(
        evaluation=replace(config, seeds=1),
        gates=(Gate(metric="silent", maximum=1.0),),
        independent=("judge",),
    )
    assert "milonga-tango version 2 is promoted" in promote(
        promoter, gates, model="milonga-tango", version="2"
    )
    assert target.served == candidate.uri
    assert any("challenger: 4 of 4 clips generated" in line for line in reported)


@pytest.fixture
def two_versions(store: str, tmp_path: Path) -> tuple[RegisteredVersion, RegisteredVersion]:
    champion, _ = register(_flux(tmp_path / "base", 0), alias="champion")
    candidate, _ = register(_flux(tmp_path / "tuned", 1))
    return champion, candidate


def looking(config: EvaluationConfig, margin: float) -> GatesConfig:
    """Gates of untrained models, none of whose clips is silent: the difference is 0, its interval is wide."""
    return GatesConfig(
        evaluation=replace(config, seeds=1),
        gates=(Gate(metric="silent", margin=margin),),
        independent=("judge",),
        looks=2,
    )


def test_more_prompts_are_evaluated_where_the_gates_are_undecided(
    two_versions: tuple[RegisteredVersion, RegisteredVersion], config: EvaluationConfig
) -> None:
    champion, candidate = two_versions
    target = ServingTarget(champion.uri)
    promoter, reported = make_promoter(target, Registry())
    with pytest.raises(GatesRefusedError, match=r"silent: no worse by 0.2 or more, found"):
        promote(promoter, looking(config, 0.2), model="milonga-tango", version="2")
    assert "look 1 of 2, 2 prompts: undecided by silent" in reported
    assert "look 2 of 2, 4 prompts: refused by silent" in reported
    (entry,) = promoter.ledger.entries()
    assert entry.look == "look 2 of 2, 4 prompts: refused by silent"
    first = json.loads(promoter.ledger.read_text(entry.run_id, "look-1.json"))
    evidence = json.loads(promoter.ledger.read_text(entry.run_id, EVIDENCE))
    assert (first["prompts"], first["outcome"]) == (2, "undecided")
    assert evidence["looks"][0] == first
    assert [look["quantile"] for look in evidence["looks"]] == pytest.approx([2.498, 2.018], abs=1e-3)
    assert evidence["prompts"]["clips"] == evidence["prompts"]["budget"] == 4
    assert evidence["challenger"]["clips_made"] == 4

    # The first look is enough for a wide margin, and its clips are there already.
    target, reported = ServingTarget(champion.uri), []
    promoter = replace(promoter, target=target, report=reported.append)
    promote(promoter, looking(config, 0.9), model="milonga-tango", version="2")
    assert target.served == candidate.uri
    assert "challenger: 0 of 2 clips generated, the others were cached" in reported
    assert "look 1 of 2, 2 prompts: passed" in reported
    assert not any("look 2" in line for line in reported)


def test_an_interrupted_promotion_repeats_its_looks(
    two_versions: tuple[RegisteredVersion, RegisteredVersion], config: EvaluationConfig
) -> None:
    """The clips of a look are kept, so another start decides by the same evidence."""
    champion, candidate = two_versions
    target = ServingTarget(champion.uri)
    gates = looking(config, 0.2)

    def die(look: Look) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Examination(gates).examine(champion, candidate, target, 5.0, print, record=die)
    looks: list[Look] = []
    _, evidence = Examination(gates).examine(champion, candidate, target, 5.0, print, record=looks.append)
    assert [(look.number, look.prompts, look.outcome) for look in looks] == [
        (1, 2, "undecided"),
        (2, 4, "refused"),
    ]
    assert (evidence["champion"]["clips_made"], evidence["challenger"]["clips_made"]) == (2, 2)
    assert target.challenger == candidate.uri  # left running on the candidate


def test_the_round_trip_is_a_gate(
    two_versions: tuple[RegisteredVersion, RegisteredVersion], config: EvaluationConfig
) -> None:
    champion, candidate = two_versions

    def gates(minimum: float) -> GatesConfig:
        return GatesConfig(
            evaluation=replace(config, seeds=1, judge=None, captioner="mini:captioner"),
            gates=(Gate(metric="round_trip_present_and_in_order", minimum=minimum),),
            independent=("captioner",),
        )

    # Clips of untrained models do not have what their prompts name.
    promoter, _ = make_promoter(ServingTarget(champion.uri), Registry())
    with pytest.raises(GatesRefusedError, match=r"round_trip_present_and_in_order: at least 0.9, found 0"):
        promote(promoter, gates(0.9), model="milonga-tango", version="2")
    (entry,) = promoter.ledger.entries()
    evidence = json.loads(promoter.ledger.read_text(entry.run_id, EVIDENCE))
    assert evidence["heard_by"].keys() == {"captioner"}
    assert evidence["independent"] == ["captioner"]
    assert evidence["gates"][0]["metric"] == "round_trip_present_and_in_order"

    promote(promoter, gates(0.0), model="milonga-tango", version="2")
    assert promoter.target.current_pin() == candidate.uri


def test_a_broken_student_is_refused_by_the_gates(
    store: str, config: EvaluationConfig, tmp_path: Path
) -> None:
    """With the shipped judge and the embedded generator: 2 steps of a student, 5 of its teacher."""
    teacher, student = tmp_path / "teacher", tmp_path / "student"
    shutil.copytree(mini_folder("mini"), teacher)
    config = replace(
        config, seeds=1, world=WorldPrompts(count=8), judge="mini:tagger", sampling=Sampling(profile="draft")
    )
    gates = GatesConfig(
        evaluation=config,
        gates=(Gate(metric="present_and_in_order", margin=0.3),),
        independent=("judge",),
    )
    shutil.copytree(teacher, student)
    broken = student_of(TANGO.load_denoiser(teacher))
    for weight in broken.parameters():
        weight.data += 0.1 * torch.randn_like(weight) * weight.std(correction=0)
    broken.save_pretrained(student / "unet")
    index = read_index(student)
    profiles = {"draft": {"num_inference_steps": 2, "guidance_scale": 3.0, "scheduler": "jump"}}
    text = json.dumps(index | {"default_scheduler": "jump", "profiles": profiles})
    (student / "model_index.json").write_text(text)
    for folder in (teacher, student):
        write_manifest(folder, name=folder.name, version="1", license="Apache-2.0")
    champion, _ = register(teacher, alias="champion")
    refused, _ = register(student)
    promoter, _ = make_promoter(ServingTarget(champion.uri), Registry())
    with pytest.raises(GatesRefusedError, match=r"present_and_in_order: no worse by 0.3 or more, found -"):
        promote(promoter, gates, model="milonga-tango", version=refused.version)
    assert promoter.target.current_pin() == champion.uri
    (entry,) = promoter.ledger.entries()
    evidence = json.loads(promoter.ledger.read_text(entry.run_id, EVIDENCE))
    assert evidence["challenger"]["clips_made"] == 8 and not evidence["passed"]


def test_a_version_of_another_family_is_not_promoted(
    store: str, config: EvaluationConfig, tmp_path: Path
) -> None:
    tango = tmp_path / "tango"
    tiny_pipeline().save_pretrained(tango)
    write_manifest(tango, name="tango", version="1", license="Apache-2.0")
    champion, _ = register(tango, alias="champion")
    register(_flux(tmp_path / "flux", 0))
    promoter, _ = make_promoter(ServingTarget(champion.uri), Registry())
    gates = GatesConfig(
        evaluation=replace(config, seeds=1),
        gates=(Gate(metric="silent", maximum=1.0),),
        independent=("judge",),
    )
    with pytest.raises(ModelFormatError, match="is of another architecture than"):
        promote(promoter, gates, model="milonga-tango", version="2")
