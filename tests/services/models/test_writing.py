"""Model folders that are written whole or not at all."""

from pathlib import Path

import pytest

from services.errors import OutputError
from services.models.writing import new_folder, replaced_folder


def _files(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    target = tmp_path / "runs" / "model"
    for content in ("first", "second"):
        with replaced_folder(target) as folder:
            (folder / content).write_text(content)
            (folder / content).chmod(0o600)
            assert folder.parent == target.parent, "the same disk"
    assert _files(target) == {"second": "second"}
    assert (target / "second").stat().st_mode & 0o777 == 0o644
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize(
    ("error", "raised"),
    [(OSError(28, "No space left on device"), OutputError), (ValueError("a bug"), ValueError)],
)
def test_what_fails_leaves_the_former_folder(
    tmp_path: Path, error: Exception, raised: type[Exception]
) -> None:
    target = tmp_path / "model"
    with replaced_folder(target) as folder:
        (folder / "a").write_text("former")

    def write() -> None:
        with replaced_folder(target) as folder:
            (folder / "a").write_text("half")
            raise error

    with pytest.raises(raised, match=error.args[-1]):
        write()
    assert _files(target) == {"a": "former"}
    assert list(tmp_path.iterdir()) == [target]


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    target = tmp_path / "model"
    for name in (".model.part", ".model.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").write_text("left")
    with replaced_folder(target) as folder:
        (folder / "b").write_text("whole")
    assert _files(target) == {"b": "whole"}
    assert list(tmp_path.iterdir()) == [target]


def test_a_new_folder_replaces_nothing(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="exists already"), new_folder(tmp_path):
        raise AssertionError("not reached")
