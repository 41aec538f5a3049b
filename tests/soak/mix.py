"""The calls of a soak run: drawn at random, each with what may come of it."""

import io
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import soundfile
from google.protobuf.message import Message
from tritonclient.grpc import service_pb2 as oip

from milonga.v1 import (
    audio_pb2,
    captioning_pb2,
    explanation_pb2,
    generation_pb2,
    operator_pb2,
    reward_pb2,
    scoring_pb2,
)
from services.catalogue import CAPTIONING, CATALOGUE, EXPLANATION, GENERATION, REWARD, SCORING
from services.wire import write_duration
from tests.services.runtime.fault_prompts import ERROR, FAULT_TOKENS, LARGE, NAN
from tests.soak.callers import FARM, HURRIED, OPERATOR, STRANGER, STUDIO, WATCHER, Caller

PROMPTS: Final = (
    "A dog barks then a siren wails", "A bird sings while rain falls", "A bell tolls", "A cat meows",
)  # fmt: skip
MAX_REQUEST_BYTES: Final = 2**21
"""The services' limit in a soak run."""

_GENERATION, _SCORING, _REWARD, _CAPTIONING, _EXPLANATION = (
    f"/{entry.rpc}/" for entry in (GENERATION, SCORING, REWARD, CAPTIONING, EXPLANATION)
)
_INFERENCE: Final = "/inference.GRPCInferenceService/"
_FULL: Final = frozenset({"OK", "RESOURCE_EXHAUSTED"})
_OIP_FULL: Final = frozenset({"OK", "RESOURCE_EXHAUSTED", "UNAVAILABLE"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    """A call to make."""

    service: str
    method: str
    """``/milonga.v1.GenerationService/GenerateAudio``."""
    payload: bytes
    codes: frozenset[str] = _FULL
    """Codes that may come of it while nothing is done to its service."""
    caller: Caller = STUDIO
    timeout: float | None = None
    """Deadline in seconds."""
    streaming: bool = False
    leaves_after: float | None = None
    """Seconds after which the caller cancels."""
    pause: float = 0.0
    """Seconds that a stream is not read after its first message."""
    proxied: bool = False
    """Whether it goes through the proxy, if there is one."""
    repeated: bool = False
    """Whether equal requests must have equal bits."""

    @property
    def rpc(self) -> str:
        return self.method.rpartition("/")[2]

    @property
    def kind(self) -> str:
        """Return what a report calls it."""
        how = "cancelled" if self.leaves_after is not None else "slow reader" if self.pause else ""
        what = "with deadline" if self.timeout is not None else ""
        return " ".join(word for word in (self.rpc, how or what) if word)


class Mix:
    """Draws calls."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(f"mix {seed}")
        self._sounds = _sounds()
        self._draws: Mapping[str, Sequence[tuple[int, Callable[[], Attempt]]]] = MappingProxyType(
            {
                GENERATION.name: (
                    (10, self._generate), (10, self._stream), (4, self._same), (2, self._infer),
                    (2, self._infer_stream), (2, self._get_model), (2, self._out_of_range),
                    (2, lambda: self._faulty_prompt(self._generate())),
                ),
                SCORING.name: (
                    (8, self._score), (5, self._embed_audio), (5, self._embed_text), (2, self._list_scorers),
                    (3, self._infer_pairs), (1, self._cut_clip),
                    (2, lambda: self._faulty_prompt(self._embed_text())),
                ),
                REWARD.name: (
                    (8, self._reward), (5, self._rank), (2, self._get_reward_model), (3, self._infer_pairs),
                    (2, lambda: self._faulty_prompt(self._reward())),
                ),
                CAPTIONING.name: (
                    (8, self._caption), (2, self._get_captioner), (3, self._infer_clip), (1, self._silence),
                    (2, lambda: self._faulty_prompt(self._caption())),
                ),
                EXPLANATION.name: (
                    (8, self._explain), (2, self._explain_given), (2, self._get_explainer),
                    (1, self._without_nothing), (2, lambda: self._faulty_prompt(self._explain())),
                ),
            }
        )  # fmt: skip
        self._service = ""

    def draw(self, service: str) -> Attempt:
        """Return the next call of a service."""
        self._service = service
        weights, makes = zip(*self._draws[service], strict=True)
        (make,) = self._rng.choices(makes, weights)
        return self._varied(make())

    def switch(self, model: str) -> Attempt:
        """Return a call that switches the model."""
        return Attempt(
            service=GENERATION.name,
            method="/milonga.v1.OperatorService/SwitchModel",
            payload=operator_pb2.SwitchModelRequest(model_uri=model).SerializeToString(),
            codes=frozenset({"OK", "ABORTED"}),
            caller=OPERATOR,
        )

    def prompt(self, service: str, prompt: str) -> Attempt:
        """Return a call with this prompt, which the service's model acts on."""
        self._service = service
        make = {
            GENERATION.name: self._generate,
            SCORING.name: self._embed_text,
            REWARD.name: self._reward,
            CAPTIONING.name: self._caption,
            EXPLANATION.name: self._explain,
        }
        return replace(_with_prompt(make[service](), prompt), codes=frozenset({"UNAVAILABLE", "INTERNAL"}))

    def _varied(self, attempt: Attempt) -> Attempt:
        """Return the call by some caller, perhaps with a deadline, cancelled, broken or too large."""
        rng, luck = self._rng, self._rng.random()
        attempt = replace(attempt, proxied=rng.random() < 0.25)
        if luck < 0.02:
            payload = b"\x0f" + rng.randbytes(rng.randrange(60))  # no field has such a type
            return replace(attempt, payload=payload, codes=frozenset({"INVALID_ARGUMENT"}), repeated=False)
        if luck < 0.03:
            payload = bytes(MAX_REQUEST_BYTES + rng.randrange(1, 2**18))
            return replace(attempt, payload=payload, codes=frozenset({"RESOURCE_EXHAUSTED"}), repeated=False)
        if luck < 0.05:
            return replace(attempt, caller=STRANGER, codes=frozenset({"UNAUTHENTICATED"}))
        if luck < 0.07:
            reads = "Get" in attempt.rpc or "List" in attempt.rpc
            codes = attempt.codes if reads else frozenset({"PERMISSION_DENIED"})
            return replace(attempt, caller=WATCHER, codes=codes)
        attempt = replace(attempt, caller=rng.choice((STUDIO, STUDIO, STUDIO, STUDIO, FARM, FARM, HURRIED)))
        if attempt.caller is HURRIED:
            attempt = replace(attempt, codes=attempt.codes | {"RESOURCE_EXHAUSTED"})
        if rng.random() < 0.4:
            codes = attempt.codes | {"DEADLINE_EXCEEDED"}
            attempt = replace(attempt, timeout=rng.choice((0.2, 1.0, 3.0, 10.0, 30.0)), codes=codes)
        if rng.random() < 0.1:
            codes = attempt.codes | {"CANCELLED"}
            attempt = replace(attempt, leaves_after=rng.uniform(0.0, 1.5), codes=codes)
        elif attempt.streaming and rng.random() < 0.2:
            attempt = replace(attempt, pause=rng.uniform(3.0, 12.0))
        return attempt

    # --------------------------------------------------------------------------------------------- generation

    def _options(self) -> generation_pb2.GenerateAudioRequest:
        rng = self._rng
        return generation_pb2.GenerateAudioRequest(
            prompt=rng.choice(PROMPTS),
            negative_prompt=rng.choice(("", "", "rain")),
            duration=write_duration(rng.choice((0.32, 0.64, 1.28, 2.56))),
            clip_count=rng.choice((1, 1, 1, 2, 3)),
            seed=rng.randrange(2**40),
            num_inference_steps=rng.choice((1, 2, 4, 8)),
            encoding=rng.choice(audio_pb2.AudioEncoding.values()),
            sample_rate_hertz=rng.choice((16_000, 48_000)),
        )

    def _attempt(self, method: str, message: Message, **fields: Any) -> Attempt:
        return Attempt(service=self._service, method=method, payload=message.SerializeToString(), **fields)

    def _generate(self) -> Attempt:
        return self._attempt(f"{_GENERATION}GenerateAudio", self._options())

    def _stream(self) -> Attempt:
        interval = self._rng.choice((None, None, 1, 2))
        request = generation_pb2.StreamGenerateAudioRequest(
            request=self._options(), preview_interval_steps=interval
        )
        return self._attempt(f"{_GENERATION}StreamGenerateAudio", request, streaming=True)

    def _same(self) -> Attempt:
        return self.same(self._rng.randrange(SAME))

    def same(self, number: int) -> Attempt:
        """Return one of `SAME` requests whose clips must have the same bits each time."""
        self._service = GENERATION.name
        request = generation_pb2.GenerateAudioRequest(
            prompt=PROMPTS[number % len(PROMPTS)],
            duration=write_duration((0.32, 1.28)[number % 2]),
            clip_count=1 + number % 2,
            seed=number,
            num_inference_steps=4,
            encoding=audio_pb2.AUDIO_ENCODING_FLOAT32,
        )
        return replace(self._attempt(f"{_GENERATION}GenerateAudio", request), repeated=True)

    def _out_of_range(self) -> Attempt:
        request = self._options()
        request.num_inference_steps = self._rng.choice((-1, 0, 10**6))
        codes = frozenset({"INVALID_ARGUMENT"})
        return self._attempt(f"{_GENERATION}GenerateAudio", request, codes=codes)

    def _get_model(self) -> Attempt:
        codes = frozenset({"OK"})
        return self._attempt(f"{_GENERATION}GetModel", generation_pb2.GetModelRequest(), codes=codes)

    def _infer_request(self) -> oip.ModelInferRequest:
        rng = self._rng
        return infer_request(
            GENERATION.model,
            PROMPT=("BYTES", [rng.choice(PROMPTS).encode()]),
            NUM_INFERENCE_STEPS=("INT32", [rng.choice((1, 2, 4))]),
            DURATION=("FP32", [rng.choice((0.32, 0.64))]),
        )

    def _infer(self) -> Attempt:
        return self._attempt(f"{_INFERENCE}ModelInfer", self._infer_request(), codes=_OIP_FULL)

    def _infer_stream(self) -> Attempt:
        method = f"{_INFERENCE}ModelStreamInfer"
        return self._attempt(method, self._infer_request(), codes=_OIP_FULL, streaming=True)

    # --------------------------------------------------------------------------------------- scoring, rewards

    def _clip(self) -> audio_pb2.Clip:
        return audio_pb2.Clip(audio=self._rng.choice(self._sounds))

    def _pairs(self) -> list[audio_pb2.PromptedClip]:
        count = self._rng.choice((1, 1, 2, 4, 8))
        return [
            audio_pb2.PromptedClip(prompt=self._rng.choice(PROMPTS), clip=self._clip()) for _ in range(count)
        ]

    def _score(self) -> Attempt:
        request = scoring_pb2.BatchScoreAudioRequest(pairs=self._pairs())
        return self._attempt(f"{_SCORING}BatchScoreAudio", request)

    def _embed_audio(self) -> Attempt:
        request = scoring_pb2.BatchEmbedAudioRequest(clips=[pair.clip for pair in self._pairs()])
        return self._attempt(f"{_SCORING}BatchEmbedAudio", request)

    def _embed_text(self) -> Attempt:
        prompts = [f"{self._rng.choice(PROMPTS)} {self._rng.randrange(2000)}" for _ in range(3)]
        request = scoring_pb2.BatchEmbedTextRequest(prompts=prompts)
        return self._attempt(f"{_SCORING}BatchEmbedText", request)

    def _list_scorers(self) -> Attempt:
        codes = frozenset({"OK"})
        return self._attempt(f"{_SCORING}ListScorers", scoring_pb2.ListScorersRequest(), codes=codes)

    def _cut_clip(self) -> Attempt:
        cut = self._rng.choice(self._sounds)
        clip = audio_pb2.Clip(audio=cut[: len(cut) // 2])
        request = scoring_pb2.BatchEmbedAudioRequest(clips=[clip])
        codes = frozenset({"INVALID_ARGUMENT", "RESOURCE_EXHAUSTED"})
        return self._attempt(f"{_SCORING}BatchEmbedAudio", request, codes=codes)

    def _reward(self) -> Attempt:
        request = reward_pb2.BatchComputeRewardsRequest(pairs=self._pairs())
        return self._attempt(f"{_REWARD}BatchComputeRewards", request)

    def _rank(self) -> Attempt:
        clips = [pair.clip for pair in self._pairs()]
        request = reward_pb2.RankAudioRequest(prompt=self._rng.choice(PROMPTS), clips=clips)
        return self._attempt(f"{_REWARD}RankAudio", request)

    def _get_reward_model(self) -> Attempt:
        codes = frozenset({"OK"})
        return self._attempt(f"{_REWARD}GetRewardModel", reward_pb2.GetRewardModelRequest(), codes=codes)

    def _infer_pairs(self) -> Attempt:
        audio = np.random.default_rng(self._rng.randrange(2**32)).standard_normal(16_000) * 0.1
        request = infer_request(
            CATALOGUE[self._service].model,
            PROMPT=("BYTES", [self._rng.choice(PROMPTS).encode()]),
            AUDIO=("FP32", audio.astype(np.float32).tolist()),
            SAMPLE_RATE=("INT32", [16_000]),
        )
        return self._attempt(f"{_INFERENCE}ModelInfer", request, codes=_OIP_FULL)

    # --------------------------------------------------------------------------------------------- captioning

    def _caption(self) -> Attempt:
        request = captioning_pb2.CaptionAudioRequest(
            clips=[self._clip() for _ in range(self._rng.choice((1, 1, 2, 4)))],
            beams=self._rng.choice(((), (), (1,), (2, 3))),
            max_new_tokens=self._rng.choice((0, 8, 16)),
            max_candidates=self._rng.choice((0, 1)),
        )
        return self._attempt(f"{_CAPTIONING}CaptionAudio", request)

    def _get_captioner(self) -> Attempt:
        codes = frozenset({"OK"})
        return self._attempt(f"{_CAPTIONING}GetCaptioner", captioning_pb2.GetCaptionerRequest(), codes=codes)

    def _infer_clip(self) -> Attempt:
        audio = np.random.default_rng(self._rng.randrange(2**32)).standard_normal(16_000) * 0.1
        request = infer_request(
            CAPTIONING.model,
            AUDIO=("FP32", audio.astype(np.float32).tolist()),
            SAMPLE_RATE=("INT32", [16_000]),
        )
        return self._attempt(f"{_INFERENCE}ModelInfer", request, codes=_OIP_FULL)

    def _silence(self) -> Attempt:
        clip = audio_pb2.Clip(
            audio=bytes(64_000), encoding=audio_pb2.AUDIO_ENCODING_FLOAT32, sample_rate_hertz=16_000
        )
        request = captioning_pb2.CaptionAudioRequest(clips=[self._clip(), clip])
        codes = frozenset({"INVALID_ARGUMENT", "RESOURCE_EXHAUSTED"})
        return self._attempt(f"{_CAPTIONING}CaptionAudio", request, codes=codes)

    def captions_of_always(self) -> Attempt:
        """Return a call of captioning whose answer must be the same each time, without other calls."""
        self._service = CAPTIONING.name
        request = captioning_pb2.CaptionAudioRequest(
            clips=[audio_pb2.Clip(audio=sound) for sound in self._sounds]
        )
        return self._attempt(f"{_CAPTIONING}CaptionAudio", request)

    # -------------------------------------------------------------------------------------------- explanation

    def _explanation(self, **fields: Any) -> explanation_pb2.ExplainAudioRequest:
        rng = self._rng
        request = generation_pb2.GenerateAudioRequest(
            prompt=rng.choice(PROMPTS),
            duration=write_duration(rng.choice((0.32, 0.64, 1.28))),
            seed=rng.randrange(2**40),
            num_inference_steps=rng.choice((1, 2, 4)),
        )
        return explanation_pb2.ExplainAudioRequest(request=request, **fields)

    def _explain(self) -> Attempt:
        method = self._rng.choice(("attention", "occlusion", "mask"))
        request = self._explanation(method=method, iterations=2 * (method == "mask"))
        return self._attempt(f"{_EXPLANATION}ExplainAudio", request, streaming=True)

    def _explain_given(self) -> Attempt:
        clip = audio_pb2.Clip(audio=self._sounds[0])
        return self._attempt(
            f"{_EXPLANATION}ExplainAudio", self._explanation(method="attention", clip=clip), streaming=True
        )

    def _without_nothing(self) -> Attempt:
        request = self._explanation(without="a word that is not there")
        codes = frozenset({"INVALID_ARGUMENT", "RESOURCE_EXHAUSTED"})
        return self._attempt(f"{_EXPLANATION}ExplainAudio", request, codes=codes, streaming=True)

    def _get_explainer(self) -> Attempt:
        codes = frozenset({"OK"})
        return self._attempt(
            f"{_EXPLANATION}GetExplainer", explanation_pb2.GetExplainerRequest(), codes=codes
        )

    def explanation_of_always(self) -> Attempt:
        """Return a call of explanation whose answer must be the same each time, without other calls."""
        self._service = EXPLANATION.name
        request = explanation_pb2.ExplainAudioRequest(
            request=generation_pb2.GenerateAudioRequest(
                prompt=PROMPTS[0], duration=write_duration(0.64), seed=7, num_inference_steps=4
            ),
            method="occlusion",
        )
        return self._attempt(f"{_EXPLANATION}ExplainAudio", request, streaming=True)

    def pairs_of_always(self, service: str) -> Attempt:
        """Return a call of scoring or reward whose answer must be the same each time, without other calls."""
        self._service = service
        pairs = [
            audio_pb2.PromptedClip(prompt=prompt, clip=audio_pb2.Clip(audio=sound))
            for prompt, sound in zip(PROMPTS, self._sounds, strict=False)
        ]
        if service == SCORING.name:
            return self._attempt(
                f"{_SCORING}BatchScoreAudio", scoring_pb2.BatchScoreAudioRequest(pairs=pairs)
            )
        return self._attempt(
            f"{_REWARD}BatchComputeRewards", reward_pb2.BatchComputeRewardsRequest(pairs=pairs)
        )

    # ------------------------------------------------------------------------------------------------- faults

    def _faulty_prompt(self, attempt: Attempt) -> Attempt:
        prompt = self._rng.choice((NAN, LARGE, ERROR))
        found = frozenset({"RESOURCE_EXHAUSTED"}) if prompt == LARGE else frozenset({"INTERNAL"})
        return replace(_with_prompt(attempt, prompt), codes=found | {"RESOURCE_EXHAUSTED"})


SAME: Final = 6
"""Number of requests whose clips must have the same bits each time."""


def _with_prompt(attempt: Attempt, prompt: str) -> Attempt:
    """Return the call with `prompt` as its first prompt, or, to a captioner, with its number of tokens."""
    request: Any
    match attempt.rpc:
        case "GenerateAudio":
            request = generation_pb2.GenerateAudioRequest.FromString(attempt.payload)
            request.prompt = prompt
        case "BatchEmbedText":
            request = scoring_pb2.BatchEmbedTextRequest.FromString(attempt.payload)
            request.prompts[0] = prompt
        case "BatchComputeRewards":
            request = reward_pb2.BatchComputeRewardsRequest.FromString(attempt.payload)
            request.pairs[0].prompt = prompt
        case "CaptionAudio":
            request = captioning_pb2.CaptionAudioRequest.FromString(attempt.payload)
            request.max_new_tokens = FAULT_TOKENS[prompt]
        case "ExplainAudio":
            request = explanation_pb2.ExplainAudioRequest.FromString(attempt.payload)
            request.request.prompt = prompt
        case other:
            raise AssertionError(other)
    return replace(attempt, payload=request.SerializeToString())


def infer_request(model: str, **tensors: tuple[str, Sequence[Any]]) -> oip.ModelInferRequest:
    """Return a request of the Open Inference Protocol with one row, from datatypes and values by tensor."""
    fields = {"BYTES": "bytes_contents", "INT32": "int_contents", "FP32": "fp32_contents"}
    request = oip.ModelInferRequest(model_name=model)
    for name, (datatype, values) in tensors.items():
        shape = [1, len(values)] if "AUDIO" in tensors else [1]
        tensor = request.inputs.add(name=name, datatype=datatype, shape=shape)
        getattr(tensor.contents, fields[datatype]).extend(values)
    return request


@cache
def _sounds() -> list[bytes]:
    """Return sound files of several formats and lengths. Made once: a Vorbis encoder draws a number."""
    rng = np.random.default_rng(0)
    files: list[bytes] = []
    for kind, subtype, rate, seconds in (
        ("WAV", "PCM_16", 16_000, 1.0), ("WAV", "FLOAT", 48_000, 0.5), ("FLAC", "PCM_16", 44_100, 2.0),
        ("OGG", "VORBIS", 48_000, 3.0), ("WAV", "PCM_24", 22_050, 4.0),
    ):  # fmt: skip
        buffer = io.BytesIO()
        samples = 0.1 * rng.standard_normal(round(rate * seconds))
        soundfile.write(buffer, samples.astype(np.float32), rate, format=kind, subtype=subtype)
        files.append(buffer.getvalue())
    return files
