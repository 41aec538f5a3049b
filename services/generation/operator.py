"""The rpc of OperatorService: switch, encode."""

from typing import TYPE_CHECKING, Any

import grpc.aio

from milonga.v1 import operator_pb2 as pb
from milonga.v1 import operator_pb2_grpc as rpc
from services.errors import FieldViolation, InvalidInputError
from services.weights.uri import ModelURI
from services.wire import write_duration, write_version

if TYPE_CHECKING:
    from services.generation.slot import EngineSlot

SERVICE_NAME: str = pb.DESCRIPTOR.services_by_name["OperatorService"].full_name

Context = grpc.aio.ServicerContext[Any, Any]


class OperatorServicer(rpc.OperatorServiceServicer):
    """Changes what a slot serves. The interceptor admits only operators, and maps exceptions."""

    def __init__(self, slot: "EngineSlot") -> None:
        self._slot = slot

    async def SwitchModel(self, request: pb.SwitchModelRequest, context: Context) -> pb.SwitchModelResponse:
        """See operator.proto."""
        switch = await self._slot.switch(read_uri(request.model_uri))
        return pb.SwitchModelResponse(
            previous=write_version(switch.previous),
            current=write_version(switch.current),
            elapsed=write_duration(switch.seconds),
        )


def read_uri(text: str) -> ModelURI:
    """Parse a model URI of a request. Violations name its field, `model_uri`."""
    try:
        return ModelURI.parse(text)
    except InvalidInputError as error:
        faults = (FieldViolation("model_uri", fault.description) for fault in error.violations)
        raise InvalidInputError(*faults) from error
