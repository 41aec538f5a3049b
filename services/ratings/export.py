"""Ratings as training data: Audio-alpaca's pairs in Parquet, BATON's labels in JSON."""

import io
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from services.errors import invalid
from services.files import write_atomically
from services.ratings.store import Rated, RatingStore, majority, reliability

STRATEGY: Final = "listeners"
"""Strategy of pairs that people have rated."""


def reliable(ratings: Sequence[Rated], least: float) -> list[Rated]:
    """Return the ratings by raters who answer at least a share of `least` of the known pairs right.

    Those who have rated none are left out, unless `least` is 0.
    """
    if not least:
        return list(ratings)
    shares = {name: found["known_right"] for name, found in reliability(ratings).items()}
    return [one for one in ratings if (shares[one.rater] or 0.0) >= least]


def export_pairs(store: RatingStore, ratings: Sequence[Rated], output: Path) -> int:
    """Write a pair per prompt that a majority decided; return their number.

    Raises:
        InvalidInputError: no pair is decided.
    """
    from datasets import Audio, Features, Value  # type: ignore[import-untyped]
    from pyarrow import Table  # type: ignore[import-untyped]
    from pyarrow.parquet import write_table  # type: ignore[import-untyped]

    by_item: dict[int, list[Rated]] = defaultdict(list)
    for one in ratings:
        if one.kind == "pair":
            by_item[one.item].append(one)
    rows: list[dict[str, Any]] = []
    for _, found in sorted(by_item.items()):
        outcomes = [one.outcome for one in found]
        winner, one = majority(outcomes), found[0]
        if winner is None:
            continue
        chosen, rejected = (one.left, one.right) if one.sources[0] == winner else (one.right, one.left)
        rows.append(
            {
                "prompt": one.prompt,
                "chosen": _audio(store, chosen),
                "rejected": _audio(store, rejected),
                "strategy": STRATEGY,
                "votes": outcomes.count(winner),
                "raters": len(found),
            }
        )
    if not rows:
        raise invalid("ratings", "hold no pair that a majority has decided; rate more")
    audio, text, whole = Audio(), Value("string"), Value("int64")
    columns = {
        "prompt": text,
        "chosen": audio,
        "rejected": audio,
        "strategy": text,
        "votes": whole,
        "raters": whole,
    }
    buffer = io.BytesIO()
    write_table(Table.from_pylist(rows, Features(columns).arrow_schema), buffer)
    write_atomically(output, buffer.getvalue())
    return len(rows)


def export_labels(store: RatingStore, ratings: Sequence[Rated], output: Path) -> int:
    """Write a label per clip, and its file into ``NAME-clips`` next to `output`; return their number.

    The label is the share of raters who call the clip right: by both absolute answers, where they were given,
    otherwise by *both good* and *both bad*. A preference says nothing of whether a clip is right.

    Raises:
        InvalidInputError: no clip has a label.
    """
    votes: dict[tuple[str, str], list[bool]] = defaultdict(list)
    for one in ratings:
        if one.kind != "pair":
            continue
        answers = one.answers
        sides = (
            (one.left, answers.left_present, answers.left_in_order),
            (one.right, answers.right_present, answers.right_in_order),
        )
        for digest, present, in_order in sides:
            if present is not None or in_order is not None:
                votes[one.prompt, digest].append(present is not False and in_order is not False)
            elif one.verdict in ("both_good", "both_bad"):
                votes[one.prompt, digest].append(one.verdict == "both_good")
    if not votes:
        raise invalid("ratings", "say of no clip whether it is right; answer the questions on single clips")
    folder = output.with_name(f"{output.stem}-clips")
    folder.mkdir(exist_ok=True)
    rows: list[Mapping[str, Any]] = []
    for (prompt, digest), found in votes.items():
        path = folder / f"{digest[:16]}.flac"
        if not path.exists():
            write_atomically(path, store.clip(digest))
        location = f"{folder.name}/{path.name}"
        rows.append({"location": location, "captions": prompt, "label": sum(found) / len(found)})
    write_atomically(output, (json.dumps(rows, ensure_ascii=False, indent=1) + "\n").encode())
    return len(rows)


def _audio(store: RatingStore, digest: str) -> dict[str, Any]:
    return {"bytes": store.clip(digest), "path": f"{digest[:16]}.flac"}
