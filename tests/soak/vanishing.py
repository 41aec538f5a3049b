"""A client that makes calls and waits to be killed: `python -m tests.soak.vanishing TARGET SERVICE TOKEN`."""

import sys
import threading
import uuid
from dataclasses import replace
from typing import Any, Final

import grpc

from tests.soak.callers import Caller
from tests.soak.mix import Mix

PREFIX: Final = "vanishing-"
"""With which the request ids of such calls begin."""
READY: Final = "ready"
CALLS: Final = 4


def main(target: str, service: str, token: str) -> None:
    """Begin the calls, say so, and wait."""
    caller = replace(Caller(name="vanishing"), token=token)
    mix = Mix(0)
    channel: Any = grpc.insecure_channel(target)
    calls = []
    for _ in range(CALLS):
        attempt = mix.draw(service)
        metadata = caller.metadata(f"{PREFIX}{uuid.uuid4().hex[:12]}")
        if attempt.streaming:
            begin = channel.unary_stream(attempt.method)
        else:
            begin = channel.unary_unary(attempt.method).future
        calls.append(begin(attempt.payload, metadata=metadata))
    print(READY, flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
