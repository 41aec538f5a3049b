"""Chromium, and a web door with its page in front of tiny models. `make test-browser` runs it.

Where there is no Chromium, or no Playwright, the suite is skipped. MILONGA_CHROMIUM names another program.
"""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from services.ratings.store import RatingStore
from tests.services.captioning import serving as captioning
from tests.services.explanation import serving as explanation
from tests.services.generation import serving as generation
from tests.services.ratings.studies import planned_store
from tests.services.reward import serving as reward
from tests.services.scoring import serving as scoring
from tests.services.web.hosting import hosting_web
from tests.tiny import tiny_captioner, tiny_clap, tiny_reward

CHROMIUM = os.environ.get("MILONGA_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
TIMEOUT = 120_000
"""Milliseconds; only ends what hangs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Studio:
    """A web door with its page, and what is behind it."""

    url: str
    store: RatingStore
    database: Path
    generating: generation.Serving


@dataclass(frozen=True, kw_only=True, slots=True)
class Visit:
    """A page in a browser, and all that it has asked for."""

    page: Any
    studio: Studio
    requests: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    @property
    def hosts(self) -> set[str]:
        """Hosts of all requests that leave the browser."""
        parts = [urlsplit(url) for url in self.requests]
        return {str(part.hostname) for part in parts if part.scheme not in ("data", "blob")}

    def open(self, path: str = "/") -> Any:
        """Open a path; return the page when it can be used."""
        self.page.goto(self.studio.url + path)
        self.page.get_by_role("tab", name="Create").wait_for()
        return self.page


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Chromium without a window."""
    if CHROMIUM is None:
        pytest.skip("needs Chromium: apt install chromium, or MILONGA_CHROMIUM=/path/to/it")
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: make test-browser")
    with playwright.sync_playwright() as running:
        # Root has no sandbox.
        flags = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = running.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studio]:
    """Every service with tiny models, a web door in front of them, and a study of 22 pairs."""
    folder = tmp_path_factory.mktemp("studio")
    database = folder / "ratings.db"
    prompts = [f"rain falls number {index}" for index in range(15)]
    store = planned_store(f"sqlite:///{database}", prompts=prompts)
    with (
        generation.tiny_engine(max_clip_count=4) as engine,
        generation.serving(engine) as generating,
        scoring.serving({"a": f"file:{scoring.save_tiny_clap(folder / 'clap', 0)}"}) as scored,
        reward.serving(tiny_reward(tiny_clap())) as rewarded,
        captioning.serving(tiny_captioner()) as captioned,
        explanation.serving(explanation.tiny_explainer()) as explained,
        hosting_web(
            generation=generating.target,
            scoring=scored.hosted.target,
            reward=rewarded.target,
            captioning=captioned.target,
            explanation=explained.target,
            ratings=f"sqlite:///{database}",
            studio=True,
        ) as url,
    ):
        yield Studio(url=url, store=store, database=database, generating=generating)
    store.close()


@pytest.fixture
def visit(browser: Any, studio: Studio, request: pytest.FixtureRequest) -> Iterator[Visit]:
    """A fresh browser profile. `params`: options of its context, such as the viewport."""
    context = browser.new_context(**getattr(request, "param", {}))
    context.set_default_timeout(TIMEOUT)
    visit = Visit(page=context.new_page(), studio=studio)
    visit.page.on("request", lambda sent: visit.requests.append(sent.url))
    visit.page.on("pageerror", lambda error: visit.errors.append(str(error)))
    yield visit
    context.close()
