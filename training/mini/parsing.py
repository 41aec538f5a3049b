"""Parsing captions token by token, on which the mini family's text encoders are pretrained.

Every word is labelled with the event that it names and with the time of that event. Released models start
from language models; these start from this. Audio alone does not teach them word order.

Shape legend: B batch, L text tokens.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from training.soundworld.captions import MAX_EVENTS, CaptionTruth, caption_parts, words
from training.soundworld.scenes import SceneConfig, draw_truth, split_of
from training.soundworld.synthesis import CLASSES

SCENES = SceneConfig(duration=5.12, three=0.35)
ROLES = MAX_EVENTS + 2
"""First, second, third; alone; together with others."""
LABELS = len(CLASSES) * ROLES
IGNORED = -100
UNREAD = 0.15
"""Share of the training captions with a word that is not of the grammar."""


def word_tokenizer(special: Sequence[str], length: int) -> PreTrainedTokenizerFast:
    """Build a tokenizer with one token a word of the grammar. Case and kind of punctuation don't matter.

    Within a sentence every run of punctuation is a comma, except inside words; at its ends there is none.

    Args:
        special: the first tokens of the vocabulary. A sentence ends with ``</s>`` and begins with ``<s>``, if
            that is one of them.
        length: most tokens of a caption.
    """
    vocabulary = {token: i for i, token in enumerate([*special, *words()])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"[\"'’‘“”(){}\[\]<>*_`]"), " "),
            normalizers.Replace(Regex(r"(?<=\w)-(?=\w)"), " "),
            normalizers.Replace(Regex(r"^[^\w]+|[^\w]+$"), ""),
            normalizers.Replace(Regex(r"\s*[^\w\s]([^\w]*[^\w\s])?\s*"), " , "),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if "<s>" in special else "$A </s>",
        special_tokens=[(token, vocabulary[token]) for token in ("<s>", "</s>") if token in special],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>" if "<s>" in special else None,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=length,
        model_input_names=["input_ids", "attention_mask"],
    )


@torch.no_grad()
def continue_embeddings(
    model: PreTrainedModel,
    old: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    known: PreTrainedTokenizerBase,
    classes: Mapping[str, str],
) -> None:
    """Give `model` the weights of `old`, an earlier edition with another vocabulary.

    Args:
        model: written in place; its sizes are those of `old`, except the vocabulary's.
        old: the earlier edition.
        tokenizer: of `model`.
        known: tokenizer of `old`.
        classes: class of words (`word_classes`). A word that `known` lacks begins with the mean embedding of
            its class's words, or of all words without a class.
    """

    def embeddings(of: PreTrainedModel) -> nn.Embedding:
        return (
            of.get_submodule("text_model.embeddings.word_embeddings")
            if hasattr(of, "text_model")
            else of.get_input_embeddings()
        )

    shapes = {name: value.shape for name, value in model.state_dict().items()}
    weights = {name: value for name, value in old.state_dict().items() if value.shape == shapes.get(name)}
    model.load_state_dict({name: value.float() for name, value in weights.items()}, strict=False)
    taken_VD, own_VD = embeddings(old).weight.float(), embeddings(model).weight
    rows: dict[str, list[Tensor]] = {}
    for word, index in known.get_vocab().items():
        rows.setdefault(classes.get(word, ""), []).append(taken_VD[index])
    for word, index in tokenizer.get_vocab().items():
        place = known.get_vocab().get(word)
        alike = rows.get(classes.get(word, ""), rows[""])
        own_VD[index] = torch.stack(alike).mean(0) if place is None else taken_VD[place]


def role_of(truth: CaptionTruth, event: int) -> int:
    """Return the label of an event's place: its rank in a sequence, or alone, or together."""
    return event if truth.relation == "then" else MAX_EVENTS if truth.relation == "single" else MAX_EVENTS + 1


def labelled_caption(
    rng: np.random.Generator, tokenizer: PreTrainedTokenizerBase, *, held_out: bool = False
) -> tuple[list[int], list[int]]:
    """Return the token ids of a caption and their labels: class x role of the event, or IGNORED.

    The token of the whole sentence (RoBERTa's first, T5's last) has the label of the first event, so that it
    too depends on all of it. With `held_out`, the template too is one of no training.
    """
    while True:
        truth = draw_truth(rng, SCENES)
        parts = caption_parts(truth, rng, held_out=held_out, unread=0.0 if held_out else UNREAD)
        if (split_of("".join(text for text, _ in parts)) != "train") == held_out:
            break
    encoded = tokenizer(
        "".join(text for text, _ in parts), add_special_tokens=False, return_offsets_mapping=True
    )
    ids: list[int] = encoded["input_ids"]
    events = [event for text, event in parts for _ in text]
    labels = [
        IGNORED
        if (event := events[start]) is None or token == tokenizer.unk_token_id
        else CLASSES.index(truth.classes[event]) * ROLES + role_of(truth, event)
        for token, (start, _) in zip(ids, encoded["offset_mapping"], strict=True)
    ]
    first = CLASSES.index(truth.classes[0]) * ROLES + role_of(truth, 0)
    whole = IGNORED if truth.relation == "while" else first
    if tokenizer.bos_token_id is None:
        return [*ids, tokenizer.eos_token_id], [*labels, whole]
    return [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id], [whole, *labels, IGNORED]


def parsing_batch(
    rng: np.random.Generator, tokenizer: PreTrainedTokenizerBase, count: int, *, held_out: bool = False
) -> tuple[Tensor, Tensor]:
    """Return ids, padded to the tokenizer's length, and labels: int64 [B, L]."""
    rows = [labelled_caption(rng, tokenizer, held_out=held_out) for _ in range(count)]
    ids_BL = torch.full((count, tokenizer.model_max_length), tokenizer.pad_token_id)
    labels_BL = torch.full_like(ids_BL, IGNORED)
    for i, (row_ids, row_labels) in enumerate(rows):
        ids_BL[i, : len(row_ids)] = torch.tensor(row_ids)
        labels_BL[i, : len(row_labels)] = torch.tensor(row_labels)
    return ids_BL, labels_BL


class Parser(nn.Module):
    """A text encoder with a linear head over class x role, which is dropped after training."""

    def __init__(self, encoder: nn.Module, width: int, padding: int) -> None:
        """Args:
        encoder: called like transformers' encoders.
        width: of its hidden states.
        padding: the id of padding.
        """
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(width, LABELS)
        self.padding = padding

    def forward(self, ids_BL: Tensor) -> Tensor:
        """Return logits [B, L, class x role]."""
        mask_BL = (ids_BL != self.padding).long()
        hidden_BLD = self.encoder(input_ids=ids_BL, attention_mask=mask_BL).last_hidden_state
        logits: Tensor = self.head(hidden_BLD)
        return logits

    def loss(self, ids_BL: Tensor, labels_BL: Tensor) -> Tensor:
        """Return the cross-entropy over the labelled tokens."""
        logits = self(ids_BL).float()
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels_BL.flatten(), ignore_index=IGNORED)

    @torch.no_grad()
    def accuracy(self, ids_BL: Tensor, labels_BL: Tensor) -> float:
        """Return the share of the labelled tokens with the right label."""
        return float((self(ids_BL).argmax(-1) == labels_BL)[labels_BL != IGNORED].float().mean())
