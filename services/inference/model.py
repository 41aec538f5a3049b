"""What a service says of its model to the protocol. Shapes: n rows, one a prompt."""

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
    """Where a request's time went, in seconds: Triton's names."""

    queue: float = 0.0
    """Waiting."""
    compute_input: float = 0.0
    """Making ready what the model takes."""
    compute_infer: float = 0.0
    """The model."""
    compute_output: float = 0.0
    """Making what is sent of what it gave."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Response:
    """One answer to a request."""

    outputs: Tensors
    """Tensors by name, of the spec's datatype."""
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    """What else there is to say; the identity of the weights is added to it."""
    rows: int = 0
    """Rows that are done with this answer; 0 on the way."""
    stages: Stages | None = None
    """With the last answer: where the time went."""
    final: bool = False
    """Whether this is the last answer."""

    def is_sent(self, wanted: Collection[str]) -> bool:
        """Whether it goes to a caller who wants the outputs `wanted`: on the way, if they want its first."""
        return self.final or any(name in wanted for name in list(self.outputs)[: None if self.rows else 1])


class Caller(Protocol):
    """Whoever waits for the answer; a gRPC context is one."""

    def time_remaining(self) -> Any:
        """Seconds until the deadline, None: there is none."""


class Leased(Protocol[Job]):
    """The weights that one call is answered with."""

    @property
    def version(self) -> str:
        """Their version."""

    @property
    def parameters(self) -> Mapping[str, str]:
        """Their identity, for every answer: at least `version` and `digest`."""

    def read(self, tensors: Tensors) -> Job:
        """Return what tensors ask for, checked as the native API checks it. Runs off the event loop.

        Raises:
            InvalidInputError: with the native API's field names.
        """

    def run(self, job: Job, caller: "Caller", *, stream: bool) -> AsyncGenerator[Response, None]:
        """Yield the answers; without `stream` there is one. Left early, the work is given up."""


class Model(Protocol):
    """One model that a service serves."""

    @property
    def name(self) -> str:
        """As callers name it; not the name of the weights, which may change."""

    @property
    def inputs(self) -> Sequence[TensorSpec]:
        """What it takes. The first says how many rows there are."""

    @property
    def outputs(self) -> Sequence[TensorSpec]:
        """What it makes."""

    @property
    def max_rows(self) -> int:
        """How many rows a request may have."""

    @property
    def decoupled(self) -> bool:
        """Whether a request of a stream has several answers.

        If not, Triton may put several requests into one batch: every tensor has its rows first.
        """

    @property
    def limits(self) -> Mapping[str, str]:
        """What a request may ask for, for the model's configuration."""

    def lease(self) -> AbstractContextManager[Leased[Any]]:
        """Hold the weights that are served now, for the time of one call."""


class Operator(Protocol):
    """Who may change what is served, and does."""

    def authorise(self, context: Context) -> None:
        """Raise `UnauthenticatedError` where the caller may not."""

    def load(self, uri: str) -> Awaitable[object]:
        """Serve what a model URI names."""
