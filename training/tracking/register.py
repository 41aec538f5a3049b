"""Register a model folder as a version in MLflow, which `models:/NAME/VERSION` then resolves to.

    milonga train register build/run/mini/dpo/model
    milonga train register tango2/ --name milonga-tango --alias champion

A version is a pyfunc whose code is `pyfunc_model.py` and whose artifact is the folder: no pickle. Tags carry
its digest, licence, parent, data and figures. The same files under the same name are registered once.
"""

import contextlib
import importlib.metadata
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, cast

from services.api.model import ModelVersion
from services.errors import (
    DigestMismatchError,
    FieldViolation,
    InvalidInputError,
    MilongaError,
    ModelFormatError,
    OutputError,
    ServiceUnavailableError,
    invalid,
)
from services.models.architectures import check_generator
from services.models.captioner.config import CLASS_NAME
from services.models.captioner.model import check_captioner
from services.models.folders import read_json
from services.models.manifest import ADAPTER_CONFIG, MANIFEST_NAME, read_manifest
from services.models.mini import mini_folder
from services.models.reward.model import MODEL_TYPE, read_reward_config
from services.weights.registry import (
    DIGEST_TAG,
    FOLDER_TAG,
    RegisteredVersion,
    connect,
    fetch,
    shown,
    tracking_uri,
)
from services.weights.uri import ModelURI, ResolvedModel, base_uri, naming, resolve

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.models import ModelSignature

Kind = Literal["tango", "reward", "captioner"]
"""Kind of a registered model."""

NAMES: Final[Mapping[Kind, str]] = {
    "tango": "milonga-tango",
    "reward": "milonga-reward",
    "captioner": "milonga-captioner",
}
"""Names of the registered models."""

CHALLENGER: Final = "challenger"
CHAMPION: Final = "champion"
"""Aliases of the version that is served and of the next candidate."""

EXPERIMENT: Final = "milonga"
"""Name of the MLflow experiment."""

_CODE = Path(__file__).with_name("pyfunc_model.py")
_EXAMPLES: Final[Mapping[Kind, Mapping[str, Any]]] = {
    "tango": {"prompt": "A dog barks then a siren wails", "seed": 7},
    "reward": {"prompt": "A dog barks", "audio": [0.0] * 16, "sampling_rate": 16_000},
    "captioner": {"audio": [0.0] * 16, "sampling_rate": 16_000},
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Provenance:
    """Origin of a model, for the tags of its version."""

    parent: str | None = None
    """Model URI or digest of the model that it was trained from."""
    data: Mapping[str, str] = field(default_factory=dict)
    """Digest of each data set that it was trained on."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Its evaluation."""
    run_id: str | None = None
    """The MLflow run that made it, and that keeps the files; None: one of its own."""


def register(
    model: Path | ResolvedModel,
    name: str | None = None,
    *,
    alias: str | None = CHALLENGER,
    clap: str | None = None,
    provenance: Provenance | None = None,
    uri: str | None = None,
) -> tuple[RegisteredVersion, bool]:
    """Make a version of a model, fetch it back, verify it, and point `alias` to it.

    Returns the version, and whether it is new: the same files are registered once.

    Args:
        model: a model folder with its manifest; the files of a resolved one are not hashed again.
        name: of the registered model; None: by its kind.
        alias: `challenger`, or `champion` to begin a registry with; None: no alias is touched.
        clap: of a reward model: URI of its CLAP model. None: the mini family's.
        provenance: origin of the model.
        uri: of the MLflow server; None: `services.weights.registry.tracking_uri`.

    Raises:
        InvalidInputError: a name or alias that can't be one.
        ModelError: the folder is refused (no manifest; files that differ from it), or its CLAP model is, or
            the registry lacks the model that an adapter was trained from.
        DigestMismatchError: what came back is something else; no alias points to it.
        ServiceUnavailableError: the server does not answer.
    """
    provenance, uri = provenance or Provenance(), tracking_uri(uri)
    model = checked_model(model)
    identity = model.identity
    kind = kind_of(model.folder)
    folder = model.own_folder
    name = name or NAMES[kind]
    check_names(name, alias, kind)
    if (folder / ADAPTER_CONFIG).is_file():
        _check_base(folder, uri)
    artifacts = {"model": folder.resolve()}
    if kind == "reward":
        artifacts["clap"] = clap_of(folder, clap)
    client = connect(uri, create=True)
    from mlflow.exceptions import MlflowException

    try:
        version, created = _find(client, name, identity.digest), False
        if version is None:
            version, created = _create(client, name, kind, identity, artifacts, provenance), True
    except MlflowException as error:
        raise _refused(uri, error) from error
    try:
        fetch(f"/{name}/{version}", uri=uri)
    except DigestMismatchError:
        if created:
            client.delete_model_version(name, version)
        raise
    try:
        if alias is not None:
            client.set_registered_model_alias(name, alias, version)
    except MlflowException as error:
        raise _refused(uri, error) from error
    digest, license = identity.digest, identity.license
    return RegisteredVersion(name=name, version=version, digest=digest, license=license), created


def checked_model(model: Path | ResolvedModel) -> ResolvedModel:
    """Return the model of a folder, its files verified. Raises `ModelError` if it has no manifest."""
    folder = model if isinstance(model, Path) else model.folder
    if folder.is_dir() and not (folder / MANIFEST_NAME).exists():
        raise ModelFormatError(
            f"{folder} has no {MANIFEST_NAME}, with its version and licence; make the folder with "
            "`milonga convert` or `milonga train`, which write one, or call services.models.manifest."
            "write_manifest"
        )
    return resolve(ModelURI(scheme="file", path=str(folder))) if isinstance(model, Path) else model


def kind_of(folder: Path) -> Kind:
    """Return the kind of the model in `folder`. Raises `ModelError` if it is no complete model."""
    config = folder / "config.json"
    if config.exists() and read_json(config).get("model_type") == MODEL_TYPE:
        read_reward_config(folder)
        return "reward"
    if config.exists() and read_json(config).get("_class_name") == CLASS_NAME:
        check_captioner(folder)
        return "captioner"
    check_generator(folder)
    return "tango"


def clap_of(folder: Path, clap: str | None) -> Path:
    """Return the CLAP model of the reward model in `folder`, by the URI `clap` or from the mini family."""
    config = read_reward_config(folder)
    if clap is None:
        embedded = mini_folder("clap-a")
        if not embedded.is_dir() or read_manifest(embedded).digest != config.clap_digest:
            raise invalid(
                "--clap",
                f"is missing, and {folder} needs the CLAP model {config.clap_name} "
                f"({config.clap_digest}), which is not the mini family's; give its model URI",
            )
        clap = "mini:clap-a"
    found = resolve(clap)
    if found.digest != config.clap_digest:
        raise DigestMismatchError(
            f"{folder} was trained on the CLAP model {config.clap_name} ({config.clap_digest}), and {clap} "
            f"is {found.digest}; give the one it was trained on"
        )
    return found.folder


def check_names(name: str, alias: str | None, kind: Kind) -> None:
    """Raise `InvalidInputError` unless a model of `kind` can have this name and this alias."""
    violations = []
    if not re.fullmatch(r"[\w.-]+", name):
        violations.append(
            FieldViolation("--name", f"is {name!r}, must be of letters, digits and any of . _ -")
        )
    elif name in NAMES.values() and name != NAMES[kind]:
        violations.append(
            FieldViolation("--name", f"is {name}, and this is a {kind} model; give {NAMES[kind]}")
        )
    if alias is not None and not re.fullmatch(r"(?![vV]\d+$)[\w-]+", alias):
        violations.append(FieldViolation("--alias", f"is {alias!r}, must be {CHALLENGER} or {CHAMPION}"))
    if violations:
        raise InvalidInputError(*violations)


def _check_base(adapter: Path, uri: str) -> None:
    """Raise `ModelError` unless the registry has the model that an adapter was trained from."""
    with naming(f"{adapter}, the model that the adapter was trained from"):
        resolve(base_uri(adapter, "models"), tracking_uri=uri, merge=False)


def _find(client: "MlflowClient", name: str, digest: str) -> str | None:
    """Return the newest version with these files, if there is one."""
    found = client.search_model_versions(f"name='{name}' and tags.`{DIGEST_TAG}`='{digest}'")
    versions = [int(version.version) for version in found if version.status == "READY"]
    return str(max(versions)) if versions else None


def _create(
    client: "MlflowClient",
    name: str,
    kind: Kind,
    model: ModelVersion,
    artifacts: Mapping[str, Path],
    provenance: Provenance,
) -> str:
    """Send the files, then create the version: none exists without its files."""
    from mlflow.exceptions import MlflowException

    own = None
    if provenance.run_id is None:
        own = client.create_run(experiment_id(client), run_name=f"register {model.name}").info.run_id
    run_id = provenance.run_id or own
    assert run_id is not None
    status = "FAILED"
    try:
        with tempfile.TemporaryDirectory(prefix="milonga-") as temporary:
            with warnings.catch_warnings():
                # Of MLflow's own classes, and of types that are open on purpose.
                warnings.simplefilter("ignore")
                packed = _pack(Path(temporary), kind, artifacts)
            client.log_artifacts(run_id, str(packed), name)
        try:
            client.create_registered_model(name, tags={"milonga.kind": kind})
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        version = client.create_model_version(
            name,
            source=f"runs:/{run_id}/{name}",  # a path on this machine would mean nothing to a server
            run_id=run_id,
            tags=tags_of(kind, model, provenance),
            description=f"{model.name} {model.version}, {model.license}",
        )
        status = "FINISHED"
        return str(version.version)
    except OSError as error:
        if isinstance(error, MilongaError) or type(error).__module__.startswith("requests"):
            raise ServiceUnavailableError(f"the model could not be sent: {error}; try again") from error
        raise OutputError(f"the model could not be packed or sent: {error}; free some space") from error
    finally:
        if own is not None:
            with contextlib.suppress(MlflowException):
                client.set_terminated(own, status)


def tags_of(kind: Kind, model: ModelVersion, provenance: Provenance) -> dict[str, str]:
    """Return the tags of a version of `model`, whose name and version are the manifest's."""
    tags = {
        DIGEST_TAG: model.digest,
        FOLDER_TAG: "artifacts/model",
        "milonga.kind": kind,
        "milonga.license": model.license,
        "milonga.name": model.name,
        "milonga.version": model.version,
    }
    if provenance.parent:
        tags["milonga.parent"] = provenance.parent
    tags |= {f"milonga.data.{name}": digest for name, digest in provenance.data.items()}
    return tags | {f"milonga.metric.{name}": f"{value:.6g}" for name, value in provenance.metrics.items()}


def experiment_id(client: "MlflowClient", name: str = EXPERIMENT) -> str:
    """Return the id of the experiment `name`, created if missing, with files next to a local database."""
    from mlflow.exceptions import MlflowException

    from services.weights.registry import database_path

    found = client.get_experiment_by_name(name)
    if found is None:
        database = database_path(client.tracking_uri)
        location = None if database is None else (database.parent / "mlruns" / name).as_uri()
        try:
            return str(client.create_experiment(name, artifact_location=location))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client.get_experiment_by_name(name)  # another process was faster
    assert found is not None
    if found.lifecycle_stage == "deleted":
        raise invalid("experiment", f"is {name}, which was deleted; restore it with `mlflow experiments`")
    return str(found.experiment_id)


def _pack(folder: Path, kind: Kind, artifacts: Mapping[str, Path]) -> Path:
    """Write the pyfunc into `folder`."""
    from mlflow.pyfunc import save_model

    named = {}
    for name, path in artifacts.items():
        # MLflow names its copies after these, and refuses links out of their folder.
        named[name] = folder / (name if path.is_dir() else f"{name}{path.suffix}")
        if path.is_dir():
            shutil.copytree(
                path, named[name], ignore=shutil.ignore_patterns(".*"), copy_function=_link_or_copy
            )
        else:
            _link_or_copy(str(path), str(named[name]))
    packed = folder / "packed"
    save_model(
        path=str(packed),
        python_model=str(_CODE),
        artifacts={name: str(path) for name, path in named.items()},
        signature=signature_of(kind),
        input_example=dict(_EXAMPLES[kind]),
        pip_requirements=[
            f"milonga[serving]=={importlib.metadata.version('milonga')}",
            f"mlflow=={importlib.metadata.version('mlflow')}",
        ],
    )
    return packed


def _link_or_copy(source: str, target: str) -> None:
    """Link a file, or copy it to another disk: weights are gigabytes."""
    try:
        os.link(os.path.realpath(source), target)
    except OSError:
        shutil.copyfile(source, target)


def signature_of(kind: Kind) -> "ModelSignature":
    """Return the schema of `predict`. Optional numbers are of any type: tables have NaN there.

    A generator also takes a string or a list of strings. MLflow makes a table of them whose only column is
    called 0, so that is a column of the schema, and `prompt` is not required: the model checks it.
    """
    from mlflow.models import ModelSignature
    from mlflow.types.schema import (
        AnyType,
        Array,
        ColSpec,
        DataType,
        ParamSchema,
        ParamSpec,
        Schema,
        TensorSpec,
    )

    inputs: list[ColSpec | TensorSpec]
    outputs: list[ColSpec | TensorSpec]
    params: list[ParamSpec] = []
    text, whole = DataType.string, DataType.long
    clip: list[ColSpec | TensorSpec] = [ColSpec(Array(AnyType()), "audio"), ColSpec(whole, "sampling_rate")]
    if kind == "reward":
        inputs = [ColSpec(text, "prompt"), *clip]
        outputs = [ColSpec(DataType.double, "logit"), ColSpec(DataType.double, "probability")]
    elif kind == "captioner":
        inputs, outputs = clip, [ColSpec(text, "caption")]
    else:
        options = {
            "negative_prompt": text,
            "seed": whole,
            "num_inference_steps": whole,
            "guidance_scale": DataType.double,
            "duration": DataType.double,
        }
        inputs = [
            ColSpec(AnyType(), cast(str, 0), required=False),  # first, where MLflow takes 0 for a name
            ColSpec(AnyType(), "prompt", required=False),
            *(ColSpec(AnyType(), name, required=False) for name in options),
        ]
        params = [ParamSpec(name, dtype, None) for name, dtype in options.items()]
        outputs = [
            ColSpec(Array(DataType.float), "audio"),
            ColSpec(whole, "sampling_rate"),
            ColSpec(whole, "seed"),
        ]
    schemas: dict[str, Any] = {"inputs": Schema(inputs), "outputs": Schema(outputs)}
    return ModelSignature(**schemas, **({"params": ParamSchema(params)} if params else {}))


def _refused(uri: str, error: Exception) -> MilongaError:
    reason = " ".join(str(error).split())[:300]
    return ServiceUnavailableError(f"the MLflow server {shown(uri)} refused the model: {reason}")
