"""Promotion into Triton: pins, loading, verification and restoring. With a real Triton: `tests/triton`."""

import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import soundfile
from tritonclient.grpc import service_pb2_grpc
from tritonclient.grpc.model_config_pb2 import ModelConfig

from services.client import TLS
from services.errors import (
    DeadlineExceededError,
    InvalidInputError,
    MilongaError,
    ServiceUnavailableError,
    UnauthenticatedError,
)
from services.inference.triton.repository import ModelExport, ModelRepository, Weights, open_storage
from services.models.mini import mini_folder
from services.weights.registry import RegisteredVersion
from services.weights.uri import resolve
from tests.training.promotion.fixtures import make_version
from tests.training.promotion.targets.test_kubernetes import self_signed
from tests.training.promotion.targets.triton_server import FakeTriton, serving
from training.evaluation.config import Sampling
from training.evaluation.prompts import Prompt
from training.evaluation.sources import PlannedClip, generation_options
from training.promotion.errors import RolloutError, exit_code
from training.promotion.registry import Registry
from training.promotion.targets.probing import CALLS
from training.promotion.targets.triton import CHALLENGER, TritonTarget
from training.promotion.targets.triton_client import TritonClient, TritonClips

CODE = "# of the first\n"


class World:
    """Two registered versions; the first is what a server has from its repository."""

    def __init__(self, folder: Path) -> None:
        self.registry = Registry()
        self.first = make_version(self.registry, folder)
        self.second = make_version(self.registry, folder)
        self.repository = ModelRepository(open_storage(str(folder / "repository")))
        self.repository.add(self.exported(self.first), 1)
        self.triton = FakeTriton(self.repository)
        self.address = ""

    def exported(self, version: RegisteredVersion, code: str = CODE) -> ModelExport:
        found = resolve(version.uri)
        config = ModelConfig(name="tango", backend="python")
        config.parameters["device"].string_value = "cuda:1"
        weights = Weights(
            name=version.name, version=version.version, digest=version.digest, folder=found.folder
        )
        return ModelExport(config=config, code=code, weights={"tango": weights})

    def target(self, **options: Any) -> TritonTarget:
        given = {"verify_seconds": 0.2, **options}
        return TritonTarget(self.address, self.repository, self.registry, **given)

    @property
    def served(self) -> dict[int, str]:
        return self.triton.ready["tango"]


@pytest.fixture
def world(store: str, tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    with serving(world.triton) as address:
        world.address = address
        world.triton.ready["tango"] = {1: world.first.digest}
        yield world


def test_its_place(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def place(address: str) -> str:
        return TritonTarget(address, world.repository, world.registry).place

    monkeypatch.setattr("socket.gethostname", lambda: "ann")
    assert place("localhost") == place("127.0.0.1:8001") == place("[::1]") == "triton/ann:8001"
    assert place("gpu-1:9001") == "triton/gpu-1:9001"
    assert place("[2001:db8::1]") == "triton/[2001:db8::1]:8001"


def test_a_version_is_loaded_alongside_the_old_and_then_alone(world: World) -> None:
    target = world.target()
    target.check_setup(challenger=True)
    target.check_reach()
    assert target.current_pin() == world.first.uri
    target.set_pin(world.second.uri, 5.0)
    assert world.triton.loads == [("tango", (1, 2)), ("tango", (2,))]
    assert world.served == {2: world.second.digest}
    target.wait(world.second.uri, 1.0)
    world.triton.requests.clear()
    target.verify(world.second.digest)
    assert [one.model_version for one in world.triton.requests] == [""] * CALLS + ["2"] * CALLS
    assert target.current_pin() == world.second.uri
    assert world.repository.versions("tango") == [1, 2]
    assert world.repository.code("tango", 2) == CODE
    weights = world.repository.weights("tango", 2)["tango"]
    assert (weights.name, weights.version, weights.digest) == ("milonga-tango", "2", world.second.digest)

    target.set_pin(world.first.uri, 5.0)  # a rollback needs no registry: the folder is there
    assert world.triton.loads[2:] == [("tango", (1, 2)), ("tango", (1,))]
    target.set_pin(world.first.uri, 5.0)
    assert world.served == {1: world.first.digest}


@pytest.mark.parametrize("fault", ["broken", "other weights", "gone"])
def test_a_failed_rollout_restores_the_old_pin(world: World, fault: str) -> None:
    target = world.target()
    if fault == "broken":
        world.triton.broken[world.second.digest] = "DigestMismatchError: unet differs"
        expected = r"version 1, 2 of tango can't be served: .*version 2 is at UNAVAILABLE.*unet differs$"
    elif fault == "other weights":
        world.triton.instead[world.second.digest] = world.first.digest
        expected = rf"version 2 of tango of the Triton at .* serves {world.first.digest}"
    else:
        world.address = "127.0.0.1:1"
        target, expected = world.target(), "127.0.0.1:1"
    with pytest.raises(ServiceUnavailableError if fault == "gone" else RolloutError, match=expected):
        target.set_pin(world.second.uri, 5.0)
    assert world.repository.pinned("tango") == (1,)
    assert world.served == {1: world.first.digest}


def test_a_rollback_from_broken_or_missing_weights(world: World) -> None:
    target = world.target()
    target.set_pin(world.second.uri, 5.0)
    world.triton.broken[world.second.digest] = "out of memory"
    world.triton.ready.clear()
    world.triton.reasons["tango", 2] = "out of memory"
    target.check_setup(challenger=False)  # it serves nothing, which may be why
    with pytest.raises(RolloutError, match=r"serves nothing, expected version 2 \(out of memory\)"):
        target.wait(world.second.uri, 5.0)
    target.set_pin(world.first.uri, 5.0)
    assert world.served == {1: world.first.digest}
    target.wait(world.first.uri, 0.0)
    world.repository.storage.remove("tango/2")
    world.repository.storage.write(
        "tango/config.pbtxt",
        (world.repository.storage.read("tango/config.pbtxt") or b"").replace(b"versions: 1", b"versions: 2"),
    )
    target.set_pin(world.first.uri, 5.0)
    assert world.repository.pinned("tango") == (1,)


def test_the_challenger_is_a_model_alongside_it(world: World) -> None:
    target = world.target()
    address = target.start_challenger(world.second.uri, 5.0)
    assert address == world.address
    assert world.triton.ready[CHALLENGER] == {2: world.second.digest}
    assert world.triton.loads == [(CHALLENGER, (2,))]
    config, challenger = world.repository.config("tango"), world.repository.config(CHALLENGER)
    assert config is not None
    assert challenger is not None
    assert (challenger.name, challenger.parameters["device"].string_value) == (CHALLENGER, "cuda:1")
    assert world.repository.code(CHALLENGER, 2) == CODE
    assert target.start_challenger(world.second.uri, 5.0) == address
    assert len(world.triton.loads) == 1
    before = target.serving
    assert before.startswith("triton/")
    assert " triton 2.51.0 " in before

    clips = target.clip_client(address, 5.0)
    sampling = Sampling(duration=2.5, num_inference_steps=3, guidance_scale=3.1, scheduler="ddim")
    options = generation_options(PlannedClip(prompt=Prompt(text="a dog barks"), seed=7), sampling)
    made = clips.generate("a dog barks", **options)
    request = world.triton.requests[-1]
    assert (request.model_name, request.model_version) == (CHALLENGER, "")
    reported = {one.name: (one.datatype, list(one.shape)) for one in request.inputs}
    assert reported == {
        "PROMPT": ("BYTES", [1]),
        "SCHEDULER": ("BYTES", [1]),
        "SEED": ("INT64", [1]),
        "NUM_INFERENCE_STEPS": ("INT32", [1]),
        "GUIDANCE_SCALE": ("FP32", [1]),
        "DURATION": ("FP32", [1]),
    }
    waveform, rate = soundfile.read(io.BytesIO(made.clips[0].audio), dtype="float32")
    assert (rate, len(waveform), made.model.digest) == (16_000, 1_600, world.second.digest)
    expected = 0.1 * np.sin(np.arange(1_600) * (1 + len(b"a dog barks") + 4))
    np.testing.assert_allclose(waveform, expected, atol=1e-3)
    assert made.timings.total > 0.0
    with pytest.raises(InvalidInputError, match="num_inference_steps: is 0, must be between"):
        clips.generate("a dog barks", num_inference_steps=0)
    clips.close()
    with pytest.raises(MilongaError):
        clips.generate("a dog barks", **options)

    target.start_challenger(world.first.uri, 5.0)
    assert world.triton.ready[CHALLENGER] == {1: world.first.digest}
    world.target().stop_challenger()  # of another promoter
    assert CHALLENGER not in world.triton.ready
    assert world.repository.storage.names(CHALLENGER) == []
    assert world.served == {1: world.first.digest}
    world.target().stop_challenger()
    changed = world.exported(world.first)
    changed.config.parameters["device"].string_value = "cpu"
    world.repository.add(changed, 1)
    assert target.serving != before  # other clips may come of it


def test_a_challenger_that_fails_to_load(world: World) -> None:
    world.triton.broken[world.second.digest] = "no kernel image"
    target = world.target()
    with pytest.raises(RolloutError, match=r"the challenger failed: .*no kernel image"):
        target.start_challenger(world.second.uri, 5.0)
    world.triton.broken.clear()
    world.triton.instead[world.second.digest] = world.first.digest
    with pytest.raises(
        RolloutError, match=r"tango-challenger of the Triton at .* serves sha256:.*, expected"
    ):
        target.start_challenger(world.second.uri, 5.0)
    target.stop_challenger()
    assert world.repository.storage.names(CHALLENGER) == []


def test_a_number_of_other_weights(world: World) -> None:
    world.repository.add(world.exported(world.first), 2)
    for attempt in (world.target().start_challenger, world.target().set_pin):
        with pytest.raises(
            InvalidInputError, match=r"--repository: .* has other weights \(sha256:.* version 2"
        ):
            attempt(world.second.uri, 5.0)
    assert (world.triton.loads, world.repository.pinned("tango")) == ([], (1,))


def test_weights_of_no_registry(world: World) -> None:
    world.repository.remove("tango")
    with pytest.raises(InvalidInputError, match=r"--repository: .*`milonga triton export` writes one"):
        world.target().current_pin()
    folder = mini_folder("mini")
    embedded = resolve("mini")
    config = world.exported(world.first).config
    weights = Weights(name="mini", version="4", digest=embedded.digest, folder=folder)
    world.repository.add(ModelExport(config=config, code=CODE, weights={"tango": weights}), 4)
    world.triton.ready["tango"] = {4: embedded.digest}
    target = world.target()
    assert target.current_pin() == f"mini#{embedded.digest}"
    target.set_pin(world.first.uri, 5.0)
    target.set_pin(f"mini#{embedded.digest}", 5.0)
    assert world.served == {4: embedded.digest}

    other = replace(weights, name="elsewhere", digest="sha256:" + "5" * 64)
    world.repository.add(ModelExport(config=config, code=CODE, weights={"tango": other}), 5)
    world.repository.pin("tango", 5)
    world.triton.ready["tango"] = {5: other.digest}
    target = world.target()
    assert target.current_pin() is None
    target.set_pin(None, 5.0)
    assert world.served == {5: other.digest}
    target.set_pin(world.first.uri, 5.0)
    with pytest.raises(RolloutError, match=r"serves milonga-tango version 1 now, and what .* in no registry"):
        world.target().set_pin(None, 5.0)
    target.set_pin(None, 5.0)  # who changed it knows
    assert world.served == {5: other.digest}


def test_names_of_existing_weights_are_renewed(world: World) -> None:
    weights = replace(world.repository.weights("tango", 1)["tango"], name="tiny", version="9")
    folder = resolve(world.first.uri).folder
    named = replace(world.exported(world.first), weights={"tango": replace(weights, folder=folder)})
    world.repository.add(named, 1)
    target = world.target()
    assert target.current_pin() is None
    target.set_pin(world.first.uri, 5.0)
    assert target.current_pin() == world.first.uri
    assert world.served == {1: world.first.digest}


def test_of_two_pinned_versions_the_higher_is_served(world: World) -> None:
    world.repository.add(world.exported(world.second), 2)
    world.repository.pin("tango", 1, 2)
    assert world.target().current_pin() == world.second.uri


def test_a_repository_that_is_not_the_servers(world: World) -> None:
    target = world.target()
    world.repository.add(world.exported(world.second), 2)
    world.repository.pin("tango", 2)
    with pytest.raises(
        InvalidInputError, match=r"--repository: .* version 2 of tango, and .* serves 1: it reads"
    ):
        target.check_setup(challenger=True)
    world.repository.pin("tango", 1)
    world.triton.ready["tango"] = {1: world.second.digest}
    with pytest.raises(InvalidInputError, match=rf"pinned to version 1 .* serves {world.second.digest}"):
        target.check_setup(challenger=True)
    world.triton.ready.clear()
    with pytest.raises(InvalidInputError, match="does not know tango"):
        target.check_setup(challenger=True)


def test_servers_that_cannot_be_changed_are_errors(world: World, tmp_path: Path) -> None:
    world.triton.explicit = False
    with pytest.raises(
        InvalidInputError, match=r"refuses to load .*; start it with --model-control-mode=expl"
    ):
        world.target().check_reach()
    world.triton.explicit, world.triton.token = True, "sesame"
    for attempt in (world.target().check_reach, world.target(token="wrong").check_reach):
        with pytest.raises(UnauthenticatedError, match=r"is restricted.*--operator-token-file"):
            attempt()
    world.target(token="sesame").check_reach()
    world.triton.name = "milonga"
    with pytest.raises(InvalidInputError, match=r"--target: .* is a service of Milonga and no Triton"):
        world.target().check_setup(challenger=True)
    with pytest.raises(InvalidInputError, match="token: would travel to gpu-1:8001 in plaintext"):
        TritonTarget("gpu-1", world.repository, world.registry, token="sesame").check_reach()
    with pytest.raises(ServiceUnavailableError, match=r"the Triton at 127.0.0.1:1: ") as caught:
        TritonTarget("127.0.0.1:1", world.repository, world.registry).check_reach()
    assert exit_code(caught.value) == 6
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with pytest.raises(ServiceUnavailableError, match="is no Triton"):
            TritonTarget(f"127.0.0.1:{port}", world.repository, world.registry).check_reach()
    finally:
        server.stop(0).wait()


def test_tls(world: World, tmp_path: Path) -> None:
    key, certificate = self_signed(tmp_path)
    tls = TLS(ca_file=certificate, server_name="generation")
    with pytest.raises(
        InvalidInputError, match=r"--tls: the handshake with the Triton at .* failed: .*plaintext"
    ):
        world.target(tls=tls).check_setup(challenger=True)
    server = grpc.server(ThreadPoolExecutor(4))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(world.triton, server)
    identity = [(key.read_bytes(), certificate.read_bytes())]
    port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials(identity))
    world.address = f"127.0.0.1:{port}"
    server.start()
    try:
        with pytest.raises(InvalidInputError, match=r"--tls: is missing, and the Triton at .* uses TLS"):
            world.target().check_setup(challenger=True)
        world.triton.token = "sesame"
        target = world.target(tls=tls, token="sesame")
        target.check_setup(challenger=True)
        target.check_reach()
        target.verify(world.first.digest)
    finally:
        server.stop(0).wait()


def test_answers_without_a_clip_are_errors(world: World) -> None:
    with TritonClient(world.address) as client:
        with pytest.raises(MilongaError, match="Request for unknown model: 'tango' version 9 is not found"):
            client.version_of_clip("tango", "9")
        with pytest.raises(MilongaError, match="unknown model: 'clap'"):
            TritonClips(client, "clap").generate("a dog", seed=1, num_inference_steps=1)
    world.triton.seconds = 1.0
    with TritonClient(world.address, timeout=0.1) as client, pytest.raises(DeadlineExceededError):
        client.version_of_clip("tango")
