"""A target in memory whose steps can fail, and registered versions with tiny files."""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from services.api.generation import ClipMaker
from services.api.model import ModelVersion
from services.models.manifest import write_manifest
from services.weights.registry import RegisteredVersion
from training.promotion.errors import BusyError, RolloutError
from training.promotion.ledger import Ledger
from training.promotion.promote import Promoter
from training.promotion.registry import Registry
from training.promotion.target import Pin, pinned_digest
from training.tracking.register import Provenance, tags_of

UNET = {"_class_name": "UNet2DConditionModel", "block_out_channels": [8, 16], "_name_or_path": "build/a"}


class HeldLock:
    """A lock that can be lost."""

    def __init__(self) -> None:
        self.lost = False

    def check(self) -> None:
        if self.lost:
            raise BusyError("the lock was lost")


class MemoryTarget:
    """Implements `Target`. `fails` are errors by step: raised once, or always if the step is in `always`."""

    def __init__(self, pin: Pin | None = None) -> None:
        self.pin, self.served = pin, pin
        self.challenger: Pin | None = None
        self.done: list[str] = []
        self.fails: dict[str, BaseException] = {}
        self.always: set[str] = set()
        self.held = HeldLock()
        self.before: Callable[[str], None] = lambda step: None

    place = "memory/test"
    serving = "memory"
    idle = False

    @contextlib.contextmanager
    def lock(self) -> Iterator[HeldLock]:
        yield self.held

    def current_pin(self) -> Pin | None:
        return self.pin

    def start_challenger(self, pin: Pin, seconds: float) -> str:
        self._step("challenger")
        self.challenger = pin
        return "nowhere:1"

    def clip_client(self, address: str, timeout: float) -> ClipMaker:
        raise AssertionError("no gate of these tests needs clips")

    def stop_challenger(self) -> None:
        self._step("stop")
        self.challenger = None

    def check_setup(self, *, challenger: bool) -> None:
        self._check("setup")

    def check_reach(self) -> None:
        self._check("reach")

    def set_pin(self, pin: Pin | None, seconds: float) -> None:
        self.pin = pin  # a rollout that fails has begun
        if pin is None:
            self.served = None

    def wait(self, pin: Pin, seconds: float) -> None:
        self._step("rollout")
        self.served = pin

    def verify(self, digest: str) -> None:
        self._step("verify")
        if self.served is None or pinned_digest(self.served) != digest:
            raise RolloutError(f"a pod serves {self.served}, expected {digest}")

    def _check(self, name: str) -> None:
        if name in self.fails:
            raise self.fails.pop(name)

    def _step(self, name: str) -> None:
        self.done.append(name)
        self.before(name)
        if name in self.fails:
            raise self.fails[name] if name in self.always else self.fails.pop(name)


def make_version(
    registry: Registry,
    folder: Path,
    *,
    unet: dict[str, Any] | None = None,
    kind: Any = "tango",
    seed: int = 0,
) -> RegisteredVersion:
    """Register a folder with the config, manifest and tags of a model, and no real weights."""
    root = folder / f"run-{len(list(folder.glob('run-*')))}"
    model = root / "artifacts" / "model"
    (model / "unet").mkdir(parents=True)
    (model / "unet" / "config.json").write_text(
        json.dumps(unet or {**UNET, "_name_or_path": f"build/{root.name}"})
    )
    (model / "unet" / "weights.safetensors").write_bytes(root.name.encode())
    digest = write_manifest(model, name="tiny", version="1", license="Apache-2.0").digest
    identity = ModelVersion(name="tiny", version="1", digest=digest, license="Apache-2.0")
    with contextlib.suppress(Exception):
        registry.client.create_registered_model("milonga-tango")
    made = registry.client.create_model_version(
        "milonga-tango", source=str(root), tags=tags_of(kind, identity, Provenance())
    )
    return RegisteredVersion(
        name="milonga-tango", version=str(made.version), digest=digest, license="Apache-2.0"
    )


def make_promoter(target: MemoryTarget, registry: Registry) -> tuple[Promoter, list[str]]:
    """A promoter of `target`, and the lines that it reports."""
    reported: list[str] = []
    promoter = Promoter(
        target=target, registry=registry, ledger=Ledger(registry), report=reported.append, deadline=5.0
    )
    return promoter, reported
