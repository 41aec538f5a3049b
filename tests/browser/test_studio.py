"""The studio in a real browser, as a person uses it."""

import re
from typing import Any

import pytest

from services.ratings.store import RatingStore
from tests.browser.conftest import Visit
from tests.waiting import until

PROMPT = "a dog barks"
PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True}
DARK = {"color_scheme": "dark"}


def _fill(page: Any, **fields: str) -> None:
    for label, text in fields.items():
        page.get_by_label(label.replace("_", " "), exact=True).fill(text)


@pytest.mark.parametrize("visit", [{}, PHONE, DARK], indirect=True, ids=["wide", "phone", "dark"])
def test_clips_are_made_by_keyboard_and_every_request_stays_on_this_machine(visit: Visit) -> None:
    page = visit.open()
    _fill(page, Prompt=PROMPT, Steps="2", Seed="7")
    page.get_by_label("Prompt", exact=True).press("Enter")
    page.locator(".card dt", has_text="Caption").nth(3).wait_for()
    page.get_by_text("best of 4 by the reward").wait_for()
    assert page.locator(".card audio").count() == 4
    assert page.locator(".card").first.locator("svg.waveform").is_visible()
    assert page.evaluate("document.querySelector('.spectrogram img').naturalWidth") > 100
    with page.expect_download() as download:
        page.get_by_role("link", name="Download Clip 1").click()
    assert download.value.suggested_filename == "clip-7-1.wav"
    assert visit.hosts == {"127.0.0.1"}
    assert visit.errors == []
    # Nothing is wider than the window.
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_a_clip_is_played(visit: Visit) -> None:
    page = visit.open()
    _fill(page, Prompt=PROMPT, Steps="1")
    page.get_by_role("button", name="Make clips").click()
    page.locator(".card dt", has_text="Caption").nth(3).wait_for()
    page.evaluate("document.querySelector('.card audio').play()")
    page.wait_for_function("document.querySelector('.card audio').currentTime > 0")


def test_cancel_ends_the_call_and_the_next_one_works(visit: Visit) -> None:
    engine = visit.studio.generating.engine
    page = visit.open()
    cancel = page.get_by_role("tabpanel").get_by_role("button", name="Cancel").first
    assert cancel.is_disabled()
    _fill(page, Prompt=PROMPT, Steps="1000")
    page.get_by_role("button", name="Make clips").click()
    page.get_by_text(re.compile("Step [0-9]+ of 1000")).wait_for()
    cancel.click()
    page.get_by_text("Cancelled.").wait_for()
    until(lambda: engine.stats.running == 0)
    page.get_by_text("Cancelled.").wait_for()
    assert page.locator(".card").count() == 0
    _fill(page, Steps="1")
    page.get_by_role("button", name="Make clips").click()
    page.locator(".card dt", has_text="Caption").nth(3).wait_for()


def test_a_closed_window_ends_the_call(visit: Visit) -> None:
    engine = visit.studio.generating.engine
    page = visit.open()
    _fill(page, Prompt=PROMPT, Steps="1000")
    page.get_by_role("button", name="Make clips").click()
    until(lambda: engine.stats.running > 0)
    page.close()
    until(lambda: engine.stats.running == 0)


def test_what_is_wrong_is_said_and_the_form_stays(visit: Visit) -> None:
    page = visit.open()
    _fill(page, Prompt="x" * 1001, Steps="many")
    page.get_by_role("button", name="Make clips").click()
    page.get_by_role("alert").get_by_text("Steps is 'many', must be a whole number").wait_for()
    _fill(page, Steps="1")
    page.get_by_role("button", name="Make clips").click()
    page.get_by_role("alert").get_by_text("Prompt has 1001 characters, the limit is 1000").wait_for()
    assert page.get_by_label("Prompt", exact=True).input_value() == "x" * 1001


def test_a_prompt_is_text_and_no_page(visit: Visit) -> None:
    prompt = "a dog <img src=x onerror='window.hit = 1'> ${1+1} {{7*7}} barks"
    page = visit.open()
    _fill(page, Prompt=prompt, Steps="1")
    page.get_by_role("button", name="Make clips").click()
    page.locator(".card dt", has_text="Caption").nth(3).wait_for()
    assert page.locator(".card audio").first.get_attribute("aria-label").endswith(prompt)
    assert page.evaluate("window.hit") is None


def test_two_settings_side_by_side(visit: Visit) -> None:
    page = visit.open()
    page.get_by_role("tab", name="Compare").click()
    page.get_by_label("Prompt to compare").fill(PROMPT)
    for side, steps in (("A", "1"), ("B", "2")):
        page.get_by_label(f"{side}: Steps").fill(steps)
    page.get_by_role("button", name="Make both").click()
    page.locator(".columns section").nth(1).locator("dt", has_text="Caption").nth(1).wait_for()
    assert len({*re.findall(r"Seed (\d+)", page.locator(".columns").inner_text())}) == 1


def test_words_and_time_under_the_spectrogram(visit: Visit) -> None:
    page = visit.open()
    page.get_by_role("tab", name="Explain").click()
    page.get_by_label("Prompt to explain").fill(PROMPT)
    page.get_by_role("button", name="Explain", exact=True).click()
    frame = page.frame_locator("iframe.explanation")
    frame.locator(".band").nth(2).wait_for()
    assert frame.locator(".name").all_inner_texts() == ["a", "dog", "barks"]
    assert visit.hosts == {"127.0.0.1"}


def test_versions_of_what_is_served(visit: Visit) -> None:
    page = visit.open()
    page.get_by_role("tab", name="Versions").click()
    page.get_by_role("cell", name="captioning").wait_for()
    assert page.locator("tbody tr").count() >= 5


# Rate


def _enter(visit: Visit, name: str) -> tuple[Any, RatingStore]:
    page, store = visit.open("/rate"), visit.studio.store
    page.get_by_label("Your rater’s token").fill(store.add_rater(name))
    page.get_by_role("button", name="Enter").click()
    page.get_by_text(f"0 of 22 rated by {name}").wait_for()
    return page, store


def _rated(store: RatingStore, name: str) -> list[int]:
    return [one.item for one in store.ratings() if one.rater == name]


def test_twenty_pairs_are_rated_by_keys_and_buttons_with_a_reload_in_the_middle(visit: Visit) -> None:
    page, store = _enter(visit, "ann")
    page.locator(".prompt").click()
    for number in range(1, 11):
        page.keyboard.press(str(1 + number % 4))
        page.get_by_text(f"{number} of 22 rated by ann").wait_for()
    shown = page.locator(".prompt").inner_text(), page.locator("#rate-left").get_attribute("src")
    page.reload()
    page.get_by_text("10 of 22 rated by ann").wait_for()
    assert shown == (
        page.locator(".prompt").inner_text(),
        page.locator("#rate-left").get_attribute("src"),
    )
    for number in range(11, 21):
        page.get_by_role("button", name="3 Both good").click()
        page.get_by_text(f"{number} of 22 rated by ann").wait_for()
    assert len({*_rated(store, "ann")}) == 20
    assert visit.hosts == {"127.0.0.1"}
    assert visit.errors == []


def test_a_rating_is_taken_back_after_a_reload(visit: Visit) -> None:
    page, store = _enter(visit, "bob")
    first = page.locator(".prompt").inner_text()
    page.get_by_role("button", name="1 Left").click()
    page.get_by_text("1 of 22 rated by bob").wait_for()
    page.reload()
    page.get_by_text("1 of 22 rated by bob").wait_for()
    page.get_by_role("button", name="Take the last one back").click()
    page.get_by_text("Taken back: rate this pair again.").wait_for()
    assert page.locator(".prompt").inner_text() == first
    assert _rated(store, "bob") == []
    page.get_by_role("button", name="2 Right").click()
    page.get_by_text("1 of 22 rated by bob").wait_for()
    assert len(_rated(store, "bob")) == 1


def test_clips_of_a_pair_play_by_key_one_at_a_time(visit: Visit) -> None:
    page, _ = _enter(visit, "cara")
    page.locator(".prompt").click()
    for key, side, other in (("q", "left", "right"), ("w", "right", "left")):
        page.keyboard.press(key)
        page.wait_for_function(f"document.getElementById('rate-{side}').currentTime > 0")
        assert page.evaluate(f"document.getElementById('rate-{other}').paused")


def test_a_database_that_goes_away_is_told_and_nothing_is_lost(visit: Visit) -> None:
    page, store = _enter(visit, "dan")
    page.get_by_role("button", name="1 Left").click()
    page.get_by_text("1 of 22 rated by dan").wait_for()
    prompt = page.locator(".prompt").inner_text()
    store.close()
    path = visit.studio.database
    away = path.rename(path.with_suffix(".away"))
    path.mkdir()
    try:
        page.get_by_role("button", name="2 Right").click()
        page.get_by_role("alert").get_by_text("Not saved, and nothing is lost").wait_for()
        assert page.locator(".prompt").inner_text() == prompt
    finally:
        path.rmdir()
        away.rename(path)
    page.get_by_role("button", name="2 Right").click()
    page.get_by_text("2 of 22 rated by dan").wait_for()
    assert len(_rated(store, "dan")) == 2
