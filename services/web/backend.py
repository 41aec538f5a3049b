"""The services behind the web door: one client, and one view of it per caller."""

import asyncio
from collections.abc import AsyncGenerator, Mapping
from typing import Any, Final, TypeVar, Unpack, cast

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from starlette.requests import Request

from services.api.generation import GenerationOptions, Update
from services.client.clients import AsyncAudioClient
from services.client.connection import Connection
from services.errors import (
    FieldViolation,
    InvalidInputError,
    MilongaError,
    UnauthenticatedError,
    invalid,
)
from services.runtime.callers import PRIORITY_KEY, Priority
from services.runtime.tokens import check_token
from services.web.problems import ClientGoneError
from services.web.settings import WebSettings

T = TypeVar("T")

_HEALTH_SECONDS: Final = 2.0


class Backend:
    """The services. Belongs to the event loop of its first call."""

    def __init__(self, settings: WebSettings) -> None:
        """Check addresses and files of the settings; nothing connects yet. Raises `InvalidInputError`."""
        self._settings = settings
        self._connection = Connection(settings.addresses, **settings.options)
        self._client = AsyncAudioClient(**settings.addresses, **settings.options)
        other = settings.addresses | {"target": settings.challenger}
        self._challenger = AsyncAudioClient(**other, **settings.options) if settings.challenger else None
        self._health: dict[str, grpc.aio.Channel] = {}

    def client_of(self, request: Request) -> AsyncAudioClient:
        """Return the client that calls for the caller of an HTTP request.

        Raises:
            UnauthenticatedError: the request has no token, and the web door passes on none without.
            InvalidInputError: the token or the priority is none.
        """
        return self.client_for(*caller_of(request))

    def client_for(
        self, token: str | None, priority: Priority = "interactive", *, challenger: bool = False
    ) -> AsyncAudioClient:
        """Return the client that calls for a caller; `challenger`: with the second generation service.

        Raises as `client_of`.
        """
        if token is None and not self._settings.admits_anonymous:
            raise UnauthenticatedError("give your token: Authorization: Bearer TOKEN")
        try:
            client = self._challenger if challenger and self._challenger else self._client
            return client.acting_for(token, priority)
        except InvalidInputError as error:
            raise MilongaError(
                f"this web door can't pass tokens on ({error}); start it with --services-tls, or with "
                "--allow-insecure-token"
            ) from error

    async def health(self) -> dict[str, str]:
        """Return the state of each service that has an address: SERVING, NOT_SERVING or UNREACHABLE."""
        named = {
            "generation" if argument == "target" else argument: address
            for argument, address in self._settings.addresses.items()
            if address
        }
        states = await asyncio.gather(*map(self._state, named.values()))
        return dict(zip(named, states, strict=True))

    async def _state(self, address: str) -> str:
        if address not in self._health:
            self._health[address] = self._connection.open_async_channel(address)
        stub: Any = health_pb2_grpc.HealthStub(self._health[address])
        try:
            response = await stub.Check(health_pb2.HealthCheckRequest(), timeout=_HEALTH_SECONDS)
        except grpc.RpcError:
            return "UNREACHABLE"
        return str(health_pb2.HealthCheckResponse.ServingStatus.Name(response.status))

    async def close(self) -> None:
        """Close the channels; calls in progress are cancelled."""
        for channel in self._health.values():
            await channel.close()
        if self._challenger is not None:
            await self._challenger.close()
        await self._client.close()


def token_of(request: Request) -> str | None:
    """Return the token of a request: a bearer's, or ElevenLabs' ``xi-api-key``."""
    given = request.headers.get("authorization")
    if given is not None:
        scheme, _, token = given.partition(" ")
        if scheme.lower() != "bearer":
            raise UnauthenticatedError("give your token as Authorization: Bearer TOKEN")
        return check_token("authorization", token)
    key = request.headers.get("xi-api-key")
    return None if key is None else check_token("xi-api-key", key)


def caller_of(request: Request) -> tuple[str | None, Priority]:
    """Return by whom, and how urgently, a request is made. Raises as `Backend.client_of`."""
    return token_of(request), _priority(request)


def _priority(request: Request) -> Priority:
    given = request.headers.get(PRIORITY_KEY, "interactive")
    if given not in ("interactive", "batch"):
        raise invalid(PRIORITY_KEY, f"is {given[:40]!r}, must be interactive or batch")
    return cast(Priority, given)


async def begin(
    client: AsyncAudioClient, prompt: str, **options: Unpack[GenerationOptions]
) -> tuple[Update, AsyncGenerator[Update, None]]:
    """Return the first event of a call, once the service has taken it, and what yields the others."""
    updates = client.stream(prompt, **options)
    return await anext(updates), updates


async def while_connected(request: Request, work: "asyncio.Future[T] | Any") -> T:
    """Return the result of `work`, which is cancelled when the client goes away.

    Raises:
        ClientGoneError: the client went away.
    """
    task: asyncio.Future[T] = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnection(request))
    try:
        await asyncio.wait((task, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError("the client went away")
        return task.result()
    finally:
        for one in (task, leaving):
            one.cancel()
        await asyncio.gather(task, leaving, return_exceptions=True)


async def _disconnection(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def renamed(error: InvalidInputError, names: Mapping[str, str]) -> InvalidInputError:
    """Return the error with the fields' names of a shape."""
    return type(error)(
        *(FieldViolation(names.get(one.field, one.field), one.description) for one in error.violations)
    )
