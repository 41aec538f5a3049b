"""Specify tensors, read them from raw or typed contents, and write them. Pure functions.

Shapes: n rows, one per prompt.
"""

import math
import struct
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from tritonclient.grpc import service_pb2 as pb

from services.errors import FieldViolation, InvalidInputError, UnsupportedError, invalid

Tensors = Mapping[str, NDArray[Any]]
"""Tensors by name. A BYTES tensor is an object array of `bytes`."""

Dims = tuple[str | int, ...]
"""Fixed sizes as numbers, variable ones as names: ``("n", "samples")``."""

BYTES: Final = "BYTES"

_NUMBERS: Final[Mapping[str, tuple[np.dtype[Any], str]]] = {
    "BOOL": (np.dtype("?"), "bool_contents"),
    "FP32": (np.dtype("<f4"), "fp32_contents"),
    "INT32": (np.dtype("<i4"), "int_contents"),
    "INT64": (np.dtype("<i8"), "int64_contents"),
}
"""By datatype: the element type in raw contents, and the field of typed contents."""

_DATATYPES: Final = {kind: datatype for datatype, (kind, _) in _NUMBERS.items()}

_MAX_NAME_CHARACTERS: Final = 80
SHARED_MEMORY: Final = "shared_memory_"
"""Prefix of the parameters of tensors in shared memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSpec:
    """Name, datatype and shape of an input or output tensor."""

    name: str
    """Name in the protocol: ``NUM_INFERENCE_STEPS``."""
    field: str
    """The native API's field, which violations name: ``num_inference_steps``."""
    datatype: str
    """BOOL, BYTES, FP32, INT32 or INT64."""
    dims: Dims
    """Shape, with names for variable sizes."""
    optional: bool = False
    """Whether a request, or a response of a stream, may omit it."""
    one_for_all: bool = False
    """Whether a single row [1] is accepted for any n."""

    @property
    def shape(self) -> list[int]:
        """Shape; variable sizes are -1."""
        return [size if isinstance(size, int) else -1 for size in self.dims]

    @property
    def expected(self) -> str:
        """Datatype and shape as text, for error messages."""
        dims = ", ".join(map(str, self.dims))
        return f"{self.datatype} [{dims}]" + (", or [1] for all" if self.one_for_all else "")


def read_inputs(
    request: pb.ModelInferRequest, specs: Sequence[TensorSpec], max_rows: int
) -> dict[str, NDArray[Any]]:
    """Return the tensors of a request. The first of `specs` determines n; if it is optional, the first given.

    A tensor with more than `max_rows` rows is refused before its contents are read. Blocks for milliseconds
    if contents are large.

    Raises:
        InvalidInputError: tensors are missing, unknown or not as specified; lists every violation.
        UnsupportedError: a tensor is in shared memory.
    """
    known = {spec.name: spec for spec in specs}
    faults: list[FieldViolation] = []
    read: dict[str, NDArray[Any]] = {}
    given: set[str] = set()
    raw = _raw_contents(request)
    for index, tensor in enumerate(request.inputs):
        spec = known.get(tensor.name)
        if spec is None:
            faults.append(_unknown("inputs", tensor.name, known))
        elif tensor.name in given:
            faults.append(FieldViolation(spec.field, f"tensor {spec.name} is given twice; give it once"))
        else:
            given.add(spec.name)
            try:
                read[spec.name] = _read_tensor(tensor, spec, max_rows, None if raw is None else raw[index])
            except InvalidInputError as error:
                faults += error.violations
    faults += _missing(given, specs)
    faults += _row_faults(read, specs)
    if faults:
        raise InvalidInputError(*faults)
    return read


def check_inputs(tensors: Tensors, specs: Sequence[TensorSpec], max_rows: int) -> None:
    """Check tensors that Triton has read as `read_inputs` checks them. Raises `InvalidInputError`."""
    faults = []
    valid: dict[str, NDArray[Any]] = {}
    for spec in specs:
        if (values := tensors.get(spec.name)) is None:
            continue
        datatype = BYTES if values.dtype == object else _DATATYPES.get(values.dtype, str(values.dtype))
        if fault := _form_fault(spec, datatype, values.shape, max_rows):
            faults.append(FieldViolation(spec.field, f"tensor {spec.name} {fault}"))
        else:
            valid[spec.name] = values
    faults += _missing(tensors.keys(), specs)
    faults += _row_faults(valid, specs)
    if faults:
        raise InvalidInputError(*faults)


def read_requested_outputs(request: pb.ModelInferRequest, specs: Sequence[TensorSpec]) -> frozenset[str]:
    """Return the names of the requested outputs; all outputs if the request names none.

    Raises:
        InvalidInputError: the model has no such output.
        UnsupportedError: an output is requested in shared memory, or as classification.
    """
    known = {spec.name: spec for spec in specs}
    for output in request.outputs:
        if _is_shared(output):
            raise _no_shared_memory(output.name)
        if "classification" in output.parameters:
            name = output.name[:_MAX_NAME_CHARACTERS]
            raise UnsupportedError(f"tensor {name!r} is no classification; leave `class_count` out")
    faults = [
        _unknown("outputs", output.name, known) for output in request.outputs if output.name not in known
    ]
    if faults:
        raise InvalidInputError(*faults)
    return frozenset(output.name for output in request.outputs) or frozenset(known)


def write_outputs(
    response: pb.ModelInferResponse, outputs: Tensors, specs: Sequence[TensorSpec], requested: Collection[str]
) -> None:
    """Add the `requested` outputs to `response`, with raw contents as Triton does."""
    for spec in specs:
        values = outputs.get(spec.name)
        if values is not None and spec.name in requested:
            response.outputs.add(name=spec.name, datatype=spec.datatype, shape=values.shape)
            response.raw_output_contents.append(_raw(spec, values))


def texts(tensors: Tensors, spec: TensorSpec) -> tuple[list[str] | None, list[FieldViolation]]:
    """Return a BYTES tensor as text (None if it was omitted), and the violations: rows that are not UTF-8."""
    values = tensors.get(spec.name)
    if values is None:
        return None, []
    decoded: list[str] = []
    faults: list[FieldViolation] = []
    for index, value in enumerate(values.flat):
        try:
            decoded.append(value.decode())
        except UnicodeDecodeError as error:
            decoded.append("")
            field = row_field(spec.field, index, len(values))
            faults.append(
                FieldViolation(
                    field, f"tensor {spec.name} is not UTF-8 from byte {error.start} on; encode text as UTF-8"
                )
            )
    return decoded, faults


def spread(values: Any, n: int) -> list[Any]:
    """Return `values` as a list of length `n`; one value, or None, is repeated."""
    if values is None:
        return [None] * n
    listed = values.flatten().tolist() if isinstance(values, np.ndarray) else list(values)
    return listed if len(listed) == n else listed * n


def decimals(values: NDArray[np.float32] | None) -> list[float] | None:
    """Return FP32 elements as the shortest decimals that round to them.

    So 0.64 equals the native API's double 0.64, and gives the same clip.
    """
    return None if values is None else [float(str(value)) for value in values]


def row_field(field: str, index: int, n: int) -> str:
    """Return the path of a row's field: ``prompt[2]``, or ``prompt`` if there is only one row."""
    return field if n == 1 else f"{field}[{index}]"


def shortened(name: str) -> str:
    """Return a caller's name for a message."""
    return name[:_MAX_NAME_CHARACTERS]


def _is_shared(tensor: Any) -> bool:
    return any(name.startswith(SHARED_MEMORY) for name in tensor.parameters)


def _raw_contents(request: pb.ModelInferRequest) -> Sequence[bytes] | None:
    """Return the raw contents, one per input; None if contents are typed."""
    for tensor in request.inputs:
        if _is_shared(tensor):
            raise _no_shared_memory(tensor.name)
    raw: Sequence[bytes] = request.raw_input_contents
    if not raw:
        return None
    if len(raw) != len(request.inputs):
        raise invalid(
            "raw_input_contents",
            f"has {len(raw)} elements, expected {len(request.inputs)}, one per tensor, or none",
        )
    return raw


def _read_tensor(tensor: Any, spec: TensorSpec, max_rows: int, raw: bytes | None) -> NDArray[Any]:
    """Return one tensor from its raw contents `raw`, or from typed contents if they are None."""

    def refuse(what: str) -> InvalidInputError:
        return invalid(spec.field, f"tensor {spec.name} {what}")

    shape = tuple(tensor.shape)
    if fault := _form_fault(spec, tensor.datatype, shape, max_rows):
        raise refuse(fault)
    count = math.prod(shape)
    if raw is not None and tensor.HasField("contents"):
        raise refuse("has both typed contents and raw_input_contents; give only one of them")
    if tensor.datatype == BYTES:
        elements = list(tensor.contents.bytes_contents) if raw is None else _split(raw, count, refuse)
        if len(elements) != count:
            raise refuse(f"holds {len(elements)} elements, expected {count} by its shape {list(shape)}")
        values = np.empty(count, dtype=object)
        values[:] = elements
        return values.reshape(shape)
    kind, typed = _NUMBERS[tensor.datatype]
    if raw is None:
        numbers = np.array(getattr(tensor.contents, typed), dtype=kind)
        if numbers.size != count:
            raise refuse(
                f"holds {numbers.size} elements in {typed}, expected {count} by its shape {list(shape)}"
            )
        return numbers.reshape(shape)
    if len(raw) != count * kind.itemsize:
        expected = f"expected {count * kind.itemsize}: {tensor.datatype} {list(shape)}"
        raise refuse(f"holds {len(raw)} bytes, {expected}")
    return np.frombuffer(raw, dtype=kind).reshape(shape)


def _split(raw: bytes, count: int, refuse: Any) -> list[bytes]:
    """Return the elements of raw BYTES contents: each preceded by its length, 4 bytes, little-endian."""
    elements: list[bytes] = []
    position = 0
    while position < len(raw):
        if len(elements) == count:
            raise refuse(f"holds more than the {count} elements of its shape")
        start = position + 4
        if start > len(raw):
            raise refuse(f"ends with {len(raw) - position} bytes, expected the 4 bytes of a length")
        (length,) = struct.unpack_from("<I", raw, position)
        position = start + length
        if position > len(raw):
            raise refuse(
                f"has length {length} for element {len(elements)}, but only {len(raw) - start} bytes are left"
            )
        elements.append(raw[start:position])
    return elements


def _row_faults(read: Tensors, specs: Sequence[TensorSpec]) -> Iterator[FieldViolation]:
    """Yield the violations of tensors whose number of rows differs from the first tensor's."""
    leading = next((spec for spec in specs if spec.name in read or not spec.optional), specs[0])
    first = read.get(leading.name)
    for spec in specs:
        rows = len(read[spec.name]) if spec.name in read else None
        if rows is None or first is None or rows == len(first) or (spec.one_for_all and rows == 1):
            continue
        yield FieldViolation(
            spec.field,
            f"tensor {spec.name} has {rows} rows, expected {len(first)}, as many as {leading.name}"
            + (", or 1" if spec.one_for_all else ""),
        )


def _form_fault(spec: TensorSpec, datatype: str, shape: tuple[int, ...], max_rows: int) -> str:
    """Return the error of a tensor's datatype or shape; an empty string if both are as specified."""
    if datatype != spec.datatype:
        return f"has datatype {datatype[:_MAX_NAME_CHARACTERS] or '(none)'}, expected {spec.expected}"
    fixed = all(size in (actual, -1) for size, actual in zip(spec.shape, shape, strict=False))
    if len(shape) != len(spec.dims) or min(shape, default=0) < 0 or not fixed:
        return f"has shape {list(shape[:8])}, expected {spec.expected}"
    if not 1 <= shape[0] <= max_rows:
        return f"has {shape[0]} rows, expected between 1 and {max_rows}; split them into several requests"
    return ""


def _missing(given: Collection[str], specs: Sequence[TensorSpec]) -> Iterator[FieldViolation]:
    for spec in specs:
        if spec.name not in given and not spec.optional:
            yield FieldViolation(spec.field, f"tensor {spec.name} is missing, expected {spec.expected}")


def _raw(spec: TensorSpec, values: NDArray[Any]) -> bytes:
    if spec.datatype == BYTES:
        return b"".join(struct.pack("<I", len(value)) + value for value in values.flat)
    return values.astype(_NUMBERS[spec.datatype][0], copy=False).tobytes()


def _unknown(field: str, name: str, known: Collection[str]) -> FieldViolation:
    return FieldViolation(
        field, f"have an unknown tensor {name[:_MAX_NAME_CHARACTERS]!r}, expected some of {', '.join(known)}"
    )


def _no_shared_memory(name: str) -> UnsupportedError:
    return UnsupportedError(
        f"tensor {name[:_MAX_NAME_CHARACTERS]!r} is in shared memory, which this service does not support; "
        "send contents in the message"
    )
