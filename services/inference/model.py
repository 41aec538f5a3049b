"""The protocols that a service implements for the Open Inference Protocol. Shapes: n rows, one per prompt."""

from collections.abc import AsyncGenerator, Awaitable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import grpc.aio

from services.inference.tensors import Tensors, TensorSpec

Context = grpc.aio.ServicerContext[Any, Any]
Parameter = str | bool | int | float
Job = TypeVar("Job")


@dataclass(frozen=True, kw_only=True, slots=True)
class Stages:
    """Time of a request by stage, in seconds, with Triton's names."""

    queue: float = 0.0
    """Waiting in the queue."""
    compute_input: float = 0.0
    """Preparing the model's inputs."""
    compute_infer: float = 0.0
    """Running the model."""
    compute_output: float = 0.0
    """Encoding the model's outputs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Response:
    """One response to a request."""

    outputs: Tensors
    """Tensors by name, of the spec's datatype."""
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    """Further parameters; the identity of the weights is added to them."""
    rows: int = 0
    """Rows that this response completes; 0 for a progress response."""
    stages: Stages | None = None
    """Time by stage; only in the final response."""
    final: bool = False
    """Whether this is the request's last response."""

    def is_sent(self, requested: Collection[str]) -> bool:
        """Return whether to send it to a caller of the outputs `requested`.

        The final response is sent always, one that completes rows if any of its outputs is requested, and a
        progress response if its first output is requested.
        """
        outputs = list(self.outputs)[: None if self.rows else 1]
        return self.final or any(name in requested for name in outputs)


class Caller(Protocol):
    """The caller of a request; a gRPC context is one."""

    def time_remaining(self) -> Any:
        """Return the seconds until the deadline; None without a deadline."""


class ModelLease(Protocol[Job]):
    """The weights that serve one call; they stay loaded until the call ends."""

    @property
    def version(self) -> str:
        """Version of the weights."""

    @property
    def parameters(self) -> Mapping[str, str]:
        """Identity of the weights, for every response: at least `version` and `digest`."""

    def read(self, tensors: Tensors) -> Job:
        """Return the service's own request for `tensors`. Runs off the event loop.

        Raises:
            InvalidInputError: the request is invalid; with the native API's field names.
        """

    def run(self, job: Job, caller: "Caller", *, stream: bool) -> AsyncGenerator[Response, None]:
        """Yield the responses; exactly one without `stream`. Closing the generator cancels the work."""


class Model(Protocol):
    """A model that a service serves."""

    @property
    def name(self) -> str:
        """Name in the protocol. It stays when other weights, with other names, are loaded."""

    @property
    def inputs(self) -> Sequence[TensorSpec]:
        """Input tensors. The first, or the first given of optional ones, determines the number of rows."""

    @property
    def outputs(self) -> Sequence[TensorSpec]:
        """Output tensors."""

    @property
    def max_rows(self) -> int:
        """Maximum number of rows in a request."""

    @property
    def decoupled(self) -> bool:
        """Whether a streaming request has several responses.

        If not, Triton may batch several requests: the first dimension of every tensor is the rows.
        """

    @property
    def limits(self) -> Mapping[str, str]:
        """Limits of a request, for the model's configuration."""

    def lease(self) -> AbstractContextManager[ModelLease[Any]]:
        """Return a context that holds the currently served weights for one call."""


class Operator(Protocol):
    """Loads other weights, for callers with the role operator."""

    def load(self, uri: str) -> Awaitable[object]:
        """Load and serve the model at a model URI."""
