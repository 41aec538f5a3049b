"""The tabs that make clips, as functions: against real services with tiny models."""

import asyncio
import base64
import html
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, contextmanager
from typing import Any

import httpx
import pytest

from services.api.scoring import Reward
from services.client import AudioClient
from services.client.clients import AsyncAudioClient
from services.processes import free_port
from services.runtime.settings import load_settings
from services.web.settings import WebSettings
from services.web.studio.cards import cards
from services.web.studio.create import compare, create, served_facts
from services.web.studio.desk import Desk
from services.web.studio.explain import WITHOUT_SERVICE, explain, methods
from services.web.studio.making import Form, Judged, Take, follow
from services.web.studio.opinions import opinion, verdict
from tests.services.explanation import serving as explanation
from tests.services.generation.serving import Serving, serving, tiny_engine
from tests.services.web.hosting import calling, hosting_web
from tests.services.web.studio.desks import desk_of
from tests.waiting import until

PROMPT = "a dog barks"
FAST = ("", "1", "", "0.64")
"""Negative prompt, steps, guidance, length."""


class Tabs:
    """The functions of the tabs, with what the page would show at the end."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk

    async def create(self, *values: Any, order: str = "as made", count: int = 1, seed: str = "7") -> "Shown":
        prompt, *settings = values or (PROMPT,)
        work = create(self.desk, "", prompt, count, order, seed, "wav", *(settings or FAST))
        return await _shown(work)


class Shown:
    def __init__(self, said: str, shown: str) -> None:
        self.said, self.shown = _text(said), shown
        self.text = _text(shown)


def _text(page: str) -> str:
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", page)).split())


async def _shown(updates: AsyncIterator[tuple[Any, Any]]) -> Shown:
    """Return what the page shows after all updates: Gradio's `skip` leaves what was there."""
    said = shown = ""
    async with aclosing(updates) as found:  # type: ignore[type-var]  # it is a generator
        async for one, other in found:
            said = one if isinstance(one, str) else said
            shown = other if isinstance(other, str) else shown
    return Shown(said, shown)


async def _desk(**settings: Any) -> AsyncIterator[Desk]:
    desk = desk_of(load_settings(WebSettings, **settings))
    yield desk
    await desk.backend.close()


@pytest.fixture
async def tabs(addresses: dict[str, str]) -> AsyncIterator[Tabs]:
    async for desk in _desk(**addresses):
        yield Tabs(desk)


# Create


async def test_clips_come_with_sound_picture_scores_reward_and_caption(
    tabs: Tabs, addresses: dict[str, str]
) -> None:
    found = await tabs.create(order="reward", count=3)
    assert found.said == ""
    assert found.shown.count("<audio") == found.shown.count("<svg") == found.shown.count("<img") == 3
    for fact in ("CLAP score a ", "Reward", "Caption", "Seed 7, 0.64 s", "Download"):
        assert found.text.count(fact) >= 3
    assert found.text.count("best of 3 by the reward") == 1
    with AudioClient(addresses["generation"]) as client:
        made = client.generate(PROMPT, seed=7, clip_count=3, num_inference_steps=1, duration=0.64)
    for clip in made.clips:
        assert base64.b64encode(clip.audio).decode() in found.shown


async def test_nothing_that_is_shown_comes_from_elsewhere(tabs: Tabs) -> None:
    found = await tabs.create()
    assert "http" not in re.sub(r"base64,[A-Za-z0-9+/=]*", "", found.shown)


async def test_a_prompt_is_text_and_no_page(tabs: Tabs) -> None:
    found = await tabs.create("a dog <img src=x onerror=alert(1)> \"' barks", *FAST)
    assert "<img src=x" not in found.shown
    assert "&lt;img src=x onerror=alert(1)&gt; &quot;&#x27; barks" in found.shown


async def test_unknown_words_are_warned_of(tabs: Tabs) -> None:
    found = await tabs.create("a zebra", *FAST)
    assert "Prompt has words that the model does not know: zebra" in found.said
    assert "<audio" in found.shown


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (("",), "Prompt is empty"),
        (("x" * 1001,), "Prompt has 1001 characters, the limit is 1000; shorten it."),
        ((PROMPT, "", "5000", "", ""), "Steps is 5000, must be between 1 and 1000."),
        ((PROMPT, "", "2.5", "many", ""), "Steps is '2.5', must be a whole number such as 25, or empty."),
        ((PROMPT, "", "2.5", "many", ""), "Guidance is 'many', must be a number such as 2.5, or empty."),
        ((PROMPT, "", "", "", "1,5"), "Length is '1,5', must be a number"),
        ((PROMPT, "", "1", "", "99"), "Length is 99 s, must be between"),
        ((PROMPT, "n" * 1001, "1", "", ""), "Negative prompt has 1001 characters"),
    ],
)
async def test_a_wrong_field_is_named_as_the_page_names_it(
    tabs: Tabs, values: tuple[str, ...], says: str
) -> None:
    found = await tabs.create(*values)
    assert says in found.said
    assert found.shown == ""


@pytest.mark.parametrize(
    ("seed", "says"), [("x", "Seed is 'x', must be"), ("-1", "Seed is -1"), ("9" * 20, "Seed")]
)
async def test_a_wrong_seed_is_named(tabs: Tabs, seed: str, says: str) -> None:
    assert says in (await tabs.create(seed=seed)).said


async def test_fields_that_were_never_shown_are_empty() -> None:
    assert Form.of([None] * 4, seed=None).options()["seed"] is None


async def test_a_service_that_is_away_is_said() -> None:
    async for desk in _desk(generation=f"127.0.0.1:{free_port()}"):
        found = await Tabs(desk).create()
        assert found.said.startswith("The service is away: ")
        assert "The service is away" in await served_facts(desk, "")


async def test_a_judge_that_is_away_keeps_no_clip_back(addresses: dict[str, str]) -> None:
    async for desk in _desk(**addresses | {"scoring": f"127.0.0.1:{free_port()}"}):
        found = await Tabs(desk).create(order="CLAP score", count=2)
        assert found.said.startswith("No CLAP scores. The service is away: ")
        assert found.shown.count("<audio") == 2
        assert "Reward" in found.text
        assert "best of" not in found.text


@contextmanager
def _crowded() -> Iterator[tuple[Serving, list[Any]]]:
    """A service with room for two clips, and the streams of two callers who have taken it."""
    with (
        tiny_engine(batch_shapes=(1,), max_queue=1, max_clip_count=1) as engine,
        serving(engine) as served,
        AudioClient(served.target, retries=0) as client,
    ):
        streams: list[Any] = [client.stream(PROMPT, num_inference_steps=1000) for _ in range(2)]
        until(lambda: next(streams[0]) is not None and engine.stats.running == 1)
        next(streams[1])
        yield served, streams
        for stream in streams:
            stream.close()


async def test_a_queue_that_stays_full_says_when_to_try_again() -> None:
    with _crowded() as (served, _):
        async for desk in _desk(generation=served.target, wait_seconds=0):
            found = await Tabs(desk).create()
            assert re.match(r"The queue is full: .* Try again in \d+ s\.", found.said)


async def test_a_full_queue_is_waited_for_as_by_http() -> None:
    with _crowded() as (served, streams):
        async for desk in _desk(generation=served.target):
            said, shown = list[str](), ""
            async with aclosing(create(desk, "", PROMPT, 1, "as made", "7", "wav", *FAST)) as updates:  # type: ignore[type-var]
                async for one, other in updates:
                    said.append(_text(one))
                    shown = other if isinstance(other, str) else shown
                    if said[-1] == "Waiting for a place in the queue":
                        for stream in streams:
                            await asyncio.to_thread(stream.close)
            assert "Waiting for a place in the queue" in said
            assert said[-1] == ""
            assert shown.count("<audio") == 1


async def test_a_full_queue_of_explanations_is_waited_for() -> None:
    with explanation.serving(explanation.tiny_explainer(), max_queue=1) as explained:
        async for desk in _desk(generation="127.0.0.1:1", explanation=explained.target):
            found = await asyncio.gather(
                *(_shown(explain(desk, "", PROMPT, "attention", "3", "", *FAST)) for _ in range(5))
            )
            assert [one.said for one in found] == [""] * 5
            assert all("Which word made which sound" in html.unescape(one.shown) for one in found)


async def test_services_for_callers_with_a_token_only_say_so(addresses: dict[str, str]) -> None:
    async for desk in _desk(**addresses, anonymous="refused"):
        assert "open “Your token”" in (await Tabs(desk).create()).said
        work = create(desk, "no token\n", PROMPT, 1, "as made", "", "wav", *FAST)
        assert "Your token holds no token" in (await _shown(work)).said


async def test_leaving_cancels_the_call(generating: Serving) -> None:
    labels = {"rpc": "StreamGenerateAudio", "code": "CANCELLED"}

    def cancelled() -> float:
        return generating.metrics.registry.get_sample_value("milonga_requests_total", labels) or 0

    before = cancelled()
    async for desk in _desk(generation=generating.target):
        async with aclosing(create(desk, "", PROMPT, 1, "as made", "", "wav", "", "1000", "", "")) as updates:  # type: ignore[type-var]
            async for said, _ in updates:
                if "Step " in str(said):
                    break
        await asyncio.to_thread(until, lambda: cancelled() == before + 1)


async def test_what_changes_last_is_seen() -> None:
    seen, state = [], [0]

    async def work(changed: Any) -> None:
        for number in range(1, 4):
            state[0] = number
            changed()
            await asyncio.sleep(0)

    async for _ in follow(work):
        await asyncio.sleep(0.01)
        seen.append(state[0])
    assert seen[-1] == 3


async def test_clips_without_a_value_come_last(tabs: Tabs) -> None:
    client = AsyncAudioClient(tabs.desk.settings.generation)
    made = await client.generate(PROMPT, seed=1, clip_count=3, num_inference_steps=1, duration=0.64)
    await client.close()
    take = Take(prompt=PROMPT, clips=[Judged(clip=clip) for clip in made.clips])
    take.clips[1].reward = Reward.of(-1.0)
    take.clips[2].reward = Reward.of(2.0)
    assert [one.clip.index for one in take.ranked("reward")] == [2, 1, 0]
    assert [one.clip.index for one in take.ranked("made")] == [0, 1, 2]
    assert "best of 3 by the reward" in cards(take, "reward")
    assert "best of" not in cards(take)


def test_opinions_in_words() -> None:
    assert verdict(Reward.of(3.0)) == "likes"
    assert verdict(Reward.of(0.1)) == "is undecided about"
    assert opinion(Reward.of(-3.0)) == (
        "The reward model does not like it: probability 0.05 that a listener calls it right."
    )
    assert "less than 0.01" in opinion(Reward.of(-9.0))
    assert "knows no word" in opinion(Reward.of(3.0, readable=False))


# Compare


async def test_two_settings_share_their_seeds(tabs: Tabs) -> None:
    sides = ("served", "", "1", "", "0.64", "served", "", "2", "", "0.64")
    found = await _shown(compare(tabs.desk, "", PROMPT, 2, "", *sides))
    seeds = re.findall(r"Seed (\d+),", found.text)
    assert len(seeds) == 4 and len({*seeds}) == 1
    assert re.search(r"A tiny 1 .* B tiny 1 ", found.text)


async def test_two_models_are_compared(addresses: dict[str, str]) -> None:
    with tiny_engine(max_clip_count=1) as engine, serving(engine) as other:
        async for desk in _desk(**addresses, challenger=other.target):
            sides = ("served", *FAST, "challenger", *FAST)
            # Two clips are more than the challenger makes in a call.
            found = await _shown(compare(desk, "", PROMPT, 2, "7", *sides))
            assert "Clips is 2, must be between 1 and 1" in found.said
            assert found.shown.count("<audio") == 2
            found = await _shown(compare(desk, "", PROMPT, 1, "7", *sides))
            assert found.said == "" and found.shown.count("<audio") == 2


# Explain


async def test_an_explanation_is_the_page_of_the_command(tabs: Tabs) -> None:
    updates = explain(tabs.desk, "", PROMPT, "the model’s first", "3", "dog", *FAST)
    found = await _shown(updates)
    assert found.said == ""
    page = html.unescape(found.shown)
    assert "Which word made which sound" in page
    assert '"words": ["a", "dog", "barks"]' in page
    assert "Without “dog”" in page


@pytest.mark.parametrize(
    ("prompt", "method", "without", "says"),
    [
        ("", "the model’s first", "", "Prompt is empty"),
        (PROMPT, "guess", "", "Method is 'guess', which this model does not have"),
        (PROMPT, "the model’s first", "zebra", "Words to leave out is 'zebra'"),
    ],
)
async def test_a_wrong_explanation_is_named(
    tabs: Tabs, prompt: str, method: str, without: str, says: str
) -> None:
    found = await _shown(explain(tabs.desk, "", prompt, method, "", without, *FAST))
    assert says in found.said
    assert found.shown == ""


async def test_methods_are_those_of_the_served_model(tabs: Tabs) -> None:
    assert (await methods(tabs.desk, ""))["choices"][1:] == ["occlusion", "attention", "mask"]
    async for desk in _desk(explanation=f"127.0.0.1:{free_port()}"):
        assert "choices" not in await methods(desk, "")


# The page


@pytest.fixture(scope="module")
def page(generating: Serving) -> Iterator[httpx.Client]:
    with hosting_web(generation=generating.target, studio=True) as url, calling(url) as http:
        yield http


def test_the_page_is_at_the_root_and_browsers_may_ask_nobody_else(page: httpx.Client) -> None:
    lead = page.get("/")
    assert (lead.status_code, lead.headers["location"]) == (307, "/studio/")
    assert page.get("/rate").headers["location"] == "/studio/?tab=rate"
    found = page.get("/studio/")
    assert found.status_code == 200
    policy = found.headers["content-security-policy"]
    assert policy.startswith("default-src 'self'; ")
    assert not re.search(r"https?:|\*", policy)
    loaded = re.findall(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=\"([^\"]*)\"", found.text)
    assert loaded and all(one.startswith(("./", "/")) for one in loaded)
    for name in loaded:
        assert page.get(f"/studio/{name[2:]}" if name.startswith(".") else name).status_code == 200


def test_tabs_without_their_service_say_so_in_a_line(page: httpx.Client) -> None:
    text = page.get("/studio/config").text
    for line in (WITHOUT_SERVICE, "start the web door with --ratings", "start the web door with --registry"):
        assert line in text


@pytest.mark.parametrize(
    "path", ["upload", "file=/etc/passwd", "/file=/etc/passwd", "proxy=http://x/", "stream/a"]
)
def test_files_neither_come_nor_go(page: httpx.Client, path: str) -> None:
    assert page.get(f"/studio/gradio_api/{path}").status_code == 404
    assert page.post(f"/studio/gradio_api/{path}", files={"files": b"x"}).status_code == 404


def test_the_rest_of_the_door_is_as_without_the_page(page: httpx.Client) -> None:
    assert page.get("/v1/nothing").headers["content-type"] == "application/problem+json"
    assert page.post("/v1/models").status_code == 405
    assert page.get("/studio/", headers={"Origin": "https://evil.example"}).status_code == 403


def test_a_door_without_the_page_says_how_to_have_it(http: httpx.Client) -> None:
    response = http.get("/")
    assert response.status_code == 501
    assert "no studio: start it with --studio" in response.json()["detail"]
