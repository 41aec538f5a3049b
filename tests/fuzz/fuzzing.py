"""What every fuzz test uses: cases that can be repeated one by one, mutations, and a watch on the memory.

A case depends on the suite's name, the seed and its number alone. The input of one that fails is written to
``build/fuzz``. Settings, in the environment (`make fuzz CASES=100000 SEED=7`):

* ``FUZZ_CASES``: cases of each suite; otherwise a suite has as many as take a second or some.
* ``FUZZ_SEED``: the seed.
* ``FUZZ_FIRST``: number of the first case: with ``FUZZ_CASES=1`` the one to repeat.
"""

import os
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from benchmarks.measuring import memory_mib

CASES: Final = int(os.environ.get("FUZZ_CASES") or 0)
SEED: Final = int(os.environ.get("FUZZ_SEED") or 0)
FIRST: Final = int(os.environ.get("FUZZ_FIRST") or 0)
FOLDER: Final = Path(__file__).parents[2] / "build/fuzz"
MAX_GROWTH_MIB: Final = 48.0
"""Of the memory, from the middle of a suite to its end."""

_NUMBERS: Final = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF)
TEXTS: Final = (
    "", " ", "a dog barks", "A dog barks then a siren wails", "\0", "a\0b", "\n", "\r\n", "\t", "\x1b[31m",
    "\u2028", "\u0085", "\ufeff", "\u202e", "e\u0301", "\U0001f415" * 3, "\uffff", "Ünïcödé", "犬が吠える",
    "'; --", "{}", "%s", "../../etc/passwd", "None", "nan", "-1", "1e400", "x" * 1_001, "dog " * 2_000,
    "\x7f", "\u0660",
)  # fmt: skip
"""Texts that programs stumble over."""


def run(
    suite: str, few: int, make: Callable[[random.Random], object], check: Callable[[object], None]
) -> None:
    """Make and check the cases of a suite: `few` of them, unless the environment says how many.

    Raises:
        AssertionError: a check failed; names the case. Or the memory grew.
    """
    middle = 0.0
    count = CASES or few
    for number in range(FIRST, FIRST + count):
        made = make(random.Random(f"{suite} {SEED} {number}"))
        try:
            check(made)
        except Exception as error:
            path = _write(f"{suite}-{SEED}-{number}", made)
            again = f"FUZZ_SEED={SEED} FUZZ_FIRST={number} FUZZ_CASES=1"
            raise AssertionError(f"case {number} of {suite} ({again}; input: {path}): {error!r}") from error
        if number == FIRST + count // 2:
            middle = memory_mib()["VmRSS"]
    growth = memory_mib()["VmRSS"] - middle
    assert growth < MAX_GROWTH_MIB, f"{suite}: the second half of the cases took {growth:.0f} MiB"


def _write(name: str, made: object) -> Path:
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = FOLDER / name
    path.write_bytes(made if isinstance(made, bytes) else repr(made).encode("utf-8", "backslashreplace"))
    return path


def mutated(rng: random.Random, data: bytes, others: tuple[bytes, ...] = ()) -> bytes:
    """Return bytes with a few changes; parts of `others` may come in."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        start = rng.randrange(len(changed) + 1)
        # Headers are at the beginning.
        start = min(start, rng.randrange(64)) if rng.random() < 0.5 else start
        end = min(len(changed), start + rng.choice((1, 2, 4, 16, 256, 4096)))
        _change(rng, changed, start, end, others)
    return bytes(changed)


def _change(rng: random.Random, data: bytearray, start: int, end: int, others: tuple[bytes, ...]) -> None:
    match rng.randrange(8):
        case 0 if start < len(data):
            data[start] ^= 1 << rng.randrange(8)
        case 1:
            data[start:end] = rng.randbytes(end - start)
        case 2:
            del data[start:end]
        case 3:
            data[start:start] = data[start:end] * rng.choice((1, 2, 50))
        case 4:
            del data[start:]
        case 5:
            order = rng.choice("<>")
            data[start : start + 4] = struct.pack(f"{order}I", rng.choice(_NUMBERS))
        case 6:
            order = rng.choice("<>")
            data[start : start + 2] = struct.pack(f"{order}H", rng.choice(_NUMBERS) & 0xFFFF)
        case _ if others:
            other = rng.choice(others)
            place = rng.randrange(len(other) + 1)
            data[start:end] = other[place : place + rng.choice((4, 64, 1024))]


def text(rng: random.Random) -> str:
    """Return a text: one that programs stumble over, some of them, or random characters."""
    match rng.randrange(4):
        case 0:
            return "".join(rng.choices(TEXTS, k=rng.randrange(4)))
        case 1:
            return "".join(_characters(rng, rng.randrange(40)))
        case _:
            return rng.choice(TEXTS)


def mutated_text(rng: random.Random, original: str) -> str:
    """Return a text with a few changes."""
    characters = list(original)
    for _ in range(rng.choice((1, 1, 2, 5))):
        start = rng.randrange(len(characters) + 1)
        end = start + rng.choice((0, 1, 3, 20))
        match rng.randrange(4):
            case 0:
                del characters[start:end]
            case 1:
                characters[start:end] = text(rng)
            case 2:
                characters[start:start] = characters[start:end] * rng.choice((1, 2, 20))
            case _:
                characters[start:start] = _characters(rng, 3)
    return "".join(characters)


def _characters(rng: random.Random, count: int) -> Iterator[str]:
    for _ in range(count):
        point = rng.choice((rng.randrange(128), rng.randrange(0x3000), rng.randrange(0x11_0000)))
        yield "?" if 0xD800 <= point < 0xE000 else chr(point)
