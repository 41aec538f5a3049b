"""Questions to a model that takes audio, against a stub of its endpoint."""

import base64
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from services.errors import InvalidInputError, MilongaError
from tests.training.preferences.test_perturb import Answer, Endpoint, endpoint  # noqa: F401 (a fixture)
from training.evaluation.audio_questions import AudioQuestions, yes_share
from training.preferences.llm import LLMConfig

RATE = 16_000
CLIP = (0.5 * np.sin(np.arange(RATE) / 10).astype(np.float32), RATE)


def answered(text: str, alternatives: Sequence[tuple[str, float]] = ()) -> dict[str, Any]:
    """Return a completion; `alternatives` are tokens with their probabilities."""
    top = [{"token": token, "logprob": math.log(share)} for token, share in alternatives]
    logprobs = {"content": [{"token": text, "logprob": -0.1, "top_logprobs": top}]} if top else None
    return {"choices": [{"message": {"role": "assistant", "content": text}, "logprobs": logprobs}]}


@pytest.mark.parametrize(
    ("answer", "share"),
    [
        (answered("Yes", [("Yes", 0.6), ("No", 0.2), ("The", 0.2)]), 0.75),
        (answered("No", [(" no", 0.5), ("NO", 0.2), ("▁yes", 0.1), ("Yes.", 0.2)]), 0.3),
        (answered("Maybe", [("Maybe", 0.9)]), None),
        (answered("Yes, it does."), 1.0),
        (answered("no"), 0.0),
        (answered("A dog"), None),
        (answered(""), None),
    ],
)
def test_the_share_of_yes(answer: dict[str, Any], share: float | None) -> None:
    assert yes_share(answer) == pytest.approx(share)


def test_an_answer_that_is_no_completion_is_refused() -> None:
    answers: list[Any] = [{}, {"choices": []}, [], None]
    for answer in answers:
        with pytest.raises(MilongaError, match="no chat completion"):
            yes_share(answer)


def test_it_sends_the_sound_with_the_question_and_keeps_the_answer(
    endpoint: Endpoint,  # noqa: F811
    tmp_path: Path,
) -> None:
    def answer(body: dict[str, Any]) -> Answer:
        question = body["messages"][0]["content"][1]["text"]
        share = 0.9 if "a dog barks" in question else 0.2
        content = answered("Yes", [("Yes", share), ("No", 1 - share)])
        return 200, {}, json.dumps(content).encode()

    endpoint.default = answer
    questions = AudioQuestions(endpoint.config, tmp_path)
    prompts = ["a dog barks", "rain falls"]
    assert questions.scores(prompts, [CLIP, CLIP]) == pytest.approx([0.9, 0.2])
    request = endpoint.requests[0]
    assert (request["path"], request["model"]) == ("/v1/chat/completions", "tiny-llm")
    assert (request["logprobs"], request["max_tokens"]) == (True, 1)
    sound = request["messages"][0]["content"][0]["input_audio"]
    waveform, rate = soundfile.read(io.BytesIO(base64.b64decode(sound["data"])))
    assert rate == RATE
    np.testing.assert_allclose(waveform, CLIP[0], atol=1e-4)

    assert questions.scores(prompts, [CLIP, CLIP]) == pytest.approx([0.9, 0.2])
    assert len(endpoint.requests) == 2


def test_an_answer_that_says_neither_is_undefined_and_kept(endpoint: Endpoint, tmp_path: Path) -> None:  # noqa: F811
    endpoint.default = lambda body: (200, {}, json.dumps(answered("Perhaps")).encode())
    questions = AudioQuestions(endpoint.config, tmp_path)
    for _ in range(2):
        assert math.isnan(questions.scores(["a dog barks"], [CLIP])[0])
    assert len(endpoint.requests) == 1


def test_an_endpoint_that_refuses_sound_is_named(endpoint: Endpoint, tmp_path: Path) -> None:  # noqa: F811
    endpoint.default = lambda body: (400, {}, b'{"error": {"message": "input_audio is not supported"}}')
    with pytest.raises(MilongaError, match="input_audio is not supported"):
        AudioQuestions(endpoint.config, tmp_path).scores(["a dog barks"], [CLIP])


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="is a folder"):
        AudioQuestions(LLMConfig(folder=tmp_path), tmp_path)
