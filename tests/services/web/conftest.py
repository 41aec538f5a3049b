from collections.abc import Iterator

import httpx
import pytest

from tests.services.captioning import serving as captioning
from tests.services.explanation import serving as explanation
from tests.services.generation import serving as generation
from tests.services.reward import serving as reward
from tests.services.scoring import serving as scoring
from tests.services.web.hosting import calling, hosting_web
from tests.tiny import tiny_captioner, tiny_clap, tiny_reward


@pytest.fixture(scope="package")
def generating() -> Iterator[generation.Serving]:
    with generation.tiny_engine(max_clip_count=3) as engine, generation.serving(engine) as generating:
        yield generating


@pytest.fixture(scope="package")
def addresses(
    generating: generation.Serving, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, str]]:
    """Addresses of every service, with tiny models."""
    folder = scoring.save_tiny_clap(tmp_path_factory.mktemp("scorers") / "a", 0)
    with (
        scoring.serving({"a": f"file:{folder}"}) as scored,
        reward.serving(tiny_reward(tiny_clap())) as rewarded,
        captioning.serving(tiny_captioner()) as captioned,
        explanation.serving(explanation.tiny_explainer()) as explained,
    ):
        yield {
            "generation": generating.target,
            "scoring": scored.hosted.target,
            "reward": rewarded.target,
            "captioning": captioned.target,
            "explanation": explained.target,
        }


@pytest.fixture(scope="package")
def door(addresses: dict[str, str]) -> Iterator[str]:
    """The URL of a web door in front of every service, with tiny models."""
    with hosting_web(**addresses, max_body_bytes=2**18, max_audio_bytes=2**22) as url:
        yield url


@pytest.fixture
def http(door: str) -> Iterator[httpx.Client]:
    with calling(door) as client:
        yield client
