"""The tab *Versions*, as functions: against real services, and a real registry."""

import html
import re
from pathlib import Path

from services.processes import free_port
from services.runtime.settings import load_settings
from services.web.settings import WebSettings
from services.web.studio.versions import registry, what_is_registered, what_is_served
from tests.services.web.studio.desks import desk_of
from training.promotion.ledger import Ledger
from training.promotion.registry import Registry


def _text(page: str) -> str:
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", page)).split())


async def test_served_weights_with_state_and_digest(addresses: dict[str, str]) -> None:
    settings = load_settings(WebSettings, **addresses | {"reward": f"127.0.0.1:{free_port()}"})
    desk = desk_of(settings)
    found = _text(await what_is_served(desk, ""))
    await desk.backend.close()
    assert "generation serving tiny 1 sha256:000000000000 Apache-2.0" in found
    assert "scoring a serving" in found
    assert "reward unreachable" in found
    assert "Reward: The service is away" in found


def test_versions_and_promotions_of_a_registry(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    known = Registry(uri)
    assert _text(registry(uri)) == "Registered None. Promotions None."
    known.client.create_registered_model("milonga-tango")
    known.client.create_model_version(
        "milonga-tango", "runs:/x/model", tags={"milonga.digest": "sha256:" + "a" * 64}
    )
    known.client.set_registered_model_alias("milonga-tango", "champion", "1")
    ledger = Ledger(known)
    entry = ledger.begin(
        "promotion", place="here", model="milonga-tango", alias="champion", alias_before=None, from_pin=None,
        to_pin="models:/milonga-tango/1#sha256:" + "a" * 64,
    )  # fmt: skip
    assert "nothing milonga-tango/1 unfinished (begun)" in _text(registry(uri))
    entry.close("refused", "worse <than> before")
    found = _text(registry(uri))
    assert "milonga-tango 1 champion sha256:aaaaaaaaaaaa" in found
    assert re.search(r"promotion nothing milonga-tango/1 refused \S+ worse <than> before", found)


async def test_a_registry_is_shown_to_callers_of_the_services_only(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    Registry(uri)
    away = f"127.0.0.1:{free_port()}"
    for anonymous, shown in (("allowed", True), ("refused", False)):
        settings = load_settings(WebSettings, generation=away, registry=uri, anonymous=anonymous)
        desk = desk_of(settings)
        for token in ("", "somebody"):
            assert ("Promotions" in await what_is_registered(desk, token)) is shown
        await desk.backend.close()


def test_a_registry_that_is_away_is_said() -> None:
    for uri in ("sqlite:////nowhere/mlflow.db", f"http://127.0.0.1:{free_port()}"):
        assert 'role="alert"' in registry(uri)
