"""What only a real Triton shows: equal bits everywhere, places that are freed, batches, refused versions."""

import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as triton

from services.cli import run
from services.client import AudioClient
from tests.programs import Services
from tests.services.inference.asking import refusal
from tests.services.inference.suite import (
    PROMPTS,
    TONES,
    Stream,
    clip,
    clips_of,
    inputs,
    pairs,
    stream,
    version,
)
from tests.triton.server import Server, index, running
from tests.waiting import until


@pytest.fixture(scope="module")
def native(services: Services) -> str:
    """Address of our own generation service, with the settings of Triton's tango."""
    return services.generation


@pytest.mark.parametrize("seed", [7, 8, 2**62 + 1])
def test_the_same_clip_bit_for_bit_everywhere(server: Server, native: str, seed: int) -> None:
    with AudioClient(native) as client:
        made = client.generate(
            PROMPTS[0],
            seed=seed,
            encoding="float32",
            num_inference_steps=10,
            guidance_scale=3.1,
            duration=1.28,
        )
    tensors = {
        "SEED": ("INT64", [seed]),
        "NUM_INFERENCE_STEPS": ("INT32", [10]),
        "GUIDANCE_SCALE": ("FP32", [3.1]),
        "DURATION": ("FP32", [1.28]),
    }
    by_protocol = clip(native, PROMPTS[0], **tensors)
    by_triton = clip(server.grpc, PROMPTS[0], **tensors)
    assert by_triton.tobytes() == by_protocol.tobytes() == made.clips[0].audio
    assert np.abs(by_triton).max() > 0.01


def test_rows_of_one_request_are_those_of_several(server: Server) -> None:
    with stream(server.grpc) as opened:
        opened.ask(inputs(PROMPTS, SEED=("INT64", [7, 8])))
        together = clips_of(opened.all())
    for row, prompt in enumerate(PROMPTS):
        alone = clip(server.grpc, prompt, SEED=("INT64", [7 + row]))
        assert alone.tobytes() == together[row].tobytes()


def test_one_who_leaves_frees_the_place_within_a_step_or_two(server: Server) -> None:
    """A call holds two clips of a length. A third waits until one is left; the other counts the steps."""
    long = inputs(PROMPTS[:1], NUM_INFERENCE_STEPS=("INT32", [1000]), DURATION=("FP32", [2.56]))

    def steps(asked: Stream) -> int:
        """Done so far; what has come meanwhile is read."""
        done = 0
        while asked.answers.qsize() or not done:
            done = round(float(asked.get().as_numpy("PROGRESS")[0]) * 1000)
        return done

    with stream(server.grpc) as stays, stream(server.grpc) as third:
        with stream(server.grpc) as leaves:
            for asked in (stays, leaves):
                asked.ask(long)
                steps(asked)
            third.ask(inputs(PROMPTS[:1], DURATION=("FP32", [2.56])))
            assert third.get().as_numpy("PROGRESS")[0] == 0
            before = steps(stays)
            while steps(stays) < before + 20:
                time.sleep(0.01)
            while third.answers.qsize():
                assert third.get().as_numpy("PROGRESS")[0] == 0
            left = steps(stays)
        while third.get().as_numpy("PROGRESS")[0] == 0:
            pass
        assert steps(stays) - left <= 4


@pytest.mark.parametrize("model", ["clap", "reward", "caption"])
def test_requests_of_several_callers_share_a_batch(server: Server, model: str) -> None:
    with triton.InferenceServerClient(server.grpc) as client:

        def counted() -> tuple[int, int]:
            (stats,) = client.get_inference_statistics(model).model_stats
            return stats.inference_count, stats.execution_count

        before = counted()
        barrier = threading.Barrier(8)

        def ask() -> None:
            with triton.InferenceServerClient(server.grpc) as own:
                own.is_server_live()
                barrier.wait()
                for _ in range(5):
                    own.infer(model, pairs(PROMPTS[:1], TONES[:1])[1 if model == "caption" else 0 :])

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        # Triton counts a request after it has answered it.
        until(lambda: counted()[0] - before[0] >= 40)
        rows, executions = (after - earlier for after, earlier in zip(counted(), before, strict=True))
    assert rows == 40
    assert executions < 30


def test_what_triton_does_not_offer_of_a_decoupled_model_says_so(server: Server) -> None:
    with triton.InferenceServerClient(server.grpc) as client:
        status, message = refusal(lambda: client.infer("tango", inputs(PROMPTS)))
    assert (status, "decoupled" in message) == ("UNIMPLEMENTED", True)


def test_its_metrics_name_our_models(server: Server) -> None:
    from urllib.request import urlopen

    with urlopen(f"http://{server.metrics}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    for name in ("tango", "clap", "reward", "caption", "explain"):
        assert f'nv_inference_request_success{{model="{name}",version="{version(name)}"}}' in text
    with urlopen(f"http://{server.http}/v2/health/ready", timeout=10) as answer:
        assert answer.status == 200


def test_a_broken_version_is_refused_and_the_old_one_serves(tmp_path: Path) -> None:
    repository = tmp_path / "models"
    export = ["triton", "export", "--only", "tango", str(repository)]
    assert run([*export, "--model", "mini-base", "--version", "1"]) == 0
    assert run([*export, "--model", "mini", "--version", "2"]) == 0
    weights = (
        repository / "tango" / "2" / "weights" / "tango" / "unet" / "diffusion_pytorch_model.safetensors"
    )
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    config = repository / "tango" / "config.pbtxt"
    assert config.read_text().count("versions: 1") == 1
    with (
        running(repository, tmp_path / "server") as server,
        triton.InferenceServerClient(server.grpc) as client,
    ):
        assert index(client)["tango", "1"][0] == "READY"
        config.write_text(config.read_text().replace("versions: 1", "versions: 1\n    versions: 2"))
        status, message = refusal(lambda: client.load_model("tango"))
        assert status == "INVALID_ARGUMENT"
        assert "DigestMismatchError" in message
        assert index(client)["tango", "2"][0] == "UNAVAILABLE"
        assert len(clip(server.grpc, PROMPTS[0])) == 10_240
        # Mended, it is loaded alongside the first, and new requests go to it.
        weights.write_bytes(whole)
        client.load_model("tango")
        with stream(server.grpc) as opened:
            opened.ask(inputs(PROMPTS[:1]))
            assert opened.all()[-1].get_response().model_version == "2"
        shutil.rmtree(repository / "tango" / "2" / "weights")
        config.write_text(config.read_text().replace("    versions: 2\n", ""))
        client.load_model("tango")
        assert len(clip(server.grpc, PROMPTS[0])) == 10_240


def test_a_parameter_that_is_no_setting_is_refused(tmp_path: Path) -> None:
    repository = tmp_path / "models"
    assert run(["triton", "export", "--only", "reward", str(repository)]) == 0
    config = repository / "reward" / "config.pbtxt"
    config.write_text(config.read_text() + 'parameters { key: "colour" value { string_value: "red" } }\n')
    with (
        running(repository, tmp_path / "server", "--exit-on-error=false") as server,
        triton.InferenceServerClient(server.grpc) as client,
    ):
        ((state, reason),) = index(client).values()
    assert state == "UNAVAILABLE"
    assert "parameters.colour: is no setting of this model; use one of device" in reason
