"""The Open Inference Protocol (KServe v2, with Triton's gRPC definition), for any service.

A service implements `Model`: it describes its tensors, and converts them to its own requests.

::

    add_inference(server, model)
    add_inference(server, model, operator)      # the operator may load other weights
"""

from services.inference.model import Model, ModelLease, Operator, Response, Stages
from services.inference.servicer import INFER, SERVICE_NAME, InferenceServicer, add_inference
from services.inference.tensors import Tensors, TensorSpec, spread, texts

__all__ = [
    "INFER",
    "SERVICE_NAME",
    "InferenceServicer",
    "Model",
    "ModelLease",
    "Operator",
    "Response",
    "Stages",
    "TensorSpec",
    "Tensors",
    "add_inference",
    "spread",
    "texts",
]
