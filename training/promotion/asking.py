"""Asking a generation service which weights it serves."""

import time
from collections.abc import Callable
from typing import Any

from services.client import TLS, AudioClient, ModelVersion
from services.errors import MilongaError
from training.promotion.errors import RolloutError

CALLS = 8
"""Calls, each on a connection of its own, that must all meet the new weights at a Service's address."""
VERIFY_SECONDS = 60.0
"""How long one may take to show nothing but the new weights: routers learn late which pods have gone."""
CALL_SECONDS = 5.0
_POLL_SECONDS = 0.5

# Whoever asks wants to meet a pod, and not the one that an earlier channel is connected to.
_OWN_CONNECTION = (("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0))


def served_model(address: str, tls: TLS | None = None, *, timeout: float = CALL_SECONDS) -> ModelVersion:
    """Which weights answer at `address`, by a connection of its own. Raises what `AudioClient` raises."""
    options: Any = {"timeout": timeout, "retries": 0, "channel_options": _OWN_CONNECTION}
    with AudioClient(address, tls=tls, **options) as client:
        model = client.get_model().model
    return ModelVersion(name=model.name, version=model.version, digest=model.digest, license=model.license)


def check_digest(
    ask: Callable[[], ModelVersion],
    digest: str,
    who: str,
    *,
    calls: int = 1,
    seconds: float = VERIFY_SECONDS,
) -> None:
    """Ask until the last `calls` answers were all of `digest`.

    Raises `RolloutError` where that does not come to be within `seconds`.
    """
    end = time.monotonic() + seconds
    right = 0
    fault = ""
    while right < calls:
        try:
            found = ask()
        except MilongaError as error:
            right, fault = 0, f"does not answer: {error}"
        else:
            if found.digest == digest:
                right += 1
                continue
            right, fault = 0, f"serves {found.digest} ({found.name} {found.version}), expected {digest}"
        if time.monotonic() > end:
            raise RolloutError(f"{who} {fault}")
        time.sleep(_POLL_SECONDS)
