"""Check and load the model folders of generators.

Folders are untrusted. Nothing in them is executed: classes come from a fixed table, weights only from
safetensors, and every key and shape is compared with the module before anything is loaded.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, Literal, Protocol, cast

import torch
from torch import Tensor, nn

from services.errors import MilongaError, ModelFormatError, ModelNotFoundError
from services.models.folders import cause, one_line, pick_device, pick_dtype, read_json, read_layout
from services.models.latent import Conditioning, LatentPipeline
from services.models.prompts import token_limit
from services.models.state_dicts import check_finite, check_weights, on_meta, quiet_loading
from services.models.words import load_tokenizer, prompt_warnings

UPSTREAM_WEIGHTS: Final = "pytorch_model_main.bin"
"""File that only released Tango checkpoints have; `convert_checkpoint` converts those."""

Builder = Callable[[dict[str, Any]], nn.Module]
"""Builds a module from the content of its `config.json`."""


class Denoise(Protocol):
    """Signature of a family's denoiser call."""

    def __call__(
        self,
        denoiser: nn.Module,
        latents_BX: Tensor,
        timesteps_B: Tensor,
        conditioning: Conditioning,
        seconds_B: Tensor,
        jumps_B2: Tensor | None = None,
        /,
    ) -> Tensor:
        """Return the denoiser's output [B, X] in its own float type, with gradients if they are enabled."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """A family of generators: diffusers pipelines that are `LatentPipeline`s, one class each."""

    pipeline: type[Any]
    """Class of the pipeline; its name is `_class_name` in `model_index.json`."""
    parts: Mapping[str, Mapping[str, Builder]]
    """Builders of each part with weights, by its permitted classes: ``library.Class``."""
    schedulers: tuple[str, ...]
    """Permitted scheduler classes: ``library.Class``."""
    denoiser: str
    """Name of the part that fine-tuning trains."""
    denoiser_class: type[Any]
    denoise: Denoise | None
    """Its call in fine-tuning, None without an objective."""
    student: Callable[[Any], Any] | None = None
    """Returns a denoiser to distil a given one into; None: it can't be distilled."""
    objective: Literal["v_prediction", "flow"] | None
    """Objective of the denoiser: a name in `training.objectives.objective`; None: it can't be fine-tuned."""
    encoders: tuple[str, ...]
    """Parts that encode audio to latents."""
    decoders: tuple[str, ...]
    """Parts that decode latents to audio; their dtype is `decoder_dtype`."""
    offloadable: tuple[str, ...] = ("text_encoder",)
    """Parts that may stay in main memory, each layer being copied to the device when it runs. Layers with
    weight normalisation can't."""
    readers: tuple[str, ...] = ("text_encoder", "tokenizer")
    """Parts that encode prompts."""
    tags: tuple[str, ...]
    """Tags of model cards on the Hugging Face hub."""

    def check(self, folder: Path) -> None:
        """Raise `ModelFormatError` unless `folder` has a complete model of this family. Loads no weights."""
        index, own = read_index(folder), self.pipeline.__name__
        if index.get("_class_name") != own:
            raise ModelFormatError(f"{folder} holds a {index.get('_class_name')}, not a {own}")
        for part, builders in self.parts.items():
            name = ".".join(_class_of(index, part))
            if name not in builders:
                raise ModelFormatError(f"{folder}: {part} is a {name}, which is not supported")
            _check_part(folder / part, builders[name])
        scheduler = ".".join(_class_of(index, "scheduler"))
        if scheduler not in self.schedulers:
            raise ModelFormatError(f"{folder}: scheduler is a {scheduler}, which is not supported")
        library, tokenizer = _class_of(index, "tokenizer")
        if library != "transformers" or not ("Tokenizer" in tokenizer and tokenizer.isidentifier()):
            raise ModelFormatError(f"{folder}: tokenizer is a {library}.{tokenizer}, which is not supported")
        # Without these files the libraries query the hub, and report that instead of the missing file.
        read_json(folder / "scheduler" / "scheduler_config.json")
        read_json(folder / "tokenizer" / "tokenizer_config.json")

    def load(
        self,
        folder: Path,
        *,
        device: str = "cpu",
        dtype: str = "float32",
        decoder_dtype: str = "float32",
        offload: bool = False,
    ) -> LatentPipeline:
        """Check and load a model of this family for inference; see `architectures.load_generator`."""
        target = pick_device(device)
        types = {"default": pick_dtype("dtype", dtype)} | dict.fromkeys(
            self.decoders, pick_dtype("decoder_dtype", decoder_dtype)
        )
        self.check(folder)
        try:
            with quiet_loading():
                pipeline: Any = self.pipeline.from_pretrained(
                    folder,
                    dtype=types,
                    use_safetensors=True,
                    local_files_only=True,
                    low_cpu_mem_usage=find_spec("accelerate") is not None,
                )
        except MilongaError:
            raise
        except Exception as error:  # any exception of the libraries means that the folder is invalid
            raise ModelFormatError(f"{folder} can't be loaded: {cause(folder, error)}") from error
        for part in self.parts:
            check_finite(f"{folder}/{part}", getattr(pipeline, part).state_dict())
        pipeline.set_progress_bar_config(disable=True)
        for name in self.parts:
            part = getattr(pipeline, name)
            # Griffin-Lim has no weights, and accelerate's hooks move parameters only.
            if offload and name in self.offloadable and any(True for _ in part.parameters()):
                from accelerate import cpu_offload  # type: ignore[import-untyped]  # peft brings it

                cpu_offload(part, target)
            else:
                part.to(target)
        return cast(LatentPipeline, pipeline)

    def load_encoders(self, folder: Path, device: torch.device) -> LatentPipeline:
        """Load a model without its denoiser, in float32, to encode audio and prompts."""
        pipeline: Any = self.load(folder)
        pipeline.register_modules(**{self.denoiser: None})
        pipeline.to(device)
        return cast(LatentPipeline, pipeline)

    def load_denoiser(self, folder: Path) -> nn.Module:
        """Load the denoiser of a checked folder, in float32 on the CPU. Raises `ModelFormatError`."""
        try:
            with quiet_loading():
                denoiser = self.denoiser_class.from_pretrained(
                    folder / self.denoiser,
                    torch_dtype=torch.float32,
                    use_safetensors=True,
                    local_files_only=True,
                )
        except Exception as error:  # any exception of the library means that the folder is invalid
            raise ModelFormatError(f"{folder}/{self.denoiser} can't be loaded: {one_line(error)}") from error
        check_finite(f"{folder}/{self.denoiser}", denoiser.state_dict())
        return cast(nn.Module, denoiser)

    def folds_guidance(self, folder: Path) -> bool:
        """Return whether the denoiser in `folder` is distilled; see `LatentPipeline.folds_guidance`."""
        config = read_json(folder / self.denoiser / "config.json")
        return self.student is not None and config.get("time_cond_proj_dim") is not None

    def meta_denoiser(self, folder: Path) -> nn.Module:
        """Return the denoiser of a checked folder on the meta device: shapes without memory."""
        builders = self.parts[self.denoiser]
        build = builders[".".join(_class_of(read_index(folder), self.denoiser))]
        config = read_json(folder / self.denoiser / "config.json")
        with quiet_loading():
            return on_meta(lambda: build(config))

    def default_duration(self, folder: Path) -> float:
        """Return the default duration of the model in `folder`, in seconds."""
        return float(self._setting(folder, "default_duration"))

    def prompt_reader(self, folder: Path) -> Callable[[str], tuple[str, ...]]:
        """Return `LatentPipeline.prompt_warnings` of the model in `folder`; only its tokenizer is loaded.

        Its warnings are sentences that begin with ``prompt``.
        """
        vocabulary = int(read_json(folder / "text_encoder" / "config.json")["vocab_size"])
        tokenizer = load_tokenizer(folder / "tokenizer", vocabulary)
        most = token_limit(tokenizer, self._setting(folder, "text_length"))
        return lambda prompt: tuple(f"prompt {one}" for one in prompt_warnings(tokenizer, prompt, most))

    def _setting(self, folder: Path, name: str) -> Any:
        """Return a setting of the model in `folder`, by default the pipeline's own."""
        own = inspect.signature(self.pipeline.__init__).parameters[name].default
        return read_index(folder).get(name, own)


def read_index(folder: Path) -> dict[str, Any]:
    """Return a generator's `model_index.json`. Raises `ModelNotFoundError` or `ModelFormatError`."""
    if not folder.is_dir():
        raise ModelNotFoundError(f"{folder} is not a folder; give the path of a model folder")
    path = folder / "model_index.json"
    if not path.is_file():
        remedy = (
            "this is a released checkpoint: run `milonga convert` on it first"
            if (folder / UPSTREAM_WEIGHTS).exists()
            else "give a folder that `milonga convert` or `save_pretrained` wrote"
        )
        raise ModelFormatError(f"{folder} has no model_index.json; {remedy}")
    return read_json(path)


def _class_of(index: Mapping[str, Any], part: str) -> tuple[str, str]:
    """Return the library and the class of `part`. Raises `ModelFormatError`."""
    match index.get(part):
        case [str(library), str(name)]:
            return library, name
        case other:
            raise ModelFormatError(f"model_index.json: {part} is {other!r}, not a library and a class")


def _check_part(folder: Path, build: Builder) -> None:
    """Raise `ModelFormatError` unless the weights in `folder` fit the module of its `config.json`."""
    config = read_json(folder / "config.json")
    try:
        with quiet_loading():
            module = on_meta(lambda: build(config))
    except MilongaError:
        raise
    except Exception as error:  # a config that its own class refuses
        raise ModelFormatError(f"{folder}/config.json is not valid: {one_line(error)}") from error
    if not module.state_dict():
        return
    check_weights(str(folder), module, read_layout(folder))
