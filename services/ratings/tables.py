"""Tables of ratings. Nothing is updated or deleted: a rating that is changed, or taken back, is a new row."""

from datetime import UTC, datetime

from sqlalchemy import DateTime, ForeignKey, LargeBinary, String, Text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


def _now() -> datetime:
    return datetime.now(UTC)


class Base(DeclarativeBase):
    """All tables."""


class StudyRow(Base):
    """A set of pairs that were planned together."""

    __tablename__ = "studies"
    id: Mapped[int] = mapped_column(primary_key=True)
    seed: Mapped[int]
    a: Mapped[str] = mapped_column(Text)
    b: Mapped[str] = mapped_column(Text)
    created: Mapped[datetime] = mapped_column(DateTime(timezone=True), default=_now)


class StudyModelRow(Base):
    """The weights that made the clips of a side of a study, ``a`` or ``b``."""

    __tablename__ = "study_models"
    study: Mapped[int] = mapped_column(ForeignKey("studies.id"), primary_key=True)
    side: Mapped[str] = mapped_column(String(1), primary_key=True)
    name: Mapped[str] = mapped_column(Text)
    version: Mapped[str] = mapped_column(Text)
    digest: Mapped[str] = mapped_column(String(80), index=True)


class ClipRow(Base):
    """A clip, by the SHA-256 of its file."""

    __tablename__ = "clips"
    digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    content: Mapped[bytes] = mapped_column(LargeBinary)


class ItemRow(Base):
    """A pair to rate. `left_source` and `right_source` are never shown."""

    __tablename__ = "items"
    id: Mapped[int] = mapped_column(primary_key=True)
    study: Mapped[int] = mapped_column(ForeignKey("studies.id"), index=True)
    kind: Mapped[str] = mapped_column(String(8))
    prompt: Mapped[str] = mapped_column(Text)
    left: Mapped[str] = mapped_column(ForeignKey("clips.digest"))
    right: Mapped[str] = mapped_column(ForeignKey("clips.digest"))
    left_source: Mapped[str] = mapped_column(String(8))
    right_source: Mapped[str] = mapped_column(String(8))
    original: Mapped[int | None] = mapped_column(ForeignKey("items.id"))


class RaterRow(Base):
    """A rater: a name of their choice, and the digest of their token."""

    __tablename__ = "raters"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(64), unique=True)
    token_digest: Mapped[str] = mapped_column(String(80), unique=True)


class RatingRow(Base):
    """A rating of a pair. The last row of a rater and a pair counts; without a verdict it takes it back."""

    __tablename__ = "ratings"
    id: Mapped[int] = mapped_column(primary_key=True)
    item: Mapped[int] = mapped_column(ForeignKey("items.id"), index=True)
    rater: Mapped[int] = mapped_column(ForeignKey("raters.id"), index=True)
    verdict: Mapped[str | None] = mapped_column(String(12))
    left_present: Mapped[bool | None]
    left_in_order: Mapped[bool | None]
    right_present: Mapped[bool | None]
    right_in_order: Mapped[bool | None]
    created: Mapped[datetime] = mapped_column(DateTime(timezone=True), default=_now)
