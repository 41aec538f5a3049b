"""Keep the adapters of a served model in memory, up to a bound."""

import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

import torch

from services.errors import InvalidInputError, ModelError, ModelFormatError, ServiceUnavailableError, invalid
from services.models.folders import read_json
from services.models.latent import LatentPipeline
from services.models.lora import Adapter, LowRank, read_low_ranks
from services.models.manifest import ADAPTER_CONFIG
from services.weights.adapter_sources import AdapterSources
from services.weights.uri import ResolvedModel, resolve

RECHECK_SECONDS: Final = 60.0
"""Age at which an alias is resolved again: a promotion may have moved it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Entry:
    adapter: Adapter
    checked_at: float


class AdapterStore:
    """The adapters of one model, by name: an LRU cache. Thread-safe."""

    def __init__(self, pipeline: LatentPipeline, sources: AdapterSources, base: str = "") -> None:
        """Keep adapters for `pipeline`; `base` is the digest of its weights."""
        self._pipeline, self._sources, self._base = pipeline, sources, base
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._lock, self._loading = threading.Lock(), threading.Lock()

    @property
    def names(self) -> tuple[str, ...]:
        """Names that are listed."""
        return tuple(self._sources.listed)

    @property
    def size(self) -> int:
        """Bytes of the adapters in memory."""
        return sum(entry.adapter.size for entry in tuple(self._entries.values()))

    def get(self, name: str) -> Adapter:
        """Return the adapter called `name`, from memory if it is there.

        Raises:
            InvalidInputError: there is none that requests may use, or it does not fit the model.
            ServiceUnavailableError: the registry does not answer.
        """
        entry = self._entries.get(name)
        if entry is None or self._is_due(name, entry):
            with self._loading:  # one at a time; those in memory are not kept waiting
                entry = self._entries.get(name)
                if entry is None or self._is_due(name, entry):
                    entry = self._loaded(name, entry)
        with self._lock:
            self._entries[name] = entry
            self._entries.move_to_end(name)
            while self.size > self._sources.max_bytes:
                self._entries.popitem(last=False)
        return entry.adapter

    def load_listed(self) -> None:
        """Load every listed adapter once. Raises `ModelError` or `InvalidInputError` if one is refused."""
        for name in self.names:
            self.get(name)

    def _is_due(self, name: str, entry: _Entry) -> bool:
        """Return whether `name` has an alias that was resolved long ago."""
        uri = self._sources.uri_of(name)
        by_alias = uri.scheme == "models" and "@" in uri.path
        return by_alias and time.monotonic() - entry.checked_at > RECHECK_SECONDS

    def _loaded(self, name: str, old: _Entry | None) -> _Entry:
        """Return a new entry. Raises as `get`; an old one is kept while the registry does not answer."""
        try:
            return self._load(name, old)
        except ServiceUnavailableError:
            if old is None:
                raise
            return _Entry(adapter=old.adapter, checked_at=time.monotonic())
        except ModelError as error:
            raise invalid("adapter", f"is {name[:80]!r}: {error}") from error
        except InvalidInputError as error:
            reasons = "; ".join(fault.description for fault in error.violations)
            raise invalid("adapter", reasons) from error

    def _load(self, name: str, old: _Entry | None) -> _Entry:
        model = resolve(self._sources.uri_of(name), merge=False)
        if old is not None and old.adapter.version == model.identity:
            return _Entry(adapter=old.adapter, checked_at=time.monotonic())
        adapter = self._read(model)
        if adapter.size > self._sources.max_bytes:
            raise ModelFormatError(
                f"the adapter takes {adapter.size / 2**20:.0f} MiB, and adapters may take "
                f"{self._sources.max_bytes / 2**20:.0f} MiB; raise adapter_memory_mib, or take a smaller rank"
            )
        return _Entry(adapter=adapter, checked_at=time.monotonic())

    def _read(self, model: ResolvedModel) -> Adapter:
        denoiser = self._pipeline.adaptable
        if denoiser is None:
            family = type(self._pipeline).__name__
            raise ModelFormatError(f"the served model ({family}) takes no adapters; leave it out")
        if not (model.folder / ADAPTER_CONFIG).is_file():
            raise ModelFormatError(
                f"{model.identity.name} is no adapter: it has no {ADAPTER_CONFIG}; give a folder that a "
                "training with lora.rank wrote, or use it as the model"
            )
        weight = next(denoiser.parameters())
        return Adapter(
            version=model.identity,
            layers={
                layer: LowRank(down_IK=_moved(one.down_IK, weight), up_KO=_moved(one.up_KO, weight))
                for layer, one in read_low_ranks(model.folder, denoiser).items()
            },
            warnings=self._warnings(model),
        )

    def _warnings(self, model: ResolvedModel) -> tuple[str, ...]:
        """Return a warning if the adapter states that it was trained from other weights."""
        start = str(read_json(model.folder / ADAPTER_CONFIG).get("base_model_name_or_path"))
        name, pinned, digest = start.partition("#")
        if not pinned or not self._base or digest == self._base:
            return ()
        return (
            f"adapter {model.identity.name} was trained from {name} ({digest[:19]}…), and the served model "
            f"is another ({self._base[:19]}…): its effect may differ",
        )


def _moved(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return tensor.to(like.device, like.dtype).contiguous()
