"""Requests of tritonclient, and what a refused one says."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton
from tritonclient.grpc import service_pb2 as pb

_KINDS = {"FP32": np.float32, "INT32": np.int32, "INT64": np.int64, "BYTES": np.object_}


def tensor(name: str, datatype: str, values: Any) -> triton.InferInput:
    """An input tensor with raw contents."""
    array = np.array(values, dtype=_KINDS[datatype])
    made = triton.InferInput(name, list(array.shape), datatype)
    made.set_data_from_numpy(array)
    return made


def inference_request(model: str, inputs: Sequence[triton.InferInput]) -> pb.ModelInferRequest:
    """The message that the client sends for raw tensors."""
    return pb.ModelInferRequest(
        model_name=model,
        inputs=[one._get_tensor() for one in inputs],
        raw_input_contents=[one._get_content() for one in inputs],
    )


def refusal(call: Callable[[], object]) -> tuple[str, str]:
    """The status of a call that fails, and its text."""
    with pytest.raises(triton.InferenceServerException) as caught:
        call()
    return caught.value.status().removeprefix("StatusCode."), caught.value.message()


def parameters(result: Any) -> dict[str, Any]:
    """The parameters of an answer."""
    found = result.get_response().parameters
    return {name: getattr(value, value.WhichOneof("parameter_choice")) for name, value in found.items()}
