"""Low-rank adapters (LoRA, arXiv 2106.09685): read their folders, and apply them row by row.

An adapter's folder is PEFT's: ``adapter_config.json`` and ``adapter_model.safetensors``. Folders are
untrusted: every key and shape is compared with the model before anything is loaded.

Shapes: R rows of a denoiser call, L positions, I inputs and O outputs of a linear layer, K rank.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from safetensors.torch import load_file
from torch import Tensor, nn

from services.api.model import ModelVersion
from services.errors import ModelFormatError
from services.models.folders import one_line, read_json, safetensors_layout
from services.models.manifest import ADAPTER_CONFIG
from services.models.state_dicts import FLOATS, check_finite

ADAPTER_WEIGHTS: Final = "adapter_model.safetensors"
"""Weights of a PEFT folder."""

_KEY: Final = re.compile(
    r"(?:base_model\.model\.|unet\.|transformer\.)?(?P<layer>.+)\.lora_(?P<half>[AB])(?:\.default)?\.weight"
)
"""Names of tensors in PEFT's files, and in those of diffusers."""

_KNOWN: Final = (
    *("peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "bias", "fan_in_fan_out"),
    *("auto_mapping", "base_model_name_or_path", "ephemeral_gpu_offload", "inference_mode", "task_type"),
    *("init_lora_weights", "layers_pattern", "megatron_core", "peft_version", "qalora_group_size"),
    *("revision", "runtime_config"),
)
"""Settings of an adapter that are read, or change nothing of what its weights do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraSettings:
    """LoRA's settings; the defaults are SLAM-AAC's."""

    rank: int = 8
    alpha: float = 32
    """The product of both matrices is multiplied by alpha / rank."""
    dropout: float = 0.05
    """Of the input, in training."""
    modules: tuple[str, ...] = ("q_proj", "v_proj")
    """Linear layers with an adapter, by the end of their names."""

    def __post_init__(self) -> None:
        if not 1 <= self.rank <= 4096:
            raise ModelFormatError(f"LoRA rank is {self.rank}; it must be 1 to 4096")
        if not 0 < self.alpha <= 1e6:
            raise ModelFormatError(f"LoRA alpha is {self.alpha}; it must be above 0, and 1e6 at most")
        if not 0 <= self.dropout < 1:
            raise ModelFormatError(f"LoRA dropout is {self.dropout}; it must be at least 0 and below 1")
        if not self.modules:
            raise ModelFormatError("LoRA modules are empty; name the layers, such as q_proj and v_proj")


def read_lora_settings(folder: Path) -> LoraSettings:
    """Return the settings of the PEFT folder. Raises `ModelFormatError` unless it is plain LoRA."""
    path = folder / ADAPTER_CONFIG
    data = read_json(path)
    if data.get("peft_type") != "LORA":
        raise ModelFormatError(f"{path}: peft_type is {data.get('peft_type')!r}; only LORA is supported")
    if data.get("bias", "none") != "none":
        raise ModelFormatError(f"{path}: bias is {data['bias']!r}; only 'none' is supported")
    if data.get("fan_in_fan_out"):
        raise ModelFormatError(f"{path}: fan_in_fan_out is set; only linear layers are supported")
    if used := sorted(key for key, value in data.items() if value and key not in _KNOWN):
        raise ModelFormatError(
            f"{path} sets {', '.join(f'{key}={data[key]!r}' for key in used)}, which is not supported"
        )
    modules = data.get("target_modules")
    if not isinstance(modules, list) or not all(isinstance(name, str) for name in modules):
        raise ModelFormatError(f"{path}: target_modules is {modules!r}; a list of names is supported")
    try:
        return LoraSettings(
            rank=data["r"],
            alpha=float(data["lora_alpha"]),
            dropout=float(data.get("lora_dropout") or 0.0),
            modules=tuple(sorted(modules)),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ModelFormatError(f"{path} is not valid: {one_line(error)}") from error


# --------------------------------------------------------------------------------------------- of a denoiser


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LowRank:
    """The product that an adapter adds to a linear layer: ``x @ down @ up``."""

    down_IK: Tensor
    up_KO: Tensor
    """Multiplied by alpha / rank."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Adapter:
    """An adapter of a denoiser, on its device."""

    version: ModelVersion
    layers: Mapping[str, LowRank]
    """Products by the name of the denoiser's layer."""
    warnings: tuple[str, ...] = ()
    """Warnings for clips that are made with it."""

    @property
    def size(self) -> int:
        """Bytes of its tensors."""
        return sum(one.down_IK.nbytes + one.up_KO.nbytes for one in self.layers.values())


def read_low_ranks(folder: Path, denoiser: nn.Module) -> dict[str, LowRank]:
    """Return the products of the adapter in `folder`, by layer of `denoiser`, float32 on the CPU.

    Raises `ModelFormatError` unless all of them fit linear layers of `denoiser`, which may be on the meta
    device.
    """
    settings, path = read_lora_settings(folder), folder / ADAPTER_WEIGHTS
    if not path.is_file():
        raise ModelFormatError(f"{folder} has no {ADAPTER_WEIGHTS}; adapters must be safetensors")
    halves: dict[str, dict[str, str]] = {}
    for key, tensor in safetensors_layout(path).items():
        found = _KEY.fullmatch(key)
        if found is None or tensor.ndim != 2 or tensor.dtype not in FLOATS:
            raise ModelFormatError(
                f"{path}: {key} {list(tensor.shape)} is no product of a linear layer; train the adapter with "
                "linear layers only (by default those of the attention)"
            )
        halves.setdefault(found["layer"], {})[found["half"]] = key
    linear = {name: one for name, one in denoiser.named_modules() if isinstance(one, nn.Linear)}
    weights = load_file(path)
    check_finite(str(path), weights)
    scale, ranks, misfits = settings.alpha / settings.rank, {}, []
    for name, keys in halves.items():
        down_KI, up_OK = (weights.get(keys.get(half, "")) for half in "AB")
        layer = linear.get(name)
        if down_KI is None or up_OK is None:
            misfits.append(f"{name} has one matrix of two")
        elif layer is None:
            misfits.append(f"there is no linear layer {name}")
        elif (*down_KI.shape, *up_OK.shape) != (
            *(settings.rank, layer.in_features, layer.out_features, settings.rank),
        ):
            misfits.append(
                f"{name} is {up_OK.shape[0]} x {down_KI.shape[1]} with rank {down_KI.shape[0]}, not "
                f"{layer.out_features} x {layer.in_features} with rank {settings.rank}"
            )
        else:
            ranks[name] = LowRank(down_IK=down_KI.float().T, up_KO=scale * up_OK.float().T)
    if misfits or not ranks:
        first = misfits[0] if misfits else "it has none"
        raise ModelFormatError(
            f"{folder} is an adapter of another architecture: {len(misfits)} of its {len(halves)} layers do "
            f"not fit the denoiser ({first}); use it with the model that it was trained from, or train one "
            "from this model"
        )
    return ranks


class RowAdapters:
    """The adapters of the rows of one denoiser call, ready to be applied.

    Adapters of one rank are one batched product over all rows, so that a row's result does not depend, not
    even by its rounding, on the adapters of other rows.
    """

    def __init__(self, denoiser: nn.Module, rows: Sequence[Adapter | None]) -> None:
        """Copy the products of `rows`; rows without an adapter get zeros."""
        self._products: list[tuple[nn.Linear, Tensor, Tensor]] = []
        stacked: dict[tuple[str, int], list[tuple[int, LowRank]]] = {}
        for row, adapter in enumerate(rows):
            for name, one in () if adapter is None else adapter.layers.items():
                stacked.setdefault((name, one.down_IK.shape[1]), []).append((row, one))
        for (name, rank), products in stacked.items():
            layer = denoiser.get_submodule(name)
            assert isinstance(layer, nn.Linear)
            down_RIK = layer.weight.new_zeros(len(rows), layer.in_features, rank)
            up_RKO = layer.weight.new_zeros(len(rows), rank, layer.out_features)
            for row, one in products:
                down_RIK[row], up_RKO[row] = one.down_IK, one.up_KO
            self._products.append((layer, down_RIK, up_RKO))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Add each row's products to the outputs of the denoiser's layers in the context."""
        with ExitStack() as stack:
            for layer, down_RIK, up_RKO in self._products:
                stack.callback(layer.register_forward_hook(_adding(down_RIK, up_RKO)).remove)
            yield


def _adding(down_RIK: Tensor, up_RKO: Tensor) -> Any:
    """Return a hook that adds the products of each row to a linear layer's output [R, ..., O]."""

    def add(_: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        rows, width, _rank = down_RIK.shape
        product_RLO = inputs[0].reshape(rows, -1, width) @ down_RIK @ up_RKO
        return output + product_RLO.view_as(output)

    return add
