"""Ask a language model that takes audio: does the clip contain what its prompt says?

    --set questions.base_url=http://localhost:8000/v1 --set questions.model=qwen-audio

As in AQAScore, the answer's probability counts, not its text: the score of a clip is the probability of Yes
as a share of Yes and No, in the distribution over the answer's first token. Endpoints that return no
probabilities give 1 or 0. Any endpoint for OpenAI's chat completions with ``input_audio``; answers are cached
on disk by the digest of the request.

Written after the paper's description and tested against a stub; no model that takes audio was available.
"""

import base64
import io
import json
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import numpy as np
import soundfile
from numpy.typing import NDArray

from services.errors import MilongaError
from training.data.store import digest_of_value, write_json
from training.preferences.llm import ChatEndpoint, LLMConfig
from training.preferences.perturbation import BadAnswerError

QUESTION: Final = 'Does this sound match the description "{prompt}"? Answer with Yes or No only.'
YES: Final = ("yes",)
NO: Final = ("no",)
TOP: Final = 20
"""Alternatives of the first token that are asked for: the most that OpenAI's API gives."""
VERSION: Final = 1
"""Of the question; cached answers are bound to it."""

Waveform = tuple[NDArray[np.float32], int]
"""Samples [N] in [-1, 1], and their rate in hertz."""


class AudioQuestions:
    """Scores clips by the answers of an endpoint. Thread-safe."""

    def __init__(self, config: LLMConfig, cache: Path) -> None:
        """Raises `InvalidInputError` if address or model are missing, or a folder is given."""
        self._endpoint, self._cache, self._parallel = ChatEndpoint(config), cache, config.in_flight

    @property
    def digest(self) -> str:
        """Return a digest of the model's name and of the question."""
        return digest_of_value([VERSION, self._endpoint.model, QUESTION])

    def scores(self, prompts: Sequence[str], clips: Sequence[Waveform]) -> list[float]:
        """Return the score of each clip, 0 to 1; NaN where the answer is neither Yes nor No.

        Raises `ServiceUnavailableError` or `MilongaError` where the endpoint refuses; answers are kept.
        """
        with ThreadPoolExecutor(self._parallel) as pool:
            return list(pool.map(self._score, prompts, clips))

    def _score(self, prompt: str, clip: Waveform) -> float:
        body = request_body(self._endpoint.model, prompt, clip)
        path = self._cache / f"{digest_of_value([VERSION, body])}.json"
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))["score"]
        except (OSError, ValueError, KeyError, TypeError):
            try:
                kept = yes_share(self._endpoint.ask(body))
            except BadAnswerError:
                return math.nan
            write_json(path, {"score": kept})
        return math.nan if kept is None else float(kept)


def request_body(model: str, prompt: str, clip: Waveform) -> dict[str, Any]:
    """Return the request for a clip: its sound as WAV, the question, one token with its alternatives."""
    buffer = io.BytesIO()
    soundfile.write(buffer, clip[0], clip[1], format="WAV", subtype="PCM_16")
    sound = base64.b64encode(buffer.getvalue()).decode()
    return {
        "model": model,
        "temperature": 0.0,
        "max_tokens": 1,
        "logprobs": True,
        "top_logprobs": TOP,
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "input_audio", "input_audio": {"data": sound, "format": "wav"}},
                    {"type": "text", "text": QUESTION.format(prompt=prompt)},
                ],
            }
        ],
    }


def yes_share(answer: Any) -> float | None:
    """Return the probability of Yes as a share of Yes and No; None if the answer is neither.

    Tokens count in any case, and with white space or punctuation around them. Raises `MilongaError` if the
    answer is no completion.
    """
    try:
        choice = answer["choices"][0]
        content = (choice.get("logprobs") or {}).get("content") or []
        text = str(choice["message"]["content"] or "")
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise MilongaError(f"the endpoint's answer is no chat completion: {str(answer)[:120]}") from error
    if content:
        alternatives: Sequence[Mapping[str, Any]] = content[0].get("top_logprobs") or content
        yes, no = (
            sum(math.exp(float(one["logprob"])) for one in alternatives if _plain(one["token"]) in words)
            for words in (YES, NO)
        )
        return yes / (yes + no) if yes + no else None
    words = _plain(text.split()[0]) if text.split() else ""
    return 1.0 if words in YES else 0.0 if words in NO else None


def _plain(token: object) -> str:
    return str(token).strip(" \t\n.,!?\"'*▁Ġ").lower()
