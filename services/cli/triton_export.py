"""What `milonga triton export` puts into a repository: the three models, each from model URIs."""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from tritonclient.grpc import model_config_pb2

from services.errors import FieldViolation, InvalidInputError
from services.generation import tensors as tango
from services.generation.settings import GenerationSettings
from services.inference.describing import write_config
from services.inference.triton.repository import Exported, Weights
from services.inference.triton.serving import read_settings
from services.reward import tensors as rewarding
from services.reward.settings import FAMILY, MEMBER, RewardSettings
from services.scoring import tensors as scoring
from services.scoring.settings import ScoringSettings
from services.weights.uri import ModelURI, ResolvedModel, resolve

TOKENIZER: Final = "roberta-base"
"""Folder beside a LAION checkpoint in which its tokenizer is looked for."""

WAITING: Final = 256
"""Requests to clap or reward that may wait in Triton; beyond that it answers UNAVAILABLE."""
WAIT_MICROSECONDS: Final = 5_000
"""How long one waits for companions: as long as in our services."""

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SET: Final = "--set {}.{{}}"
_CODE: Final = '''\
"""Written by `milonga triton export`: the model that the {service} service serves, under Triton."""

from services.{service}.triton import open_model
from services.inference.triton.backend import python_model

TritonPythonModel = python_model(open_model)
'''


def export_tango(uri: str, settings: Mapping[str, str] | None = None) -> tuple[Exported, int]:
    """Return the generating model that a URI names, and its version number.

    Args:
        uri: of the weights.
        settings: of the generation service, for config.pbtxt.

    Raises:
        ModelError, InvalidInputError: it was not found or refused, is no generating model, or a setting is
            not known.
    """
    found = _find("--model", uri)
    if not (found.folder / "model_index.json").exists():
        raise InvalidInputError(
            FieldViolation("--model", f"is {uri}, which makes no sound: it has no model_index.json")
        )
    read_settings(GenerationSettings, settings or {}, _SET.format(tango.NAME), model=uri)
    config = write_config(tango.NAME, tango.INPUTS, tango.OUTPUTS, 0, decoupled=True)
    _configure(config, settings)
    return _exported(config, "generation", {tango.PART: found}), _number(found)


def export_clap(uris: Mapping[str, str], settings: Mapping[str, str] | None = None) -> tuple[Exported, int]:
    """Return the scorers that URIs name, and the version number of the first. Raises as `export_tango`."""
    for name in uris:
        if not _NAME.fullmatch(name):
            raise InvalidInputError(
                FieldViolation(
                    "--scorer",
                    f"has the name {name[:80]!r}, must be letters, digits, dots, underscores and hyphens, "
                    "the first of them a letter or a digit: it names a folder",
                )
            )
    found = {name: _find(f"--scorer {name}", uri) for name, uri in uris.items()}
    rows = read_settings(
        ScoringSettings, settings or {}, _SET.format(scoring.NAME), scorers=dict(uris)
    ).max_batch_size
    config = write_config(scoring.NAME, scoring.INPUTS, scoring.outputs_of(len(found)), rows, decoupled=False)
    _configure(config, settings)
    return _exported(config, "scoring", found), _number(next(iter(found.values())))


def export_reward(uri: str, clap: str, settings: Mapping[str, str] | None = None) -> tuple[Exported, int]:
    """Return the reward model that a URI names, with its CLAP model; its number. Raises as `export_tango`."""
    named = f"{FAMILY}:{MEMBER}" if uri == FAMILY else uri
    found = {rewarding.REWARD: _find("--reward", named), rewarding.CLAP: _find("--clap", clap)}
    rows = read_settings(
        RewardSettings, settings or {}, _SET.format(rewarding.NAME), model=named, clap=clap
    ).max_batch_size
    config = write_config(rewarding.NAME, rewarding.INPUTS, rewarding.OUTPUTS, rows, decoupled=False)
    _configure(config, settings)
    return _exported(config, "reward", found), _number(found[rewarding.REWARD])


def _find(flag: str, uri: str) -> ResolvedModel:
    try:
        parsed = ModelURI.parse(uri)
    except InvalidInputError as error:
        raise InvalidInputError(*(FieldViolation(flag, v.description) for v in error.violations)) from error
    if parsed.scheme == "laion-clap":
        raise InvalidInputError(
            FieldViolation(flag, f"is {uri}, which needs the package laion_clap; give laion:{parsed.path}")
        )
    return resolve(parsed)


def _number(found: ResolvedModel) -> int:
    """The version as Triton's folders have it: a registered model's own; others are 1 unless they say."""
    version = found.identity.version
    return int(version) if version.isdecimal() and int(version) else 1


def _configure(config: model_config_pb2.ModelConfig, settings: Mapping[str, str] | None) -> None:
    """Fill in how Triton runs it, and the service's settings as parameters."""
    config.backend = "python"
    # The setting `device` says where it runs. One instance: requests share its batches.
    config.instance_group.add(kind=model_config_pb2.ModelInstanceGroup.KIND_MODEL, count=1)
    if not config.model_transaction_policy.decoupled:
        config.dynamic_batching.max_queue_delay_microseconds = WAIT_MICROSECONDS
        config.dynamic_batching.default_queue_policy.max_queue_size = WAITING
    for name, value in (settings or {}).items():
        config.parameters[name].string_value = value


def _exported(
    config: model_config_pb2.ModelConfig, service: str, found: Mapping[str, ResolvedModel]
) -> Exported:
    return Exported(
        config=config,
        code=_CODE.format(service=service),
        weights={
            part: _checkpoint(one) if one.folder.is_file() else _folder(one) for part, one in found.items()
        },
    )


def _folder(model: ResolvedModel) -> Weights:
    found = model.identity
    return Weights(name=found.name, version=found.version, digest=found.digest, folder=model.folder)


def _checkpoint(model: ResolvedModel) -> Weights:
    """A LAION checkpoint, and the tokenizer that it lacks."""
    from services.models.clap.laion import TOKENIZER_FILES, find_tokenizer

    tokenizer = find_tokenizer(model.folder)
    return replace(
        _folder(model),
        checkpoint=model.folder.name,
        beside={
            f"{TOKENIZER}/{name}": tokenizer / name
            for name in TOKENIZER_FILES
            if (tokenizer / name).is_file()
        },
    )
