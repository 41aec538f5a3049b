"""The page, and where the web door has it: `/studio`, behind a fence that keeps it to this server."""

from importlib.resources import files
from typing import Any, Final

import gradio as gr
from fastapi import FastAPI
from starlette.datastructures import MutableHeaders
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.web.studio import PATH
from services.web.studio.create import compare_tab, create_tab, served_facts
from services.web.studio.desk import Desk
from services.web.studio.explain import explain_tab
from services.web.studio.fields import QUIET
from services.web.studio.rate import rate_tab
from services.web.studio.versions import versions_tab

TABS: Final = ("create", "compare", "explain", "rate", "versions")
_POLICY: Final = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; media-src 'self' data:; font-src 'self' data:; connect-src 'self' data:; "
    "form-action 'none'; frame-ancestors 'self'; base-uri 'self'"
)
"""Browsers ask no other machine for anything, whatever a version of Gradio would have them ask."""
_CLOSED: Final = ("upload", "upload_progress", "proxy=", "file=", "stream", "file/")
"""Gradio's paths that nothing of the page uses: files that come in or go out."""


def mount(app: FastAPI, desk: Desk) -> None:
    """Add the page to the web door's app."""
    page = build_page(desk)
    page.queue(default_concurrency_limit=None)
    gr.mount_gradio_app(
        app,
        page,
        path=PATH,
        footer_links=[],
        run_history=False,
        show_error=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
        max_file_size=1,
        app_kwargs={"docs_url": None, "redoc_url": None, "openapi_url": None},
        theme=theme(),
        css=_text("style.css"),
        head=f"<script>{_text('script.js')}</script>",
    )
    app.add_middleware(Fence)

    @app.get("/manifest.json", include_in_schema=False)
    async def manifest() -> dict[str, Any]:
        """Return what Gradio's page asks for to be put on a home screen."""
        return {"name": "Milonga studio", "start_url": f"{PATH}/", "display": "browser", "icons": []}

    @app.get("/favicon.ico", include_in_schema=False)
    async def icon() -> Response:
        """Return the icon of the page."""
        return Response(_text("icon.svg"), media_type="image/svg+xml")


def theme() -> Any:
    """Return the theme, with the fonts of the reader's machine."""
    return gr.themes.Default(
        primary_hue="teal",
        neutral_hue="slate",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    ).set(
        # The theme's own colours have too little contrast.
        checkbox_border_color_dark="*neutral_400",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_hover_dark="*primary_800",
    )


def build_page(desk: Desk) -> Any:
    """Return the page: a tab per task."""
    with gr.Blocks(title="Milonga studio", analytics_enabled=False, fill_width=True) as page:
        gr.HTML('<h1 class="title">Milonga studio</h1>')
        token = gr.Textbox(
            label="Your token",
            info="Only for services that ask for one. It stays in this browser.",
            type="password",
            elem_id="token",
            render=False,
        )
        with gr.Tabs() as tabs:
            with gr.Tab("Create", id="create"):
                facts = create_tab(desk, token)
            with gr.Tab("Compare", id="compare"):
                compare_tab(desk, token)
            with gr.Tab("Explain", id="explain"):
                explain_tab(desk, token)
            with gr.Tab("Rate", id="rate"):
                rating = rate_tab(desk)
            with gr.Tab("Versions", id="versions") as versions:
                show_versions = versions_tab(desk, token)
        show_versions(triggers=[versions.select])
        with gr.Accordion("Your token", open=False):
            token.render()
        _on_load(page, desk, token, facts, tabs, rating)
    return page


def _on_load(page: Any, desk: Desk, token: Any, facts: Any, tabs: Any, rating: Any) -> None:
    """Restore tokens from the browser, open the tab that the address names, say what is served."""

    async def load(given: str, request: gr.Request) -> tuple[str, Any]:
        named = request.query_params.get("tab", "")
        return await served_facts(desk, given), gr.update(selected=named) if named in TABS else gr.skip()

    kept = page.load(None, None, [token], js="() => [milonga.kept('token')]", **QUIET)
    kept.then(load, [token], [facts, tabs], **QUIET)

    async def again(given: str) -> str:
        return await served_facts(desk, given)

    token.change(again, [token], [facts], **QUIET)
    token.change(None, [token], None, js="value => milonga.keep('token', value)", **QUIET)
    if rating is not None:
        rater, entering = rating
        page.load(None, None, [rater], js="() => [milonga.kept('rater')]", **QUIET).then(**entering)
        rater.change(None, [rater], None, js="value => milonga.keep('rater', value)", **QUIET)


class Fence:
    """Closes what nothing of the page uses, and forbids browsers to ask other machines."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        path: str = scope.get("path", "")
        if scope["type"] != "http" or not (path == PATH or path.startswith(f"{PATH}/")):
            await self._app(scope, receive, send)
            return
        rest = path.removeprefix(PATH).lstrip("/").removeprefix("gradio_api").lstrip("/")
        if rest.startswith(_CLOSED):
            await PlainTextResponse("the studio has no files", 404)(scope, receive, send)
            return

        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["Content-Security-Policy"] = _POLICY
                headers["Referrer-Policy"] = "no-referrer"
                headers["X-Content-Type-Options"] = "nosniff"
            await send(message)

        await self._app(scope, receive, sent)


def _text(name: str) -> str:
    return (files("services.web.studio") / name).read_text(encoding="utf-8")
