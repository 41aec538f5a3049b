"""Beam search over clips and beam sizes in one batch.

For each clip and beam size the result is that of transformers' ``generate`` with ``num_beams`` alone (no
sampling, length penalty 1, repetition penalty 1, ``early_stopping=False``; one beam: greedy search), up to
rounding: the sizes share the pass over the prompt, and each step is one pass over the beams of all searches
that are not done.

Shapes: B clips, A clips whose search is not done, L tokens of a prompt, D width, n beams, K candidates
(2 n), V vocabulary, S generated tokens, R rows of a pass.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import DynamicCache

_NEVER: Final = -1.0e9
"""Score of a beam that must not be chosen."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Hypothesis:
    """The best sentence of a search."""

    tokens: tuple[int, ...]
    """Generated tokens, the end token included if it was reached."""
    log_probability: float
    """Sum of the tokens' log probabilities; NaN, without tokens, if the model returned NaN."""


@torch.inference_mode()
def search(
    model: nn.Module, prompts_BLD: Tensor, beams: Sequence[int], *, end: int, max_new_tokens: int
) -> list[list[Hypothesis]]:
    """Return for each clip the best hypothesis of each beam size.

    Args:
        model: transformers' causal language model.
        prompts_BLD: embeddings of the prompts, all of one length.
        beams: beam sizes, each 1 or more.
        end: id of the end token.
        max_new_tokens: most tokens of a hypothesis, 1 or more.
    """
    cache = DynamicCache()
    logits_RV = _last_logits(model, cache, inputs_embeds=prompts_BLD)
    clips_B = torch.arange(len(prompts_BLD), device=prompts_BLD.device)
    searches = [_Search(clips_B, size, end, max_new_tokens) for size in beams]
    # The rows of the pass that each search continues; at first all beams of a clip have its prompt's.
    running, rows = searches, [clips_B.repeat_interleave(one.size) for one in searches]
    while running:
        steps = [one.step(logits_RV[own]) for one, own in zip(running, rows, strict=True)]
        running = [one for one in running if one.rows]
        if running:
            cache.batch_select_indices(
                torch.cat([own[step[1]] for own, step in zip(rows, steps, strict=True)])
            )
            tokens_R1 = torch.cat([step[0] for step in steps])[:, None]
            logits_RV = _last_logits(model, cache, input_ids=tokens_R1)
            places_R = torch.arange(len(tokens_R1), device=clips_B.device)
            rows = list(torch.split(places_R, [one.rows for one in running]))
    return [[one.best(clip) for one in searches] for clip in range(len(prompts_BLD))]


def _last_logits(model: nn.Module, cache: DynamicCache, **inputs: Any) -> Tensor:
    output = model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
    logits: Tensor = output.logits[:, -1].float()
    return logits


class _Search:
    """The searches of one beam size for all clips: A of them are active."""

    def __init__(self, clips_B: Tensor, size: int, end: int, max_new_tokens: int) -> None:
        count, device = len(clips_B), clips_B.device
        self.size, self._end, self._max = size, end, max_new_tokens
        self._active = clips_B
        self._running = torch.empty(count, size, 0, dtype=torch.long, device=device)
        self._scores = torch.zeros(count, size, device=device)
        self._scores[:, 1:] = _NEVER  # all beams begin with the same prompt
        self._finished = torch.full((count, size), -torch.inf, device=device)
        """Scores per token of finished hypotheses, the best first; -inf where there is none yet."""
        self._best: list[Hypothesis | None] = [None] * count

    @property
    def rows(self) -> int:
        """Return the number of rows that this search needs in the next pass: A × n."""
        return len(self._active) * self.size

    def best(self, clip: int) -> Hypothesis:
        """Return the result of a clip, after the search."""
        return self._best[clip] or Hypothesis(tokens=(), log_probability=math.nan)

    def step(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Choose the next tokens by logits [A × n, V].

        Returns the chosen tokens, and for each the row before this step that it continues. Searches that are
        done have none.
        """
        log_AnV = torch.unflatten(logits.log_softmax(dim=-1), 0, (-1, self.size)) + self._scores[..., None]
        vocabulary = log_AnV.shape[-1]
        scores_AK, places_AK = log_AnV.flatten(1).topk(2 * self.size)
        beams_AK, tokens_AK = places_AK // vocabulary, places_AK % vocabulary
        before = self._running.gather(1, beams_AK[..., None].expand(-1, -1, self._running.shape[-1]))
        sentences_AKS = torch.cat([before, tokens_AK[..., None]], dim=-1)
        length = sentences_AKS.shape[-1]
        ended_AK = tokens_AK == self._end if length < self._max else torch.ones_like(tokens_AK).bool()

        self._finish(scores_AK, sentences_AKS, ended_AK)
        scores_An, kept_An = scores_AK.masked_fill(ended_AK, _NEVER).topk(self.size)
        # Could the best running beam still beat the worst finished one, at its present score per token?
        going = scores_An[:, 0] / length > self._finished[:, -1]
        if self.size == 1:
            going &= self._finished[:, -1].isinf()  # greedy search ends with the first end token
        if length == self._max:
            going = torch.zeros_like(going)
        parents = (
            beams_AK.gather(1, kept_An) + torch.arange(len(going), device=going.device)[:, None] * self.size
        )
        self._running = sentences_AKS.gather(1, kept_An[..., None].expand(-1, -1, length))[going]
        self._scores, self._finished = scores_An[going], self._finished[going]
        self._active = self._active[going]
        return self._running[:, :, -1].flatten(), parents[going].flatten()

    def _finish(self, scores_AK: Tensor, sentences_AKS: Tensor, ended_AK: Tensor) -> None:
        """Keep the sentences that have ended, if they are among the best n of a step."""
        length = sentences_AKS.shape[-1]
        ended_An = ended_AK[:, : self.size]
        scores_An = (scores_AK[:, : self.size] / length).masked_fill(~ended_An, -torch.inf)
        best_A, places_A = scores_An.max(dim=1)
        for row in (best_A > self._finished[:, 0]).nonzero()[:, 0].tolist():
            self._best[int(self._active[row])] = Hypothesis(
                tokens=tuple(sentences_AKS[row, places_A[row]].tolist()),
                log_probability=float(best_A[row]) * length,
            )
        self._finished = torch.cat([self._finished, scores_An], dim=1).topk(self.size).values
