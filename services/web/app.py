"""The app of the web door."""

import importlib.metadata
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse
from starlette.types import ASGIApp

from services.errors import MilongaError, UnsupportedError
from services.web import generation, judging, provenance, studio
from services.web.backend import Backend
from services.web.docs_page import docs_page
from services.web.limits import Limits
from services.web.metrics import WebMetrics
from services.web.problems import on_error, on_http_error, on_invalid
from services.web.settings import WebSettings
from services.web.studio.desk import Desk
from services.web.waiting import WaitingRoom

DESCRIPTION = (
    "Text to audio: clips of prompts in the shapes of vLLM-Omni and of ElevenLabs; scores, rewards and "
    "captions of sounds. Errors are problem details (RFC 9457)."
)


class Readiness:
    """Whether the web door takes requests."""

    draining = False


def build_app(settings: WebSettings, metrics: WebMetrics, readiness: Readiness) -> ASGIApp:
    """Return the ASGI app. It calls services from the event loop that runs it.

    Raises:
        InvalidInputError: an address or a file of the settings is wrong.
    """
    backend = Backend(settings)
    signer = None
    if settings.sign_cert is not None and settings.sign_key is not None:
        from services.provenance.signing import ClipSigner

        runs_of = None
        if settings.registry is not None:
            from services.weights.lineage import Lineage

            runs_of = Lineage(settings.registry)
        signer = ClipSigner(
            settings.sign_cert, settings.sign_key, with_prompt=settings.sign_prompt, runs_of=runs_of
        )

    store = None
    if settings.ratings is not None:
        from services.ratings.store import RatingStore

        store = RatingStore(settings.ratings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await backend.close()
        if store is not None:
            store.close()

    app = FastAPI(
        title="Milonga",
        version=importlib.metadata.version("milonga"),
        description=DESCRIPTION,
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
    )
    app.add_exception_handler(MilongaError, on_error)
    app.add_exception_handler(Exception, on_error)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(RequestValidationError, on_invalid)
    room = WaitingRoom(settings.wait_seconds, metrics.waiting)
    app.include_router(generation.router(backend, settings, signer, room))
    app.include_router(judging.router(backend, settings, room))
    app.include_router(provenance.router(settings, signer))
    if store is not None:
        from services.web import ratings

        app.include_router(ratings.router(store))
    app.include_router(_operations(app, backend, settings, metrics, readiness))
    desk = Desk(backend=backend, settings=settings, room=room, store=store, signer=signer)
    _add_studio(app, settings, desk)
    return Limits(app, settings, metrics)


def _add_studio(app: FastAPI, settings: WebSettings, desk: Desk) -> None:
    """Add the studio, and the way to it from `/` and `/rate`; without it these say what it needs."""
    installed = settings.studio and studio.is_installed()
    if installed:
        # Gradio takes a second to import.
        from services.web.studio.page import mount

        mount(app, desk)

    async def lead(request: Request) -> Response:
        if not installed:
            remedy = "start it with --studio" if studio.is_installed() else "pip install 'milonga[studio]'"
            raise UnsupportedError(f"this web door has no studio: {remedy}; /docs lists its paths")
        tab = "?tab=rate" if request.url.path == "/rate" else ""
        return RedirectResponse(f"{studio.PATH}/{tab}")

    for path in ("/", "/rate"):
        app.add_api_route(path, lead, methods=["GET", "HEAD"], include_in_schema=False)


def _operations(
    app: FastAPI, backend: Backend, settings: WebSettings, metrics: WebMetrics, readiness: Readiness
) -> APIRouter:
    """Return the endpoints for those who run the web door."""
    routes = APIRouter()

    @routes.head("/health", include_in_schema=False)
    @routes.get("/health")
    async def health() -> Response:
        """Say whether clips can be made (200) or not (503), and the state of each service."""
        states = await backend.health()
        well = states["generation"] == "SERVING" and not readiness.draining
        return JSONResponse(
            {"status": "ok" if well else "unavailable", "services": states}, 200 if well else 503
        )

    @routes.head("/live", include_in_schema=False)
    @routes.get("/live", include_in_schema=False)
    async def live() -> Response:
        """Say whether the web door takes requests, whatever its services do: for probes."""
        return Response(status_code=503 if readiness.draining else 200)

    @routes.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        """Return the page of the API."""
        return HTMLResponse(docs_page(app.openapi()))

    if settings.metrics_port is None:

        @routes.get("/metrics", include_in_schema=False)
        async def scrape() -> Response:
            """Return metrics for Prometheus."""
            return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return routes
