"""Memory of the GPUs that PyTorch uses in this process, as metrics. Without CUDA there are none."""

import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuMemory:
    """Memory of one GPU in bytes."""

    device: int
    """CUDA's index of the GPU."""
    allocated: int
    """In tensors now."""
    peak: int
    """Most that was in tensors at a time since the start."""
    reserved: int
    """Held by PyTorch's allocator, tensors included."""
    total: int
    """Of the GPU, for all processes."""


_GAUGES: Final[Mapping[str, str]] = {
    "allocated": "GPU memory in PyTorch's tensors.",
    "peak": "Most GPU memory that PyTorch's tensors have held at a time.",
    "reserved": "GPU memory that PyTorch's allocator holds, tensors included.",
    "total": "Memory of the GPU, for all processes.",
}
"""Help of each gauge, by field of `GpuMemory`."""


def gpu_memory() -> Iterator[Metric]:
    """Yield the memory metrics of the GPUs in use; nothing before CUDA is used."""
    yield from memory_metrics(list(_read()))


def memory_metrics(gpus: Iterable[GpuMemory]) -> Iterator[Metric]:
    """Yield a gauge for each figure, with a sample for each of `gpus`; nothing if there are none."""
    gpus = tuple(gpus)
    for field, text in _GAUGES.items() if gpus else ():
        gauge = GaugeMetricFamily(f"milonga_gpu_memory_{field}_bytes", text, labels=["device"])
        for gpu in gpus:
            gauge.add_metric([str(gpu.device)], getattr(gpu, field))
        yield gauge


def _read() -> Iterator[GpuMemory]:
    # A scrape must neither import torch, which takes seconds, nor initialize CUDA, which takes memory.
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return
    for device in range(torch.cuda.device_count()):
        reserved = torch.cuda.memory_reserved(device)
        if reserved:
            yield GpuMemory(
                device=device,
                allocated=torch.cuda.memory_allocated(device),
                peak=torch.cuda.max_memory_allocated(device),
                reserved=reserved,
                total=torch.cuda.get_device_properties(device).total_memory,
            )
