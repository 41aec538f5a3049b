"""`AudioGenExplainer`: clips under masks, the matrix of words and frames, and requests."""

import dataclasses

import numpy as np
import pytest
import torch

from services.api.explanation import (
    ExplanationProgress,
    ExplanationRequest,
    explanation_violations,
)
from services.api.generation import GenerationRequest
from services.audio.decoding import ReadClip
from services.engine import Engine, EngineConfig
from services.errors import RequestCancelledError
from services.models.audiogen.explainer import AudioGenExplainer
from services.models.audiogen.pipeline import AudioGenPipeline
from tests.tiny import tiny_audiogen

PROMPT = "a dog barks then a siren wails"
LEFT_OUT = "siren"


@pytest.fixture(scope="module", params=[None, 16], ids=["exact length", "padded"])
def audiogen(request: pytest.FixtureRequest) -> AudioGenPipeline:
    torch.set_num_threads(1)
    return tiny_audiogen(text_length=request.param)


@pytest.fixture(scope="module")
def explainer(audiogen: AudioGenPipeline) -> AudioGenExplainer:
    return AudioGenExplainer(audiogen)


def _generation(explainer: AudioGenExplainer, **options: object) -> GenerationRequest:
    request = GenerationRequest.of(PROMPT, explainer.description.generation.defaults, seed=5)
    return dataclasses.replace(request, **options)  # type: ignore[arg-type]


def test_without_a_mask_it_makes_the_engines_clip(
    audiogen: AudioGenPipeline, explainer: AudioGenExplainer
) -> None:
    for options in ({}, {"negative_prompt": "rain falls"}, {"guidance_scale": 1.0}, {"guidance_stop": 0.3}):
        request = _generation(explainer, **options)
        clip = explainer.clip(explainer.generate(request, explainer.read(PROMPT)), request)
        with Engine(audiogen, EngineConfig(threads=1)) as engine:
            (expected,) = engine.generate(request).clips
        assert np.allclose(clip.waveform(), expected.waveform(), atol=1e-5)


def test_a_mask_of_zeros_takes_the_text_away(
    audiogen: AudioGenPipeline, explainer: AudioGenExplainer
) -> None:
    request, text = _generation(explainer, guidance_scale=1.0), explainer.read(PROMPT)
    steps = audiogen.steps(0, request.duration)
    made = explainer.generate(request, text, mask_SL=torch.zeros(steps, text.tokens))
    nothing = dataclasses.replace(text, text_LW=torch.zeros_like(text.text_LW))
    assert torch.equal(made.sequence_KS, explainer.generate(request, nothing).sequence_KS)
    assert not torch.equal(made.sequence_KS, explainer.generate(request, text).sequence_KS)


def test_learning_lowers_the_loss_and_keeps_the_model(
    audiogen: AudioGenPipeline, explainer: AudioGenExplainer
) -> None:
    before = {key: value.clone() for key, value in audiogen.decoder.state_dict().items()}
    text = explainer.read(PROMPT)
    made = explainer.generate(_generation(explainer), text)
    first, again = (explainer.learn(made, text, seed=5, iterations=40) for _ in range(2))
    assert torch.equal(first.p_SL, again.p_SL), "the same seed, the same explanation"
    totals = [values[-1] for values in first.trace]
    assert np.mean(totals[-5:]) < np.mean(totals[:5])
    assert first.p_SL.shape == (19, text.tokens) and (first.p_SL > 0).all() and (first.p_SL < 1).all()
    assert all(torch.equal(before[key], value) for key, value in audiogen.decoder.state_dict().items())


def test_a_frame_takes_the_steps_that_predict_its_codes_and_a_word_its_tokens(
    explainer: AudioGenExplainer,
) -> None:
    text = explainer.read(PROMPT)
    p_SL = torch.zeros(19, text.tokens)
    dog = int(text.owners_VL[1].nonzero()[0])
    p_SL[6, dog] = 1.0
    matrix = explainer.by_word(p_SL, text)
    assert matrix.shape == (7, 16)
    assert matrix[1].nonzero()[:, 0].tolist() == [3, 4, 5, 6], "codebook k of frame t is predicted at t + k"
    assert torch.allclose(matrix[1, 3:7], torch.full((4,), 0.25))
    assert not matrix[[0, 2, 3, 4, 5, 6]].any()


@pytest.mark.parametrize("method", ["audiogenx", "audiogenx-upstream"])
def test_explain(explainer: AudioGenExplainer, method: str) -> None:
    request = ExplanationRequest(
        generation=_generation(explainer), method=method, without=LEFT_OUT, iterations=3
    )
    assert explanation_violations(request, explainer.description) == ()
    seen: list[ExplanationProgress] = []
    found = explainer.explain(request, seen.append)
    assert found.matrix_WT.shape == (7, 16) and found.matrix_WT.min() >= 0
    assert (found.words, found.method, found.iterations) == (tuple(PROMPT.split()), method, 3)
    assert [one.kind for one in found.variants] == ["factual", "counterfactual", "without"]
    assert found.mask_size is not None and 0 < found.mask_size < 1
    assert [one.fraction for one in seen] == sorted(one.fraction for one in seen)
    assert len(seen) == 4 * 19 + 3 + 1 and seen[-1].fraction == 1.0


def test_words_can_be_exchanged(explainer: AudioGenExplainer) -> None:
    request = ExplanationRequest(
        generation=_generation(explainer),
        method="audiogenx",
        without=LEFT_OUT,
        replacement="bell",
        iterations=1,
    )
    last = explainer.explain(request, lambda _: None).variants[-1]
    assert (last.kind, last.prompt) == ("replaced", "a dog barks then a bell wails")


def test_a_given_clip_is_explained(explainer: AudioGenExplainer) -> None:
    waveform = (0.1 * np.sin(np.arange(8_000) * 0.2)).astype(np.float32)
    request = ExplanationRequest(
        generation=_generation(explainer, duration=0.5),
        method="audiogenx",
        given=ReadClip(waveform=waveform, sampling_rate=16_000, warnings=()),
        iterations=2,
    )
    found = explainer.explain(request, lambda _: None)
    assert found.matrix_WT.shape == (7, 13)
    assert np.array_equal(found.clip.waveform(), waveform)


def test_what_the_report_raises_ends_it_within_a_step(explainer: AudioGenExplainer) -> None:
    seen: list[str] = []

    def report(progress: ExplanationProgress) -> None:
        seen.append(progress.stage)
        if seen.count("explain") == 2:
            raise RequestCancelledError("cancelled")

    request = ExplanationRequest(generation=_generation(explainer), method="audiogenx", iterations=50)
    with pytest.raises(RequestCancelledError):
        explainer.explain(request, report)
    assert seen[-2:] == ["explain", "explain"] and len(seen) == 19 + 2
    explainer.generate(_generation(explainer), explainer.read(PROMPT))
