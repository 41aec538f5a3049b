"""A model's metadata, configuration and repository index, in the protocol's messages."""

import importlib.metadata
import json
from collections.abc import Sequence
from typing import Any, Final

from tritonclient.grpc import model_config_pb2
from tritonclient.grpc import service_pb2 as pb

from services.errors import UnsupportedError, invalid
from services.inference.model import Model, ModelLease
from services.inference.tensors import TensorSpec

PLATFORM: Final = "milonga"
"""`platform` of the models; Triton's own models name their backend there."""

EXTENSIONS: Final = ("model_configuration", "model_repository", "parameters", "statistics")
"""Supported protocol extensions, by Triton's names."""

_CONFIG_TYPES: Final = {"BYTES": "TYPE_STRING"}


def server_metadata() -> pb.ServerMetadataResponse:
    """Return the response of ServerMetadata."""
    return pb.ServerMetadataResponse(
        name="milonga", version=importlib.metadata.version("milonga"), extensions=EXTENSIONS
    )


def model_metadata(model: Model, lease: ModelLease[Any]) -> pb.ModelMetadataResponse:
    """Return the response of ModelMetadata."""

    def tensors(specs: Sequence[TensorSpec]) -> list[Any]:
        kind = pb.ModelMetadataResponse.TensorMetadata
        return [kind(name=spec.name, datatype=spec.datatype, shape=spec.shape) for spec in specs]

    return pb.ModelMetadataResponse(
        name=model.name,
        versions=[lease.version],
        platform=PLATFORM,
        inputs=tensors(model.inputs),
        outputs=tensors(model.outputs),
    )


def model_config(model: Model, lease: ModelLease[Any]) -> pb.ModelConfigResponse:
    """Return the response of ModelConfig; its parameters are the request limits and the weights' identity."""
    config = write_config(model.name, model.inputs, model.outputs, model.max_rows, decoupled=model.decoupled)
    config.platform = PLATFORM
    limits = {"max_rows": str(model.max_rows), **model.limits}
    for name, value in {**limits, **lease.parameters}.items():
        config.parameters[name].string_value = value
    return pb.ModelConfigResponse(config=config)


def write_config(
    name: str, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], max_rows: int, *, decoupled: bool
) -> Any:
    """Return a ModelConfig, for this protocol and for Triton's config.pbtxt.

    If Triton may batch requests, `max_batch_size` is `max_rows`, and shapes leave the rows out. For a
    decoupled model `max_batch_size` is 0, and shapes include the rows.
    """
    first = 0 if decoupled else 1
    return model_config_pb2.ModelConfig(
        name=name,
        max_batch_size=0 if decoupled else max_rows,
        input=[
            model_config_pb2.ModelInput(
                name=spec.name,
                data_type=_config_type(spec),
                dims=spec.shape[first:],
                optional=spec.optional,
                # A batch may have clips of different lengths: each request keeps its own tensor.
                allow_ragged_batch=not decoupled and -1 in spec.shape[first:],
            )
            for spec in inputs
        ],
        output=[
            model_config_pb2.ModelOutput(
                name=spec.name, data_type=_config_type(spec), dims=spec.shape[first:]
            )
            for spec in outputs
        ],
        model_transaction_policy=model_config_pb2.ModelTransactionPolicy(decoupled=decoupled),
    )


def repository_index(model: Model, lease: ModelLease[Any]) -> pb.RepositoryIndexResponse:
    """Return the response of RepositoryIndex: the single model, which is always ready."""
    entry = pb.RepositoryIndexResponse.ModelIndex(name=model.name, version=lease.version, state="READY")
    return pb.RepositoryIndexResponse(models=[entry])


def read_load(request: pb.RepositoryModelLoadRequest) -> str | None:
    """Return the model URI of a RepositoryModelLoad request; None if it has no `config`.

    The URI is a parameter of the model configuration, so that any client can send it:
    ``{"parameters": {"model_uri": {"string_value": "mini"}}}``.

    Raises:
        InvalidInputError: `config` has another form.
        UnsupportedError: the request has other parameters, such as files.
    """
    others = [name for name in request.parameters if name != "config"]
    if others:
        raise UnsupportedError(
            f"parameter {others[0][:80]!r} is not supported: models are loaded by URI, not uploaded; "
            "give `config` with the parameter model_uri"
        )
    if "config" not in request.parameters:
        return None
    try:
        uri = json.loads(request.parameters["config"].string_param)["parameters"]["model_uri"]["string_value"]
    except (ValueError, LookupError, TypeError, RecursionError):
        uri = None
    if not isinstance(uri, str):
        form = '{"parameters": {"model_uri": {"string_value": "MODEL_URI"}}}'
        raise invalid("model_uri", f"is missing in `config`, expected {form}")
    return uri


def _config_type(spec: TensorSpec) -> Any:
    return model_config_pb2.DataType.Value(_CONFIG_TYPES.get(spec.datatype, f"TYPE_{spec.datatype}"))
