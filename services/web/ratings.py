"""Ratings of blind pairs by HTTP. People rate on the studio's page."""

import asyncio
from typing import Any, Literal

from fastapi import APIRouter, Depends, Request, Response
from pydantic import BaseModel, ConfigDict

from services.ratings.store import Answers, Rater, RatingStore, summary
from services.web.backend import token_of
from services.web.problems import check_query


class RatingBody(BaseModel):
    """A rating of a pair. A further one of the same pair replaces it."""

    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)

    item: int
    """Number of the pair."""
    verdict: Literal["left", "right", "both_good", "both_bad"]
    """The better clip, or both."""
    left_present: bool | None = None
    """Whether every event of the prompt is in the left clip."""
    left_in_order: bool | None = None
    """Whether they are in order."""
    right_present: bool | None = None
    """The same for the right clip."""
    right_in_order: bool | None = None
    """The same for the right clip."""


async def _no_query(request: Request) -> None:
    check_query(request)


def router(store: RatingStore) -> APIRouter:
    """Return the endpoints of ratings. A rater's token is that of `RatingStore.add_rater`."""
    routes = APIRouter(dependencies=[Depends(_no_query)])

    async def rater_of(request: Request) -> Rater:
        return await asyncio.to_thread(store.rater, token_of(request))

    async def state(rater: Rater) -> dict[str, Any]:
        shown, done, total = await asyncio.to_thread(store.next_item, rater)
        pair = None
        if shown is not None:
            left, right = (f"/v1/ratings/clips/{digest}" for digest in (shown.left, shown.right))
            pair = {"item": shown.id, "prompt": shown.prompt, "left": left, "right": right}
        return {"rater": rater.name, "done": done, "total": total, "pair": pair}

    @routes.get("/v1/ratings/next")
    async def next_pair(request: Request) -> dict[str, Any]:
        """Return the next pair to rate, null at the end."""
        return await state(await rater_of(request))

    @routes.post("/v1/ratings", status_code=201)
    async def rate(body: RatingBody, request: Request) -> dict[str, Any]:
        """Save a rating; return the next pair. What is answered 201 is saved."""
        rater = await rater_of(request)
        answers = Answers(
            left_present=body.left_present,
            left_in_order=body.left_in_order,
            right_present=body.right_present,
            right_in_order=body.right_in_order,
        )
        await asyncio.to_thread(store.rate, rater, body.item, body.verdict, answers)
        return await state(rater)

    @routes.delete("/v1/ratings/{item}")
    async def take_back(item: int, request: Request) -> dict[str, Any]:
        """Take a rating back: the pair will be shown again."""
        rater = await rater_of(request)
        await asyncio.to_thread(store.rate, rater, item, None)
        return await state(rater)

    @routes.get("/v1/ratings/summary")
    async def agreement(request: Request) -> dict[str, Any]:
        """Return counts, agreement between raters, and how reliable each is."""
        await rater_of(request)
        return summary(await asyncio.to_thread(store.ratings))

    @routes.get("/v1/ratings/clips/{digest}", response_class=Response)
    async def clip(digest: str) -> Response:
        """Return a clip of a pair."""
        content = await asyncio.to_thread(store.clip, digest)
        return Response(content, media_type="audio/flac", headers={"Cache-Control": "private, max-age=3600"})

    return routes
