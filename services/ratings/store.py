"""The database of ratings: SQLite or PostgreSQL."""

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from sqlalchemy import create_engine, func, select
from sqlalchemy.exc import (
    ArgumentError,
    IntegrityError,
    NoSuchModuleError,
    ProgrammingError,
    SQLAlchemyError,
)
from sqlalchemy.orm import Session

from services.api.model import ModelVersion
from services.errors import (
    ServiceUnavailableError,
    UnauthenticatedError,
    invalid,
)
from services.ratings.agreement import krippendorff_alpha, wilson_interval
from services.ratings.tables import (
    Base,
    ClipRow,
    ItemRow,
    RaterRow,
    RatingRow,
    StudyModelRow,
    StudyRow,
)
from services.runtime.tokens import new_token, token_digest

Verdict = Literal["left", "right", "both_good", "both_bad"]
Kind = Literal["pair", "repeat", "known"]

NAME: Final = r"[^\W_][\w .-]{0,63}"
"""Pattern of a rater's name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedItem:
    """A pair to add: files, and where they come from."""

    kind: Kind
    prompt: str
    left: bytes
    right: bytes
    left_source: str
    """``a`` or ``b``; of a pair with a known answer ``right`` or ``wrong``."""
    right_source: str
    repeats: int | None = None
    """Index in the plan of the pair that this one repeats with swapped sides."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answers:
    """BATON's absolute questions on both clips; None: not answered."""

    left_present: bool | None = None
    """Whether every event of the prompt is there."""
    left_in_order: bool | None = None
    """Whether they are in order."""
    right_present: bool | None = None
    right_in_order: bool | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Rater:
    """Who rates."""

    id: int
    name: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Shown:
    """What a rater sees of a pair."""

    id: int
    prompt: str
    left: str
    """SHA-256 of the left clip's file."""
    right: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Rated:
    """The current rating of a pair by a rater, with what the rater does not see."""

    item: int
    study: int
    original: int
    """The pair that it repeats, otherwise itself."""
    kind: Kind
    prompt: str
    left: str
    right: str
    rater: str
    verdict: Verdict
    answers: Answers
    sources: tuple[str, str]
    """Sources of the left and the right clip."""

    @property
    def outcome(self) -> str:
        """The verdict by source: ``a``, ``b``, ``right``, ``wrong``, ``both_good`` or ``both_bad``."""
        if self.verdict == "left":
            return self.sources[0]
        return self.sources[1] if self.verdict == "right" else self.verdict


class RatingStore:
    """Pairs, raters and ratings. Thread-safe."""

    def __init__(self, url: str, field: str = "ratings", *, create: bool = True) -> None:
        """Connect, and create what is missing.

        Args:
            url: ``sqlite:///FILE`` or ``postgresql://USER@HOST/NAME``.
            field: name of the setting in error messages.
            create: whether SQLite may create its file.

        Raises:
            InvalidInputError: the URL is none, or its driver is not installed; or there is no such file.
            ServiceUnavailableError: the database can't be reached.
        """
        try:
            self._engine = create_engine(
                re.sub(r"^postgres(ql)?://", "postgresql+psycopg://", url), pool_pre_ping=True
            )
        except (ArgumentError, NoSuchModuleError, ModuleNotFoundError) as error:
            fault = "must be sqlite:///FILE, or postgresql://USER@HOST/NAME"
            raise invalid(field, f"is {_shown(url)!r}, {fault} ({error})") from error
        if not create:
            self._check_file(field)
        with self._telling():
            try:
                Base.metadata.create_all(self._engine)
            except (ProgrammingError, IntegrityError):  # another process was creating the same tables
                Base.metadata.create_all(self._engine)

    def _check_file(self, field: str) -> None:
        """Raise `InvalidInputError` if SQLite's file is missing."""
        path = self._engine.url.database
        if self._engine.dialect.name != "sqlite" or not path or path.startswith(("file:", ":")):
            return
        if not Path(path).is_file():
            raise invalid(
                field, f"is a database in {path}, which is no file; `milonga ratings plan` makes one"
            )

    def close(self) -> None:
        """Close the connections."""
        self._engine.dispose()

    @contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except SQLAlchemyError as error:
            reason = " ".join(str(getattr(error, "orig", None) or error).split())[:200]
            raise ServiceUnavailableError(
                f"the database of ratings can't be used: {reason}; nothing was saved, try again"
            ) from error

    @contextmanager
    def _session(self) -> Iterator[Session]:
        with self._telling(), Session(self._engine) as session, session.begin():
            yield session

    # Plans

    def add_study(
        self,
        a: str,
        b: str,
        seed: int,
        items: Sequence[PlannedItem],
        models: tuple[ModelVersion, ModelVersion] | None = None,
    ) -> int:
        """Add the pairs of `a` and `b`, all or none; return the study's number.

        `models` are the weights that made the clips of both. Without them no promotion can use the ratings.
        """
        with self._session() as session:
            study = StudyRow(a=a, b=b, seed=seed)
            session.add(study)
            session.flush()
            for side, model in zip(("a", "b"), models or (), strict=False):
                session.add(
                    StudyModelRow(
                        study=study.id, side=side, name=model.name, version=model.version, digest=model.digest
                    )
                )
            rows: list[ItemRow] = []
            for item in items:
                row = ItemRow(
                    study=study.id,
                    kind=item.kind,
                    prompt=item.prompt,
                    left=_add_clip(session, item.left),
                    right=_add_clip(session, item.right),
                    left_source=item.left_source,
                    right_source=item.right_source,
                    original=None if item.repeats is None else rows[item.repeats].id,
                )
                session.add(row)
                session.flush()
                rows.append(row)
            return study.id

    def clip(self, digest: str) -> bytes:
        """Return the file of a clip. Raises `InvalidInputError`."""
        with self._session() as session:
            row = session.get(ClipRow, digest) if re.fullmatch("[0-9a-f]{64}", digest) else None
            if row is None:
                raise invalid("clip", f"is {digest[:80]!r}, which is no clip of a pair")
            return row.content

    # Raters

    def add_rater(self, name: str) -> str:
        """Add a rater; return their token, which is kept nowhere. Raises `InvalidInputError`."""
        if not re.fullmatch(NAME, name):
            raise invalid("name", f"is {name[:80]!r}, must be a word of up to 64 characters")
        token = new_token()
        try:
            with Session(self._engine) as session, session.begin():
                session.add(RaterRow(name=name, token_digest=token_digest(token)))
        except IntegrityError as error:
            raise invalid("name", f"is {name!r}, which another rater has; choose another") from error
        except SQLAlchemyError:
            with self._telling():
                raise
        return token

    def rater(self, token: str | None) -> Rater:
        """Return the rater of a token. Raises `UnauthenticatedError`."""
        with self._session() as session:
            found = None
            if token:
                query = select(RaterRow).where(RaterRow.token_digest == token_digest(token))
                found = session.scalars(query).first()
            if found is None:
                raise UnauthenticatedError("give your rater's token: Authorization: Bearer TOKEN")
            return Rater(id=found.id, name=found.name)

    # Rating

    def next_item(self, rater: Rater) -> tuple[Shown | None, int, int]:
        """Return the rater's next pair, None at the end, with the numbers of pairs that are rated and in all.

        Each rater has an order of their own. Repeats come after all others.
        """
        with self._session() as session:
            seeds = {row.id: row.seed for row in session.scalars(select(StudyRow))}
            items = list(session.scalars(select(ItemRow)))
            rated = {one.item for one in _latest(session) if one.rater == rater.id}

            def place(item: ItemRow) -> tuple[int, bool, bytes]:
                words = f"{seeds[item.study]} {rater.id} {item.id}"
                return item.study, item.kind == "repeat", hashlib.sha256(words.encode()).digest()

            left = sorted((item for item in items if item.id not in rated), key=place)
            shown = None
            if left:
                one = left[0]
                shown = Shown(id=one.id, prompt=one.prompt, left=one.left, right=one.right)
            return shown, len(items) - len(left), len(items)

    def rate(self, rater: Rater, item: int, verdict: Verdict | None, answers: Answers | None = None) -> None:
        """Add a rating, which replaces the rater's earlier one; None takes it back.

        Raises:
            InvalidInputError: there is no such pair.
            ServiceUnavailableError: the database can't be used; nothing was saved.
        """
        given = answers or Answers()
        with self._session() as session:
            # Databases have smaller numbers than Python.
            if not 0 < item < 2**31 or session.get(ItemRow, item) is None:
                raise invalid("item", f"is {str(item)[:40]}, which is no pair")
            session.add(
                RatingRow(
                    item=item,
                    rater=rater.id,
                    verdict=verdict,
                    left_present=given.left_present,
                    left_in_order=given.left_in_order,
                    right_present=given.right_present,
                    right_in_order=given.right_in_order,
                )
            )

    def comparisons(self, a: str, b: str) -> dict[int, bool]:
        """Return the studies that compare the weights of two digests, and whether `a` is their side b."""
        with self._session() as session:
            sides = {(row.study, row.side): row.digest for row in session.scalars(select(StudyModelRow))}
        return {
            study: digest == b
            for (study, side), digest in sorted(sides.items())
            if side == "a" and {digest, sides.get((study, "b"))} == {a, b} and a != b
        }

    def last_item(self, rater: Rater) -> Shown | None:
        """Return the pair that the rater has rated last, without those taken back; None without any."""
        with self._session() as session:
            rated = [one.item for one in _latest(session) if one.rater == rater.id]
            row = session.get(ItemRow, rated[-1]) if rated else None
            if row is None:
                return None
            return Shown(id=row.id, prompt=row.prompt, left=row.left, right=row.right)

    def ratings(self) -> list[Rated]:
        """Return every rating that counts."""
        with self._session() as session:
            items = {row.id: row for row in session.scalars(select(ItemRow))}
            names = {row.id: row.name for row in session.scalars(select(RaterRow))}
            return [_rated(row, items[row.item], names[row.rater]) for row in _latest(session)]


@dataclass(frozen=True, kw_only=True, slots=True)
class WinRate:
    """How often b beats a, by prompt."""

    wins: float
    """Prompts on which a majority of the ratings prefers b, and half of those without a winner."""
    prompts: int
    """Prompts that were rated."""
    decided: int
    """Prompts with a winner."""

    @property
    def share(self) -> float | None:
        """The win rate; None without ratings."""
        return self.wins / self.prompts if self.prompts else None

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval over the prompts. It is wider than needed if many have no winner."""
        return wilson_interval(self.wins, self.prompts)


def win_rate(ratings: Iterable[Rated], winner: str = "b") -> WinRate:
    """Return how often side `winner` beats the other one. Repeats and known answers don't count."""
    outcomes: dict[str, list[str]] = defaultdict(list)
    for one in ratings:
        if one.kind == "pair":
            outcomes[one.prompt].append(one.outcome)
    winners = [majority(found) for found in outcomes.values()]
    decided = len(winners) - winners.count(None)
    wins = winners.count(winner) + winners.count(None) / 2
    return WinRate(wins=wins, prompts=len(winners), decided=decided)


def summary(ratings: Sequence[Rated]) -> dict[str, Any]:
    """Return counts, agreement between raters, and how reliable each rater is, as JSON.

    ``win_rate`` is as in `WinRate`, of b.
    """
    units: dict[int, list[str]] = defaultdict(list)
    for one in ratings:
        if one.kind == "pair":
            units[one.item].append(one.outcome)
    rate = win_rate(ratings)
    return {
        "ratings": len(ratings),
        "pairs": len(units),
        "krippendorff_alpha": krippendorff_alpha(list(units.values())),
        "prompts": rate.prompts,
        "decided": rate.decided,
        "win_rate": rate.share,
        "win_rate_interval": list(rate.interval),
        "raters": reliability(ratings),
    }


def reliability(ratings: Sequence[Rated]) -> dict[str, dict[str, Any]]:
    """Return for each rater the shares of hidden repeats answered as before, and of known pairs, rightly.

    Shares are None without such pairs.
    """
    found: dict[str, dict[str, Any]] = {}
    for name in sorted({one.rater for one in ratings}):
        own = {one.item: one for one in ratings if one.rater == name}
        same = [
            one.outcome == own[one.original].outcome
            for one in own.values()
            if one.kind == "repeat" and one.original in own
        ]
        known = [one.outcome == "right" for one in own.values() if one.kind == "known"]
        found[name] = {
            "ratings": len(own),
            "repeats": len(same),
            "consistency": sum(same) / len(same) if same else None,
            "known": len(known),
            "known_right": sum(known) / len(known) if known else None,
        }
    return found


def majority(outcomes: Sequence[str]) -> str | None:
    """Return ``a`` or ``b`` if more ratings prefer it than the other; None without a winner."""
    a, b = outcomes.count("a"), outcomes.count("b")
    return None if a == b else "a" if a > b else "b"


def _latest(session: Session) -> list[RatingRow]:
    """Return the last rating of each pair by each rater, without those that were taken back."""
    last = select(func.max(RatingRow.id)).group_by(RatingRow.item, RatingRow.rater)
    query = select(RatingRow).where(RatingRow.id.in_(last), RatingRow.verdict.is_not(None))
    return list(session.scalars(query.order_by(RatingRow.id)))


def _rated(row: RatingRow, item: ItemRow, rater: str) -> Rated:
    return Rated(
        item=item.id,
        study=item.study,
        original=item.original or item.id,
        kind=item.kind,  # type: ignore[arg-type]
        prompt=item.prompt,
        left=item.left,
        right=item.right,
        rater=rater,
        verdict=row.verdict,  # type: ignore[arg-type]
        answers=Answers(
            left_present=row.left_present,
            left_in_order=row.left_in_order,
            right_present=row.right_present,
            right_in_order=row.right_in_order,
        ),
        sources=(item.left_source, item.right_source),
    )


def _add_clip(session: Session, content: bytes) -> str:
    digest = hashlib.sha256(content).hexdigest()
    if session.get(ClipRow, digest) is None:
        session.add(ClipRow(digest=digest, content=content))
        session.flush()
    return digest


def _shown(url: str) -> str:
    """Return a URL without its password."""
    return re.sub(r"//[^/@]*@", "//…@", url)[:80]
