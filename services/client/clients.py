"""The two faces. What they do is written once, in `services.client.rpcs`."""

from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Self, Unpack

from milonga.v1 import generation_pb2, reward_pb2, scoring_pb2
from services.client.answers import (
    Best,
    Embeddings,
    Generation,
    ModelSwitch,
    RankBy,
    Ranking,
    Rewards,
    Scores,
    Update,
)
from services.client.calls import Calls
from services.client.connection import Connection, ConnectionOptions
from services.client.generation import GenerationOptions
from services.client.rpcs import Rpcs
from services.client.sounds import Sound
from services.client.transport import AsyncioTransport, BlockingTransport, finish, iterate


class AudioClient:
    """Calls the services. Thread-safe: make one and keep it; close it, or use it as a context.

    Every method raises the tree of `services.errors`: `InvalidInputError` with every violated field,
    `QueueFullError` with `retry_after`, `DeadlineExceededError`, `ServiceUnavailableError`; and plain
    `MilongaError` for a fault of the service. `timeout` is in seconds, everything included: reading files,
    retries, and the waits between them.
    """

    def __init__(
        self,
        target: str | None = None,
        *,
        scoring: str | None = None,
        reward: str | None = None,
        **options: Unpack[ConnectionOptions],
    ) -> None:
        """Nothing is sent yet: channels are opened at the first call to each address.

        Args:
            target: ``host:port``, or any gRPC name (``dns:///generation:50051``, ``unix:/run/milonga.sock``),
                of the generation service, and of every other one that has no address of its own, as behind
                one gateway. Where a name has several addresses, calls go round.
            scoring: the scoring service's address.
            reward: the reward service's address.
            options: see `ConnectionOptions`.

        Raises:
            InvalidInputError: an empty address, a token without TLS, retries out of range, a TLS file that
                can't be read. A service without any address is told at the first call to it.
        """
        connection = Connection({"target": target, "scoring": scoring, "reward": reward}, **options)
        self._rpcs = Rpcs(Calls(connection, BlockingTransport(connection)))

    def generate(
        self, prompt: str, *, timeout: float | None = None, **options: Unpack[GenerationOptions]
    ) -> Generation:
        """Make the clips of a prompt, and wait for them."""
        return finish(self._rpcs.generate(prompt, timeout=timeout, **options))

    def stream(
        self,
        prompt: str,
        *,
        timeout: float | None = None,
        preview_interval_steps: int | None = None,
        **options: Unpack[GenerationOptions],
    ) -> Iterator[Update]:
        """Make the clips of a prompt, and tell what happens on the way. Leaving the loop cancels the rest."""
        return iterate(
            self._rpcs.stream(
                prompt, timeout=timeout, preview_interval_steps=preview_interval_steps, **options
            )
        )

    def get_model(self, *, timeout: float | None = None) -> generation_pb2.GetModelResponse:
        """Which model generates, with its limits and defaults."""
        return finish(self._rpcs.get_model(timeout=timeout))

    def switch_model(self, uri: str, *, token: str, timeout: float | None = None) -> ModelSwitch:
        """Have the generation service load another model beside its own and serve that; for operators.

        Returns when new requests start on it. Those under way finish on the model before. Whatever is raised,
        the service serves on; past the deadline the switch goes on as well, and `get_model` tells.

        Args:
            uri: model URI as the service resolves it, best with its pin.
            token: the operator's, as the service was started with. Leaves this machine by TLS only.
            timeout: in seconds.

        Raises:
            InvalidInputError: no model URI; or the token would travel in plaintext.
            UnauthenticatedError: another token.
            AlreadyUnderWayError: another switch is under way.
            ModelError: the model was not found, or refused.
        """
        return finish(self._rpcs.switch_model(uri, token=token, timeout=timeout))

    def score_audio(
        self,
        pairs: Sequence[tuple[str, Sound]],
        *,
        scorers: Sequence[str] | None = None,
        timeout: float | None = None,
    ) -> Scores:
        """CLAP scores of sounds against their prompts.

        Args:
            pairs: each a prompt and the `Sound` that should be like it.
            scorers: names of those to ask; all by default.
            timeout: in seconds.
        """
        return finish(self._rpcs.score_audio(pairs, scorers=scorers, timeout=timeout))

    def embed_audio(
        self,
        clips: Sequence[Sound],
        *,
        scorers: Sequence[str] | None = None,
        timeout: float | None = None,
    ) -> Embeddings:
        """CLAP embeddings of sounds, by the named scorers, or by all."""
        return finish(self._rpcs.embed_audio(clips, scorers=scorers, timeout=timeout))

    def embed_text(
        self,
        prompts: Sequence[str],
        *,
        scorers: Sequence[str] | None = None,
        timeout: float | None = None,
    ) -> Embeddings:
        """CLAP embeddings of prompts, by the named scorers, or by all."""
        return finish(self._rpcs.embed_text(prompts, scorers=scorers, timeout=timeout))

    def list_scorers(self, *, timeout: float | None = None) -> scoring_pb2.ListScorersResponse:
        """Which scorers are served, and what a call may hold."""
        return finish(self._rpcs.list_scorers(timeout=timeout))

    def compute_rewards(self, pairs: Sequence[tuple[str, Sound]], *, timeout: float | None = None) -> Rewards:
        """Rewards of sounds for their prompts. `pairs`: each a prompt and the `Sound` made of it."""
        return finish(self._rpcs.compute_rewards(pairs, timeout=timeout))

    def rank_audio(self, prompt: str, clips: Sequence[Sound], *, timeout: float | None = None) -> Ranking:
        """Put the sounds of one prompt in order, best first, by the reward model."""
        return finish(self._rpcs.rank_audio(prompt, clips, timeout=timeout))

    def get_reward_model(self, *, timeout: float | None = None) -> reward_pb2.GetRewardModelResponse:
        """Which reward model judges, on which CLAP, and what a call may hold."""
        return finish(self._rpcs.get_reward_model(timeout=timeout))

    def generate_best(
        self,
        prompt: str,
        *,
        candidates: int = 4,
        rank_by: RankBy = "reward",
        timeout: float | None = None,
        **options: Unpack[GenerationOptions],
    ) -> Best:
        """Make several clips of a prompt and put them in order, best first.

        As many candidates as the service makes in one call (its `max_clip_count`) come from one call, with
        the seed as given, or drawn: they are what `generate` makes with that seed and `clip_count`. More come
        from further calls, whose seeds are hashed from the first one and the number of the call; each clip
        tells its own `seed` and `index`. So the same seed gives the same candidates, all different, as long
        as the service's weights and its `max_clip_count` stay the same.

        Args:
            prompt: what to hear.
            candidates: how many clips to make, in the place of `clip_count`.
            rank_by: ``reward``: the reward service judges, and a clip's value is its logit. ``clap``: the
                scoring service does, and a clip's value is the mean of all scorers' CLAP scores.
            timeout: seconds that all of it may take.
            options: of generation.

        Raises:
            InvalidInputError: also for `clip_count`, and, before anything is generated, for a judge without
                an address.
            MilongaError: also where a service changed its weights in between.
        """
        return finish(
            self._rpcs.generate_best(
                prompt, candidates=candidates, rank_by=rank_by, timeout=timeout, **options
            )
        )

    def close(self) -> None:
        """Close the channels; calls under way are cancelled."""
        finish(self._rpcs.close())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AsyncAudioClient(Rpcs):
    """`AudioClient` for asyncio: the same arguments, answers and errors.

    Belongs to the event loop of its first call.
    """

    def __init__(
        self,
        target: str | None = None,
        *,
        scoring: str | None = None,
        reward: str | None = None,
        **options: Unpack[ConnectionOptions],
    ) -> None:
        """As `AudioClient`."""
        connection = Connection({"target": target, "scoring": scoring, "reward": reward}, **options)
        super().__init__(Calls(connection, AsyncioTransport(connection)))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
