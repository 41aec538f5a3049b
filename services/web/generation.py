"""Clips by HTTP: the two shapes of `shapes`, as a file or as server-sent events."""

import asyncio
import base64
import json
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Final

from fastapi import APIRouter, Query, Request, Response
from starlette.responses import StreamingResponse

from services.api.generation import (
    Clip,
    Finished,
    Generation,
    GenerationModel,
    Preview,
    Progress,
    Queued,
    Update,
    finished_generation,
)
from services.api.model import ModelVersion
from services.client.clients import AsyncAudioClient
from services.errors import InvalidInputError, MilongaError, invalid
from services.provenance import check_signable
from services.web import judging
from services.web.backend import Backend, begin, caller_of, renamed, while_connected
from services.web.problems import check_query, problem, respond
from services.web.settings import WebSettings
from services.web.shapes import CONTENT_TYPES, AudioGenerateRequest, Plan, SoundGenerationRequest
from services.web.versions import openai_model, version_of
from services.web.waiting import WaitingRoom

if TYPE_CHECKING:
    from services.provenance.signing import ClipSigner

HEARTBEAT_SECONDS: Final = 15.0
"""Time without an event after which a comment is sent, so that proxies keep the connection."""
_MAX_HEADER: Final = 2000
"""Maximum length of the header of warnings."""
_LEAST_TEXT: Final = 40
"""Length below which a cut warning says nothing."""

_AUDIO: Final[dict[int | str, dict[str, Any]]] = {
    200: {"content": {kind: {} for kind in dict.fromkeys(CONTENT_TYPES.values())}, "description": "The clip."}
}


def router(
    backend: Backend, settings: WebSettings, signer: "ClipSigner | None", room: WaitingRoom
) -> APIRouter:
    """Return the endpoints that make clips."""
    routes = APIRouter()

    async def answer(
        request: Request, shape: AudioGenerateRequest | SoundGenerationRequest, *query: str
    ) -> Response:
        check_query(request, *query)
        client = backend.client_of(request)
        plan = _checked(shape.plan(await client.get_model()), signer)
        line = (*caller_of(request), "generation")
        entered = room.enter(line, partial(_begin, client, plan))
        begun: tuple[Update, AsyncGenerator[Update, None]] = await while_connected(request, entered)
        first, updates = begun
        if signer is not None:
            updates = _signing(updates, plan, signer)
        if _wants_events(request, shape):
            headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
            events = _events(first, updates, plan)
            return StreamingResponse(events, headers=headers, media_type="text/event-stream")
        return _file(await while_connected(request, _collected(updates)), plan)

    @routes.post("/v1/audio/generate", response_class=Response, responses=_AUDIO)
    async def generate(body: AudioGenerateRequest, request: Request) -> Response:
        """Make a clip of a prompt, in the shape of vLLM-Omni."""
        return await answer(request, body)

    @routes.post("/v1/sound-generation", response_class=Response, responses=_AUDIO)
    async def sound_generation(
        body: SoundGenerationRequest,
        request: Request,
        output_format: Annotated[str | None, Query(description="As the field of the body.")] = None,
    ) -> Response:
        """Make a clip of a prompt, in the shape of ElevenLabs."""
        if output_format is not None:
            if body.output_format not in (None, output_format):
                raise invalid("output_format", "differs between query and body; give it once")
            body = body.model_copy(update={"output_format": output_format})
        return await answer(request, body, "output_format")

    @routes.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        """List the served models, in the shape of OpenAI."""
        client = backend.client_of(request)
        found = [_generator(await client.get_model()), *await judging.served(client, settings)]
        return {"object": "list", "data": found}

    return routes


async def _begin(client: AsyncAudioClient, plan: Plan) -> tuple[Update, AsyncGenerator[Update, None]]:
    """Return the first event of a call, once the service has taken it, and what yields the others."""
    try:
        return await begin(client, plan.prompt, **plan.options)
    except InvalidInputError as error:
        raise renamed(error, plan.names) from error


async def _collected(updates: AsyncGenerator[Update, None]) -> Generation:
    """Return the clips of a call. When the client goes away, it is cancelled."""
    clips: list[Clip] = []
    async with aclosing(updates):
        async for update in updates:
            if isinstance(update, Clip):
                clips.append(update)
            elif isinstance(update, Finished):
                return finished_generation(clips, update)
    raise MilongaError("the generation service ended the call without a result")


def _file(made: Generation, plan: Plan) -> Response:
    clip = made.clips[0]
    kind = CONTENT_TYPES[clip.encoding]
    if clip.encoding == "linear16":
        kind = f"{kind}; rate={clip.sampling_rate}; channels=1"
    return Response(clip.audio, media_type=kind, headers=_headers(made, clip, plan))


def _checked(plan: Plan, signer: "ClipSigner | None") -> Plan:
    """Return the plan. Raises `InvalidInputError` if its clip is to be signed and can't be."""
    encoding = plan.options.get("encoding")
    if signer is not None and encoding is not None:
        check_signable(plan.names["encoding"], encoding, encoding)
    return plan


async def _signing(
    updates: AsyncGenerator[Update, None], plan: Plan, signer: "ClipSigner"
) -> AsyncGenerator[Update, None]:
    """Yield the events, clips signed. They wait for the last event, which states what made them."""
    clips: list[Clip] = []
    try:
        async for update in updates:
            if isinstance(update, Clip):
                clips.append(update)
                continue
            if isinstance(update, Finished):
                for clip in clips:
                    yield await _signed(clip, plan, update.model, signer)
            yield update
    finally:
        await updates.aclose()


async def _signed(clip: Clip, plan: Plan, model: ModelVersion, signer: "ClipSigner | None") -> Clip:
    if signer is None:
        return clip
    from services.provenance.signing import Origin

    origin = Origin(prompt=plan.prompt, model=model, seed=clip.seed, clip_index=clip.index)
    return replace(clip, audio=await asyncio.to_thread(signer.sign, clip.audio, clip.encoding, origin))


def _headers(made: Generation, clip: Clip, plan: Plan) -> dict[str, str]:
    headers = {
        "X-Seed": str(clip.seed),
        "X-Sample-Rate": str(clip.sampling_rate),
        "X-Duration": f"{clip.duration:g}",
        "X-Model": _ascii(made.model.name),
        "X-Model-Version": _ascii(made.model.version),
        "X-Model-Digest": made.model.digest,
    }
    warnings = [*plan.warnings, *made.warnings]
    if warnings:
        headers["X-Warnings"] = json_header(warnings)
    return headers


def json_header(texts: Sequence[str]) -> str:
    """Return a JSON list of as many texts as a header holds; the last one may be cut."""
    kept: list[str] = []
    for text in texts:
        kept.append(text)
        while len(json.dumps(kept)) > _MAX_HEADER:
            kept[-1] = f"{kept[-1][: len(kept[-1]) * 3 // 4]}…"
            if len(kept[-1]) < _LEAST_TEXT:
                return json.dumps(kept[:-1])
    return json.dumps(kept)


def _ascii(text: str) -> str:
    return text.encode("ascii", "replace").decode()


def _wants_events(request: Request, shape: AudioGenerateRequest | SoundGenerationRequest) -> bool:
    if isinstance(shape, AudioGenerateRequest) and shape.stream_format == "sse":
        return True
    return "text/event-stream" in request.headers.get("accept", "")


async def _events(first: Update, updates: AsyncGenerator[Update, None], plan: Plan) -> AsyncIterator[bytes]:
    """Yield the events; when the client goes away, the call is cancelled."""
    update: Update | None = first
    waiting: asyncio.Task[Update | None] | None = None
    try:
        while update is not None:
            yield _event(*_shown(update, plan))
            waiting = asyncio.create_task(_next(updates))
            while not (await asyncio.wait((waiting,), timeout=HEARTBEAT_SECONDS))[0]:
                yield b": still at work\n\n"
            update, waiting = waiting.result(), None
    except MilongaError as error:
        yield _event("error", problem(error))
    except Exception as error:
        respond(error)  # logs it
        yield _event("error", problem(error))
    finally:
        if waiting is not None:
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
        await updates.aclose()


async def _next(updates: AsyncGenerator[Update, None]) -> Update | None:
    return await anext(updates, None)


def _event(name: str, data: dict[str, Any]) -> bytes:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()


def _shown(update: Update, plan: Plan) -> tuple[str, dict[str, Any]]:
    """Return the name and the data of an event."""
    match update:
        case Queued(position=position):
            return "queued", {"position": position}
        case Progress():
            return "progress", {
                "step": update.step,
                "num_inference_steps": update.num_inference_steps,
                "fraction": update.fraction,
                "seconds_left": update.seconds_left,
            }
        case Preview(step=step):
            return "preview", {"step": step}
        case Clip():
            return "clip", {
                "audio": base64.b64encode(update.audio).decode(),
                "content_type": CONTENT_TYPES[update.encoding],
                "sample_rate": update.sampling_rate,
                "duration": update.duration,
                "seed": update.seed,
            }
        case Finished():
            return "finished", {
                "model": version_of(update.model),
                "warnings": [*plan.warnings, *update.warnings],
                "timings": asdict(update.timings),
                **({"adapter": version_of(update.adapter)} if update.adapter else {}),
            }


def _generator(served: GenerationModel) -> dict[str, Any]:
    limits, defaults = served.limits, served.defaults
    return {
        **openai_model(served.model, "generation"),
        "sample_rate": served.geometry.sampling_rate,
        "limits": {
            "audio_length": [limits.min_duration, limits.max_duration],
            "num_inference_steps": [1, limits.max_steps],
            "guidance_scale": [0, limits.max_guidance_scale],
            "guidance_stop": [0, 1],
            "schedulers": list(limits.schedulers),
            "adapters": list(limits.adapters),
        },
        "profiles": [asdict(one) for one in defaults.profiles],
        "defaults": {
            "audio_length": defaults.duration,
            "num_inference_steps": defaults.num_inference_steps,
            "guidance_scale": defaults.guidance_scale,
            "guidance_stop": defaults.guidance_stop,
            "scheduler": defaults.scheduler,
            "profile": defaults.profile,
        },
    }
