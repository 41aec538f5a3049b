"""Make clips for the page, and have them judged: state that grows while a call runs."""

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal, Self, TypeVar

from services.api.generation import Clip, Finished, GenerationOptions, Progress, Queued, Update
from services.api.model import ModelVersion
from services.api.scoring import Reward
from services.client.clients import AsyncAudioClient
from services.errors import FieldViolation, InvalidInputError
from services.web.backend import begin
from services.web.studio.messages import sentences
from services.web.waiting import WaitingRoom

if TYPE_CHECKING:
    from services.provenance.signing import ClipSigner

T = TypeVar("T")

Order = Literal["reward", "clap", "made"]
"""What puts clips in order: the reward, the mean of the CLAP scores, or nothing."""
FORMATS: Final = ("wav", "flac", "mp3")
"""Encodings that the page offers. All of them can be signed."""
WAITING: Final = "waiting for a place in the queue"
"""Stage of a call that its service has no room for yet."""


@dataclass(kw_only=True, slots=True)
class Judged:
    """A clip, and what is known of it so far."""

    clip: Clip
    scores: Mapping[str, float | None] = field(default_factory=dict)
    """CLAP score by scorer; None where the scorer can't read the prompt."""
    reward: Reward | None = None
    caption: str = ""

    def value(self, order: Order) -> float | None:
        """Return what the clip is ranked by; None if that is not known."""
        if order == "reward":
            return self.reward.logit if self.reward is not None and self.reward.readable else None
        known = [score for score in self.scores.values() if score is not None]
        return sum(known) / len(known) if order == "clap" and known else None


@dataclass(kw_only=True, slots=True)
class Take:
    """One call for clips of a prompt, as far as it has come."""

    prompt: str
    title: str = ""
    stage: str = "sending"
    fraction: float = 0.0
    """Share of the denoising steps that are done."""
    seconds_left: float | None = None
    clips: list[Judged] = field(default_factory=list)
    model: ModelVersion | None = None
    warnings: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    edition: int = 0
    """Grows whenever `clips` changes."""

    def ranked(self, order: Order) -> list[Judged]:
        """Return the clips, best first; those without a value stay behind, in the order of the request."""
        clips = sorted(self.clips, key=lambda one: one.clip.index)
        return sorted(clips, key=lambda one: _rank(one.value(order)))


def _rank(value: float | None) -> tuple[bool, float]:
    return value is None, -(value or 0.0)


Judge = Literal["scoring", "reward", "captioning"]
"""Services that judge clips."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Visitor:
    """Who uses the page. Calls services for them, in their lines where a queue is full."""

    client: AsyncAudioClient
    room: WaitingRoom
    token: str | None
    generator: str
    """Name of the service that makes the clips."""

    async def enter(
        self, service: str, attempt: Callable[[], Awaitable[T]], on_wait: Callable[[], None]
    ) -> T:
        """Return the result of `attempt`; see `WaitingRoom.enter`."""
        return await self.room.enter((self.token, "interactive", service), attempt, on_wait)


async def make(
    take: Take,
    visitor: Visitor,
    options: GenerationOptions,
    *,
    judges: tuple[Judge, ...],
    signer: "ClipSigner | None",
    changed: Callable[[], None],
) -> None:
    """Make the clips of `take`, and have them judged; `changed` is called after each change of it.

    An error becomes a problem of the take. Cancelling this cancels the call.
    """

    def on_wait() -> None:
        take.stage = WAITING
        changed()

    attempt = partial(begin, visitor.client, take.prompt, **options)
    try:
        first, updates = await visitor.enter(visitor.generator, attempt, on_wait)
        async with aclosing(updates):
            _add(take, first)
            changed()
            async for update in updates:
                _add(take, update)
                changed()
        take.stage, take.seconds_left = "judging", None
        await _sign(take, signer)
        changed()
        await asyncio.gather(*(_judge(take, visitor, name, changed) for name in judges))
        take.stage = "done"
    except Exception as error:
        take.problems += sentences(error)
        take.stage = "failed"
    changed()


def _add(take: Take, update: Update) -> None:
    """Add an event of the call."""
    match update:
        case Queued(position=position):
            take.stage = f"queued behind {position}" if position else "next in the queue"
        case Progress():
            take.stage = f"step {update.step} of {update.num_inference_steps}"
            take.fraction, take.seconds_left = update.fraction, update.seconds_left
        case Clip():
            take.clips.append(Judged(clip=update))
            take.stage, take.edition = "decoding", take.edition + 1
        case Finished():
            take.model, take.fraction = update.model, 1.0
            take.warnings += update.warnings


async def _sign(take: Take, signer: "ClipSigner | None") -> None:
    if signer is None or take.model is None:
        return
    from services.provenance.signing import Origin

    for one in take.clips:
        clip = one.clip
        origin = Origin(prompt=take.prompt, model=take.model, seed=clip.seed, clip_index=clip.index)
        one.clip = replace(
            clip, audio=await asyncio.to_thread(signer.sign, clip.audio, clip.encoding, origin)
        )


async def _judge(take: Take, visitor: Visitor, judge: Judge, changed: Callable[[], None]) -> None:
    """Add the judgements of one service. Its error is a problem, and keeps nothing else back."""
    if not take.clips:
        return
    try:
        found = await visitor.enter(judge, partial(_JUDGES[judge], take, visitor.client), changed)
        take.warnings += [one for one in found if one not in take.warnings]
    except Exception as error:
        take.problems += [f"No {_MISSING[judge]}. {one}" for one in sentences(error)]
    take.edition += 1
    changed()


async def _add_scores(take: Take, client: AsyncAudioClient) -> list[str]:
    found = await client.score_audio([(take.prompt, one.clip) for one in take.clips])
    names = [scorer.name for scorer in found.scorers]
    for one, values, readable in zip(take.clips, found.values.tolist(), found.readable.tolist(), strict=True):
        rows = zip(names, values, readable, strict=True)
        one.scores = {name: value if known else None for name, value, known in rows}
    return _distinct(found.warnings)


async def _add_rewards(take: Take, client: AsyncAudioClient) -> list[str]:
    found = await client.compute_rewards([(take.prompt, one.clip) for one in take.clips])
    for one, reward in zip(take.clips, found.rewards, strict=True):
        one.reward = reward
    return _distinct(reward.warnings for reward in found.rewards)


async def _add_captions(take: Take, client: AsyncAudioClient) -> list[str]:
    found = await client.caption_audio([one.clip for one in take.clips], max_candidates=1)
    for one, caption in zip(take.clips, found.captions, strict=True):
        one.caption = caption.text
    return []


def _distinct(warnings: Any) -> list[str]:
    return list(dict.fromkeys(warning for found in warnings for warning in found))


_JUDGES: Final[Mapping[Judge, Callable[[Take, AsyncAudioClient], Awaitable[list[str]]]]] = {
    "scoring": _add_scores,
    "reward": _add_rewards,
    "captioning": _add_captions,
}
_MISSING: Final[Mapping[Judge, str]] = {
    "scoring": "CLAP scores",
    "reward": "rewards",
    "captioning": "captions",
}


Work = Callable[[Callable[[], None]], Coroutine[Any, Any, None]]


async def follow(*works: Work) -> AsyncIterator[None]:
    """Run coroutines at once; yield whenever one of them calls its argument, and at the end.

    Leaving the loop cancels them.
    """
    changed = asyncio.Event()
    running = asyncio.gather(*(work(changed.set) for work in works))
    running.add_done_callback(lambda _: changed.set())
    try:
        while not running.done():
            await changed.wait()
            changed.clear()
            yield
        await running
        # What changed while the last one was being looked at.
        yield
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class Form:
    """What a person has entered for a generation, as text; empty fields take the model's defaults.

    Gradio gives None for a field that was never shown.
    """

    negative_prompt: str | None = ""
    steps: str | None = ""
    guidance: str | None = ""
    seconds: str | None = ""
    seed: str | None = ""
    clips: float = 1
    encoding: str = FORMATS[0]

    @classmethod
    def of(
        cls, settings: Sequence[Any], *, seed: str | None, clips: float = 1, encoding: str = FORMATS[0]
    ) -> Self:
        """Return the form with the values of `services.web.studio.fields.SettingFields`."""
        negative, steps, guidance, seconds = settings
        return cls(
            negative_prompt=negative, steps=steps, guidance=guidance, seconds=seconds,
            seed=seed, clips=clips, encoding=encoding,
        )  # fmt: skip

    def options(self) -> GenerationOptions:
        """Return the options of a call. Raises `InvalidInputError` with every field that is no number."""
        faults: list[FieldViolation] = []
        steps = _number("num_inference_steps", self.steps, _WHOLE, faults)
        seed = _number("seed", self.seed, _WHOLE, faults)
        guidance = _number("guidance_scale", self.guidance, _DECIMAL, faults)
        seconds = _number("duration", self.seconds, _DECIMAL, faults)
        if faults:
            raise InvalidInputError(*faults)
        return {
            "negative_prompt": self.negative_prompt or None,
            "num_inference_steps": None if steps is None else int(steps),
            "guidance_scale": None if guidance is None else float(guidance),
            "duration": None if seconds is None else float(seconds),
            "seed": None if seed is None else int(seed),
            "clip_count": int(self.clips),
            "encoding": self.encoding,
        }


_WHOLE: Final = (re.compile(r"-?[0-9]{1,20}"), "a whole number such as 25")
_DECIMAL: Final = (re.compile(r"-?[0-9]{1,20}(\.[0-9]{1,20})?"), "a number such as 2.5")


def _number(
    field: str, text: str | None, form: tuple[re.Pattern[str], str], faults: list[FieldViolation]
) -> str | None:
    """Return the text of a number, None if it is empty; add what is wrong with it to `faults`."""
    given = (text or "").strip()
    if given and not form[0].fullmatch(given):
        faults.append(FieldViolation(field, f"is {given[:40]!r}, must be {form[1]}, or empty"))
    return given or None
