"""Read or change the weights of a denoiser's cross-attention while it runs.

Shapes: B rows, H heads, Q queries (a layer's frames × its frequency bins), L text tokens.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from diffusers.models.attention_processor import Attention, AttnProcessor
from torch import Tensor, nn

from services.errors import UnsupportedError

Edit = Callable[[Tensor], Tensor]
"""Takes the weights [B, H, Q, L] of a layer after the softmax; returns those to use, maybe the same."""


def cross_attention_layers(denoiser: nn.Module) -> list[Any]:
    """Return the layers in which the denoiser attends to the text, in order; none if they can't be told."""
    return [
        layer
        for name, layer in denoiser.named_modules()
        if isinstance(layer, Attention) and name.rpartition(".")[2] == "attn2" and layer.is_cross_attention
    ]


@contextmanager
def edited(denoiser: nn.Module, edit: Edit) -> Iterator[None]:
    """Have `edit` called with the weights of each layer of cross-attention, at each call of the denoiser.

    The softmax is computed step by step, not in one kernel: the output differs by rounding. The layers are as
    before at the end of the context, whatever happens.

    Raises:
        UnsupportedError: the denoiser has no layers of cross-attention.
    """
    layers = cross_attention_layers(denoiser)
    if not layers:
        raise UnsupportedError(
            f"{type(denoiser).__name__} has no layers of cross-attention to read; give a model with a U-Net, "
            "Tango's, or the method occlusion"
        )
    processors = [layer.processor for layer in layers]

    def hook(layer: Any) -> None:
        scores = type(layer).get_attention_scores

        def weights(*args: Any, **options: Any) -> Tensor:
            probabilities: Tensor = scores(layer, *args, **options)
            by_head = probabilities.view(-1, layer.heads, *probabilities.shape[1:])
            return edit(by_head).flatten(0, 1)

        layer.get_attention_scores = weights

    try:
        for layer in layers:
            # It calls `get_attention_scores`, which the kernels of the default processor do not.
            layer.processor = AttnProcessor()
            hook(layer)
        yield
    finally:
        for layer, processor in zip(layers, processors, strict=True):
            layer.processor = processor
            layer.__dict__.pop("get_attention_scores", None)
