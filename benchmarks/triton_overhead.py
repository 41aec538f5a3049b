"""One model behind three doors: the native API, the Open Inference Protocol on our service, a real Triton.

    make bench-triton
    python benchmarks/triton_overhead.py [--rounds 5] [--output FILE]        # .venv-triton is made by make

All three generate with the same engine, weights, settings and threads, and take turns within one run. Clients
are bare stubs: what is counted is what the servers do, and the bytes that come over the wire.
"""

import argparse
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import grpc
import numpy as np
import tritonclient.grpc as triton
from tritonclient.grpc import service_pb2, service_pb2_grpc

from benchmarks.measuring import PROMPT, noise_clips, seconds, service_plan, write_report
from milonga.v1 import audio_pb2, generation_pb2, generation_pb2_grpc, scoring_pb2, scoring_pb2_grpc
from services.cli import run
from services.processes import running
from tests.triton.server import running as triton_running

SETTINGS = {"threads": "1"}
IN_FLIGHT = {1: 6, 4: 16, 16: 48}
"""Requests at a time, and how many a round."""
CHANNEL = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Door:
    """One way to the models: each call returns the bytes of all answers."""

    generate: Callable[[int, int, float], int]
    """Of a seed, denoising steps and seconds of sound."""
    score: Callable[[Any], int]
    """Of a clip at 16 kHz."""


def native(generation: grpc.Channel, scoring: grpc.Channel) -> Door:
    """The services' own API, progress included."""
    speaking = generation_pb2_grpc.GenerationServiceStub(generation)
    hearing = scoring_pb2_grpc.ScoringServiceStub(scoring)

    def generate(seed: int, steps: int, duration: float) -> int:
        request = generation_pb2.GenerateAudioRequest(prompt=PROMPT, seed=seed, num_inference_steps=steps)
        request.duration.FromNanoseconds(round(duration * 1e9))
        request.encoding = audio_pb2.AUDIO_ENCODING_FLOAT32
        stream = generation_pb2.StreamGenerateAudioRequest(request=request)
        return sum(answer.ByteSize() for answer in speaking.StreamGenerateAudio(stream))

    def score(sound: Any) -> int:
        clip = audio_pb2.Clip(
            audio=sound.tobytes(), encoding=audio_pb2.AUDIO_ENCODING_FLOAT32, sample_rate_hertz=16_000
        )
        pair = audio_pb2.PromptedClip(prompt=PROMPT, clip=clip)
        return hearing.BatchScoreAudio(scoring_pb2.BatchScoreAudioRequest(pairs=[pair])).ByteSize()

    return Door(generate=generate, score=score)


def protocol(tango: grpc.Channel, clap: grpc.Channel) -> Door:
    """The Open Inference Protocol, progress included."""
    speaking = service_pb2_grpc.GRPCInferenceServiceStub(tango)
    hearing = service_pb2_grpc.GRPCInferenceServiceStub(clap)

    def request(model: str, tensors: list[tuple[str, str, Any]]) -> Any:
        made = service_pb2.ModelInferRequest(model_name=model)
        for name, datatype, values in tensors:
            one = triton.InferInput(name, list(values.shape), datatype)
            one.set_data_from_numpy(values)
            made.inputs.append(one._get_tensor())
            made.raw_input_contents.append(one._get_content())
        return made

    def generate(seed: int, steps: int, duration: float) -> int:
        tensors = [
            ("PROMPT", "BYTES", np.array([PROMPT.encode()], dtype=object)),
            ("SEED", "INT64", np.array([seed], dtype=np.int64)),
            ("NUM_INFERENCE_STEPS", "INT32", np.array([steps], dtype=np.int32)),
            ("DURATION", "FP32", np.array([duration], dtype=np.float32)),
        ]
        count = 0
        for answer in speaking.ModelStreamInfer(iter([request("tango", tensors)])):
            if answer.error_message:
                raise RuntimeError(answer.error_message)
            count += answer.ByteSize()
        return count

    def score(sound: Any) -> int:
        tensors = [
            ("PROMPT", "BYTES", np.array([[PROMPT.encode()]], dtype=object)),
            ("AUDIO", "FP32", sound[None]),
            ("SAMPLE_RATE", "INT32", np.array([[16_000]], dtype=np.int32)),
        ]
        return int(hearing.ModelInfer(request("clap", tensors)).ByteSize())

    return Door(generate=generate, score=score)


def throughput(door: Door, at_once: int, count: int) -> float:
    """Clips of 2.56 s and ten steps a second."""
    with ThreadPoolExecutor(at_once) as pool:
        spent = seconds(lambda: list(pool.map(lambda seed: door.generate(seed, 10, 2.56), range(count))))
    return count / spent


def hearing(door: Door, at_once: int, count: int) -> float:
    """Scored clips of 2.56 s a second."""
    clips = noise_clips(count)
    with ThreadPoolExecutor(at_once) as pool:
        spent = seconds(lambda: list(pool.map(door.score, clips)))
    return count / spent


def in_turns(doors: dict[str, Door], rounds: int, measure: Callable[[Door], float]) -> dict[str, float]:
    """The median of each door, measured in turns."""
    found: dict[str, list[float]] = {name: [] for name in doors}
    for number in range(rounds):
        for name in sorted(doors, reverse=number % 2 == 1):
            found[name].append(measure(doors[name]))
    return {name: median(values) for name, values in found.items()}


@contextmanager
def opened(folder: Path) -> Iterator[tuple[dict[str, Door], str]]:
    """The three doors, and Triton's version."""
    repository = folder / "models"
    settings = [word for name, value in SETTINGS.items() for word in ("--set", f"tango.{name}={value}")]
    names = ["--only", "tango", "--only", "clap", "--set", "clap.threads=1"]
    if run(["triton", "export", *names, *settings, str(repository)]):
        raise SystemExit(1)
    plans = [
        service_plan("generation", "--model", "mini"),
        service_plan("scoring", "--scorer", "clap-a=mini:clap-a", "--scorer", "clap-b=mini:clap-b"),
    ]
    environment = {**os.environ, "MILONGA_THREADS": "1", "OMP_NUM_THREADS": "1"}
    with (
        running(plans, logs=folder, environment=environment) as (generation, scoring),
        triton_running(repository, folder) as server,
        triton.InferenceServerClient(server.grpc) as client,
    ):
        for service in (generation, scoring):
            service.wait_until_serving()
        speaking, judging, both = (
            grpc.insecure_channel(address, options=CHANNEL)
            for address in (generation.target, scoring.target, server.grpc)
        )
        doors = {
            "native": native(speaking, judging),
            "protocol": protocol(speaking, judging),
            "triton": protocol(both, both),
        }
        yield doors, client.get_server_metadata().version


def main() -> None:
    """Measure, print, write the JSON file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("build/bench/triton.json"))
    arguments = parser.parse_args()
    rounds = arguments.rounds
    with TemporaryDirectory() as name, opened(Path(name)) as (doors, version):
        for door in doors.values():
            door.generate(0, 2, 2.56)
            door.score(noise_clips(1)[0])
        report: dict[str, Any] = {
            "triton": version,
            "bytes_of_a_clip": {name: door.generate(0, 10, 2.56) for name, door in doors.items()},
            "bytes_of_its_samples": 40_960 * 4,
        }
        for at_once, count in IN_FLIGHT.items():
            report[f"clips_a_second_{at_once}"] = in_turns(
                doors, rounds, partial(throughput, at_once=at_once, count=count)
            )
            report[f"scores_a_second_{at_once}"] = in_turns(
                doors, rounds, partial(hearing, at_once=at_once, count=4 * count)
            )
            print(json.dumps(report, indent=1), flush=True)
        # The shortest clip in one step: the costs of a request apart from the model.
        report["seconds_of_one_step"] = in_turns(
            doors, 20, lambda door: seconds(lambda: door.generate(0, 1, 0.64))
        )
        report["seconds_a_step"] = in_turns(
            doors,
            rounds,
            lambda door: (
                (seconds(lambda: door.generate(0, 81, 0.64)) - seconds(lambda: door.generate(0, 1, 0.64)))
                / 80
            ),
        )
        report["seconds_of_a_score"] = in_turns(
            doors, 20, lambda door: seconds(lambda: door.score(noise_clips(1)[0]))
        )
    write_report(arguments.output, report)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
