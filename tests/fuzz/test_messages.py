"""Messages of every rpc, malformed, mutated and extreme, to real servers with tiny models.

No case may end with UNKNOWN, INTERNAL or UNAVAILABLE, or break what comes after it.
"""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import grpc
import pytest
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from tritonclient.grpc import service_pb2 as oip

from milonga.v1 import audio_pb2, captioning_pb2, generation_pb2, operator_pb2, reward_pb2, scoring_pb2
from services.catalogue import CAPTIONING, CATALOGUE, GENERATION, REWARD, SCORING
from services.runtime.roles import OPEN
from services.runtime.status import DETAILS_KEY
from services.wire import write_duration
from tests.fuzz.fuzzing import run, text
from tests.fuzz.messages import payload
from tests.services.audio.sounds import file_of, tone
from tests.services.captioning.serving import serving as serving_captioning
from tests.services.generation.serving import serving as serving_generation
from tests.services.generation.serving import tiny_engine
from tests.services.reward.serving import serving as serving_reward
from tests.services.scoring.serving import save_tiny_clap
from tests.services.scoring.serving import serving as serving_scoring
from tests.tiny import tiny_captioner, tiny_clap, tiny_reward
from tests.waiting import until

OPERATOR_TOKEN: Final = "an-operator-of-this-test"
SOUNDS: Final = (
    *(file_of(tone(0.3), kind=kind, subtype=subtype) for kind, subtype in (
        ("WAV", "PCM_16"), ("WAV", "FLOAT"), ("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("AIFF", "PCM_16"),
    )),
    tone(0.3).astype("<f4").tobytes(),
)  # fmt: skip
PROMPT: Final = "a dog barks"

CLIP: Final = audio_pb2.Clip(audio=SOUNDS[0])
PAIR: Final = audio_pb2.PromptedClip(prompt=PROMPT, clip=CLIP)
GENERATE: Final = generation_pb2.GenerateAudioRequest(
    prompt=PROMPT, seed=1, num_inference_steps=1, duration=write_duration(0.32)
)
STREAM: Final = generation_pb2.StreamGenerateAudioRequest(request=GENERATE, preview_interval_steps=1)
REWARDS: Final = reward_pb2.BatchComputeRewardsRequest(pairs=[PAIR])
SCORES: Final = scoring_pb2.BatchScoreAudioRequest(pairs=[PAIR])
CAPTIONS: Final = captioning_pb2.CaptionAudioRequest(clips=[CLIP], beams=[2], max_new_tokens=4)

FAULTS: Final = ("UNKNOWN", "INTERNAL", "UNAVAILABLE", "CANCELLED")
"""Codes that no input may lead to. A full queue is UNAVAILABLE in the Open Inference Protocol, but one call
at a time does not fill it."""


def _infer(model: str) -> oip.ModelInferRequest:
    request = oip.ModelInferRequest(model_name=model)
    if model != CAPTIONING.model:
        rows = [1] if model == GENERATION.model else [1, 1]
        tensor = request.inputs.add(name="PROMPT", datatype="BYTES", shape=rows)
        tensor.contents.bytes_contents.append(PROMPT.encode())
    if model == GENERATION.model:
        steps = request.inputs.add(name="NUM_INFERENCE_STEPS", datatype="INT32", shape=[1])
        steps.contents.int_contents.append(1)
    else:
        audio = request.inputs.add(name="ENCODED_AUDIO", datatype="BYTES", shape=[1, 1])
        audio.contents.bytes_contents.append(SOUNDS[0])
    return request


@dataclass(frozen=True, kw_only=True, slots=True)
class Rpc:
    """An rpc of a service."""

    path: str
    request: type[Message]
    client_streaming: bool
    server_streaming: bool


def rpcs(*services: Any) -> list[Rpc]:
    """Return the rpcs of services' descriptors."""
    return [
        Rpc(
            path=f"/{service.full_name}/{method.name}",
            request=GetMessageClass(method.input_type),
            client_streaming=method.client_streaming,
            server_streaming=method.server_streaming,
        )
        for service in services
        for method in service.methods
    ]


PROBES: Final = ("/grpc.health.v1.Health/", "/grpc.reflection.v1alpha.ServerReflection/", *OPEN)
"""Rpcs whose statuses have no details."""
INFERENCE: Final = oip.DESCRIPTOR.services_by_name["GRPCInferenceService"]
SERVICES: Final = {
    GENERATION.name: (
        generation_pb2.DESCRIPTOR.services_by_name["GenerationService"],
        operator_pb2.DESCRIPTOR.services_by_name["OperatorService"],
        INFERENCE,
    ),
    SCORING.name: (
        scoring_pb2.DESCRIPTOR.services_by_name["ScoringService"],
        INFERENCE,
        health_pb2.DESCRIPTOR.services_by_name["Health"],
    ),
    REWARD.name: (
        reward_pb2.DESCRIPTOR.services_by_name["RewardService"],
        INFERENCE,
    ),
    "reflection": (reflection_pb2.DESCRIPTOR.services_by_name["ServerReflection"],),
    CAPTIONING.name: (captioning_pb2.DESCRIPTOR.services_by_name["CaptioningService"], INFERENCE),
}
SOUND_REQUESTS: Final[tuple[Message, ...]] = (
    GENERATE, STREAM, REWARDS, SCORES, CAPTIONS,
    reward_pb2.RankAudioRequest(prompt=PROMPT, clips=[CLIP, CLIP]),
    scoring_pb2.BatchEmbedAudioRequest(clips=[CLIP]),
    scoring_pb2.BatchEmbedTextRequest(prompts=[PROMPT]),
    reflection_pb2.ServerReflectionRequest(file_containing_symbol="milonga.v1.RewardService.RankAudio"),
    reflection_pb2.ServerReflectionRequest(
        file_containing_extension=reflection_pb2.ExtensionRequest(
            containing_type="google.protobuf.MethodOptions", extension_number=1
        )
    ),
    *(_infer(entry.model) for entry in CATALOGUE.values()),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A call to make."""

    rpc: Rpc
    payloads: tuple[bytes, ...]
    metadata: tuple[tuple[str, str], ...]


def make(rng: random.Random, candidates: list[Rpc]) -> Case:
    """Return a call of one of the rpcs."""
    rpc = rng.choice(candidates)
    sound = tuple(request for request in SOUND_REQUESTS if isinstance(request, rpc.request))
    count = rng.choice((1, 1, 2)) if rpc.client_streaming else 1
    return Case(
        rpc=rpc,
        payloads=tuple(payload(rng, rpc.request, sound, SOUNDS) for _ in range(count)),
        metadata=_metadata(rng),
    )


def _metadata(rng: random.Random) -> tuple[tuple[str, str], ...]:
    """Return the operator's token, or sometimes metadata at random: gRPC takes printable ASCII."""
    if rng.random() < 0.9:
        return (("authorization", f"Bearer {OPERATOR_TOKEN}"),)
    keys = ("x-request-id", "x-milonga-priority", "triton_grpc_error", "traceparent", "authorization")
    made = ((key, re.sub(r"[^ -~]", "", text(rng))[:500]) for key in keys if rng.random() < 0.5)
    # Wrong tokens would be answered by a pause.
    return tuple((key, value) for key, value in made if key != "authorization" or "earer" not in value)


def _call(channel: Any, case: Case) -> str:
    """Make the call; return its code, after checking what it says."""
    rpc = case.rpc
    # A watch of the health has no end.
    options = {"timeout": 0.05 if rpc.path.endswith("/Watch") else 2.0, "metadata": case.metadata}
    try:
        if rpc.client_streaming:
            list(channel.stream_stream(rpc.path)(iter(case.payloads), **options))
        elif rpc.server_streaming:
            list(channel.unary_stream(rpc.path)(case.payloads[0], **options))
        else:
            channel.unary_unary(rpc.path)(case.payloads[0], **options)
    except grpc.RpcError as error:
        failed = error
    else:
        return "OK"
    assert isinstance(failed, grpc.Call)
    code, details = failed.code().name, failed.details() or ""
    assert code not in FAULTS, f"{rpc.path}: {code}: {details}"
    assert details
    assert "Traceback" not in details
    if code == "INVALID_ARGUMENT" and not rpc.path.startswith(PROBES):
        assert dict(failed.trailing_metadata() or ())[DETAILS_KEY]
    return code


def fuzz(target: str, service: str, check: Callable[[], object]) -> None:
    """Run the cases of one service, and `check` now and then."""
    candidates = rpcs(*SERVICES[service])
    codes: dict[str, set[str]] = {rpc.path: set() for rpc in candidates}
    with grpc.insecure_channel(target) as channel:
        done = 0

        def call(made: object) -> None:
            nonlocal done
            assert isinstance(made, Case)
            codes[made.rpc.path].add(_call(channel, made))
            done += 1
            if done % 200 == 0:
                check()

        run(f"messages-{service}", 600, lambda rng: make(rng, candidates), call)
    check()
    if done >= 600:
        assert all(codes.values()), codes
        possible = {"OK", "INVALID_ARGUMENT"} | (
            {"UNIMPLEMENTED"} if INFERENCE in SERVICES[service] else set()
        )
        assert possible <= set().union(*codes.values())


def test_generation() -> None:
    engine = tiny_engine(max_queue=8, max_clip_count=4)
    settings: dict[str, Any] = {"token": OPERATOR_TOKEN, "operator_uris": ("file:/nowhere",)}
    with (
        engine,
        serving_generation(engine, **settings) as served,
        grpc.insecure_channel(served.target) as channel,
    ):
        generate: Any = channel.unary_unary("/milonga.v1.GenerationService/GenerateAudio")
        before = generate(GENERATE.SerializeToString(), timeout=60)

        def check() -> None:
            after = generate(GENERATE.SerializeToString(), timeout=60)
            ours, theirs = map(generation_pb2.GenerateAudioResponse.FromString, (after, before))
            assert ours.clips == theirs.clips
            until(lambda: (engine.stats.running, engine.stats.queue_depth) == (0, 0))

        fuzz(served.target, GENERATION.name, check)


def test_scoring(tmp_path: Path) -> None:
    scorers = {"a": f"file:{save_tiny_clap(tmp_path / 'a', 0)}"}
    with serving_scoring(scorers) as served, grpc.insecure_channel(served.hosted.target) as channel:
        score: Any = channel.unary_unary("/milonga.v1.ScoringService/BatchScoreAudio")

        def check() -> None:
            assert scoring_pb2.BatchScoreAudioResponse.FromString(score(SCORES.SerializeToString())).results
            assert served.scorers["a"].audio.stats.queue_cost == 0
            assert served.scorers["a"].text.stats.queue_cost == 0

        fuzz(served.hosted.target, SCORING.name, check)


def test_reward() -> None:
    with serving_reward(tiny_reward(tiny_clap())) as served:

        def check() -> None:
            assert served.stub.BatchComputeRewards(REWARDS).rewards
            assert served.scorer.batcher.stats.queue_cost == 0

        fuzz(served.target, REWARD.name, check)


def test_reflection() -> None:
    with serving_reward(tiny_reward(tiny_clap())) as served:
        fuzz(served.target, "reflection", lambda: None)


def test_captioning() -> None:
    with serving_captioning(tiny_captioner(), tiny_clap()) as served:

        def check() -> None:
            assert served.stub.CaptionAudio(CAPTIONS).captions
            assert served.worker.batcher.stats.queue_cost == 0

        fuzz(served.target, CAPTIONING.name, check)


@pytest.mark.parametrize("service", SERVICES)
def test_every_rpc_has_a_valid_request_or_needs_none(service: str) -> None:
    valid = tuple(type(request) for request in SOUND_REQUESTS)
    without = {rpc.request for rpc in rpcs(*SERVICES[service][:1]) if rpc.request not in valid}
    assert all(kind.DESCRIPTOR.name.startswith(("Get", "List")) for kind in without)
