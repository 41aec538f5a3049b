"""Calls that are refused before their message is read, and refusals that are delayed."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import pytest

from milonga.v1 import audio_pb2, captioning_pb2, generation_pb2, reward_pb2, scoring_pb2, scoring_pb2_grpc
from services.api.generation import Progress
from services.errors import QueueFullError
from services.fairness import Account
from services.runtime.callers import Caller, calling
from services.runtime.gate import Gate
from tests.services.captioning.serving import serving as captioning
from tests.services.generation.serving import serving as generating
from tests.services.generation.serving import tiny_engine
from tests.services.reward.serving import float32, tone
from tests.services.reward.serving import serving as rewarding
from tests.services.scoring.serving import save_tiny_clap
from tests.services.scoring.serving import serving as scoring
from tests.tiny import tiny_captioner, tiny_clap, tiny_reward
from tests.waiting import until

RPC = "/a.Service/Rpc"
CALLER = Caller(name="a")


class Queue:
    """A queue that is full as long as `refusal` is set, and the number of times that it was asked."""

    def __init__(self) -> None:
        self.now, self.asked, self.refusal = 0.0, 0, ""
        self.gate = Gate(lambda: self.now)
        self.needed: float | None = None
        self.answers: list[object] = []
        self.gate.add([RPC], self._expect)

    @contextmanager
    def _expect(self) -> Iterator[None]:
        self.asked += 1
        if self.refusal:
            raise QueueFullError("full", retry_after=5.0, refusal=self.refusal, needed=self.needed)
        yield

    def refuses(self, caller: Caller = CALLER, rpc: str = RPC) -> bool:
        try:
            with calling(caller), self.gate.receiving(rpc):
                return False
        except QueueFullError as error:
            self.answers.append((str(error), error.retry_after, error.refusal, error.needed))
            return True


def test_the_answer_of_a_full_queue_holds_for_a_moment_and_for_its_caller() -> None:
    queue = Queue()
    assert not queue.refuses()
    queue.refusal = "room"
    assert queue.refuses()
    asked = queue.asked
    assert all(queue.refuses() for _ in range(100))
    assert queue.asked == asked
    assert queue.refuses(Caller(name="b"))
    assert queue.refuses(Caller(name="a", priority="batch"))
    assert queue.asked == asked + 2
    assert not queue.refuses(rpc="/a.Service/Other")
    queue.refusal = ""
    assert queue.refuses()
    queue.now = 1.0
    assert not queue.refuses()


def test_the_answer_that_there_is_not_the_time_holds_for_calls_with_no_more_time() -> None:
    queue = Queue()
    queue.refusal, queue.needed = "time", 3.0
    assert queue.refuses(Caller(name="a", deadline=2.0))
    asked = queue.asked
    for deadline in (2.0, 1.0, 2.9):
        assert queue.refuses(Caller(name="a", deadline=deadline))
    assert queue.asked == asked
    assert set(queue.answers) == {("full", 5.0, "time", 3.0)}
    queue.refusal = ""
    assert not queue.refuses(Caller(name="a", deadline=3.1))
    assert not queue.refuses(Caller(name="a"))
    queue.now = 1.0
    assert not queue.refuses(Caller(name="a", deadline=3.0))


def test_an_answer_that_depends_on_the_call_holds_for_no_other() -> None:
    queue = Queue()
    queue.refusal = "quota"
    assert queue.refuses()
    queue.refusal = ""
    assert not queue.refuses()


def test_callers_who_come_back_too_soon_wait_for_their_refusal() -> None:
    queue = Queue()

    def delay(caller: Caller, retry_after: float) -> tuple[float, float]:
        error = QueueFullError("full", retry_after=retry_after)
        return queue.gate.delay(caller, error), error.retry_after

    assert delay(CALLER, 5.0) == (0.0, 5.0)
    assert delay(CALLER, 5.0) == (1.0, 4.0)
    assert delay(CALLER, 0.25) == (0.25, 0.0)
    assert delay(Caller(name="a", deadline=0.5), 5.0) == (0.25, 4.75)
    assert delay(Caller(name="a", deadline=-1.0), 5.0) == (0.0, 5.0)
    assert delay(Caller(name="b"), 5.0) == (0.0, 5.0)
    queue.now = 5.0
    assert delay(CALLER, 5.0) == (0.0, 5.0)


def test_no_more_callers_are_remembered_than_there_is_memory_for() -> None:
    queue = Queue()
    for number in range(5_000):
        queue.gate.delay(Caller(name=str(number)), QueueFullError("full", retry_after=5.0))
    assert queue.gate.delay(Caller(name="0"), QueueFullError("full", retry_after=5.0)) == 0
    assert queue.gate.delay(Caller(name="4999"), QueueFullError("full", retry_after=5.0)) > 0


@pytest.fixture(scope="module")
def generation() -> Iterator[tuple[str, Any]]:
    """A service whose queue is full."""
    began, go_on = threading.Event(), threading.Event()

    def block(event: object) -> None:
        if isinstance(event, Progress):
            began.set()
            go_on.wait()

    with tiny_engine(max_queue=1, batch_shapes=(1,)) as engine, generating(engine) as served:
        request = engine.request("a dog barks", num_inference_steps=2, duration=0.64)
        engine.submit(request, block, account=Account("others"))
        began.wait()
        engine.submit(request, lambda _: None, account=Account("others too"))
        try:
            yield served.target, lambda: None
        finally:
            go_on.set()


PAIR = audio_pb2.PromptedClip(prompt="a dog barks", clip=float32(tone(1.0)))
WAITING = {"max_wait_seconds": 60, "max_queue_seconds": 1}
"""Settings of a service whose queue is full of one call, which waits for others."""


@pytest.fixture(scope="module")
def reward() -> Iterator[tuple[str, Any]]:
    with rewarding(tiny_reward(tiny_clap()), **WAITING) as served:
        call = served.stub.BatchComputeRewards.future(reward_pb2.BatchComputeRewardsRequest(pairs=[PAIR]))
        until(lambda: served.scorer.batcher.stats.queue_cost > 0)
        yield served.target, call


@pytest.fixture(scope="module")
def clap(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Any]]:
    folder = save_tiny_clap(tmp_path_factory.mktemp("models") / "tiny", 0)
    with (
        scoring({"tiny": f"file:{folder}"}, **WAITING) as served,
        grpc.insecure_channel(served.hosted.target) as channel,
    ):
        stub = scoring_pb2_grpc.ScoringServiceStub(channel)
        call = stub.BatchScoreAudio.future(scoring_pb2.BatchScoreAudioRequest(pairs=[PAIR]))
        until(lambda: served.scorers["tiny"].audio.stats.queue_cost > 0)
        yield served.hosted.target, call


@pytest.fixture(scope="module")
def captioner() -> Iterator[tuple[str, Any]]:
    with captioning(tiny_captioner(), None, **WAITING) as served:
        call = served.stub.CaptionAudio.future(captioning_pb2.CaptionAudioRequest(clips=[PAIR.clip]))
        until(lambda: served.worker.batcher.stats.queue_cost > 0)
        yield served.target, call


@pytest.mark.parametrize(
    ("service", "rpcs"),
    [
        ("captioner", {"CaptioningService": ("CaptionAudio",)}),
        ("generation", {"GenerationService": ("GenerateAudio", "StreamGenerateAudio")}),
        ("reward", {"RewardService": ("BatchComputeRewards", "RankAudio")}),
        ("clap", {"ScoringService": ("BatchScoreAudio", "BatchEmbedAudio")}),
    ],
)
def test_a_call_that_a_full_queue_refuses_is_not_parsed(
    service: str, rpcs: dict[str, tuple[str, ...]], request: pytest.FixtureRequest
) -> None:
    target, _ = request.getfixturevalue(service)
    methods = [f"/milonga.v1.{name}/{rpc}" for name, of in rpcs.items() for rpc in of]
    with grpc.insecure_channel(target) as channel:
        for method in (*methods, "/inference.GRPCInferenceService/ModelInfer"):
            call: Any = channel.unary_unary(method)
            with pytest.raises(grpc.RpcError) as caught:
                call(b"\xff malformed")
            code: Any = caught.value
            busy = "UNAVAILABLE" if "inference" in method else "RESOURCE_EXHAUSTED"
            assert (code.code().name, method) == (busy, method)


def test_rpcs_that_do_not_need_the_queue_are_served(generation: tuple[str, Any]) -> None:
    with grpc.insecure_channel(generation[0]) as channel:
        call: Any = channel.unary_unary("/milonga.v1.GenerationService/GetModel")
        assert generation_pb2.GetModelResponse.FromString(call(b"")).model.name == "tiny"
