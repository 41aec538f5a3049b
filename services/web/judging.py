"""Scores, rewards and captions of sounds by HTTP.

Sounds are base64 in JSON, or one file as the whole body: ``curl --data-binary @clip.wav -H "Content-Type:
audio/wav" 'localhost:8080/v1/audio/scores?prompt=A+dog+barks'``.
"""

import asyncio
import base64
import re
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema

from services.api.captioning import Caption
from services.api.explanation import Explanation
from services.api.model import ModelVersion
from services.api.scoring import REWARD, Reward, Scores
from services.client.clients import AsyncAudioClient
from services.errors import FieldViolation, InvalidInputError, UnsupportedError, invalid
from services.web.backend import Backend, caller_of, while_connected
from services.web.problems import check_query
from services.web.settings import WebSettings
from services.web.versions import openai_model, version_of
from services.web.waiting import WaitingRoom
from services.wire import read_version

B = TypeVar("B", bound=BaseModel)
T = TypeVar("T")


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)


def _decode(value: object) -> bytes:
    if not isinstance(value, str):
        raise ValueError("must be a file's content as text in base64")
    try:
        return base64.b64decode("".join(value.split()), validate=True)
    except ValueError as error:
        raise ValueError(f"must be base64: {error}") from error


SoundFile = Annotated[bytes, BeforeValidator(_decode), WithJsonSchema({"type": "string", "format": "base64"})]
"""A file's content, in base64 in JSON."""


class PairBody(_Body):
    """A prompt and a sound."""

    prompt: str
    """Description of the sound."""
    audio: SoundFile
    """The file in base64: WAV, FLAC, OGG, MP3 or AIFF."""


class ScoresBody(_Body):
    """Pairs to score by CLAP."""

    pairs: Annotated[list[PairBody], Field(min_length=1)]
    """The pairs."""
    scorers: list[str] | None = None
    """Names of the scorers. Default: all."""


class RewardsBody(_Body):
    """Pairs to score by the reward model."""

    pairs: Annotated[list[PairBody], Field(min_length=1)]
    """The pairs."""


class CaptionsBody(_Body):
    """Sounds to describe."""

    clips: Annotated[list[SoundFile], Field(min_length=1)]
    """Files in base64: WAV, FLAC, OGG, MP3 or AIFF."""
    beams: list[int] | None = None
    """Numbers of beams, each of which gives a candidate. Default: the captioner's."""
    refine: bool | None = None
    """Whether CLAP chooses among the candidates. Default: if there is a scorer."""
    max_candidates: int | None = None
    """Maximum number of candidates in the answer. Default: all."""


class ExplanationBody(_Body):
    """A clip whose prompt to explain: one that is made, or `audio`."""

    prompt: str
    """Description of the clip."""
    audio: SoundFile | None = None
    """The clip's file in base64. Default: a clip that is made of the prompt."""
    method: str | None = None
    """Name of a method of the served model. Default: its first."""
    seed: int | None = None
    """Seed of the noise. Default: drawn."""
    audio_length: float | None = None
    """Length of a clip that is made, in seconds. Default: the model's."""
    num_inference_steps: int | None = None
    """Number of denoising steps. Default: the model's."""
    guidance_scale: float | None = None
    """Scale of classifier-free guidance. Default: the model's."""
    iterations: int | None = None
    """Most iterations of a method that learns."""


def _documented(body: type[BaseModel]) -> dict[str, Any]:
    """Return what OpenAPI says of a body that `_read` reads."""
    schema = body.model_json_schema(ref_template="#/components/schemas/{model}")
    schema.pop("$defs", None)
    return {
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": schema}, "audio/*": {"schema": {"type": "string"}}},
        }
    }


_SCORES, _REWARDS, _CAPTIONS = (_documented(body) for body in (ScoresBody, RewardsBody, CaptionsBody))
_EXPLANATION = _documented(ExplanationBody)


def router(backend: Backend, settings: WebSettings, room: WaitingRoom) -> APIRouter:
    """Return the endpoints that judge sounds, also those whose service has no address: they say so."""
    routes = APIRouter()

    async def call(request: Request, service: str, attempt: Callable[[], Awaitable[T]]) -> T:
        """Return the result of a call; violations name the fields of the body."""
        try:
            return await while_connected(request, room.enter((*caller_of(request), service), attempt))
        except InvalidInputError as error:
            raise InvalidInputError(
                *(FieldViolation(_field(one.field), one.description) for one in error.violations)
            ) from error

    @routes.post("/v1/audio/scores", openapi_extra=_SCORES)
    async def scores(request: Request) -> dict[str, Any]:
        """Return CLAP scores of prompts and sounds."""
        _require(settings.scoring, "scoring")
        body = await _read(request, ScoresBody)
        client, pairs = backend.client_of(request), [(pair.prompt, pair.audio) for pair in body.pairs]
        return _scores(
            await call(request, "scoring", partial(client.score_audio, pairs, scorers=body.scorers))
        )

    @routes.post("/v1/audio/rewards", openapi_extra=_REWARDS)
    async def rewards(request: Request) -> dict[str, Any]:
        """Return how well a listener would like sounds as answers to prompts."""
        _require(settings.reward, "reward")
        body = await _read(request, RewardsBody)
        client, pairs = backend.client_of(request), [(pair.prompt, pair.audio) for pair in body.pairs]
        found = await call(request, REWARD, partial(client.compute_rewards, pairs))
        return {"model": version_of(found.model), "rewards": [_reward(one) for one in found.rewards]}

    @routes.post("/v1/audio/captions", openapi_extra=_CAPTIONS)
    async def captions(request: Request) -> dict[str, Any]:
        """Describe sounds in a sentence."""
        _require(settings.captioning, "captioning")
        body = await _read(request, CaptionsBody)
        attempt = partial(
            backend.client_of(request).caption_audio,
            body.clips,
            beams=body.beams,
            refine=body.refine,
            max_candidates=body.max_candidates,
        )
        found = await call(request, "captioning", attempt)
        return {
            "model": version_of(found.model),
            "scorer": None if found.scorer is None else found.scorer.name,
            "captions": [_caption(one) for one in found.captions],
        }

    @routes.post("/v1/audio/explanations", openapi_extra=_EXPLANATION)
    async def explanations(request: Request) -> dict[str, Any]:
        """Return how much each frame of a clip owes to each word of its prompt."""
        _require(settings.explanation, "explanation")
        body = await _read(request, ExplanationBody)
        attempt = partial(
            backend.client_of(request).explain_audio,
            body.prompt,
            clip=body.audio,
            method=body.method,
            seed=body.seed,
            duration=body.audio_length,
            num_inference_steps=body.num_inference_steps,
            guidance_scale=body.guidance_scale,
            iterations=body.iterations,
            encoding="flac",
        )
        return _explanation(await call(request, "explanation", attempt))

    return routes


async def served(client: AsyncAudioClient, settings: WebSettings) -> list[dict[str, Any]]:
    """Return the models of the services that have an address and judge sounds, in the shape of OpenAI."""
    found: list[tuple[ModelVersion, str]] = []
    if settings.scoring:
        listed = await client.list_scorers()
        found += [(read_version(one.model), "scoring") for one in listed.scorers]
    if settings.reward:
        found.append((read_version((await client.get_reward_model()).model), REWARD))
    if settings.captioning:
        found.append((read_version((await client.get_captioner()).model), "captioning"))
    if settings.explanation:
        found.append(((await client.get_explainer()).generation.model, "explanation"))
    return [openai_model(version, kind) for version, kind in found]


def _require(address: str | None, service: str) -> None:
    if not address:
        raise UnsupportedError(f"this web door has no {service} service; start it with --{service} HOST:PORT")


async def _read(request: Request, kind: type[B]) -> B:
    """Return the body of a request: JSON, or one file with a prompt in the query."""
    content = await request.body()
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media.startswith("audio/") or media == "application/octet-stream":
        return _of_file(content, request, kind)
    check_query(request)
    if media != "application/json":
        shown = repr(media[:60]) if media else "missing"
        raise invalid("Content-Type", f"is {shown}, must be application/json, or audio/wav for a file")
    try:
        return await asyncio.to_thread(kind.model_validate_json, content)
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from error


def _of_file(content: bytes, request: Request, kind: type[B]) -> B:
    """Return the body of a file; for captions it has no prompt. Raises `InvalidInputError`."""
    needs_prompt = kind is not CaptionsBody
    check_query(request, *(["prompt"] if needs_prompt else []))
    prompt = request.query_params.get("prompt")
    if prompt is None:
        if needs_prompt:
            raise invalid("prompt", "is missing; give it in the query")
        return kind.model_construct(clips=[content])
    if kind is ExplanationBody:
        return kind.model_construct(prompt=prompt, audio=content)
    return kind.model_construct(pairs=[PairBody.model_construct(prompt=prompt, audio=content)])


def _field(field: str) -> str:
    """Return the body's name of a field of the wire: a pair's ``audio``, and ``clips[0]``."""
    names = {"duration": "audio_length", "clip": "audio", "clip.audio": "audio"}
    if field in names:
        return names[field]
    if field.startswith("clips["):
        return field.removesuffix(".audio")
    return re.sub(r"\.clip(\.audio)?$", ".audio", field)


def _scores(found: Scores) -> dict[str, Any]:
    names = [scorer.name for scorer in found.scorers]
    return {
        "scorers": [{"name": one.name, "model": version_of(one.model)} for one in found.scorers],
        "scores": [
            {
                "values": {
                    name: value if known else None
                    for name, value, known in zip(names, row, readable, strict=True)
                },
                "warnings": list(warnings),
            }
            for row, readable, warnings in zip(
                found.values.tolist(), found.readable.tolist(), found.warnings, strict=True
            )
        ],
    }


def _reward(one: Reward) -> dict[str, Any]:
    return {
        "logit": one.logit if one.readable else None,
        "probability": one.probability if one.readable else None,
        "warnings": list(one.warnings),
    }


def _explanation(one: Explanation) -> dict[str, Any]:
    return {
        "model": version_of(one.model),
        "method": one.method,
        "seed": one.seed,
        "frame_seconds": one.frame_seconds,
        "words": [
            {"word": word, "peak": peak, "values": row}
            for word, peak, row in zip(one.words, one.peaks(), one.matrix_WT.tolist(), strict=True)
        ],
        "audio": base64.b64encode(one.clip.audio).decode(),
        "content_type": "audio/flac",
        "warnings": list(one.warnings),
    }


def _caption(one: Caption) -> dict[str, Any]:
    candidates: Sequence[dict[str, Any]] = [
        {
            "text": candidate.text,
            "beams": candidate.beams,
            "log_probability": candidate.log_probability,
            "clap_score": candidate.clap_score,
        }
        for candidate in one.candidates
    ]
    return {"text": one.text, "candidates": candidates, "warnings": list(one.warnings)}
