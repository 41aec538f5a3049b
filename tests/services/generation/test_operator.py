"""Switching models under way: the operator's rpc, on a real server and tiny models."""

import gc
import os
import shutil
import threading
import urllib.request
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from services.client import AsyncAudioClient, AudioClient, Clip, Finished, Progress
from services.engine import Engine, EngineConfig
from services.errors import (
    AlreadyUnderWayError,
    DeadlineExceededError,
    DigestMismatchError,
    InvalidInputError,
    MilongaError,
    ModelError,
    ModelFormatError,
    ModelNotFoundError,
    UnauthenticatedError,
)
from services.generation.settings import GenerationSettings
from services.models.manifest import write_manifest
from services.models.tango.loading import load_tango
from services.models.tango.pipeline import TangoPipeline
from services.models.vocoder import GriffinLimVocoder
from services.runtime.settings import load_settings
from services.weights.uri import ResolvedModel
from tests.services.generation.serving import MODEL, Serving, serving, tiny_engine
from tests.tiny import tiny_pipeline
from tests.waiting import until

PROMPT = "A dog barks then a siren wails"
TOKEN = "of-the-operator"


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model of the same kind."""
    folder = tmp_path_factory.mktemp("models") / "second"
    tiny_pipeline(seed=1).save_pretrained(folder)
    write_manifest(folder, name="second", version="2", license="Apache-2.0")
    return folder


@dataclass(kw_only=True, slots=True)
class Loading:
    """Loads models as the service does, when it may."""

    allowed: threading.Event = field(default_factory=threading.Event)
    begun: threading.Event = field(default_factory=threading.Event)
    engines: list[Engine] = field(default_factory=list)

    def __call__(self, model: ResolvedModel) -> Engine:
        self.begun.set()
        assert self.allowed.wait(60)
        config = EngineConfig(threads=1, batch_shapes=(1,))
        engine = Engine(load_tango(model.folder), config, model.identity)
        self.engines.append(engine)
        return engine


@pytest.fixture
def loading() -> Loading:
    loading = Loading()
    loading.allowed.set()
    return loading


@pytest.fixture
def served(loading: Loading) -> Iterator[Serving]:
    """A server of its own for each test: what it serves changes."""
    with (
        tiny_engine(batch_shapes=(1,)) as engine,
        serving(engine, token=TOKEN, load=loading, metrics_port=0) as served,
    ):
        yield served
        served.run(served.slot.close())


@pytest.fixture
def client(served: Serving) -> Iterator[AudioClient]:
    with AudioClient(served.target, retries=0, timeout=120) as client:
        yield client


def _clip(client: AudioClient, **options: Any) -> tuple[str, bytes]:
    made = client.generate(PROMPT, seed=7, encoding="float32", **options)
    return made.model.name, made.clips[0].audio


def test_new_requests_start_on_the_new_model(client: AudioClient, second: Path) -> None:
    before = _clip(client)
    switch = client.switch_model(f"file:{second}", token=TOKEN)
    assert (switch.previous.name, switch.previous.digest) == (MODEL.identity.name, MODEL.digest)
    assert (switch.current.name, switch.current.version) == ("second", "2")
    assert switch.seconds > 0
    after = _clip(client)
    assert after[0] == client.get_model().model.name == "second"
    with Engine(load_tango(second), EngineConfig(threads=1, batch_shapes=(1,))) as alone:
        assert after[1] == alone.generate(alone.request(PROMPT, seed=7)).clips[0].waveform().tobytes()
    assert before[0] == "tiny"
    assert before[1] != after[1]


def test_a_running_request_finishes_on_the_model_that_it_began_with(
    served: Serving, client: AudioClient, second: Path
) -> None:
    _, alone = _clip(client, num_inference_steps=30)
    stream = client.stream(PROMPT, seed=7, encoding="float32", num_inference_steps=30)
    while not isinstance(next(stream), Progress):
        pass
    client.switch_model(f"file:{second}", token=TOKEN)
    assert _clip(client)[0] == "second"
    *_, clip, finished = stream
    assert isinstance(clip, Clip)
    assert isinstance(finished, Finished)
    assert (finished.model.name, clip.audio) == ("tiny", alone)
    # Nobody is left on it: closed, it refuses.
    until(lambda: not served.engine._thread.is_alive())


def test_what_was_served_leaves_no_memory_behind(
    served: Serving, client: AudioClient, loading: Loading, second: Path
) -> None:
    client.switch_model(f"file:{second}", token=TOKEN)
    client.generate(PROMPT)
    (engine,) = loading.engines
    loading.engines.clear()
    pipeline: Any = engine.pipeline
    held: tuple[Any, ...] = (engine, pipeline, pipeline.unet)
    gone = [weakref.ref(one) for one in held]
    del held, engine, pipeline
    third = second.with_name("third")
    tiny_pipeline(seed=2).save_pretrained(third)
    gc.collect()
    gc.disable()  # without its help: it would run too late, and stop every call meanwhile
    try:
        client.switch_model(f"file:{third}", token=TOKEN)
        until(lambda: all(reference() is None for reference in gone))
    finally:
        gc.enable()


def test_the_metrics_follow_and_never_count_backwards(
    served: Serving, client: AudioClient, second: Path
) -> None:
    def scrape() -> dict[str, float]:
        url = f"http://127.0.0.1:{served.server.metrics_port}/metrics"
        with urllib.request.urlopen(url, timeout=30) as response:
            lines = response.read().decode().splitlines()
        return {k: float(v) for k, v in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}

    def model(values: dict[str, float]) -> list[str]:
        return [name for name in values if name.startswith("milonga_model_info")]

    client.generate(PROMPT)
    before = scrape()
    assert ['name="tiny"' in name for name in model(before)] == [True]
    client.switch_model(f"file:{second}", token=TOKEN)
    client.generate(PROMPT)
    until(lambda: not served.engine._thread.is_alive())
    after = scrape()
    assert ['name="second"' in name for name in model(after)] == [True]
    for name in ("milonga_clips_total", "milonga_denoising_steps_total"):
        assert after[name] > before[name]
    assert after["milonga_running"] == 0


def test_what_is_served_already_is_not_loaded_again(
    client: AudioClient, loading: Loading, second: Path
) -> None:
    for _ in range(2):
        switch = client.switch_model(f"file:{second}", token=TOKEN)
    assert switch.previous == switch.current
    assert len(loading.engines) == 1


def _damaged(second: Path, folder: Path) -> str:
    shutil.copytree(second, folder)
    path = folder / "unet/diffusion_pytorch_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    return f"file:{folder}"


def _of_nan(second: Path, folder: Path) -> str:
    shutil.copytree(second, folder)
    path = folder / "unet/diffusion_pytorch_model.safetensors"
    save_file({name: tensor * float("nan") for name, tensor in load_file(path).items()}, path)
    write_manifest(folder, name="nan", version="1", license="Apache-2.0")
    return f"file:{folder}"


def _of_another_rate(second: Path, folder: Path) -> str:
    parts = tiny_pipeline(seed=1).components
    parts["vocoder"] = GriffinLimVocoder(sampling_rate=8_000, iterations=4, inversion_iterations=8)
    pipeline = TangoPipeline(**parts, sampling_rate=8_000, default_duration=0.64, max_duration=2.56)
    pipeline.save_pretrained(folder)
    return f"file:{folder}"


@pytest.mark.parametrize(
    ("make", "kind", "says"),
    [
        (lambda second, folder: "nonsense", InvalidInputError, "model_uri: is 'nonsense'"),
        (lambda second, folder: f"file:{folder}", ModelNotFoundError, "is no folder"),
        (lambda second, folder: f"file:{second}#sha256:{'0' * 64}", DigestMismatchError, "not sha256:000"),
        (lambda second, folder: "mini:clap-a", ModelFormatError, "model_index.json"),
        (_damaged, DigestMismatchError, "differs from its manifest"),
        (_of_nan, ModelFormatError, "hold NaN or infinity"),
        (_of_another_rate, ModelFormatError, "sampling_rate 8000, not 16000"),
    ],
)
def test_what_is_refused_changes_nothing(
    client: AudioClient,
    second: Path,
    tmp_path: Path,
    make: Callable[[Path, Path], str],
    kind: type[MilongaError],
    says: str,
) -> None:
    before = _clip(client)
    with pytest.raises(kind, match=says) as caught:
        client.switch_model(make(second, tmp_path / "bad"), token=TOKEN)
    assert "\n" not in str(caught.value)
    assert _clip(client) == before
    # And the next is none the worse for it.
    client.switch_model(f"file:{second}", token=TOKEN)
    assert _clip(client)[0] == "second"


def test_a_model_too_large_to_fit_next_to_the_served_one(
    client: AudioClient, loading: Loading, second: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any, **options: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr("tests.services.generation.test_operator.load_tango", full)
    with pytest.raises(ModelError, match="second 2 does not fit into memory alongside"):
        client.switch_model(f"file:{second}", token=TOKEN)
    assert _clip(client)[0] == "tiny"


def test_two_switches_at_once(client: AudioClient, loading: Loading, second: Path) -> None:
    loading.allowed.clear()
    done: list[str] = []
    switching = threading.Thread(
        target=lambda: done.append(client.switch_model(f"file:{second}", token=TOKEN).current.name)
    )
    switching.start()
    assert loading.begun.wait(60)
    with pytest.raises(AlreadyUnderWayError, match="another switch is under way"):
        client.switch_model("mini", token=TOKEN)
    assert _clip(client)[0] == "tiny"
    loading.allowed.set()
    switching.join()
    assert done == ["second"]


def test_a_caller_who_goes_away_abandons_it(client: AudioClient, loading: Loading, second: Path) -> None:
    loading.allowed.clear()
    with pytest.raises(DeadlineExceededError, match="ask get_model"):
        client.switch_model(f"file:{second}", token=TOKEN, timeout=1)
    assert loading.begun.wait(60)
    with pytest.raises(AlreadyUnderWayError):
        client.switch_model("mini", token=TOKEN)
    loading.allowed.set()
    until(lambda: bool(loading.engines) and not loading.engines[0]._thread.is_alive())
    assert client.get_model().model.name == "tiny"

    def again() -> bool:
        try:
            return client.switch_model(f"file:{second}", token=TOKEN).current.name == "second"
        except AlreadyUnderWayError:
            return False

    until(again)
    assert _clip(client)[0] == "second"


def test_a_switch_has_a_time_limit(loading: Loading, second: Path) -> None:
    loading.allowed.clear()
    with (
        tiny_engine() as engine,
        serving(engine, token=TOKEN, load=loading, switch_timeout_seconds=0.5) as served,
        AudioClient(served.target, retries=0) as client,
    ):
        with pytest.raises(DeadlineExceededError, match=r"took longer than 0\.5 s"):
            client.switch_model(f"file:{second}", token=TOKEN, timeout=60)
        assert client.get_model().model.name == "tiny"
        loading.allowed.set()
        served.run(served.slot.close())
        assert not any(one._thread.is_alive() for one in loading.engines)


NONSENSE = (
    *("file:../models", "file:models", "file:~/models", "file:/models/../etc", "file:", "file:/a\0b"),
    *("file:/dev", "file:/dev/zero", "file:/proc/self", "file:/sys", "file:/etc/passwd", "models:/a\n/1"),
    *(
        "laion:/dev/zero",
        "laion-clap:/etc/passwd",
        "mini:\0",
        "http://host/model",
        "hf:../../etc",
        "hf:../etc",
        "",
    ),
)


@pytest.mark.parametrize("uri", NONSENSE)
def test_nonsense_is_the_callers_fault(client: AudioClient, loading: Loading, uri: str) -> None:
    with pytest.raises(InvalidInputError, match="model_uri: is "):
        client.switch_model(uri, token=TOKEN)
    assert not loading.begun.is_set()


@pytest.mark.parametrize(
    "make", [os.mkfifo, lambda path: path.write_text("x"), lambda path: path.symlink_to("/dev")]
)
def test_what_is_no_folder_is_the_callers_fault(
    client: AudioClient, loading: Loading, tmp_path: Path, make: Callable[[Path], object]
) -> None:
    make(tmp_path / "model")
    with pytest.raises(InvalidInputError, match="model_uri: is "):
        client.switch_model(f"file:{tmp_path}/model", token=TOKEN)


def test_a_folder_without_a_model_is_not_hashed(client: AudioClient, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "milonga.json")  # opened, it would never end
    with pytest.raises(ModelFormatError, match="is no model folder"):
        client.switch_model(f"file:{tmp_path}", token=TOKEN)


def test_operators_switch_to_what_the_settings_allow(loading: Loading, second: Path, tmp_path: Path) -> None:
    root = second.parent
    (root / "link").symlink_to(tmp_path)
    allowed = [f"file:{root}", "models:/ours"]
    with (
        tiny_engine() as engine,
        serving(engine, token=TOKEN, load=loading, operator_uris=allowed) as served,
        AudioClient(served.target, retries=0) as client,
    ):
        for uri in (
            *("mini", "mini:base", "hf:owner/name", "models:/others/1", "models:/ours-too/1"),
            *(f"file:{root}-too/model", f"file:{root}/link", f"file:{tmp_path}", f"file:{root.parent}"),
        ):
            with pytest.raises(InvalidInputError, match=r"operators may not load here|must be mini"):
                client.switch_model(uri, token=TOKEN)
        with pytest.raises(ModelNotFoundError):
            client.switch_model(f"file:{root}/absent", token=TOKEN)
        assert client.switch_model(f"file:{second}", token=TOKEN).current.name == "second"
        served.run(served.slot.close())


@pytest.mark.parametrize(
    "uris", [["file:models"], ["laion:/a"], ["/models"], [""], ["mini:base"], ["models:x"]]
)
def test_wrong_beginnings_are_refused_at_the_start(uris: list[str]) -> None:
    with pytest.raises(InvalidInputError, match=r"operator_uris: .* must be mini, models:"):
        load_settings(GenerationSettings, operator_uris=uris)


def test_a_server_that_stops_ends_a_switch_first(loading: Loading, second: Path) -> None:
    loading.allowed.clear()
    with (
        tiny_engine() as engine,
        serving(engine, token=TOKEN, load=loading) as served,
        AudioClient(served.target, retries=0) as client,
    ):
        with pytest.raises(DeadlineExceededError):
            client.switch_model(f"file:{second}", token=TOKEN, timeout=1)
        assert loading.begun.wait(60)
        threading.Timer(0.5, loading.allowed.set).start()
        served.run(served.slot.close())
        (loaded,) = loading.engines
        assert not loaded._thread.is_alive()
        assert not engine._thread.is_alive()


@pytest.mark.parametrize("token", ["", "of-the-operato", TOKEN + "r", "Ünicode"])
def test_another_token_is_refused(client: AudioClient, loading: Loading, token: str) -> None:
    with pytest.raises((UnauthenticatedError, InvalidInputError), match="token"):
        client.switch_model("mini", token=token)
    assert not loading.begun.is_set()


def test_without_a_token_there_is_no_such_rpc() -> None:
    with (
        tiny_engine() as engine,
        serving(engine) as served,
        AudioClient(served.target, retries=0) as client,
        pytest.raises(MilongaError, match=r"operator rpc is off; start it with: .*--operator-token-file"),
    ):
        client.switch_model("mini", token=TOKEN)


@pytest.mark.parametrize(
    "target",
    [
        "generation:50051",
        "dns:///10.0.0.1:50051",
        "ipv4:127.0.0.1:1,10.0.0.1:1",
        "127.evil.example:1",
        "dns://10.0.0.1/localhost:1",
    ],
)
def test_a_token_does_not_leave_this_machine_in_plaintext(target: str) -> None:
    with (
        AudioClient(target, retries=0) as client,
        pytest.raises(InvalidInputError, match=r"token: would travel to .* in plaintext"),
    ):
        client.switch_model("mini", token=TOKEN)


async def test_asyncio_switches_too(served: Serving, second: Path) -> None:
    async with AsyncAudioClient(f"ipv4:{served.target}", retries=0) as client:
        assert (await client.switch_model(f"file:{second}", token=TOKEN)).current.name == "second"
        assert (await client.get_model()).model.name == "second"
