"""Between the wire and the reward model: requests in, rewards and rankings out. Pure functions."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from milonga.v1 import reward_pb2 as pb
from services.audio.clips import AudioBounds, ReadClip, check_prompt, read_clips
from services.errors import FieldViolation, InvalidInputError


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """One place of a ranking."""

    index: int
    """Which clip of the request."""
    logit: float
    """Its reward."""
    beats_next: float | None
    """Probability that it is preferred to the next; None for the last."""


def read_candidates(request: pb.RankAudioRequest, bounds: AudioBounds) -> tuple[str, list[ReadClip]]:
    """Return the prompt and the decoded clips of RankAudio.

    Raises:
        InvalidInputError: with every violated field, the prompt's and the clips'.
    """
    faults: list[FieldViolation] = [*check_prompt(request.prompt, "prompt", bounds)]
    clips: list[ReadClip] = []
    try:
        clips = read_clips(request.clips, "clips", bounds)
    except InvalidInputError as error:
        faults += error.violations
    if faults:
        raise InvalidInputError(*faults)
    return request.prompt, clips


def rank(logits: Sequence[float]) -> list[Place]:
    """Put rewards in order, best first; equal ones stay as they are."""
    order = sorted(range(len(logits)), key=lambda index: -logits[index])
    beaten = [sigmoid(logits[one] - logits[other]) for one, other in itertools.pairwise(order)]
    return [
        Place(index=index, logit=logits[index], beats_next=probability)
        for index, probability in zip(order, [*beaten, None], strict=True)
    ]


def write_reward(logit: float) -> pb.Reward:
    """The message of a reward."""
    return pb.Reward(logit=logit, probability=sigmoid(logit))


def write_place(place: Place) -> pb.RankedClip:
    """The message of one place of a ranking."""
    return pb.RankedClip(
        clip_index=place.index, reward=write_reward(place.logit), beats_next=place.beats_next
    )


def sigmoid(logit: float) -> float:
    """The logistic function, for a logit of any size."""
    small = math.exp(-abs(logit))
    return (1.0 if logit >= 0 else small) / (1.0 + small)
