"""The language model of audio tokens: transformers' `MusicgenForCausalLM` on projected text embeddings.

Upstream zeroes the embeddings of padding tokens and uses NO mask: such rows have a key of zero, and take
part in the softmax. So a prompt's clip depends on its padding; an attention mask would change the logits.

Shapes: B clips, K codebooks, S steps, L text tokens, D text width, W the model's width, V codes.
"""

from dataclasses import dataclass

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache, MusicgenForCausalLM


class TextProjection(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Text embeddings [B, L, D] to the language model's width [B, L, W]; rows of zeros remain zero."""

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, text_width: int, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(text_width, width)

    def forward(self, embeds_BLD: Tensor) -> Tensor:
        """Project. The bias is not added to padding and to the null condition, which are zero."""
        present_BL1 = (embeds_BLD != 0).any(-1, keepdim=True)
        projected_BLW: Tensor = self.linear(embeds_BLD) * present_BL1
        return projected_BLW


def hidden_states(model: MusicgenForCausalLM, sequence_BKS: Tensor, text_BLW: Tensor) -> Tensor:
    """Return the states [B, S, W] after the last norm, in one causal pass."""
    states_BSW: Tensor = model.model.decoder(
        input_ids=sequence_BKS.flatten(0, 1), encoder_hidden_states=text_BLW, use_cache=False
    ).last_hidden_state
    return states_BSW


def heads(model: MusicgenForCausalLM, states_BSW: Tensor) -> Tensor:
    """Return the logits [B, K, S, V] of states."""
    return torch.stack([head(states_BSW) for head in model.lm_heads], dim=1)


def token_logits(model: MusicgenForCausalLM, sequence_BKS: Tensor, text_BLW: Tensor) -> Tensor:
    """Return the logits [B, K, S, V] of the step that follows each step."""
    return heads(model, hidden_states(model, sequence_BKS, text_BLW))


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Prefix:
    """A prefix of sequences, as the model last saw it."""

    sequence_BKS: Tensor
    text_BLW: Tensor
    past: EncoderDecoderCache
    states_BSW: Tensor


class PrefixCache:
    """Hidden states of growing prefixes, which are computed for the new steps only.

    The keys and values of the latest calls are kept. A call whose batch, text and earlier tokens are those
    of one of them continues it; any other is computed from the beginning. Not thread-safe.
    """

    def __init__(self, model: MusicgenForCausalLM, size: int = 2) -> None:
        """Keep `size` batches: two are enough for two groups of requests that take turns."""
        self._model, self._size = model, size
        self._kept: list[_Prefix] = []

    def states(self, sequence_BKS: Tensor, text_BLW: Tensor) -> Tensor:
        """Return the hidden states [B, S, W] after the last norm of all steps of the sequences."""
        known = next((one for one in self._kept if _continues(one, sequence_BKS, text_BLW)), None)
        if known is None:
            config = self._model.config
            past = EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config))
            states_BSW = text_BLW.new_zeros((len(text_BLW), 0, config.hidden_size))
        else:
            self._kept.remove(known)
            past, states_BSW = known.past, known.states_BSW
        new_BKS = sequence_BKS[..., states_BSW.shape[1] :]
        if new_BKS.shape[-1]:
            output = self._model.model.decoder(
                input_ids=new_BKS.flatten(0, 1),
                encoder_hidden_states=text_BLW,
                past_key_values=past,
                use_cache=True,
            )
            states_BSW = torch.cat([states_BSW, output.last_hidden_state], dim=1)
        kept = _Prefix(sequence_BKS=sequence_BKS, text_BLW=text_BLW, past=past, states_BSW=states_BSW)
        self._kept = [kept, *self._kept[: self._size - 1]]
        return states_BSW


def _continues(known: _Prefix, sequence_BKS: Tensor, text_BLW: Tensor) -> bool:
    """Return whether a call continues a known prefix."""
    steps = known.sequence_BKS.shape[-1]
    return (
        sequence_BKS.shape[-1] >= steps
        and torch.equal(known.sequence_BKS, sequence_BKS[..., :steps])
        and torch.equal(known.text_BLW, text_BLW)
    )
