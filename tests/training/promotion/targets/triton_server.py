"""A server that behaves as Triton 2.51, from a repository on disk, without models."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

from services.inference.triton.repository import ModelRepository
from training.promotion.targets.triton_client import RESTRICTION


class FakeTriton(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """Versions are ready as soon as they are loaded."""

    def __init__(self, repository: ModelRepository) -> None:
        self.repository = repository
        self.ready: dict[str, dict[int, str]] = {}
        """Digests of what serves, by model and version."""
        self.broken: dict[str, str] = {}
        """Why weights of a digest can't be loaded."""
        self.instead: dict[str, str] = {}
        """Digest that answers in place of another."""
        self.reasons: dict[tuple[str, int], str] = {}
        self.loads: list[tuple[str, tuple[int, ...]]] = []
        self.requests: list[Any] = []
        self.explicit, self.token, self.name = True, "", "triton"
        self.seconds = 0.0
        """A clip takes."""
        self._lock = threading.Lock()

    def ServerMetadata(self, request: Any, context: grpc.ServicerContext) -> Any:
        return pb.ServerMetadataResponse(name=self.name, version="2.51.0")

    def RepositoryIndex(self, request: Any, context: grpc.ServicerContext) -> Any:
        self._check_token(context)
        with self._lock:
            states = {(m, v): ("READY", "") for m, versions in self.ready.items() for v in versions}
            states |= {key: ("UNAVAILABLE", reason) for key, reason in self.reasons.items()}
        kind = pb.RepositoryIndexResponse.ModelIndex
        return pb.RepositoryIndexResponse(
            models=[
                kind(name=model, version=str(version), state=state, reason=reason)
                for (model, version), (state, reason) in sorted(states.items())
            ]
        )

    def RepositoryModelLoad(self, request: Any, context: grpc.ServicerContext) -> Any:
        self._check_token(context)
        self._check_explicit(context)
        model = request.model_name
        if not (pinned := self.repository.pinned(model)):
            details = f"failed to load '{model}', failed to poll from model repository"
            context.abort(grpc.StatusCode.INTERNAL, details)
        failed = ""
        with self._lock:
            self.loads.append((model, pinned))
            old, new = self.ready.get(model, {}), dict[int, str]()
            for version in pinned:
                (weights,) = self.repository.weights(model, version).values()
                reason = self.broken.get(weights.digest)
                if reason is None or version in old:
                    new[version] = weights.digest
                    self.reasons.pop((model, version), None)
                else:
                    failed = f"version {version} is at UNAVAILABLE state: Internal: {reason}\n\nAt:\n  x\n;\n"
                    self.reasons[model, version] = f"Internal: {reason}"
            # Where one fails, nothing is unloaded.
            kept = old if failed else {}
            self.reasons |= {
                (model, version): "unloaded" for version in old if version not in {**kept, **new}
            }
            self.ready[model] = {**kept, **new}
        if failed:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"load failed for model '{model}': {failed}")
        return pb.RepositoryModelLoadResponse()

    def RepositoryModelUnload(self, request: Any, context: grpc.ServicerContext) -> Any:
        self._check_token(context)
        self._check_explicit(context)
        with self._lock:
            for version in self.ready.pop(request.model_name, {}):
                self.reasons[request.model_name, version] = "unloaded"
        return pb.RepositoryModelUnloadResponse()

    def ModelStreamInfer(self, requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
        for request in requests:
            yield from self._answers(request)

    def _answers(self, request: Any) -> Iterator[Any]:
        versions = self.ready.get(request.model_name, {})
        version = int(request.model_version or max(versions, default=0))
        if version not in versions:
            told = f"Request for unknown model: '{request.model_name}' version {version} is not found"
            yield pb.ModelStreamInferResponse(error_message=told)
            return
        inputs = {
            one.name: data for one, data in zip(request.inputs, request.raw_input_contents, strict=True)
        }
        steps = int(np.frombuffer(inputs["NUM_INFERENCE_STEPS"], "<i4")[0])
        if not steps:
            told = "num_inference_steps: is 0, must be between 1 and 1000"
            yield pb.ModelStreamInferResponse(error_message=told)
            return
        self.requests.append(request)
        time.sleep(self.seconds)
        digest = self.instead.get(versions[version], versions[version]).encode()
        samples = np.arange(1_600, dtype=np.float32)
        outputs = {
            "AUDIO": ("FP32", [1, 1_600], (0.1 * np.sin(samples * (1 + len(inputs["PROMPT"])))).tobytes()),
            "SAMPLE_RATE": ("INT32", [1], np.array([16_000], "<i4").tobytes()),
            "DIGEST": ("BYTES", [1], len(digest).to_bytes(4, "little") + digest),
        }
        empty = pb.ModelInferResponse(model_name=request.model_name, model_version=str(version))
        yield pb.ModelStreamInferResponse(infer_response=empty)
        made = pb.ModelInferResponse(model_name=request.model_name, model_version=str(version))
        for name, (datatype, shape, data) in outputs.items():
            made.outputs.add(name=name, datatype=datatype, shape=shape)
            made.raw_output_contents.append(data)
        yield pb.ModelStreamInferResponse(infer_response=made)

    def _check_explicit(self, context: grpc.ServicerContext) -> None:
        if not self.explicit:
            details = "explicit model load / unload is not allowed if polling is enabled"
            context.abort(grpc.StatusCode.UNAVAILABLE, details)

    def _check_token(self, context: grpc.ServicerContext) -> None:
        header = f"triton-grpc-protocol-{RESTRICTION}"
        if self.token and (header, self.token) not in context.invocation_metadata():
            details = f"This protocol is restricted, expecting header '{header}'"
            context.abort(grpc.StatusCode.UNAVAILABLE, details)


@contextmanager
def serving(triton: FakeTriton) -> Iterator[str]:
    """Its address, while it serves."""
    server = grpc.server(ThreadPoolExecutor(8))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(triton, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(0).wait()
