from collections.abc import Iterator
from pathlib import Path
from threading import Event

import pytest

from services.errors import InvalidInputError, OutputError
from services.files import side_by_side, write_atomically
from training.data.store import RowLog, claim, digest_of_value, finish, read_rows


def test_an_incomplete_last_line_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": 2}\n{"a": ')
    with RowLog(path) as log:
        assert log.rows == [{"a": 1}, {"a": 2}]
        log.append({"a": 3})
    assert read_rows(path) == [{"a": 1}, {"a": 2}, {"a": 3}]


def test_files_are_written_atomically(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="can't be written"):
        write_atomically(tmp_path / "file" / "below", "content")
    write_atomically(tmp_path / "folder" / "file", "content")
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["file"]


def test_a_folder_refuses_other_settings(tmp_path: Path) -> None:
    assert claim(tmp_path, {"steps": 1, "device": "cpu"}) is None
    finish(tmp_path, {"made": 3})
    assert claim(tmp_path, {"steps": 1, "device": "gpu"}, free=("device",)) == {"made": 3}
    with pytest.raises(InvalidInputError, match="steps was 1, is 2"):
        claim(tmp_path, {"steps": 2, "device": "cpu"}, free=("device",))


def test_digests_do_not_depend_on_the_order_of_keys() -> None:
    assert digest_of_value({"a": 1, "b": "é"}) == digest_of_value({"b": "é", "a": 1})
    assert digest_of_value([1]) != digest_of_value(["1"])


def test_work_in_flight_is_limited_and_a_failure_ends_all() -> None:
    running: list[int] = []
    most, stopped = 0, Event()

    def work(item: int) -> int:
        nonlocal most
        running.append(item)
        most = max(most, len(running))
        if item == 5:
            raise ValueError("five")
        running.remove(item)
        return item * 2

    def items() -> Iterator[int]:
        for item in range(1_000):
            taken.append(item)
            yield item

    taken: list[int] = []
    assert dict(side_by_side(lambda item: item * 2, range(20), 4)) == {item: item * 2 for item in range(20)}
    with pytest.raises(ValueError, match="five"):
        list(side_by_side(work, items(), 3, stopped.set))
    assert most <= 3 + 1
    assert len(taken) < 20
