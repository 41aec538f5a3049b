"""Profiles: named settings of a model's folder, per request or as a service's default."""

import json
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from services.api.generation import Defaults, GenerationRequest, Profile, violations
from services.client import AudioClient
from services.engine import Engine, EngineConfig
from services.errors import InvalidInputError, ModelFormatError
from services.local import open_clip_maker
from services.models.architectures import load_generator
from services.models.latent import clip_generator
from services.models.manifest import write_manifest
from services.models.mini import mini_folder
from services.models.pipelines import read_index
from services.models.profiles import with_profiles
from services.weights.uri import resolve
from tests.services.generation.serving import Serving, serving, tiny_engine
from tests.tiny import PROFILES, tiny_pipeline, tiny_tangoflux

PROMPT = "a dog barks"
DRAFT: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 1.0, "scheduler": "ddim"}


def test_a_profile_is_the_same_as_its_settings(client: AudioClient) -> None:
    named, spelt, plain = (
        client.generate(PROMPT, seed=7, encoding="float32", **options).clips[0].audio
        for options in ({"profile": "draft"}, DRAFT, {})
    )
    assert named == spelt != plain


def test_settings_of_the_request_win(client: AudioClient) -> None:
    explicit = client.generate(
        PROMPT, seed=7, encoding="float32", profile="draft", num_inference_steps=3, guidance_scale=2.5
    )
    expected = client.generate(
        PROMPT, seed=7, encoding="float32", num_inference_steps=3, guidance_scale=2.5, scheduler="ddim"
    )
    assert explicit.clips[0].audio == expected.clips[0].audio


def test_an_unknown_profile_is_refused_with_those_there_are(client: AudioClient) -> None:
    with pytest.raises(InvalidInputError, match="profile: is 'best', must be one of quality, draft"):
        client.generate(PROMPT, profile="best")
    with pytest.raises(InvalidInputError, match="profile: is 'best', must be one of quality, draft"):
        list(client.stream(PROMPT, profile="best"))


def test_a_model_without_profiles_takes_none() -> None:
    with Engine(tiny_tangoflux(), EngineConfig(threads=1)) as engine:
        request = engine.request(PROMPT, profile="draft")
        (fault,) = violations(request, engine.limits)
    assert (fault.field, fault.description) == (
        "profile",
        "is 'draft', and this model has no profiles; leave it out",
    )


def test_the_model_describes_its_profiles(client: AudioClient) -> None:
    model = client.get_model()
    assert model.limits.profiles == ("quality", "draft")
    assert model.defaults.profiles[1] == Profile(name="draft", **DRAFT)
    assert model.defaults.profile == ""


@pytest.fixture
def drafting() -> Any:
    with tiny_engine(profile="draft") as engine, serving(engine) as served:
        yield served


def test_a_services_default_profile(drafting: Serving) -> None:
    with AudioClient(drafting.target, retries=0, timeout=60) as client:
        defaults = client.get_model().defaults
        assert (defaults.profile, defaults.num_inference_steps, defaults.scheduler) == ("draft", 2, "ddim")
        left_out, named = (
            client.generate(PROMPT, seed=7, encoding="float32", **options).clips[0].audio  # type: ignore[arg-type]
            for options in ({}, {"profile": "draft"})
        )
        assert left_out == named
        better = client.generate(PROMPT, seed=7, encoding="float32", profile="quality").clips[0].audio
        request = drafting.engine.request(PROMPT, profile="quality")
        assert (request.num_inference_steps, request.guidance_scale) == (6, 3.0)
        assert better != named


def test_a_service_does_not_start_with_an_unknown_profile() -> None:
    with pytest.raises(InvalidInputError, match="profile: is 'best', must be one of quality, draft"):
        tiny_engine(profile="best")


def test_profiles_survive_the_models_folder_and_work_without_a_service(tmp_path: Path) -> None:
    tiny_pipeline().save_pretrained(tmp_path / "tiny")
    write_manifest(tmp_path / "tiny", name="tiny", version="1", license="Apache-2.0")
    model = resolve(f"file:{tmp_path / 'tiny'}")
    with closing(open_clip_maker(model, device="cpu", config=EngineConfig(threads=1))) as maker:
        assert maker.get_model().limits.profiles == ("quality", "draft")
        named, spelt = (
            maker.generate(PROMPT, seed=7, **options).clips for options in ({"profile": "draft"}, DRAFT)
        )
    assert named == spelt


@pytest.mark.parametrize(
    ("profiles", "says"),
    [
        ({"draft": 4}, "profiles.draft must have guidance_scale, num_inference_steps, scheduler"),
        ({"draft": {"num_inference_steps": 4}}, "and nothing else"),
        ({"draft": {**DRAFT, "speed": 9}}, "and nothing else"),
        ({"draft": {**DRAFT, "num_inference_steps": 0}}, "steps are not 1 to 1000"),
        ({"draft": {**DRAFT, "num_inference_steps": 2.5}}, "steps are not 1 to 1000"),
        ({"draft": {**DRAFT, "num_inference_steps": True}}, "steps are not 1 to 1000"),
        ({"draft": {**DRAFT, "guidance_scale": float("nan")}}, "guidance scale is not 0 to 20"),
        ({"draft": {**DRAFT, "guidance_scale": "3"}}, "guidance scale is not 0 to 20"),
        ({"draft": {**DRAFT, "guidance_stop": 1.5}}, "guidance_stop is not 0 to 1"),
        ({"draft": {**DRAFT, "guidance_stop": "half"}}, "guidance_stop is not 0 to 1"),
        ({"draft": {**DRAFT, "scheduler": "euler"}}, "scheduler is not one of ddpm"),
        ({"draft": {**DRAFT, "scheduler": ["ddim"]}}, "scheduler is not one of ddpm"),
        ({"": DRAFT}, "a name has 1 to 40"),
        ({"dra\nft": DRAFT}, "a name has 1 to 40"),
    ],
)
def test_a_folder_with_invalid_profiles_is_refused(
    tmp_path: Path, profiles: dict[str, Any], says: str
) -> None:
    tiny_pipeline().save_pretrained(tmp_path)
    index = read_index(tmp_path) | {"profiles": profiles}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ModelFormatError, match=says.replace("(", r"\(")):
        Engine(load_generator(tmp_path))


def test_profiles_of_an_older_folder_are_none() -> None:
    described = tiny_pipeline().description
    assert with_profiles(described, None).limits.profiles == ()
    assert [one.name for one in with_profiles(described, PROFILES).defaults.profiles] == [*PROFILES]


def test_a_profile_may_stop_guidance() -> None:
    half = {**DRAFT, "guidance_scale": 3.0, "guidance_stop": 0.5}
    pipeline = tiny_pipeline()
    pipeline.register_to_config(profiles={"half": half})
    with Engine(pipeline, EngineConfig(threads=1)) as engine, serving(engine) as served:
        request = engine.request(PROMPT, profile="half")
        assert (request.guidance_stop, engine.request(PROMPT).guidance_stop) == (0.5, 1.0)
        with AudioClient(served.target, retries=0, timeout=60) as client:
            (profile,) = client.get_model().defaults.profiles
            assert profile == Profile(name="half", **half)
            named, spelt, whole = (
                client.generate(PROMPT, seed=7, encoding="float32", **options).clips[0].audio
                for options in ({"profile": "half"}, half, {**half, "guidance_stop": 1.0})
            )
            assert named == spelt != whole
            with pytest.raises(InvalidInputError, match=r"guidance_stop: is -0\.5, must be between 0 and 1"):
                client.generate(PROMPT, guidance_stop=-0.5)
            made = client.generate(PROMPT, guidance_scale=1.0, guidance_stop=0.5)
            assert "guidance_stop has no effect on this clip: there is no guidance" in made.warnings


@pytest.mark.parametrize("options", [{}, {"num_inference_steps": 3}, {"guidance_scale": 2.0}])
def test_the_pipeline_takes_a_profile(options: dict[str, Any]) -> None:
    pipeline = tiny_pipeline()
    clips = [
        pipeline(PROMPT, generator=clip_generator(7), **{**chosen, **options}).audios
        for chosen in ({"profile": "draft"}, DRAFT, {})
    ]
    assert np.array_equal(clips[0], clips[1])
    assert not np.array_equal(clips[0], clips[2])


def test_the_pipeline_refuses_an_unknown_profile() -> None:
    with pytest.raises(InvalidInputError, match="profile: is 'best', must be one of quality, draft"):
        tiny_pipeline()(PROMPT, profile="best")
    with pytest.raises(InvalidInputError, match="guidance_stop: nan; give a share of the steps, 0 to 1"):
        tiny_pipeline()(PROMPT, guidance_stop=float("nan"))


def test_a_complete_request_names_its_profile() -> None:
    defaults = Defaults(
        duration=1.0,
        num_inference_steps=25,
        guidance_scale=3.0,
        scheduler="ddpm",
        sampling_rate=16_000,
        profiles=(Profile(name="draft", **DRAFT),),
    )
    draft = GenerationRequest.of(PROMPT, defaults, seed=1, profile="draft")
    assert (draft.profile, draft.num_inference_steps) == ("draft", 2)
    plain = GenerationRequest.of(PROMPT, defaults, seed=1)
    assert (plain.profile, plain.num_inference_steps) == ("", 25)
    assert replace(plain, profile="draft", **DRAFT) == draft


@pytest.mark.parametrize("name", ["quality", "balanced", "draft"])
def test_mini_has_the_three_profiles(name: str) -> None:
    profiles = load_generator(mini_folder("mini")).description.defaults.profiles
    assert name in {profile.name for profile in profiles}
