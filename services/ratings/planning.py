"""Make the pairs of a study: two models, the same prompts and seeds, sides drawn at random."""

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from services.errors import invalid
from services.ratings.store import PlannedItem

MAX_SHARE: Final = 1.0

Make = Callable[[str, int], bytes]
"""Returns the file of a model's clip of a prompt and a seed."""


def plan_items(
    prompts: Sequence[str], a: Make, b: Make, *, seed: int = 0, repeats: float = 0.1, known: float = 0.1
) -> Iterator[PlannedItem]:
    """Yield a pair per prompt, then hidden repeats and pairs with a known answer.

    A repeat shows the clips of a pair with swapped sides. A pair with a known answer shows `a`'s clip of the
    prompt and its clip of another prompt.

    Args:
        prompts: the prompts; those with a known answer are taken from them.
        a, b: make the clips of both models.
        seed: of the sides, of the choice of prompts, and of the clips.
        repeats, known: further pairs, as shares of the number of prompts.

    Raises:
        InvalidInputError: a share is out of range, or there are too few prompts.
    """
    for name, share in (("repeats", repeats), ("known", known)):
        if not 0 <= share <= MAX_SHARE:
            raise invalid(name, f"is {share:g}, must be between 0 and 1")
    if len(prompts) < 2:
        raise invalid("prompts", f"are {len(prompts)}, must be at least 2")
    rng = random.Random(f"milonga ratings {seed}")
    pairs: list[PlannedItem] = []
    for index, prompt in enumerate(prompts):
        clips = [(a(prompt, seed + index), "a"), (b(prompt, seed + index), "b")]
        rng.shuffle(clips)
        pairs.append(_item("pair", prompt, clips))
        yield pairs[-1]
    for index in sorted(rng.sample(range(len(pairs)), round(repeats * len(pairs)))):
        one = pairs[index]
        clips = [(one.right, one.right_source), (one.left, one.left_source)]
        yield _item("repeat", one.prompt, clips, repeats=index)
    for index in sorted(rng.sample(range(len(prompts)), round(known * len(prompts)))):
        other = rng.choice(
            [number for number in range(len(prompts)) if prompts[number] != prompts[index]] or [0]
        )
        own = seed + len(prompts) + index
        clips = [(a(prompts[index], own), "right"), (a(prompts[other], own), "wrong")]
        rng.shuffle(clips)
        yield _item("known", prompts[index], clips)


def _item(
    kind: str, prompt: str, clips: Sequence[tuple[bytes, str]], repeats: int | None = None
) -> PlannedItem:
    (left, left_source), (right, right_source) = clips
    return PlannedItem(
        kind=kind,  # type: ignore[arg-type]
        prompt=prompt,
        left=left,
        right=right,
        left_source=left_source,
        right_source=right_source,
        repeats=repeats,
    )
