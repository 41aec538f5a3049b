import json
import math
import shutil
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd  # type: ignore[import-untyped]
import pytest
import typer
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from typer.testing import CliRunner

from services.errors import (
    DigestMismatchError,
    InvalidInputError,
    MilongaError,
    ModelError,
    ModelFormatError,
    ModelNotFoundError,
)
from services.models.latent import clip_generator
from services.models.manifest import Manifest, read_manifest, verify_manifest, write_manifest
from services.weights import registry
from services.weights.adapter_sources import AdapterSources
from services.weights.adapters import AdapterStore
from services.weights.uri import resolve
from tests.tiny import tiny_adapter, tiny_captioner, tiny_clap, tiny_pipeline, tiny_reward, tiny_tangoflux
from tests.training.tracking.mlflow_server import MLflowServer
from training.commands import tracking as tracking_cli
from training.promotion.registry import Registry
from training.tracking.register import CHAMPION, Provenance, register
from training.tracking.runs import Tracker

PROMPT = "a dog barks then a siren wails"


@pytest.fixture(autouse=True)
def _server_early(starting_server: MLflowServer) -> None:
    pass


@pytest.fixture(autouse=True)
def _no_pickles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model folder with its manifest."""
    folder = tmp_path / "tuned model"
    tiny_pipeline().save_pretrained(folder)
    write_manifest(folder, name="tuned", version="3", license="CC-BY-NC-SA-4.0")
    (folder / "README.md").write_text("# Model card\n")
    return folder


def loaded(uri: str, store: str) -> Any:
    """What `mlflow.pyfunc.load_model` gives where MLFLOW_TRACKING_URI is `store`."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("MLFLOW_TRACKING_URI", store)
        return mlflow.pyfunc.load_model(uri)


def versions(store: str, name: str) -> list[str]:
    return sorted(str(v.version) for v in MlflowClient(store, store).search_model_versions(f"name='{name}'"))


def test_a_model_becomes_a_version_that_resolves_back_to_the_same_files(
    store: str, model: Path, tmp_path: Path
) -> None:
    provenance = Provenance(
        parent="models:/milonga-tango/0", data={"pairs": "sha256:12"}, metrics={"in_order": 0.615}
    )
    done, created = register(model, provenance=provenance)
    digest = verify_manifest(model).digest
    assert (done.name, done.version, created) == ("milonga-tango", "1", True)
    assert done.uri == f"models:/milonga-tango/1#{digest}"
    for uri in ("models:/milonga-tango/1", "models:/milonga-tango@challenger", done.uri):
        found = resolve(uri)
        assert (found.identity.name, found.identity.version, found.digest) == ("milonga-tango", "1", digest)
        assert found.identity.license == "CC-BY-NC-SA-4.0"
        assert verify_manifest(found.folder).digest == digest
        assert found.folder == tmp_path / "cache" / "models" / digest.removeprefix("sha256:")
    assert (found.folder / "README.md").exists()
    version = MlflowClient(store, store).get_model_version("milonga-tango", "1")
    assert version.tags == {
        "milonga.digest": digest,
        "milonga.folder": "artifacts/model",
        "milonga.kind": "tango",
        "milonga.license": "CC-BY-NC-SA-4.0",
        "milonga.name": "tuned",
        "milonga.version": "3",
        "milonga.parent": "models:/milonga-tango/0",
        "milonga.data.pairs": "sha256:12",
        "milonga.metric.in_order": "0.615",
    }


def test_a_registered_model_makes_sound_without_pickles(store: str, model: Path) -> None:
    register(model)
    files = {path.name for path in Path("mlruns").rglob("*") if path.is_file()}
    assert {"pyfunc_model.py", "input_example.json", "requirements.txt", "milonga.json"} <= files
    assert not [name for name in files if name.endswith((".pkl", ".pickle", ".pt", ".bin"))]
    assert "uv.lock" not in files
    (requirements,) = Path("mlruns").rglob("requirements.txt")
    assert "milonga[serving]==" in requirements.read_text()
    registered = loaded("models:/milonga-tango@challenger", store)
    signature = registered.metadata.signature
    assert {"prompt", "seed", "duration"} <= set(signature.inputs.input_names())
    assert {param.name for param in signature.params} == {
        *("negative_prompt", "seed", "num_inference_steps", "guidance_scale", "duration")
    }
    [clip] = registered.predict({"prompt": PROMPT, "seed": 7, "num_inference_steps": 2, "guidance_scale": 2})
    expected = tiny_pipeline()(
        PROMPT, num_inference_steps=2, guidance_scale=2.0, generator=[clip_generator(7)]
    )
    np.testing.assert_allclose(clip["audio"], expected.audios[0], atol=1e-6)
    assert (clip["audio"].dtype, clip["sampling_rate"], clip["seed"]) == (np.float32, 16_000, 7)
    many = registered.predict([{"prompt": PROMPT, "seed": 7}, {"prompt": PROMPT, "duration": 1.28}])
    assert [len(clip["audio"]) for clip in many] == [10_240, 20_480]
    table = pd.DataFrame({"prompt": [PROMPT], "seed": [7], "negative_prompt": ["rain"]})
    [other] = registered.predict(table)
    assert not np.array_equal(other["audio"], many[0]["audio"])
    for wrong, field in (
        ({"prompt": " "}, "prompt"),
        ({"prompt": PROMPT, "seed": -1}, "seed"),
        ({"prompt": PROMPT, "seed": 1.5}, "seed"),
        ({"prompt": PROMPT, "duration": "long"}, "duration"),
        ({"prompt": PROMPT, "num_inference_steps": 0}, "num_inference_steps"),
    ):
        with pytest.raises(InvalidInputError, match=field):
            registered.predict(wrong)
    for missing in ({"text": PROMPT}, [], {"seed": 7}, {"prompt": None}, [PROMPT, None], [7]):
        with pytest.raises(InvalidInputError, match="prompt: is missing"):
            registered.predict(missing)


def test_a_registered_model_takes_strings_and_parameters(store: str, model: Path) -> None:
    register(model)
    registered = loaded("models:/milonga-tango@challenger", store)
    row = {"prompt": PROMPT, "seed": 7, "duration": 0.32}
    [expected] = registered.predict(row)
    params = {"seed": 7, "duration": 0.32}
    for data in (
        PROMPT,
        [PROMPT],
        pd.Series([PROMPT]),
        pd.DataFrame({"prompt": [PROMPT]}),
        {"prompt": PROMPT},
    ):
        [clip] = registered.predict(data, params=params)
        np.testing.assert_array_equal(clip["audio"], expected["audio"])
    two = registered.predict([PROMPT, "rain falls"], params=params)
    assert [clip["seed"] for clip in two] == [7, 7]
    np.testing.assert_allclose(two[0]["audio"], expected["audio"], atol=1e-6)
    # What a row says goes before the parameters, and an empty cell says nothing.
    table = pd.DataFrame({"prompt": [PROMPT, PROMPT], "seed": [8, None]})
    assert [clip["seed"] for clip in registered.predict(table, params=params)] == [8, 7]
    [drawn] = registered.predict(PROMPT)
    assert drawn["seed"] >= 0 and len(drawn["audio"]) == 10_240
    with pytest.raises(InvalidInputError, match="seed"):
        registered.predict(PROMPT, params={"seed": -1})
    with pytest.raises(MlflowException, match="seed"):
        registered.predict(PROMPT, params={"seed": "seven"})


def test_a_reward_model_is_registered_with_the_clap_model_that_it_stands_on(
    store: str, tmp_path: Path
) -> None:
    clap = tiny_clap()
    clap.save(tmp_path / "clap")
    digest = write_manifest(tmp_path / "clap", name="clap", version="1", license="Apache-2.0").digest
    reward = tiny_reward(clap, digest)
    folder = tmp_path / "reward"
    reward.save(folder)
    write_manifest(folder, name="reward", version="1", license="Apache-2.0")
    with pytest.raises(InvalidInputError, match="--clap"):
        register(folder)
    with pytest.raises(InvalidInputError, match="milonga-reward"):
        register(folder, "milonga-tango", clap=f"file:{tmp_path / 'clap'}")
    done, _ = register(folder, clap=f"file:{tmp_path / 'clap'}")
    assert (done.name, done.version) == ("milonga-reward", "1")
    assert resolve("models:/milonga-reward@challenger").digest == verify_manifest(folder).digest
    waveform = np.sin(np.arange(16_000) / 20).astype(np.float32)
    model = loaded("models:/milonga-reward/1", store)
    [verdict] = model.predict({"prompt": PROMPT, "audio": waveform, "sampling_rate": 16_000})
    expected = reward.reward([PROMPT], [reward.prepare(waveform, 16_000)]).item()
    assert verdict["logit"] == pytest.approx(expected, abs=1e-5)
    assert verdict["probability"] == pytest.approx(1 / (1 + math.exp(-expected)))
    rows = [{"prompt": PROMPT, "audio": waveform.tolist(), "sampling_rate": 16_000}] * 2
    assert model.predict(rows)[1]["logit"] == pytest.approx(expected, abs=1e-5)
    with pytest.raises(InvalidInputError, match="audio"):
        model.predict({"prompt": PROMPT, "audio": [], "sampling_rate": 16_000})


def test_a_captioner_is_registered_and_describes_clips(store: str, tmp_path: Path) -> None:
    folder, captioner = tmp_path / "captioner", tiny_captioner()
    captioner.save_pretrained(folder)
    write_manifest(folder, name="tiny-captioner", version="1", license="Apache-2.0")
    with pytest.raises(InvalidInputError, match="milonga-captioner"):
        register(folder, "milonga-tango")
    done, _ = register(folder)
    assert (done.name, done.version) == ("milonga-captioner", "1")
    model = loaded("models:/milonga-captioner@challenger", store)
    waveform = np.sin(np.arange(16_000) / 20).astype(np.float32)
    [row] = model.predict({"audio": waveform, "sampling_rate": 16_000})
    clip = captioner.prepare(waveform, 16_000)
    assert row == {"caption": captioner.generate(captioner.encode([clip]), (3,))[0][0].text}
    with pytest.raises(InvalidInputError, match="audio"):
        model.predict({"audio": [], "sampling_rate": 16_000})


def test_an_adapter_is_a_version_that_requests_and_promotions_can_name(
    store: str, model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "tuned-adapter"
    pipeline = tiny_pipeline()
    tiny_adapter(folder, pipeline)
    config = folder / "adapter_config.json"
    trained_from = f"file:{model}#{verify_manifest(model).digest}"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": trained_from}))
    write_manifest(folder, name="tuned-adapter", version="1", license="CC0-1.0")
    with pytest.raises(ModelNotFoundError, match=r"has the digest .*; register that model first"):
        register(folder)
    base, _ = register(model)
    done, created = register(folder, alias=CHAMPION)
    shutil.rmtree(model)
    assert (done.name, done.version, created) == ("milonga-tango", "2", True)

    found = resolve(done.uri)
    assert (found.identity.version, found.digest) == ("2", verify_manifest(folder).digest)
    assert set(read_manifest(found.folder).files) == set(read_manifest(resolve(base.uri).folder).files)
    Registry(store).check_architecture(base, done)
    other = tmp_path / "other"
    tiny_tangoflux().save_pretrained(other)
    write_manifest(other, name="other", version="1", license="CC0-1.0")
    with pytest.raises(ModelFormatError, match="is of another architecture than"):
        Registry(store).check_architecture(register(other, "flux")[0], done)

    sources = AdapterSources(listed={}, registry=True)
    names = AdapterStore(pipeline, sources, base.digest)
    by_alias = names.get("milonga-tango@champion")
    assert by_alias.version == names.get("milonga-tango@2").version == found.identity
    assert not by_alias.warnings
    for name, reason in (("milonga-tango@9", "not in the registry"), ("milonga-tango@1", "is no adapter")):
        with pytest.raises(InvalidInputError, match=f"adapter: is '{name}': .*{reason}"):
            names.get(name)
    with pytest.raises(InvalidInputError, match="must be one of NAME@VERSION of the registry"):
        names.get("milonga-tango")


def test_the_same_files_are_registered_once_and_an_alias_moves(store: str, model: Path) -> None:
    first, _ = register(model)
    again, created = register(model, alias=CHAMPION)
    assert (again, created) == (first, False)
    tiny_pipeline(seed=1).save_pretrained(model)
    write_manifest(model, name="tuned", version="4", license="CC-BY-NC-SA-4.0")
    second, created = register(model)
    assert (second.version, created) == ("2", True)
    assert resolve("models:/milonga-tango@challenger").identity.version == "2"
    assert resolve("models:/milonga-tango@champion").identity.version == "1"
    assert versions(store, "milonga-tango") == ["1", "2"]


def test_what_is_no_whole_model_is_refused(store: str, model: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(model, bare)
    (bare / "milonga.json").unlink()
    refusals: list[tuple[Path, dict[str, str], type[MilongaError], str]] = [
        (bare, {}, ModelFormatError, "licence.*milonga convert"),
        (tmp_path / "absent", {}, ModelNotFoundError, "absent"),
        (model, {"name": "a b"}, InvalidInputError, "--name"),
        (model, {"name": "milonga-reward"}, InvalidInputError, "milonga-tango"),
        (model, {"alias": "v1"}, InvalidInputError, "--alias"),
    ]
    for folder, arguments, kind, message in refusals:
        with pytest.raises(kind, match=message) as caught:
            register(folder, **arguments)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)
    (model / "unet" / "config.json").write_text("{}")
    with pytest.raises(DigestMismatchError, match=r"unet/config\.json"):
        register(model)
    empty = tmp_path / "empty"
    empty.mkdir()
    write_manifest(empty, name="x", version="1", license="MIT")
    with pytest.raises(ModelFormatError, match="model_index"):
        register(empty)
    assert versions(store, "milonga-tango") == []


def test_what_comes_back_otherwise_is_no_version(
    store: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(*, artifact_uri: str, dst_path: str, tracking_uri: str) -> str:
        folder = Path(download(artifact_uri=artifact_uri, dst_path=dst_path, tracking_uri=tracking_uri))
        (folder / "unet" / "config.json").write_text("{}")
        return str(folder)

    download = mlflow.artifacts.download_artifacts
    monkeypatch.setattr(mlflow.artifacts, "download_artifacts", damaged)
    with pytest.raises(DigestMismatchError, match="registered as"):
        register(model)
    assert versions(store, "milonga-tango") == []
    assert not list(registry.cache_folder().rglob("*.json"))


def test_the_cache_is_mended_and_a_pinned_version_needs_no_registry(
    store: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done, _ = register(model)
    folder = resolve(done.uri).folder
    (folder / "unet" / "config.json").write_text("{}")
    assert verify_manifest(resolve(done.uri).folder).digest == done.digest
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'gone.db'}")
    assert resolve(done.uri).folder == folder
    with pytest.raises(ModelNotFoundError, match=r"gone\.db"):
        resolve("models:/milonga-tango@challenger")
    assert not (tmp_path / "gone.db").exists()


def test_a_version_that_is_not_there_or_not_ours(store: str, model: Path) -> None:
    register(model)
    for uri in ("models:/milonga-tango/9", "models:/milonga-tango@champion", "models:/other/1"):
        with pytest.raises(ModelNotFoundError, match="not in the registry"):
            resolve(uri)
    with pytest.raises(DigestMismatchError, match="correct the pin"):
        resolve("models:/milonga-tango/1#sha256:" + "0" * 64)
    client = MlflowClient(store, store)
    client.create_registered_model("foreign")
    client.create_model_version("foreign", source=str(model))
    with pytest.raises(ModelFormatError, match="milonga train register"):
        resolve("models:/foreign/1")


def test_a_remote_registry_gets_the_files_themselves(
    server: MLflowServer, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    monkeypatch.setenv("MILONGA_CACHE", str(tmp_path / "cache"))
    with Tracker("mini", tmp_path / "t") as tracker:
        done, _ = register(model, provenance=Provenance(run_id=tracker.run_id), alias=CHAMPION)
    manifest = verify_manifest(model)
    shutil.rmtree(model)
    shutil.rmtree(tmp_path / "cache")
    found = resolve("models:/milonga-tango@champion")
    assert (found.identity.version, found.digest) == (done.version, manifest.digest)
    version = MlflowClient(server.uri, server.uri).get_model_version("milonga-tango", done.version)
    assert (version.run_id, version.source) == (tracker.run_id, f"runs:/{tracker.run_id}/milonga-tango")
    assert len(list(server.artifacts.rglob("milonga.json"))) == 1
    [clip] = loaded("models:/milonga-tango@champion", server.uri).predict({"prompt": PROMPT, "seed": 1})
    assert clip["audio"].shape == (10_240,)


def test_the_commands(store: str, model: Path, tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(tracking_cli.register)
    app.command()(tracking_cli.sync)
    done = CliRunner().invoke(app, ["register", str(model), "--alias", "champion", "--tracking-uri", store])
    assert done.exit_code == 0, done.output
    manifest: Manifest = verify_manifest(model)
    assert done.stdout == f"milonga-tango version 1, champion\nmodels:/milonga-tango/1#{manifest.digest}\n"
    assert "registered before" in CliRunner().invoke(app, ["register", str(model)]).output
    with Tracker("run", tmp_path / "t"):
        pass
    assert CliRunner().invoke(app, ["sync", str(tmp_path / "t")]).stdout == "0 entries sent\n"
    failed = CliRunner().invoke(app, ["register", str(tmp_path)])
    assert isinstance(failed.exception, ModelError)


def test_the_input_example_is_one_that_the_model_takes(store: str, model: Path) -> None:
    register(model)
    (example,) = Path("mlruns").rglob("input_example.json")
    [clip] = loaded("models:/milonga-tango/1", store).predict(json.loads(example.read_text()))
    assert clip["seed"] == 7
