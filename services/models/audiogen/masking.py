"""Passes of the language model in which a mask scales how much of each text token each step reads.

The mask multiplies the cross-attention's weights after the softmax, without renormalisation, in all layers
and heads (upstream: hjkng/audiogenX, ``models/lm.py``). As no layer has a bias there, a mask of zeros takes
the text away.

Shapes: B rows, K codebooks, S steps, L text tokens, W the model's width, H heads.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from torch import Tensor, nn
from transformers import AttentionInterface, EncoderDecoderCache, MusicgenForCausalLM
from transformers.masking_utils import AttentionMaskInterface, eager_mask

_ATTENTION: Final = "milonga_text_mask"


def _masked_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float = 1.0,
    *,
    text_mask: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Compute attention step by step; `text_mask` [B, S, L] is for cross-attention."""
    scores_BHSL = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores_BHSL = scores_BHSL + attention_mask
    weights_BHSL = scores_BHSL.softmax(-1)
    if text_mask is not None and not module.is_causal:
        weights_BHSL = weights_BHSL * text_mask[:, None]
    return (weights_BHSL @ value).transpose(1, 2).contiguous(), weights_BHSL


AttentionInterface.register(_ATTENTION, _masked_attention)
AttentionMaskInterface.register(_ATTENTION, eager_mask)


@contextmanager
def masked_attention(model: MusicgenForCausalLM) -> Iterator[None]:
    """Let `masked_states` run. The model is as before at the end of the context, whatever happens."""
    config = model.model.decoder.config
    before = config._attn_implementation
    config._attn_implementation = _ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = before


def masked_states(
    model: MusicgenForCausalLM,
    sequence_BKS: Tensor,
    text_BLW: Tensor,
    mask_BSL: Tensor,
    past: EncoderDecoderCache | None = None,
) -> Tensor:
    """Return the states [B, S, W] after the last norm, in one causal pass that continues `past`.

    Needs `masked_attention`. Row s of the mask is for the query of step s, in [0, 1].
    """
    states_BSW: Tensor = model.model.decoder(
        input_ids=sequence_BKS.flatten(0, 1),
        encoder_hidden_states=text_BLW,
        past_key_values=past,
        use_cache=past is not None,
        text_mask=mask_BSL,
    ).last_hidden_state
    return states_BSW
