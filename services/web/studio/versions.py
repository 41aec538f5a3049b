"""The tab *Versions*: what is served, the registry, the ledger of promotions. Read only."""

import asyncio
import html
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, Final

import gradio as gr

from services.api.model import ModelVersion
from services.client.clients import AsyncAudioClient
from services.web.studio.desk import Desk
from services.web.studio.fields import QUIET
from services.web.studio.messages import note, problem, sentences
from services.wire import read_version

WITHOUT_REGISTRY: Final = (
    "Registered versions and promotions need a registry: start the web door with --registry, the "
    "address of an MLflow server."
)
_SECONDS: Final = 5.0


def versions_tab(desk: Desk, token: Any) -> Any:
    """Create the tab; return what shows it."""
    refresh = gr.Button("Refresh", elem_classes="narrow")
    served = gr.HTML()
    registered = gr.HTML("" if desk.settings.registry else note(WITHOUT_REGISTRY))

    async def read(given: str) -> tuple[Any, Any]:
        return await what_is_served(desk, given), await what_is_registered(desk, given)

    refresh.click(read, [token], [served, registered], **QUIET)
    return partial(gr.on, fn=read, inputs=[token], outputs=[served, registered], **QUIET)


async def what_is_served(desk: Desk, token: str) -> str:
    """Return the state and the weights of each service with an address, as HTML."""
    states = await desk.backend.health()
    try:
        client = desk.client(token)
    except Exception as error:
        return problem(sentences(error))
    rows: list[list[str]] = []
    faults: list[str] = []
    for service, state in states.items():
        try:
            found = await _weights(client, service)
        except Exception as error:
            faults += [f"{service.capitalize()}: {one}" for one in sentences(error)]
            found = [("", None)]
        rows += [
            [service + (f" {name}" if name else ""), state.lower().replace("_", " "), *_identity(version)]
            for name, version in found
        ]
    header = ("Service", "State", "Model", "Version", "Digest", "Licence")
    return f"<h2>Served</h2>{problem(faults)}{table(header, rows)}"


async def _weights(client: AsyncAudioClient, service: str) -> list[tuple[str, ModelVersion | None]]:
    """Return the weights of a service, by scorer where there are several."""
    match service:
        case "generation":
            return [("", (await client.get_model(timeout=_SECONDS)).model)]
        case "scoring":
            listed = await client.list_scorers(timeout=_SECONDS)
            return [(one.name, read_version(one.model)) for one in listed.scorers]
        case "reward":
            return [("", read_version((await client.get_reward_model(timeout=_SECONDS)).model))]
        case "captioning":
            return [("", read_version((await client.get_captioner(timeout=_SECONDS)).model))]
        case _:
            return [("", (await client.get_explainer(timeout=_SECONDS)).generation.model)]


def _identity(version: ModelVersion | None) -> list[str]:
    if version is None:
        return ["", "", "", ""]
    return [version.name, version.version, version.digest[:19], version.license]


async def what_is_registered(desk: Desk, token: str) -> str:
    """Return the registry and the ledger, for a caller whom the services admit, as HTML."""
    if not desk.settings.registry:
        return note(WITHOUT_REGISTRY)
    try:
        client = desk.client(token)
        if not desk.settings.admits_anonymous:
            await client.get_model(timeout=_SECONDS)  # only the services know whose token it is
    except Exception as error:
        return problem(sentences(error))
    return await asyncio.to_thread(registry, desk.settings.registry)


def registry(uri: str) -> str:
    """Return the registered versions and the ledger of promotions, as HTML."""
    from services.weights.promotions import read_promotions, read_versions
    from services.weights.registry import connect

    try:
        client = connect(uri)
        versions, promotions = read_versions(client), read_promotions(client)
    except Exception as error:
        return problem(sentences(error))
    rows = [[one.name, one.version, ", ".join(one.aliases), one.digest[:19], one.created] for one in versions]
    ledger = [
        [one.started, one.kind, one.before, one.after, one.outcome, one.who, one.reason] for one in promotions
    ]
    return (
        f"<h2>Registered</h2>{table(('Model', 'Version', 'Aliases', 'Digest', 'Since (UTC)'), rows)}"
        f"<h2>Promotions</h2>"
        f"{table(('Began (UTC)', 'Kind', 'From', 'To', 'Outcome', 'By', 'Reason'), ledger)}"
    )


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table as HTML; a line where it has no row."""
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}' for cell in row)}" for row in rows)
    if not body:
        return note("None.")
    head = "".join(f"<th>{html.escape(name)}" for name in header)
    return f'<div class="scroll"><table><thead><tr>{head}<tbody>{body}</table></div>'
