"""Ratings: blind pairs, what raters see, agreement, the page's endpoints, and exports that training reads."""

import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
import soundfile

from services import cli
from services.errors import InvalidInputError, ServiceUnavailableError, UnauthenticatedError
from services.ratings.agreement import krippendorff_alpha, wilson_interval
from services.ratings.export import export_labels, export_pairs, reliable
from services.ratings.planning import plan_items
from services.ratings.store import Answers, Rater, RatingStore, Verdict, summary
from services.ratings.tables import Base, ItemRow
from tests.services.generation.serving import serving, tiny_engine
from tests.services.ratings.postgres import PROGRAMS, Postgres
from tests.services.ratings.studies import PROMPTS, make_a, make_b, planned_store, rate_all
from tests.services.web.hosting import calling, faults, hosting_web
from training.data.examples import read_labelled, read_pairs


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    """A server of the tests' own."""
    pytest.importorskip("psycopg")
    if PROGRAMS is None:
        pytest.skip("needs PostgreSQL's programs (Debian: postgresql), or POSTGRES_URL")
    # Not below pytest's folder, which another user may not enter.
    folder = Path(tempfile.mkdtemp())
    server = Postgres(folder)
    yield server
    server.stop()
    shutil.rmtree(folder)


@pytest.fixture(params=["sqlite", "postgresql"])
def store(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[RatingStore]:
    """A database with a study. PostgreSQL's is that of POSTGRES_URL, which is emptied, or the tests' own."""
    url = f"sqlite:///{tmp_path}/ratings.db"
    if request.param == "postgresql":
        url = os.environ.get("POSTGRES_URL") or request.getfixturevalue("postgres").url
        _empty(url)
    store = planned_store(url)
    yield store
    if request.param == "postgresql":
        _empty(url)
    store.close()


def _empty(url: str) -> None:
    engine = RatingStore(url)._engine
    Base.metadata.drop_all(engine)
    engine.dispose()


# Agreement


def test_alpha_is_that_of_krippendorffs_own_example() -> None:
    rows = ("123321412...", "123322412" + "5.3", ".33323422" + "51.", "12332441" + "251.")
    units = [[row[unit] for row in rows if row[unit] != "."] for unit in range(12)]
    alpha = krippendorff_alpha(units)
    assert alpha == pytest.approx(0.743, abs=5e-4)


def test_alpha_of_agreement_chance_and_nothing() -> None:
    assert krippendorff_alpha([["a", "a"], ["b", "b"]]) == 1
    assert krippendorff_alpha([["a", "b"], ["a", "b"]]) == pytest.approx(-0.5)
    assert krippendorff_alpha([["a"], []]) is None
    assert krippendorff_alpha([["a", "a"]]) is None


def test_wilsons_interval_by_hand() -> None:
    assert wilson_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson_interval(0, 0) == (0, 1)


# Plans and ratings


def test_a_plan_has_a_pair_per_prompt_on_sides_drawn_at_random_and_hidden_checks() -> None:
    items = list(plan_items(PROMPTS, make_a, make_b, seed=3, repeats=0.3, known=0.2))
    kinds = [item.kind for item in items]
    assert (kinds.count("pair"), kinds.count("repeat"), kinds.count("known")) == (10, 3, 2)
    sides = {item.left_source for item in items if item.kind == "pair"}
    assert sides == {"a", "b"}
    for item in items:
        if item.repeats is not None:
            original = items[item.repeats]
            assert (item.left, item.right, item.prompt) == (original.right, original.left, original.prompt)
    assert items == list(plan_items(PROMPTS, make_a, make_b, seed=3, repeats=0.3, known=0.2))


@pytest.mark.parametrize(("repeats", "prompts"), [(1.5, PROMPTS), (0.1, PROMPTS[:1])])
def test_wrong_plans_are_refused(repeats: float, prompts: list[str]) -> None:
    with pytest.raises(InvalidInputError):
        list(plan_items(prompts, make_a, make_b, repeats=repeats))


def test_a_rater_sees_every_pair_once_and_no_source(store: RatingStore) -> None:
    rater = store.rater(store.add_rater("ann"))
    seen = []
    while (shown := store.next_item(rater)[0]) is not None:
        assert not hasattr(shown, "left_source")
        seen.append(shown.id)
        store.rate(rater, shown.id, "both_bad")
    assert len(seen) == len({*seen}) == 15
    assert store.next_item(rater) == (None, 15, 15)
    other = store.rater(store.add_rater("bob"))
    assert store.next_item(other)[1:] == (0, 15)


def test_a_rating_can_be_changed_and_taken_back(store: RatingStore) -> None:
    rater = store.rater(store.add_rater("ann"))
    shown, _, _ = store.next_item(rater)
    assert shown is not None
    store.rate(rater, shown.id, "left")
    store.rate(rater, shown.id, "both_good", Answers(left_present=True))
    (one,) = store.ratings()
    assert (one.verdict, one.answers.left_present) == ("both_good", True)
    store.rate(rater, shown.id, None)
    assert store.ratings() == []
    assert store.next_item(rater)[0] == shown


def test_the_summary_measures_agreement_and_each_rater(store: RatingStore) -> None:
    rate_all(store, "ann")
    rate_all(store, "bob")
    found = summary(store.ratings())
    assert (found["pairs"], found["decided"], found["win_rate"]) == (10, 10, 1.0)
    assert found["win_rate_interval"][0] > 0.7
    assert found["raters"]["ann"]["consistency"] == 1
    assert found["raters"]["ann"]["repeats"] == 3
    rate_all(store, "eve", prefers_b=False)
    found = summary(store.ratings())
    assert found["win_rate"] == 1.0  # two of three
    assert found["krippendorff_alpha"] < 0


def test_many_raters_at_once_lose_nothing(store: RatingStore) -> None:
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda index: rate_all(store, f"rater {index}"), range(6)))
    assert len(store.ratings()) == 6 * 15


def test_one_pair_rated_twice_at_once_counts_once(store: RatingStore) -> None:
    rater = store.rater(store.add_rater("ann"))
    verdicts: list[Verdict] = ["left", "right"] * 10
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda verdict: store.rate(rater, 1, verdict), verdicts))
    assert len(store.ratings()) == 1


def test_tokens_and_names_of_raters(store: RatingStore) -> None:
    store.add_rater("Ann K.")
    for name in ("Ann K.", "", "x" * 65, "a\nb"):
        with pytest.raises(InvalidInputError, match="name"):
            store.add_rater(name)
    for token in (None, "", "wrong"):
        with pytest.raises(UnauthenticatedError):
            store.rater(token)
    with pytest.raises(InvalidInputError, match="is no pair"):
        store.rate(Rater(id=1, name="x"), 99, "left")


@pytest.mark.parametrize("url", ["nonsense", "oracle://x", "mysql://user:secret@host/x"])
def test_wrong_urls_are_named_without_their_password(url: str) -> None:
    with pytest.raises(InvalidInputError, match="must be sqlite:///FILE") as caught:
        RatingStore(url)
    assert "secret" not in str(caught.value)


def test_a_database_that_can_not_be_opened_is_told(tmp_path: Path) -> None:
    with pytest.raises(ServiceUnavailableError, match="nothing was saved"):
        RatingStore(f"sqlite:///{tmp_path}/absent/ratings.db")


def test_stores_that_create_the_tables_at_once_agree(postgres: Postgres) -> None:
    for _ in range(5):
        _empty(postgres.url)
        with ThreadPoolExecutor(6) as pool:
            stores = list(pool.map(lambda _: RatingStore(postgres.url), range(6)))
        for store in stores:
            assert store.ratings() == []
            store.close()


def test_a_server_that_crashes_in_the_middle_loses_no_rating(postgres: Postgres) -> None:
    _empty(postgres.url)
    store = planned_store(postgres.url)
    rater = store.rater(store.add_rater("ann"))
    store.rate(rater, 1, "left")
    postgres.stop()
    try:
        for _ in range(2):
            with pytest.raises(ServiceUnavailableError, match="nothing was saved, try again"):
                store.rate(rater, 2, "left")
    finally:
        postgres.start()
    store.rate(rater, 2, "right")
    assert [(one.item, one.verdict) for one in store.ratings()] == [(1, "left"), (2, "right")]
    _empty(postgres.url)
    store.close()


def test_ratings_of_one_pair_while_others_read_are_whole(store: RatingStore) -> None:
    """Several raters, each changing their mind; summaries are read meanwhile."""
    raters = [store.rater(store.add_rater(f"rater {number}")) for number in range(4)]

    def change(rater: Rater) -> None:
        verdicts: tuple[Verdict | None, ...] = ("left", None, "both_good", "right", None, "both_bad")
        for verdict in verdicts:
            store.rate(rater, 1, verdict, Answers(left_present=verdict == "both_good"))
            found = [one for one in store.ratings() if one.rater == rater.name]
            assert [one.verdict for one in found] == ([] if verdict is None else [verdict])
            assert summary(store.ratings())["pairs"] <= 1

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(change, raters))
    assert {one.verdict for one in store.ratings()} == {"both_bad"}
    assert len(store.ratings()) == 4


# Exports


def test_pairs_are_what_training_reads(store: RatingStore, tmp_path: Path) -> None:
    for name in ("ann", "bob"):
        rate_all(store, name)
    path = tmp_path / "pairs.parquet"
    assert export_pairs(store, store.ratings(), path) == 10
    pairs = read_pairs(path)
    assert [pair.prompt for pair in pairs] == PROMPTS
    assert {pair.kind for pair in pairs} == {"strategy listeners"}
    for pair in pairs:
        waveform_CN, rate = pair.chosen.read()[:2]
        assert rate == 16_000
        assert np.abs(np.fft.rfft(np.asarray(waveform_CN).reshape(-1)))[1:].argmax() + 1 > 300


def test_labels_are_what_training_reads(store: RatingStore, tmp_path: Path) -> None:
    rater = store.rater(store.add_rater("ann"))
    (first, second, third) = (item for item in range(1, 4))
    store.rate(rater, first, "both_good")
    store.rate(rater, second, "left", Answers(left_present=True, left_in_order=True, right_present=False))
    store.rate(rater, third, "right")
    path = tmp_path / "labels.json"
    assert export_labels(store, store.ratings(), path) == 4
    labelled = read_labelled(path)
    assert sorted(one.label for one in labelled) == [0, 1, 1, 1]
    assert {one.prompt for one in labelled} == set(PROMPTS[:2])


def test_raters_who_fail_known_pairs_are_left_out(store: RatingStore) -> None:
    good, bad = (store.rater(store.add_rater(name)) for name in ("good", "bad"))
    with store._session() as session:
        known = {row.id: row.left_source for row in session.query(ItemRow) if row.kind == "known"}
    for item, source in known.items():
        store.rate(good, item, "left" if source == "right" else "right")
        store.rate(bad, item, "left" if source == "wrong" else "right")
    for rater in (good, bad):
        store.rate(rater, 1, "left")
    assert {one.rater for one in reliable(store.ratings(), 0.7)} == {"good"}
    assert len(reliable(store.ratings(), 0)) == len(store.ratings())


def test_nothing_to_export_is_said(store: RatingStore, tmp_path: Path) -> None:
    for export in (export_pairs, export_labels):
        with pytest.raises(InvalidInputError, match="ratings"):
            export(store, store.ratings(), tmp_path / "x.json")


# Commands


def test_from_a_plan_to_pairs_by_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts, database = tmp_path / "prompts.jsonl", f"sqlite:///{tmp_path}/ratings.db"
    prompts.write_text("".join(f'{{"prompt": "{text}"}}\n' for text in ("a dog barks", "a siren wails")))
    with tiny_engine() as engine, serving(engine) as served:
        plan = ["--a", served.target, "--b", served.target, "--steps", "1", "--known", "0.5"]
        assert cli.run(["ratings", "plan", *plan, "--prompts", str(prompts), "--ratings", database]) == 0
    assert "3 pairs, of 2 prompts" in capsys.readouterr().out
    assert cli.run(["ratings", "rater", "ann", "--ratings", database]) == 0
    token = capsys.readouterr().out.strip()
    store = RatingStore(database)
    rater = store.rater(token)
    for item in (1, 2):
        store.rate(rater, item, "left")
    store.close()
    assert cli.run(["ratings", "export", str(tmp_path / "pairs.parquet"), "--ratings", database]) == 0
    assert len(read_pairs(tmp_path / "pairs.parquet")) == 2
    capsys.readouterr()
    assert cli.run(["ratings", "show", "--ratings", database]) == 0
    assert json.loads(capsys.readouterr().out)["pairs"] == 2
    assert cli.run(["ratings", "export", str(tmp_path / "pairs.csv"), "--ratings", database]) == 2


@pytest.mark.parametrize("words", [["show"], ["export", "pairs.parquet"]])
def test_a_database_that_is_not_there_is_named_and_not_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    path = tmp_path / "typo.db"
    assert cli.run(["ratings", *words, "--ratings", f"sqlite:///{path}"]) == 2
    assert f"--ratings: is a database in {path}, which is no file" in capsys.readouterr().err
    assert not path.exists()


def test_a_win_rate_gates_by_its_interval(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    database = f"sqlite:///{tmp_path}/ratings.db"
    store = planned_store(database)
    gate = ["ratings", "show", "--ratings", database, "--require", "0.5"]
    assert cli.run(gate) == 2  # nothing is rated
    rate_all(store, "ann")
    assert cli.run(gate) == 0  # ten of ten: from .72
    assert cli.run([*gate[:-1], "0.8"]) == 2
    assert "between 0.722 and 1.000 on 10 rated prompts" in capsys.readouterr().err
    store.close()


# HTTP


@pytest.fixture
def door(tmp_path: Path) -> Iterator[tuple[httpx.Client, RatingStore, Path]]:
    path = tmp_path / "ratings.db"
    store = planned_store(f"sqlite:///{path}")
    with (
        hosting_web(generation="127.0.0.1:1", ratings=f"sqlite:///{path}") as url,
        calling(url, Authorization=f"Bearer {store.add_rater('ann')}") as http,
    ):
        yield http, store, path
    store.close()


def test_rating_by_http(door: tuple[httpx.Client, RatingStore, Path]) -> None:
    http, store, _ = door
    state = http.get("/v1/ratings/next").json()
    assert (state["rater"], state["done"], state["total"]) == ("ann", 0, 15)
    pair = state["pair"]
    assert set(pair) == {"item", "prompt", "left", "right"}
    assert soundfile.info(io.BytesIO(http.get(pair["left"]).content)).format == "FLAC"
    answer = http.post("/v1/ratings", json={"item": pair["item"], "verdict": "left", "left_present": True})
    assert (answer.status_code, answer.json()["done"]) == (201, 1)
    assert http.get("/v1/ratings/next").json()["pair"] == answer.json()["pair"]  # a reload changes nothing
    assert http.get("/v1/ratings/summary").json()["ratings"] == 1
    assert http.delete(f"/v1/ratings/{pair['item']}").json()["done"] == 0
    assert store.ratings() == []


def test_one_pair_rated_at_once_in_two_windows_counts_once(
    door: tuple[httpx.Client, RatingStore, Path],
) -> None:
    http, store, _ = door
    verdicts: list[Verdict] = ["left", "right", "both_good", "both_bad"] * 4

    def rate(verdict: Verdict) -> httpx.Response:
        return http.post("/v1/ratings", json={"item": 1, "verdict": verdict})

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(rate, verdicts))
    assert [(one.status_code, one.json()["done"]) for one in answers] == [(201, 1)] * len(verdicts)
    (rating,) = store.ratings()
    assert (rating.item, rating.rater) == (1, "ann")
    last = http.post("/v1/ratings", json={"item": 1, "verdict": "left"})
    assert last.json()["done"] == 1
    assert [one.verdict for one in store.ratings()] == ["left"]


def test_wrong_ratings_are_named(door: tuple[httpx.Client, RatingStore, Path]) -> None:
    http, _, _ = door
    for body, field in (
        ({"item": 1, "verdict": "best"}, "verdict"),
        ({"item": 999, "verdict": "left"}, "item"),
        ({"item": 2**31, "verdict": "left"}, "item"),
        ({"item": 2**70, "verdict": "left"}, "item"),
        ({"item": -1, "verdict": "left"}, "item"),
        ({"item": "1", "verdict": "left"}, "item"),
        ({"item": 1, "verdict": "left", "rater": "bob"}, "rater"),
    ):
        assert field in faults(http.post("/v1/ratings", json=body))
    assert http.get("/v1/ratings/next", headers={"Authorization": "Bearer wrong"}).status_code == 401
    assert http.get("/v1/ratings/clips/abc").status_code == 400
    assert "is unknown in the query" in faults(http.get("/v1/ratings/next?rater=bob"))["rater"]


def test_a_database_that_goes_away_is_told_and_nothing_is_lost(
    door: tuple[httpx.Client, RatingStore, Path],
) -> None:
    http, store, path = door
    assert http.post("/v1/ratings", json={"item": 1, "verdict": "left"}).status_code == 201
    store.close()
    away = path.rename(path.with_suffix(".away"))
    path.mkdir()
    answer = http.post("/v1/ratings", json={"item": 2, "verdict": "left"})
    assert answer.status_code == 503
    assert "nothing was saved" in answer.json()["detail"]
    path.rmdir()
    away.rename(path)
    answer = http.post("/v1/ratings", json={"item": 2, "verdict": "left"})
    assert (answer.status_code, answer.json()["done"]) == (201, 2)
