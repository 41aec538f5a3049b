import pytest

from services.engine import EngineConfig
from services.engine.batching import (
    choose_rows,
    decodes_this_turn,
    entry_work,
    next_turn,
    queue_tag,
    row_shapes,
    rows_of,
)


def test_guidance_up_to_one_takes_one_row() -> None:
    assert [rows_of(scale) for scale in (0, 1, 1.01, 3)] == [1, 1, 2, 2]


def test_each_batch_shape_gives_itself_and_its_double() -> None:
    assert row_shapes((1, 2, 4, 8)) == (1, 2, 4, 8, 16)
    assert row_shapes((3,)) == (3, 6)


def test_the_smallest_shape_that_fits_is_chosen_and_with_exact_the_largest() -> None:
    shapes = (1, 2, 4, 8, 16)
    assert [choose_rows(rows, shapes, exact=False) for rows in (1, 2, 3, 5, 9, 16)] == [1, 2, 4, 8, 16, 16]
    assert {choose_rows(rows, shapes, exact=True) for rows in range(1, 17)} == {16}


def test_lengths_take_turns_by_the_work_of_each_clip() -> None:
    work = {"short": 0.0, "long": 0.0}
    turns = []
    for _ in range(10):
        key = next_turn(work)
        work[key] += {"short": 16, "long": 64}[key]
        turns.append(key)
    assert turns.count("short") == 8
    assert turns.count("long") == 2


def test_a_length_that_comes_late_does_not_catch_up() -> None:
    assert entry_work([640.0, 320.0]) == 320.0
    assert entry_work([]) == 0.0


def test_a_newcomer_goes_before_the_second_clip_of_those_who_wait() -> None:
    first = [(queue_tag(0, index), 0) for index in range(3)]
    second = [(queue_tag(0, index), 1) for index in range(2)]
    assert sorted(first + second) == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)]


def test_nobody_waits_forever() -> None:
    """However many newcomers there are, each pushes the clock on, and the old clip's tag comes up."""
    last_of_first = (queue_tag(0, 7), 0)
    now = 0.0
    for number in range(1, 20):
        newcomer = (queue_tag(now, 1), number)
        if newcomer > last_of_first:
            break
        now = newcomer[0]
    assert number < 10


def test_decodes_do_not_pile_up_and_do_not_hold_up_the_others() -> None:
    assert decodes_this_turn(8, stepping=False) == 8
    assert decodes_this_turn(0, stepping=True) == 0
    assert decodes_this_turn(8, stepping=True) == 4
    assert decodes_this_turn(1, stepping=True) == 1
    backlog = 0
    for _ in range(100):
        backlog += 3
        backlog -= decodes_this_turn(backlog, stepping=True)
    assert backlog <= 3


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"batch_shapes": ()}, "batch_shapes"),
        ({"batch_shapes": (4, 2)}, "ascending"),
        ({"batch_shapes": (0, 2)}, "1 or more"),
        ({"max_queue": 0}, "max_queue"),
        ({"threads": 0}, "threads"),
        ({"max_clip_count": 0}, "max_clip_count"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        EngineConfig(**settings)  # type: ignore[arg-type]
