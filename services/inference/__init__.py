"""The Open Inference Protocol (KServe v2, as Triton speaks it over gRPC), for any service.

Knows no service: each describes its model (`Model`) and turns tensors into requests of its own.

::

    add_inference(server, model)
    add_inference(server, model, operator)      # which may load another model
"""

from services.inference.model import Leased, Model, Operator, Response, Stages
from services.inference.servicer import SERVICE_NAME, InferenceServicer, add_inference
from services.inference.tensors import Tensors, TensorSpec, spread, texts

__all__ = [
    "SERVICE_NAME",
    "InferenceServicer",
    "Leased",
    "Model",
    "Operator",
    "Response",
    "Stages",
    "TensorSpec",
    "Tensors",
    "add_inference",
    "spread",
    "texts",
]
