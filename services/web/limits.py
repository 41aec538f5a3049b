"""What a request may take: bytes, time, and a place among others. An ASGI middleware around the app.

A body is received whole before the app runs, so that nothing is done for one that is too large or too slow.
"""

import asyncio
import time
from collections.abc import MutableMapping
from typing import Any, Final

import structlog
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.errors import MilongaError, QueueFullError
from services.web.metrics import WebMetrics
from services.web.problems import CLIENT_GONE, BodyTooLargeError, ForeignOriginError, SlowBodyError, respond
from services.web.settings import WebSettings

log = structlog.get_logger()

AUDIO_PATHS: Final = (
    "/v1/audio/scores",
    "/v1/audio/rewards",
    "/v1/audio/captions",
    "/v1/audio/explanations",
    "/v1/provenance",
)
"""Paths whose bodies have sounds."""
_FORMS: Final = ("", "application/x-www-form-urlencoded")
"""What curl -d says of every body."""
_RETRY_SECONDS: Final = 1.0


class Limits:
    """Bounds every request by the settings, measures it, and logs it."""

    def __init__(self, app: ASGIApp, settings: WebSettings, metrics: WebMetrics) -> None:
        self._app, self._settings, self._metrics = app, settings, metrics
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run one request."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        if scope["type"] != "http":
            return
        start, code = time.monotonic(), CLIENT_GONE
        sending = _Sending(send)
        self._metrics.in_flight.inc()
        try:
            await self._serve(scope, receive, sending)
            code = sending.status or code
        finally:
            self._metrics.in_flight.dec()
            route = getattr(scope.get("route"), "path", "")
            seconds = time.monotonic() - start
            self._metrics.observe(scope["method"], route, code, seconds)
            log.info("request", method=scope["method"], route=route, code=code, seconds=round(seconds, 4))

    async def _serve(self, scope: Scope, receive: Receive, send: "_Sending") -> None:
        body = _Body()
        try:
            try:
                self._check(scope)
                await self._receive(scope, receive, body)
            except MilongaError as error:
                await respond(error)(scope, receive, send)
                return
            if body.gone:
                return
            _name_json(scope, body.content)
            await self._app(scope, body.replayed(receive), send)
        finally:
            self._held -= body.held

    def _check(self, scope: Scope) -> None:
        if self._metrics.in_flight_now > self._settings.max_requests:
            raise QueueFullError("too many requests at a time", retry_after=_RETRY_SECONDS)
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2] != headers.get("host"):
            raise ForeignOriginError(f"pages of {origin[:80]} may not call this server")

    async def _receive(self, scope: Scope, receive: Receive, body: "_Body") -> None:
        """Receive the whole body. Raises `MilongaError` if it is too large or too slow."""
        path: str = scope["path"]
        limit = self._settings.max_audio_bytes if path in AUDIO_PATHS else self._settings.max_body_bytes
        stated = Headers(scope=scope).get("content-length", "0")
        if stated.isdecimal() and int(stated[:20]) > limit:
            raise _too_large(limit)
        try:
            async with asyncio.timeout(self._settings.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        body.gone = True
                        return
                    part: bytes = message.get("body", b"")
                    body.held += len(part)
                    self._held += len(part)
                    if body.held > limit:
                        raise _too_large(limit)
                    if self._held > self._settings.max_held_bytes and body.held:
                        raise QueueFullError("too many bytes at a time", retry_after=_RETRY_SECONDS)
                    body.content += part
                    if not message.get("more_body", False):
                        return
        except TimeoutError as error:
            seconds = self._settings.body_seconds
            raise SlowBodyError(f"the body did not arrive within {seconds:g} s; send it faster") from error


class _Body:
    """A body, and the bytes that count for it."""

    def __init__(self) -> None:
        self.content, self.held, self.gone = bytearray(), 0, False

    def replayed(self, receive: Receive) -> Receive:
        """Return a receiver that yields the body, and then what `receive` yields: the disconnection."""
        messages: list[MutableMapping[str, Any]] = [
            {"type": "http.request", "body": bytes(self.content), "more_body": False}
        ]
        self.content.clear()

        async def next_message() -> Message:
            return messages.pop() if messages else await receive()

        return next_message


class _Sending:
    """Sends messages of a response, and remembers the status."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.status: int | None = None

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        await self._send(message)


def _too_large(limit: int) -> BodyTooLargeError:
    return BodyTooLargeError(f"the body is larger than {limit} bytes; send less")


def _name_json(scope: Scope, content: bytearray) -> None:
    """State that a JSON object is JSON where the client stated nothing, or what curl -d states."""
    headers: list[tuple[bytes, bytes]] = scope["headers"]
    kind = Headers(raw=headers).get("content-type", "").partition(";")[0].strip().lower()
    if kind in _FORMS and content.lstrip().startswith((b"{", b"[")):
        others = [(name, value) for name, value in headers if name != b"content-type"]
        scope["headers"] = [*others, (b"content-type", b"application/json")]
