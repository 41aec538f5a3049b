"""`DiffusionExplainer` on tiny random models of both families."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from services.api.explanation import (
    ExplanationProgress,
    ExplanationRequest,
    explanation_violations,
)
from services.audio.decoding import ReadClip
from services.engine import Engine, EngineConfig
from services.errors import NotFiniteError, RequestCancelledError
from services.models.architectures import ARCHITECTURES
from services.models.explaining.explainer import DiffusionExplainer
from tests.tiny import tiny_pipeline, tiny_tangoflux

PROMPT = "a dog barks, then the siren wails"
WORDS = ("a", "dog", "barks", "then", "the", "siren", "wails")


def ignore(progress: ExplanationProgress) -> None:
    pass


@pytest.fixture(scope="module")
def tango() -> DiffusionExplainer:
    return DiffusionExplainer(tiny_pipeline(), ARCHITECTURES["TangoPipeline"])


@pytest.fixture(scope="module")
def flux() -> DiffusionExplainer:
    return DiffusionExplainer(tiny_tangoflux(), ARCHITECTURES["TangoFluxPipeline"])


def request_of(explainer: DiffusionExplainer, prompt: str = PROMPT, **options: Any) -> ExplanationRequest:
    request = ExplanationRequest.of(prompt, explainer.description, **{"seed": 3, **options})
    assert not explanation_violations(request, explainer.description)
    return request


@pytest.mark.parametrize("method", ["occlusion", "attention", "mask"])
def test_an_explanation_of_a_clip_that_is_made(tango: DiffusionExplainer, method: str) -> None:
    seen: list[ExplanationProgress] = []
    found = tango.explain(request_of(tango, method=method, iterations=5), seen.append)
    assert found.words == WORDS and found.prompt == PROMPT and found.seed == 3
    assert found.matrix_WT.shape == (7, 16) and found.matrix_WT.dtype == np.float32
    assert (found.matrix_WT >= 0).all() and found.matrix_WT.any()
    assert found.frame_seconds == pytest.approx(0.04) and found.clip.duration == pytest.approx(0.64)
    assert (found.mask_size is not None) == (method == "mask") and found.iterations == 5 * (method == "mask")
    fractions = [one.fraction for one in seen]
    assert fractions == sorted(fractions) and fractions[-1] == 1.0
    assert [stage for stage, _ in itertools.groupby(one.stage for one in seen)] == [
        "denoise", "explain", "finished"
    ]  # fmt: skip


@pytest.mark.parametrize(("guidance_scale", "stop"), [(1.0, 1.0), (3.0, 1.0), (3.0, 0.5)])
@pytest.mark.parametrize("family", [tiny_pipeline, tiny_tangoflux])
def test_the_clip_is_the_engines(family: Callable[[], object], guidance_scale: float, stop: float) -> None:
    pipeline = family()
    explainer = DiffusionExplainer(pipeline, ARCHITECTURES[type(pipeline).__name__])  # type: ignore[arg-type]
    options: dict[str, Any] = {"guidance_scale": guidance_scale, "guidance_stop": stop, "duration": 0.5}
    options["negative_prompt"] = "rain"
    found = explainer.explain(request_of(explainer, **options), ignore)
    with Engine(pipeline, EngineConfig(threads=1)) as engine:  # type: ignore[arg-type]
        (clip,) = engine.generate(engine.request(PROMPT, seed=3, **options)).clips
    np.testing.assert_array_equal(found.clip.waveform(), clip.waveform())
    # Latents are longer than the clip; frames after its end are left out.
    assert found.matrix_WT.shape[1] * found.frame_seconds == pytest.approx(0.5, abs=found.frame_seconds)


def test_a_model_without_readable_cross_attention_has_occlusion_only(flux: DiffusionExplainer) -> None:
    assert flux.description.methods == ("occlusion",) and not flux.description.iterations
    found = flux.explain(request_of(flux), ignore)
    assert found.matrix_WT.shape == (7, 10) and found.matrix_WT.any()


@pytest.mark.parametrize("family", ["tango", "flux"])
def test_a_given_clip_is_explained_at_its_own_length_and_rate(
    family: str, request: pytest.FixtureRequest
) -> None:
    explainer: DiffusionExplainer = request.getfixturevalue(family)
    rng = np.random.default_rng(1)
    stereo = (0.1 * rng.standard_normal((2, 22_050))).astype(np.float32)
    given = ReadClip(waveform=stereo, sampling_rate=44_100, warnings=("clip is loud",))
    found = explainer.explain(request_of(explainer, given=given), ignore)
    assert found.clip.sampling_rate == 44_100 and found.clip.duration == pytest.approx(0.5)
    np.testing.assert_allclose(found.clip.waveform(), stereo.mean(0), atol=1e-6)
    assert found.matrix_WT.shape[1] * found.frame_seconds == pytest.approx(0.5, abs=found.frame_seconds)
    assert "clip is loud" in found.warnings
    again = explainer.explain(request_of(explainer, given=given), ignore)
    np.testing.assert_array_equal(found.matrix_WT, again.matrix_WT)
    other = explainer.explain(request_of(explainer, given=given, seed=4), ignore)
    assert not np.array_equal(found.matrix_WT, other.matrix_WT)


def test_a_clip_without_a_word_begins_with_the_same_noise(tango: DiffusionExplainer) -> None:
    found = tango.explain(request_of(tango, without="Dog barks"), ignore)
    (variant,) = found.variants
    assert (variant.kind, variant.words, variant.prompt) == ("without", "Dog barks", PROMPT)
    assert variant.clip.duration == found.clip.duration
    assert not np.array_equal(variant.clip.waveform(), found.clip.waveform())
    # What the model reads of the rest stays, so that the clip is no other one.
    difference = np.abs(variant.clip.waveform() - found.clip.waveform()).mean()
    other = tango.explain(request_of(tango, seed=4), ignore)
    assert difference < np.abs(other.clip.waveform() - found.clip.waveform()).mean()


def test_a_word_that_is_replaced_is_the_clip_of_the_other_prompt(tango: DiffusionExplainer) -> None:
    found = tango.explain(request_of(tango, without="dog", replacement="cat"), ignore)
    expected = tango.explain(request_of(tango, PROMPT.replace("dog", "cat")), ignore)
    (variant,) = found.variants
    assert variant.kind == "replaced" and variant.prompt == PROMPT.replace("dog", "cat")
    np.testing.assert_array_equal(variant.clip.waveform(), expected.clip.waveform())


def test_a_phrase_is_replaced_at_each_place(tango: DiffusionExplainer) -> None:
    prompt = "the dog barks, the dog sings"
    found = tango.explain(request_of(tango, prompt, without="the dog", replacement="a cat"), ignore)
    assert found.variants[0].prompt == "a cat barks, a cat sings"


def test_a_prompt_of_one_word(tango: DiffusionExplainer) -> None:
    found = tango.explain(request_of(tango, "rain"), ignore)
    assert found.words == ("rain",) and found.matrix_WT.any()


def test_words_that_are_unknown_or_cut_have_rows_and_warnings(tango: DiffusionExplainer) -> None:
    prompt = "the zebra sings and the dog barks and the cat sings and the bird sings and rain falls"
    found = tango.explain(request_of(tango, prompt), ignore)
    assert len(found.words) == 18 and found.matrix_WT.shape[0] == 18
    assert found.matrix_WT[1].any(), "an unknown word has a token, which the model reads"
    # 15 tokens and the end are read.
    assert not found.matrix_WT[15:].any() and found.matrix_WT[:15].any(1).all()
    text = "\n".join(found.warnings)
    assert "prompt has words that the model does not know: zebra" in text
    assert "rows are 0, since the model reads no token of them: and, rain, falls" in text


@pytest.mark.parametrize("method", ["occlusion", "attention", "mask"])
@pytest.mark.parametrize("after", [1, 6])
def test_what_the_report_raises_ends_it_after_that_step(
    tango: DiffusionExplainer, method: str, after: int
) -> None:
    count = 0

    def report(progress: ExplanationProgress) -> None:
        nonlocal count
        count += 1
        if count == after:
            raise RequestCancelledError("cancelled")

    before = tango.explain(request_of(tango), ignore)
    with pytest.raises(RequestCancelledError):
        tango.explain(request_of(tango, method=method), report)
    assert count == after
    np.testing.assert_array_equal(before.matrix_WT, tango.explain(request_of(tango), ignore).matrix_WT)


def test_a_model_that_is_not_finite_is_reported() -> None:
    pipeline = tiny_pipeline()
    with torch.no_grad():
        pipeline.unet.conv_out.bias.fill_(float("nan"))
    explainer = DiffusionExplainer(pipeline, ARCHITECTURES["TangoPipeline"])
    with pytest.raises(NotFiniteError):
        explainer.explain(request_of(explainer), ignore)


def test_masks_are_learned_below_the_limit(tango: DiffusionExplainer) -> None:
    request = request_of(tango, method="mask")
    found = tango.explain(replace(request, iterations=400), ignore)
    assert found.iterations < 400
