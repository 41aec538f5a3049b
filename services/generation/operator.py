"""The rpc of OperatorService: decode, switch, encode; and which models an operator may switch to."""

import asyncio
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Final

import grpc.aio

from milonga.v1 import operator_pb2 as pb
from milonga.v1 import operator_pb2_grpc as rpc
from services.api.model import ModelSwitch
from services.errors import FieldViolation, InvalidInputError, ModelFormatError, invalid
from services.generation.settings import GenerationSettings
from services.models.manifest import MANIFEST_NAME
from services.weights.uri import ModelURI
from services.wire import write_duration, write_version

if TYPE_CHECKING:
    from services.generation.slot import EngineSlot

SERVICE_NAME: str = pb.DESCRIPTOR.services_by_name["OperatorService"].full_name

_SYSTEM: Final = ("/dev", "/proc", "/sys")
"""Folders whose files are none."""
_MODEL_FILES: Final = (MANIFEST_NAME, "model_index.json")

Context = grpc.aio.ServicerContext[Any, Any]


class OperatorServicer(rpc.OperatorServiceServicer):
    """Changes what a slot serves. The interceptor admits only operators, and maps exceptions."""

    def __init__(self, switcher: "Switcher") -> None:
        self._switcher = switcher

    async def SwitchModel(self, request: pb.SwitchModelRequest, context: Context) -> pb.SwitchModelResponse:
        """See operator.proto."""
        switch = await self._switcher.switch(request.model_uri)
        return pb.SwitchModelResponse(
            previous=write_version(switch.previous),
            current=write_version(switch.current),
            elapsed=write_duration(switch.seconds),
        )


class Switcher:
    """Switches the model of a slot on behalf of an operator."""

    def __init__(self, slot: "EngineSlot", settings: GenerationSettings) -> None:
        self._slot, self._timeout = slot, settings.switch_timeout_seconds
        self._allowed = settings.operator_uris

    async def switch(self, text: str) -> ModelSwitch:
        """Switch to the model of a URI.

        Raises:
            InvalidInputError: it is none, or the settings do not allow it.
            MilongaError: as `EngineSlot.switch`.
        """
        uri = await asyncio.to_thread(read_uri, text, self._allowed)
        return await self._slot.switch(uri, self._timeout)


def read_uri(text: str, allowed: Sequence[str]) -> ModelURI:
    """Parse the model URI of an operator.

    Raises:
        InvalidInputError: it is none, or is not `allowed`; of the field `model_uri`.
    """
    try:
        uri = ModelURI.parse(text)
    except InvalidInputError as error:
        faults = (FieldViolation("model_uri", fault.description) for fault in error.violations)
        raise InvalidInputError(*faults) from error
    if uri.scheme == "file":
        _check_folder(uri.path, [one.removeprefix("file:") for one in allowed if one.startswith("file:")])
        return uri
    location = "mini" if uri.scheme == "embedded" else text.partition("#")[0]
    if not any(_begins(location, one) for one in allowed):
        raise _refusal(text, f"which operators may not load here; allowed are {', '.join(allowed)}")
    return uri


def _begins(location: str, beginning: str) -> bool:
    """Return whether a URI begins with another one, at the end of a name."""
    rest = location.removeprefix(beginning)
    return location.startswith(beginning) and (beginning[-1] in ":/" or not rest or rest[0] in "/@")


def _check_folder(text: str, roots: Sequence[str]) -> None:
    """Raise `InvalidInputError` unless a path names a folder below one of `roots`, without detours."""
    path = PurePosixPath(text)
    if not path.is_absolute() or ".." in path.parts:
        raise _refusal(text, "which must be an absolute path without ..")
    found = Path(text).resolve()
    inside = any(found.is_relative_to(Path(root).resolve()) for root in roots)
    if not inside or any(found.is_relative_to(system) for system in _SYSTEM):
        known = ", ".join(f"file:{root}" for root in roots) or "no folders"
        raise _refusal(text, f"which operators may not load here; allowed are {known}")
    if found.exists() and not found.is_dir():
        raise _refusal(text, "which is no folder")
    if found.is_dir() and not any((found / name).is_file() for name in _MODEL_FILES):
        # Every file of a folder is hashed before it is loaded: not of any folder.
        raise ModelFormatError(f"model: {found} is no model folder: it has no {' or '.join(_MODEL_FILES)}")


def _refusal(text: str, reason: str) -> InvalidInputError:
    return invalid("model_uri", f"is {text[:80]!r}, {reason}")
