"""`load_laion_clap`: run LAION's checkpoints with the laion_clap package (model URI ``laion-clap:PATH``).

This is upstream's own arithmetic; `services.models.clap.laion` computes the same embeddings without the
package. The package pins numpy < 2, so it needs a separate environment::

    pip install "milonga[serving,laion-clap]"

Workarounds for release 1.1.7, in effect only while a model is built:

* Importing it downloads three tokenizers, and building a model downloads RoBERTa's weights, which the
  checkpoint replaces: here nothing is downloaded.
* It imports torchvision, for training only, without declaring it: if it is missing, empty modules replace it.
* Its ``load_ckpt`` executes the code of a pickle, and fails on files without
  ``text_branch.embeddings.position_ids``: here `read_state` loads, and `check_weights` checks.
"""

import copy
import logging
import sys
import threading
import types
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final
from unittest import mock

import torch
import transformers
from torch import Tensor, nn

from services.errors import ModelError, ModelFormatError
from services.models.clap.laion import (
    Weights,
    architecture,
    laion_config,
    laion_extractor,
    load_text_tokenizer,
    read_state,
)
from services.models.clap.model import CACHED_TEXTS, ClapModel, TextCache
from services.models.folders import pick_device
from services.models.state_dicts import check_weights, quiet_loading

POSITIONS: Final = "text_branch.embeddings.position_ids"
"""An index buffer that LAION's files have and current versions of RoBERTa lack."""

_TORCHVISION: Final[dict[str, tuple[str, ...]]] = {
    "torchvision": (),
    "torchvision.datasets": (),
    "torchvision.ops": (),
    "torchvision.ops.misc": ("FrozenBatchNorm2d",),
    "torchvision.transforms": (
        *("CenterCrop", "Compose", "InterpolationMode", "Normalize"),
        *("RandomResizedCrop", "Resize", "ToTensor"),
    ),
}
"""Names that laion_clap imports, but needs only for training and for clips longer than a window."""

_FETCHING: Final = ("BertTokenizer", "RobertaTokenizer", "BartTokenizer", "RobertaModel")
"""transformers' classes whose `from_pretrained` laion_clap calls."""


class LaionClap(ClapModel):
    """laion_clap's model with the members of `ClapModel` that scoring uses: windows, embeddings, cache.

    It does not provide the encoders' tokens, so reward models can't use it.
    """

    def __init__(self, laion: nn.Module, extractor: transformers.ClapFeatureExtractor) -> None:
        """Args:
        laion: laion_clap's ``CLAP_Module``.
        extractor: settings of windows and padding (its spectrogram is not used).
        """
        nn.Module.__init__(self)  # ClapModel.__init__ needs transformers' model
        self.laion: Any = laion
        self.extractor = extractor
        self.max_text_tokens = 77  # fixed upstream
        self.cache = TextCache(CACHED_TEXTS)
        self.tokenizer = copy.deepcopy(self.laion.tokenize)  # the model's own belongs to its thread
        self._tokenizing = threading.Lock()

    @property
    def dimension(self) -> int:
        """Width of an embedding, D."""
        return int(self.laion.model.joint_embed_shape)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        device: torch.device = self.laion.model.logit_scale_a.device
        return device

    def audio_features(self, windows_WS: Tensor) -> Tensor:
        """Return normalised embeddings [W, D] of single windows, with gradients."""
        features = import_module("laion_clap.training.data").get_audio_features
        inputs = [
            features(
                {},
                window_S,
                self.window_samples,
                data_truncating=self.extractor.truncation,
                data_filling=self.extractor.padding,
                audio_cfg=self.laion.model_cfg["audio_cfg"],
                require_grad=window_S.requires_grad,
            )
            for window_S in windows_WS
        ]
        embeddings: Tensor = self.laion.model.get_audio_embedding(inputs)
        return embeddings

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """Return normalised embeddings [B, D] of prompts, with gradients and uncached."""
        embeddings: Tensor = self.laion.get_text_embedding(list(prompts), use_tensor=True)
        return embeddings


def load_laion_clap(path: Path, device: str = "cpu", *, tokenizer: Path | None = None) -> LaionClap:
    """Load the checkpoint `path` with laion_clap on `device`; `tokenizer` as in `load_laion`.

    Raises `ModelError` if the package is not installed, and otherwise what `load_laion` raises.
    """
    target = pick_device(device)
    state = read_state(path)
    config = laion_config(path.name, state)
    module = make_laion_clap(path.name, config, load_text_tokenizer(path, tokenizer, config))
    own: Weights = module.model.state_dict()
    weights = {key: value for key, value in state.items() if key != POSITIONS or key in own}
    check_weights(path.name, module.model, weights)
    module.model.load_state_dict(weights)
    model = LaionClap(module, laion_extractor(config, state))
    return model.to(target).eval().requires_grad_(False)


def make_laion_clap(
    part: str, config: transformers.ClapConfig, tokenizer: transformers.PreTrainedTokenizerBase
) -> Any:
    """Build a ``laion_clap.CLAP_Module`` of `config`'s sizes with random weights, on the CPU, offline.

    `part` names the checkpoint in messages. Raises `ModelError` or `ModelFormatError`.
    """
    name = architecture(part, config)
    text = config.text_config
    roberta = transformers.RobertaConfig(
        vocab_size=text.vocab_size,
        hidden_size=text.hidden_size,
        num_hidden_layers=text.num_hidden_layers,
        num_attention_heads=text.num_attention_heads,
        intermediate_size=text.intermediate_size,
        max_position_embeddings=text.max_position_embeddings,
        type_vocab_size=text.type_vocab_size,
        layer_norm_eps=text.layer_norm_eps,
    )
    fused = bool(config.audio_config.enable_fusion)
    package = import_laion_clap()
    if fused and find_spec("torchaudio") is None:
        raise ModelError(f"{part} is a fused model, for which laion_clap needs torchaudio; install it too")
    try:
        with quiet_loading(), _quiet_root(), _not_fetching(tokenizer, roberta):
            return package.CLAP_Module(
                enable_fusion=fused, device="cpu", amodel=name, tmodel="roberta"
            ).eval()
    except (RuntimeError, ValueError) as error:
        raise ModelFormatError(f"{part}: laion_clap can't build this model: {error}") from error


def import_laion_clap() -> Any:
    """Import the package offline, and return it. Raises `ModelError` if it can't be used."""
    if find_spec("laion_clap") is None:
        raise ModelError(
            "laion_clap is not installed; it needs numpy < 2, so install it into a separate environment: "
            'pip install "milonga[serving,laion-clap]"'
        )
    try:
        with _quiet_root(), _not_fetching(None, None), _torchvision():
            return import_module("laion_clap")
    except (ImportError, AttributeError) as error:  # numpy 2 lacks names that its dependencies use
        raise ModelError(
            f"laion_clap can't be imported ({error}); it needs a separate environment, with numpy < 2"
        ) from error


@contextmanager
def _not_fetching(
    tokenizer: transformers.PreTrainedTokenizerBase | None, roberta: transformers.RobertaConfig | None
) -> Iterator[None]:
    """In the context, `from_pretrained` returns `tokenizer`, or a random RoBERTa of the given sizes."""

    def given_tokenizer(name: str, *_: object, **__: object) -> Any:
        return tokenizer

    def random_model(name: str, *_: object, **__: object) -> Any:
        return transformers.RobertaModel(roberta)

    with ExitStack() as stack:
        for name in _FETCHING:
            replacement = random_model if name.endswith("Model") else given_tokenizer
            stack.enter_context(
                mock.patch.object(getattr(transformers, name), "from_pretrained", replacement)
            )
        yield


@contextmanager
def _torchvision() -> Iterator[None]:
    """In the context, empty classes replace torchvision's if it is not installed."""
    if find_spec("torchvision") is not None:
        yield
        return
    # transformers checks for torchvision: import its classes before torchvision seems to be installed.
    for name in ("BertModel", "BartModel", *_FETCHING):
        getattr(transformers, name)
    modules = {name: types.ModuleType(name) for name in _TORCHVISION}
    for name, classes in _TORCHVISION.items():
        for each in classes:
            setattr(modules[name], each, type(each, (), {}))
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(modules[parent], child, modules[name])
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]


@contextmanager
def _quiet_root() -> Iterator[None]:
    """In the context, the root logger logs only warnings and errors: upstream logs every step to it."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.WARNING)
    try:
        yield
    finally:
        root.setLevel(level)
