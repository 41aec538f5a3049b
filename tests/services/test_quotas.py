"""Seconds of sound are charged by scoring and reward, natively and by the Open Inference Protocol."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tritonclient.grpc import InferenceServerClient, InferInput
from tritonclient.utils import InferenceServerException

from services.client import AudioClient
from services.errors import QuotaExceededError
from services.runtime.tokens import new_token, token_digest
from tests.services.reward import serving as reward
from tests.services.scoring import serving as scoring
from tests.tiny import tiny_clap, tiny_reward

TOKEN = new_token()
PROMPT = "a dog barks"
RATE = 16_000


@contextmanager
def served(name: str, folder: Path) -> Iterator[str]:
    """Serve tiny models to one caller, who may use three seconds of sound a minute; yield the address."""
    callers = folder / "callers.toml"
    callers.write_text(f"[callers.studio]\ntokens = ['{token_digest(TOKEN)}']\nwork_per_minute = 3\n")
    if name == "scoring":
        uri = f"file:{scoring.save_tiny_clap(folder / 'clap', 0)}"
        with scoring.serving({"a": uri}, callers_file=callers) as one:
            yield one.hosted.target
    else:
        with reward.serving(tiny_reward(tiny_clap()), callers_file=callers) as other:
            yield other.target


def tensors(seconds: int) -> list[Any]:
    """Return the inputs of one pair."""
    sound = 0.1 * np.sin(np.arange(seconds * RATE, dtype=np.float32))[None]
    found = []
    for name, kind, value in (
        ("PROMPT", "BYTES", np.array([[PROMPT.encode()]], dtype=object)),
        ("AUDIO", "FP32", sound),
        ("SAMPLE_RATE", "INT32", np.array([[RATE]], dtype=np.int32)),
    ):
        one = InferInput(name, list(value.shape), kind)
        one.set_data_from_numpy(value)
        found.append(one)
    return found


@pytest.mark.parametrize("name", ["scoring", "reward"])
def test_seconds_of_sound_are_charged(name: str, tmp_path: Path) -> None:
    sound = (0.1 * np.sin(np.arange(RATE, dtype=np.float32)), RATE)
    with served(name, tmp_path) as target:
        with AudioClient(**{name: target}, token=TOKEN, retries=0) as client:  # type: ignore[arg-type]
            call: Any = client.score_audio if name == "scoring" else client.compute_rewards
            call([(PROMPT, sound)] * 2)
            with pytest.raises(QuotaExceededError, match="3 work units a minute") as caught:
                call([(PROMPT, sound)] * 2)
            assert 10 < caught.value.retry_after <= 20
        triton = InferenceServerClient(target)
        headers = {"authorization": f"Bearer {TOKEN}"}
        model = "clap" if name == "scoring" else "reward"
        with pytest.raises(InferenceServerException, match="3 work units a minute") as refused:
            triton.infer(model, tensors(2), headers=headers)
        assert refused.value.status() == "StatusCode.RESOURCE_EXHAUSTED"
        with pytest.raises(InferenceServerException, match="takes calls only from callers"):
            triton.infer(model, tensors(2))
        assert triton.is_server_ready()
        triton.close()
