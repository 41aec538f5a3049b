import base64

import grpc
import pytest
import torch
from google.rpc import error_details_pb2

from services import errors
from services.errors import FieldViolation, InvalidInputError, MilongaError, QueueFullError
from services.runtime.status import STATUS_CODES, from_status, status_code, to_status

VIOLATIONS = (FieldViolation("prompt", "is empty"), FieldViolation("duration", "is 0 s"))


def _example(kind: type[MilongaError]) -> MilongaError:
    if kind is InvalidInputError:
        return InvalidInputError(*VIOLATIONS)
    if issubclass(kind, QueueFullError):
        return kind("64 clips wait", retry_after=1.5)
    return kind("it says why")


def test_every_class_of_the_tree_has_a_code() -> None:
    tree = {
        kind
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, MilongaError) and kind is not MilongaError
    }
    assert tree == set(STATUS_CODES)


@pytest.mark.parametrize("kind", STATUS_CODES)
def test_an_error_crosses_the_wire(kind: type[MilongaError]) -> None:
    sent = _example(kind)
    rich = to_status(sent, "id-1")
    got = from_status(status_code(sent), rich.message, rich.SerializeToString())
    assert type(got) is kind
    assert str(got) == str(sent)


def test_all_violations_and_the_delay_arrive() -> None:
    rich = to_status(InvalidInputError(*VIOLATIONS), "id-1")
    got = from_status(grpc.StatusCode.INVALID_ARGUMENT, rich.message, rich.SerializeToString())
    assert isinstance(got, InvalidInputError)
    assert got.violations == VIOLATIONS
    rich = to_status(QueueFullError("full", retry_after=1.5), "id-1")
    full = from_status(grpc.StatusCode.RESOURCE_EXHAUSTED, rich.message, rich.SerializeToString())
    assert isinstance(full, QueueFullError)
    assert full.retry_after == 1.5


def test_a_delay_of_zero_does_not_invite_hammering() -> None:
    rich = to_status(QueueFullError("full", retry_after=0.0), "id-1")
    retry = error_details_pb2.RetryInfo()
    assert any(detail.Unpack(retry) for detail in rich.details if detail.Is(retry.DESCRIPTOR))
    assert retry.retry_delay.ToMilliseconds() == 1


@pytest.mark.parametrize("error", [MemoryError("/secret"), torch.OutOfMemoryError("CUDA out of memory")])
def test_memory_that_is_short_anywhere_is_no_internal_error(error: Exception) -> None:
    rich = to_status(error, "id-1")
    assert status_code(error) is grpc.StatusCode.RESOURCE_EXHAUSTED
    got = from_status(status_code(error), rich.message, rich.SerializeToString())
    assert isinstance(got, errors.TooLargeError)
    assert "secret" not in str(got)


def test_memory_of_the_cpu_is_known_by_its_message() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(10**15)
    assert errors.is_out_of_memory(caught.value)
    assert not errors.is_out_of_memory(RuntimeError("CUDA error"))


def test_our_own_fault_tells_the_request_id_and_nothing_else() -> None:
    rich = to_status(RuntimeError("/secret/path: prompt of another"), "id-1")
    assert rich.code == grpc.StatusCode.INTERNAL.value[0]
    assert "secret" not in str(rich)
    assert "id-1" in rich.message
    got = from_status(grpc.StatusCode.INTERNAL, rich.message, rich.SerializeToString())
    assert type(got) is MilongaError


def test_long_texts_fit_into_headers() -> None:
    assert len(to_status(errors.ModelFormatError("x" * 100_000), "id-1").message) == 1000


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.UNAVAILABLE, errors.ServiceUnavailableError),
        (grpc.StatusCode.DEADLINE_EXCEEDED, errors.DeadlineExceededError),
        (grpc.StatusCode.CANCELLED, errors.RequestCancelledError),
        (grpc.StatusCode.INVALID_ARGUMENT, InvalidInputError),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, MilongaError),  # a message over the size limit
        (grpc.StatusCode.UNIMPLEMENTED, MilongaError),
        (grpc.StatusCode.PERMISSION_DENIED, errors.PermissionDeniedError),
    ],
)
@pytest.mark.parametrize("details", [None, b"\xff not a status"])
def test_statuses_of_others_are_understood_by_their_code(
    code: grpc.StatusCode, kind: type[MilongaError], details: bytes | None
) -> None:
    got = from_status(code, "a\nproxy says", details)
    assert type(got) is kind
    assert "a proxy says" in str(got)


def test_of_very_many_violations_the_first_are_told_and_how_many_there_are_besides() -> None:
    """Trailers have to fit into the 8 KiB of headers that gRPC clients take."""
    violations = [
        FieldViolation(f"pairs[{i}].clip.audio", "is empty; send an encoded clip") for i in range(192)
    ]
    found = to_status(InvalidInputError(*violations), "r")
    assert len(base64.b64encode(found.SerializeToString())) + len(found.message) < 7_000
    error = from_status(grpc.StatusCode.INVALID_ARGUMENT, "", found.SerializeToString())
    assert isinstance(error, InvalidInputError)
    *told, last = error.violations
    assert list(told) == violations[: len(told)] and len(told) > 20
    assert last.field == violations[len(told)].field
    assert f"{192 - len(told) - 1} more" in last.description
