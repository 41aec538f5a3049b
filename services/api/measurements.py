"""What queues and models report of single requests, batches and steps; metrics make histograms of it."""

from typing import Literal, Protocol

Quantity = Literal["queue_wait", "first_step", "step", "decode", "batch", "fill"]
"""What is measured.

queue_wait: seconds from the arrival of a request or item until the device takes it, or it leaves otherwise.
first_step: seconds from the arrival of a request to the end of its first denoising step.
step: seconds of a denoising step. decode: seconds to decode a clip. batch: seconds of a call of a model.
fill: share of a batch that is not padding, or of its largest cost, 0 to 1.
"""


class Observer(Protocol):
    """Receives measurements, on the thread that made them, which it must not keep waiting."""

    def __call__(self, quantity: Quantity, value: float, label: str = "") -> None:
        """`label`: priority class of `queue_wait` and `first_step`; rows of a `step`, padding included."""


def ignore(quantity: Quantity, value: float, label: str = "") -> None:
    """Drop a measurement."""
