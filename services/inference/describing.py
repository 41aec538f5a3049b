"""A model's metadata, configuration and repository index, in the protocol's messages."""

import importlib.metadata
import json
from collections.abc import Sequence
from typing import Any, Final

from tritonclient.grpc import model_config_pb2
from tritonclient.grpc import service_pb2 as pb

from services.errors import FieldViolation, InvalidInputError, UnsupportedError
from services.inference.model import Leased, Model
from services.inference.tensors import TensorSpec

PLATFORM: Final = "milonga"
"""Of the models, where Triton names a backend."""

EXTENSIONS: Final = ("model_configuration", "model_repository", "parameters", "statistics")
"""Of the protocol, by Triton's names."""

_CONFIG_TYPES: Final = {"BYTES": "TYPE_STRING"}


def server_metadata() -> pb.ServerMetadataResponse:
    """The answer of ServerMetadata."""
    return pb.ServerMetadataResponse(
        name="milonga", version=importlib.metadata.version("milonga"), extensions=EXTENSIONS
    )


def model_metadata(model: Model, leased: Leased[Any]) -> pb.ModelMetadataResponse:
    """The answer of ModelMetadata."""

    def tensors(specs: Sequence[TensorSpec]) -> list[Any]:
        kind = pb.ModelMetadataResponse.TensorMetadata
        return [kind(name=spec.name, datatype=spec.datatype, shape=spec.shape) for spec in specs]

    return pb.ModelMetadataResponse(
        name=model.name,
        versions=[leased.version],
        platform=PLATFORM,
        inputs=tensors(model.inputs),
        outputs=tensors(model.outputs),
    )


def model_config(model: Model, leased: Leased[Any]) -> pb.ModelConfigResponse:
    """The answer of ModelConfig: also what a request may ask for, and which weights are served."""
    config = write_config(model.name, model.inputs, model.outputs, model.max_rows, decoupled=model.decoupled)
    config.platform = PLATFORM
    limits = {"max_rows": str(model.max_rows), **model.limits}
    for name, value in {**limits, **leased.parameters}.items():
        config.parameters[name].string_value = value
    return pb.ModelConfigResponse(config=config)


def write_config(
    name: str, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], max_rows: int, *, decoupled: bool
) -> Any:
    """Return a ModelConfig, for this protocol and for Triton.

    Where Triton may make batches of several requests, `max_batch_size` is `max_rows` and the shapes leave the
    rows out; a decoupled model has none, and its shapes name them.
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
                # Clips of several lengths may be one batch: each request keeps its own tensor.
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


def repository_index(model: Model, leased: Leased[Any]) -> pb.RepositoryIndexResponse:
    """The answer of RepositoryIndex: the one model, which is ready as long as anything answers."""
    entry = pb.RepositoryIndexResponse.ModelIndex(name=model.name, version=leased.version, state="READY")
    return pb.RepositoryIndexResponse(models=[entry])


def read_load(request: pb.RepositoryModelLoadRequest) -> str | None:
    """Return the model URI that RepositoryModelLoad asks for; None where it names none.

    It stands where a model configuration has its parameters, so that any client can send it:
    ``{"parameters": {"model_uri": {"string_value": "mini"}}}``.

    Raises:
        InvalidInputError: a configuration that is not of this form.
        UnsupportedError: parameters that this service does not read: files.
    """
    others = [name for name in request.parameters if name != "config"]
    if others:
        raise UnsupportedError(
            f"parameter {others[0][:80]!r} is not read: models are loaded by their URI, not sent; "
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
        raise InvalidInputError(FieldViolation("model_uri", f"is not in `config`, expected {form}"))
    return uri


def _config_type(spec: TensorSpec) -> Any:
    return model_config_pb2.DataType.Value(_CONFIG_TYPES.get(spec.datatype, f"TYPE_{spec.datatype}"))
