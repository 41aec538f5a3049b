import pytest

from services.engine import EngineConfig
from services.engine.batching import choose_rows, row_shapes, spare_rows


def test_each_batch_shape_gives_itself_and_its_double() -> None:
    assert row_shapes((1, 2, 4, 8)) == (1, 2, 4, 8, 16)
    assert row_shapes((3,)) == (3, 6)


def test_the_smallest_shape_that_fits_is_chosen_and_with_exact_the_largest() -> None:
    shapes = (1, 2, 4, 8, 16)
    assert [choose_rows(rows, shapes, exact=False) for rows in (1, 2, 3, 5, 9, 16)] == [1, 2, 4, 8, 16, 16]
    assert {choose_rows(rows, shapes, exact=True) for rows in range(1, 17)} == {16}


def test_others_join_where_they_hardly_slow_the_call_down() -> None:
    shapes = (1, 2, 4, 8, 16)
    assert spare_rows(2, shapes, lambda rows: float(rows)) == 2, "twice the rows take twice as long"
    assert spare_rows(3, shapes, lambda rows: float(rows)) == 4, "padding is free"
    assert spare_rows(2, shapes, lambda rows: 1 + rows / 16) == 8, "1.125 and 1.5 s; 16 rows take 2 s"
    assert spare_rows(16, shapes, lambda rows: float(rows)) == 16


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"batch_shapes": ()}, "batch_shapes"),
        ({"batch_shapes": (4, 2)}, "ascending"),
        ({"batch_shapes": (0, 2)}, "from 1 to 4096"),
        ({"max_queue": 0}, "max_queue"),
        ({"threads": 0}, "threads"),
        ({"max_clip_count": 0}, "max_clip_count"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        EngineConfig(**settings)  # type: ignore[arg-type]
