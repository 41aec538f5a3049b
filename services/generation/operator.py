"""The rpc of OperatorService: check the token, switch, encode."""

import hmac
from typing import TYPE_CHECKING, Any

import grpc.aio

from milonga.v1 import operator_pb2 as pb
from milonga.v1 import operator_pb2_grpc as rpc
from services.errors import FieldViolation, InvalidInputError, UnauthenticatedError
from services.weights.uri import ModelURI
from services.wire import write_duration, write_version

if TYPE_CHECKING:
    from services.generation.slot import EngineSlot

SERVICE_NAME: str = pb.DESCRIPTOR.services_by_name["OperatorService"].full_name

Context = grpc.aio.ServicerContext[Any, Any]


class OperatorServicer(rpc.OperatorServiceServicer):
    """Lets a caller with the token switch the model of a slot. Exceptions are mapped by the interceptor."""

    def __init__(self, slot: "EngineSlot", token: str) -> None:
        self._slot = slot
        self._check_token = TokenCheck(token)

    async def SwitchModel(self, request: pb.SwitchModelRequest, context: Context) -> pb.SwitchModelResponse:
        """See operator.proto."""
        self._check_token(context)
        switch = await self._slot.switch(read_uri(request.model_uri))
        return pb.SwitchModelResponse(
            previous=write_version(switch.previous),
            current=write_version(switch.current),
            elapsed=write_duration(switch.seconds),
        )


class TokenCheck:
    """Checks whether a caller is the operator."""

    def __init__(self, token: str) -> None:
        self._expected = f"Bearer {token}".encode()

    def __call__(self, context: Context) -> None:
        """Raise `UnauthenticatedError` unless the call's metadata have the token."""
        given = dict(context.invocation_metadata() or ()).get("authorization", "")
        # In constant time: its duration shows nothing of the token.
        if not hmac.compare_digest(given if isinstance(given, bytes) else given.encode(), self._expected):
            raise UnauthenticatedError(
                "the operator's token is missing or wrong; send the service's as authorization: Bearer TOKEN"
            )


def read_uri(text: str) -> ModelURI:
    """Parse a model URI of a request. Violations name its field, `model_uri`."""
    try:
        return ModelURI.parse(text)
    except InvalidInputError as error:
        faults = (FieldViolation("model_uri", fault.description) for fault in error.violations)
        raise InvalidInputError(*faults) from error
