"""The tab *Rate*, as functions, on a real database."""

import html
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.ratings.store import RatingStore
from services.web.studio.rate import IN_ORDER, PRESENT, View, agreement, rate, show, take_back
from tests.services.ratings.studies import planned_store


@pytest.fixture
def store(tmp_path: Path) -> Iterator[RatingStore]:
    store = planned_store(f"sqlite:///{tmp_path}/ratings.db")
    yield store
    store.close()


def _rate(store: RatingStore, token: str, item: int | None, verdict: str = "1 Left") -> View:
    return rate(store, verdict, token, item, False, [], [])


def test_twenty_pairs_one_after_another(store: RatingStore) -> None:
    token = store.add_rater("ann")
    view = show(store, token)
    for number in range(15):
        assert f"{number} of 15 rated by ann" in view.said
        assert view.entered and view.item is not None and view.pair is not None
        assert len(re.findall(r"/v1/ratings/clips/[0-9a-f]{64}", view.pair)) == 2
        assert view == show(store, token)  # a reload
        view = _rate(store, token, view.item)
    assert view.item is None
    assert "All pairs are rated" in str(view.pair)
    assert len(store.ratings()) == 15


def test_the_page_tells_no_source(store: RatingStore) -> None:
    view = show(store, store.add_rater("ann"))
    assert not re.search(r"mini|source|known|repeat", f"{view.pair}{view.said}")


def test_a_hasty_second_answer_replaces_the_first_one(store: RatingStore) -> None:
    token = store.add_rater("ann")
    first = show(store, token).item
    _rate(store, token, first)
    _rate(store, token, first, "4 Both bad")
    (one,) = store.ratings()
    assert (one.item, one.verdict) == (first, "both_bad")


def test_the_last_rating_is_taken_back_also_after_a_reload(store: RatingStore) -> None:
    token = store.add_rater("ann")
    first = show(store, token).item
    second = _rate(store, token, first).item
    _rate(store, token, second)
    for item, left in ((second, 1), (first, 0)):
        view = take_back(store, token)
        assert view.item == item
        assert "Taken back" in view.said
        assert len(store.ratings()) == left
    assert "no rating to take back" in take_back(store, token).said
    assert _rate(store, token, first).item is not None
    assert [one.item for one in store.ratings()] == [first]


def test_answers_on_single_clips_count_if_they_are_meant(store: RatingStore) -> None:
    token = store.add_rater("ann")
    item = show(store, token).item
    rate(store, "2 Right", token, item, True, [PRESENT], [PRESENT, IN_ORDER])
    (one,) = store.ratings()
    answers = one.answers
    assert (answers.left_present, answers.left_in_order) == (True, False)
    assert (answers.right_present, answers.right_in_order) == (True, True)


@pytest.mark.parametrize("token", ["", "  ", "milonga_unknown", "\n"])
def test_nobody_rates_without_a_raters_token(store: RatingStore, token: str) -> None:
    view = show(store, token)
    assert (view.item, view.entered) == (None, False)
    assert "token" in view.said
    assert "Not saved" in _rate(store, token, 1).said
    assert store.ratings() == []


def test_a_database_that_goes_away_is_told_and_the_pair_stays(store: RatingStore, tmp_path: Path) -> None:
    token = store.add_rater("ann")
    item = show(store, token).item
    item = _rate(store, token, item).item
    store.close()
    path = tmp_path / "ratings.db"
    away = path.rename(path.with_suffix(".away"))
    path.mkdir()
    for view in (_rate(store, token, item), take_back(store, token)):
        assert "Not saved, and nothing is lost: the pair stays here." in view.said
        assert "the database of ratings can&#x27;t be used" in view.said
        assert view.pair is None  # what is shown stays
    assert "can&#x27;t be used" in show(store, token).said
    path.rmdir()
    away.rename(path)
    assert "2 of 15" in _rate(store, token, item).said
    assert len(store.ratings()) == 2


def test_agreement_says_how_raters_agree_and_nothing_of_the_models(store: RatingStore) -> None:
    for name in ("ann", "bob"):
        token = store.add_rater(name)
        while (item := show(store, token).item) is not None:
            _rate(store, token, item, "3 Both good")
    text = html.unescape(re.sub(r"<[^>]*>", " ", agreement(store, token)))
    assert "not known" in text  # all answers are the same
    assert re.search(r"ann\s+15\s+100 % of 3\s+0 % of 2", text)
    assert "win" not in text
    assert "No rater has this token" in agreement(store, "wrong")
