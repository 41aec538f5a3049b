"""No recording in training and among the held-out ones."""

from pathlib import Path

import pytest

from services.errors import InvalidInputError
from training.data.examples import FileClip
from training.data.recordings import Recording
from training.data.splits import SplitConfig, recording_groups, split_recordings


def recordings(folder: Path, count: int = 40, pieces: int = 3, **fields: object) -> list[Recording]:
    """Clips of two classes, `pieces` of each recording."""
    found = []
    for number in range(count):
        for piece in range(pieces):
            path = folder / f"{number}-{piece}.wav"
            path.write_bytes(f"{number} {piece}".encode())
            source = f"r{number}" if pieces > 1 else None
            sound = ("dog", "rain")[number % 2]
            found.append(Recording(clip=FileClip(path=path), captions=("x",), sound=sound, source=source))
    return found


@pytest.mark.parametrize("share", [0.0, 0.01, 0.1, 0.5])
def test_pieces_of_a_recording_are_on_one_side(share: float, tmp_path: Path) -> None:
    found = recordings(tmp_path)
    splits = split_recordings(found, SplitConfig(held_out=share))
    assert not {one.source for one in splits.train} & {one.source for one in splits.held_out}
    assert len(splits.train) + len(splits.held_out) == len(found)
    for sound in ("dog", "rain"):
        held = {one.source for one in splits.held_out if one.sound == sound}
        assert len(held) == (max(1, round(share * 20)) if share else 0)


def test_the_split_depends_on_the_clips_alone(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first = split_recordings(recordings(tmp_path / "a", pieces=1), SplitConfig())
    second = split_recordings(recordings(tmp_path / "b", pieces=1)[::-1], SplitConfig())
    held = [sorted(Path(one.clip.name).name for one in splits.held_out) for splits in (first, second)]
    assert held[0] == held[1]
    assert len(held[0]) == 4


def test_copies_of_a_clip_are_on_one_side(tmp_path: Path) -> None:
    found = recordings(tmp_path, count=10, pieces=1)
    for number, one in enumerate(list(found)):
        copy = tmp_path / f"copy-{number}.wav"
        copy.write_bytes(Path(one.clip.name).read_bytes())
        found.append(
            Recording(clip=FileClip(path=copy), captions=("x",), sound=one.sound, source=f"s{number}")
        )
    splits = split_recordings(found, SplitConfig(held_out=0.5))
    digests = [{one.clip.digest for one in part} for part in (splits.train, splits.held_out)]
    assert not digests[0] & digests[1]
    assert all(digests)


def fold(one: Recording, name: str | None) -> Recording:
    return Recording(clip=one.clip, captions=one.captions, sound=one.sound, source=one.source, fold=name)


@pytest.mark.parametrize(
    ("names", "config", "held"),
    [
        (("1", "2", "10"), SplitConfig(), {"10"}),
        (("1", "2", "10"), SplitConfig(folds=("1", "2")), {"1", "2"}),
        (("train", "val", "test"), SplitConfig(), {"val", "test"}),
        (("Train", "Test"), SplitConfig(), {"Test"}),
    ],
)
def test_folds_are_held_out(
    names: tuple[str, ...], config: SplitConfig, held: set[str], tmp_path: Path
) -> None:
    found = [fold(one, names[i % len(names)]) for i, one in enumerate(recordings(tmp_path, pieces=1))]
    splits = split_recordings(found, config)
    assert {one.fold for one in splits.held_out} == held
    assert {one.fold for one in splits.train} == set(names) - held


def test_a_recording_in_two_folds_is_in_training(tmp_path: Path) -> None:
    found = recordings(tmp_path, count=4)
    spread = [fold(one, "2" if i % 3 == 0 or i >= 6 else "1") for i, one in enumerate(found)]
    splits = split_recordings(spread, SplitConfig())
    assert {one.source for one in splits.held_out} == {"r2", "r3"}
    assert {one.source for one in splits.train} == {"r0", "r1"}


def test_folds_can_be_ignored_and_must_exist(tmp_path: Path) -> None:
    found = [fold(one, str(i % 5)) for i, one in enumerate(recordings(tmp_path, pieces=1))]
    assert len(split_recordings(found, SplitConfig(folds=("none",))).held_out) == 4
    with pytest.raises(
        InvalidInputError, match=r"split\.folds: is '7', which is no fold; the folds are 0, 1"
    ):
        split_recordings(found, SplitConfig(folds=("7",)))


def test_a_single_recording_is_never_held_out(tmp_path: Path) -> None:
    splits = split_recordings(recordings(tmp_path, count=2), SplitConfig(held_out=1.0))
    assert (len(splits.train), len(splits.held_out)) == (6, 0)


def test_clips_that_cannot_be_read_are_groups_of_their_own(tmp_path: Path) -> None:
    found = [Recording(clip=FileClip(path=tmp_path / name), captions=("x",)) for name in ("a.wav", "b.wav")]
    assert len(set(recording_groups(found))) == 2
