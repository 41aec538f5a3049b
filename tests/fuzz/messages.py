"""Protobuf messages of any type, filled at random with values that services stumble over."""

import random
import sys
from typing import Any, Final

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from tests.fuzz.fuzzing import mutated, text

_FLOATS: Final = (
    0.0, -0.0, 1.0, -1.0, 0.5, 3.0, 1e-40, 1e30, -1e30, sys.float_info.max, float("inf"), float("-inf"),
    float("nan"),
)  # fmt: skip
_BITS: Final = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
}
_MAX_DEPTH: Final = 6


def fill(rng: random.Random, message: Any, contents: tuple[bytes, ...], depth: int = 0) -> None:
    """Set some fields of a message; fields of bytes are often one of `contents`, whole or damaged."""
    for field in message.DESCRIPTOR.fields:
        if rng.random() < 0.3 or depth > _MAX_DEPTH:
            continue
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            _fill_map(rng, message, field, contents, depth)
        elif field.is_repeated:
            _fill_repeated(rng, message, field, contents, depth)
        elif field.message_type is not None:
            fill(rng, getattr(message, field.name), contents, depth + 1)
        else:
            setattr(message, field.name, _value(rng, field, contents))


def _fill_map(
    rng: random.Random, message: Any, field: FieldDescriptor, contents: tuple[bytes, ...], depth: int
) -> None:
    assert field.message_type is not None
    key, value = (field.message_type.fields_by_name[name] for name in ("key", "value"))
    table = getattr(message, field.name)
    for _ in range(rng.randrange(3)):
        name = _value(rng, key, contents)
        if value.message_type is None:
            table[name] = _value(rng, value, contents)
        else:
            fill(rng, table[name], contents, depth + 1)


def _fill_repeated(
    rng: random.Random, message: Any, field: FieldDescriptor, contents: tuple[bytes, ...], depth: int
) -> None:
    values = getattr(message, field.name)
    for _ in range(rng.choice((0, 1, 1, 2, 3, 70) if depth < 2 else (0, 1, 2))):
        if field.message_type is None:
            values.append(_value(rng, field, contents))
        else:
            fill(rng, values.add(), contents, depth + 1)


def _value(rng: random.Random, field: FieldDescriptor, contents: tuple[bytes, ...]) -> Any:
    kind = field.cpp_type
    if kind in _BITS:
        low, high = _BITS[kind]
        return rng.choice((low, high, 0, 1, 2, 3, 16_000, max(low, -1), rng.randint(low, high)))
    if kind in (FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT):
        return rng.choice(_FLOATS)
    if kind == FieldDescriptor.CPPTYPE_BOOL:
        return rng.random() < 0.5
    if field.enum_type is not None:
        return rng.choice((*field.enum_type.values_by_number, 99, -1, 2**31 - 1))
    if field.type == FieldDescriptor.TYPE_STRING:
        return text(rng)
    whole = rng.choice(contents)
    return rng.choice((whole, mutated(rng, whole, contents), rng.randbytes(rng.randrange(40)), b""))


def payload(
    rng: random.Random, kind: type[Message], sound: tuple[Message, ...], contents: tuple[bytes, ...]
) -> bytes:
    """Return the bytes of a request: filled at random, a sound one that is changed, or no message at all.

    `sound` are valid requests of this type.
    """
    match rng.randrange(5):
        case 0:
            return rng.randbytes(rng.choice((1, 5, 50, 5_000)))
        case 1 if sound:
            return mutated(rng, rng.choice(sound).SerializeToString(), contents)
        case 2 if sound:
            changed = kind()
            changed.CopyFrom(rng.choice(sound))
            other = kind()
            fill(rng, other, contents)
            changed.MergeFrom(other)
            return changed.SerializeToString()
        case 3:
            filled = kind()
            fill(rng, filled, contents)
            return mutated(rng, filled.SerializeToString(), contents)
        case _:
            filled = kind()
            fill(rng, filled, contents)
            return filled.SerializeToString()
