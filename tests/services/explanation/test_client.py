"""`AudioClient.explain_audio`, and the same calls without a server."""

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from services.api.explanation import ClipExplainer
from services.client import AsyncAudioClient, AudioClient, ExplanationProgress, ExplanationUpdate, Queued
from services.errors import InvalidInputError
from services.local_explainer import LocalExplainer
from services.models.explaining.explainer import DiffusionExplainer
from tests.services.explanation.serving import MODEL, Served
from tests.services.explanation.test_servicer import PROMPT, WORDS
from tests.services.reward.serving import tone, wav
from tests.services.traces import attributes, recording

EXPLAIN = "milonga.v1.ExplanationService/ExplainAudio"
OPTIONS: list[dict[str, Any]] = [
    {"method": "attention"},
    {"method": "mask", "iterations": 2},
    {"without": "dog", "num_inference_steps": 2, "encoding": "flac"},
    {"clip": wav(tone(0.5)).audio},
]
FAULTS: list[tuple[dict[str, Any], set[str]]] = [
    ({"method": "magic", "seed": -1}, {"seed"}),
    ({"method": "magic", "guidance_scale": 99.0, "without": "cat"}, {"method", "guidance_scale", "without"}),
    ({"clip": b"a dog barks, he said\n" * 20}, {"clip.audio"}),
    ({"clip": Path("no such file.wav"), "iterations": "many"}, {"clip", "iterations"}),
]


@pytest.mark.parametrize("options", OPTIONS)
def test_a_service_and_this_process_answer_the_same(
    served: Served, explainer: DiffusionExplainer, options: dict[str, Any]
) -> None:
    updates: list[ExplanationUpdate] = []
    local = LocalExplainer(explainer, MODEL)
    expected = local.explain_audio(PROMPT, seed=3, **options)
    with AudioClient(explanation=served.target) as client:
        found = client.explain_audio(PROMPT, seed=3, on_update=updates.append, **options)
    assert (found.prompt, found.words) == (PROMPT, tuple(WORDS)) == (expected.prompt, expected.words)
    np.testing.assert_array_equal(found.matrix_WT, expected.matrix_WT)
    assert found.frame_seconds == pytest.approx(expected.frame_seconds)
    for name in ("method", "seed", "model", "warnings", "iterations"):
        assert getattr(found, name) == getattr(expected, name), name
    assert found.mask_size == pytest.approx(expected.mask_size)
    assert found.clip.audio == expected.clip.audio and found.clip.encoding == expected.clip.encoding
    assert [one.clip.audio for one in found.variants] == [one.clip.audio for one in expected.variants]
    assert isinstance(updates[0], Queued) and isinstance(updates[-1], ExplanationProgress)


@pytest.mark.parametrize(("options", "fields"), FAULTS)
def test_both_refuse_the_same(
    served: Served, explainer: DiffusionExplainer, options: dict[str, Any], fields: set[str]
) -> None:
    with AudioClient(explanation=served.target) as client:
        explainers: list[ClipExplainer] = [client, LocalExplainer(explainer, MODEL)]
        for one in explainers:
            with pytest.raises(InvalidInputError) as caught:
                one.explain_audio(PROMPT, **options)
            assert {violation.field for violation in caught.value.violations} == fields


def test_the_asyncio_client(served: Served) -> None:
    async def ask() -> None:
        async with AsyncAudioClient(explanation=served.target) as client:
            model = await client.get_explainer()
            assert model.methods == ("occlusion", "attention", "mask") and model.makes_variants
            assert model == served.worker.description
            found = await client.explain_audio(PROMPT, num_inference_steps=1)
            assert found.matrix_WT.shape == (7, 16)
            assert found.peaks() == tuple((row.argmax() + 0.5) * 0.04 for row in found.matrix_WT)

    asyncio.run(ask())


def test_a_call_waits_and_explains(served: Served) -> None:
    with AudioClient(explanation=served.target, retries=0) as client, recording() as traces:
        client.explain_audio(PROMPT, num_inference_steps=1)
        service = traces.one(EXPLAIN, "SERVER")
        assert traces.children(service) == ["explain"]
        assert traces.children(traces.one("explain")) == ["queue", "model"]
        expected = {"milonga.steps": 1, "milonga.model_digest": MODEL.digest}
        assert attributes(traces.one("explain")) == expected
        traces.check()
