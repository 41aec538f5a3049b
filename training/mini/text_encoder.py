"""Train the mini text encoder: a small T5 that knows, at each word, which event it names and when.

    python -m training.mini.text_encoder --work build/mini

It is pretrained on parsing captions, token by token, and then frozen: trained jointly with a denoiser it
does not learn word order (a swapped caption ends up nearly equal), and a sentence-level objective stalls.

Shape legend: B batch, L text tokens, D text width.
"""

from dataclasses import replace

import numpy as np
import torch
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from training.mini.loop import LoopConfig, fit, part_arguments
from training.soundworld.captions import MAX_EVENTS, CaptionTruth, caption_parts, words
from training.soundworld.scenes import SceneConfig, draw_truth, split_of
from training.soundworld.synthesis import CLASSES

SEED = 202
TEXT_LENGTH = 24
"""Tokens a prompt is padded to; the longest caption of the grammar has 20."""
BATCH = 64
LOOP = LoopConfig(steps=2_500, learning_rate=1.5e-3, ema=0.99)
SCENES = SceneConfig(duration=5.12, three=0.35)
ROLES = MAX_EVENTS + 2
"""First, second, third; alone; together with others."""
IGNORED = -100


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word of the grammar, lower case; T5's special tokens and its ``</s>`` at the end."""
    special = ["<pad>", "</s>", "<unk>"]
    vocabulary = {token: i for i, token in enumerate([*special, *words()])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=TEXT_LENGTH,
        model_input_names=["input_ids", "attention_mask"],
    )


def build(vocabulary: int) -> T5EncoderModel:
    """The architecture of FLAN-T5's encoder, 128 wide and three layers deep."""
    return T5EncoderModel(
        T5Config(
            vocab_size=vocabulary,
            d_model=128,
            d_kv=32,
            d_ff=256,
            num_layers=3,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            is_encoder_decoder=False,
            use_cache=False,
            tie_word_embeddings=True,
        )
    )


def role_of(truth: CaptionTruth, event: int) -> int:
    """The label of an event's place: its rank in a sequence, or alone, or together."""
    return event if truth.relation == "then" else MAX_EVENTS if truth.relation == "single" else MAX_EVENTS + 1


def labelled_caption(
    rng: np.random.Generator, tokenizer: PreTrainedTokenizerFast, *, held_out: bool = False
) -> tuple[list[int], list[int]]:
    """Token ids of a caption and for each the label class x role of the event it names, or IGNORED.

    The end token carries the label of the first event, so that it too must read the whole sentence.
    """
    while True:
        truth = draw_truth(rng, SCENES)
        parts = caption_parts(truth, rng)
        if (split_of("".join(text for text, _ in parts)) != "train") == held_out:
            break
    ids: list[int] = []
    labels: list[int] = []
    for text, event in parts:
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids += tokens
        label = (
            IGNORED if event is None else CLASSES.index(truth.classes[event]) * ROLES + role_of(truth, event)
        )
        labels += [label] * len(tokens)
    first = CLASSES.index(truth.classes[0]) * ROLES + role_of(truth, 0)
    return [*ids, 1], [*labels, IGNORED if truth.relation == "while" else first]


def batch(
    seed: int, step: int, tokenizer: PreTrainedTokenizerFast, *, held_out: bool = False
) -> tuple[Tensor, Tensor]:
    """Padded ids and labels, int64 [B, L]."""
    rng = np.random.default_rng([seed, step])
    rows = [labelled_caption(rng, tokenizer, held_out=held_out) for _ in range(BATCH)]
    ids = torch.zeros(BATCH, TEXT_LENGTH, dtype=torch.long)
    labels = torch.full((BATCH, TEXT_LENGTH), IGNORED)
    for i, (row_ids, row_labels) in enumerate(rows):
        ids[i, : len(row_ids)] = torch.tensor(row_ids)
        labels[i, : len(row_labels)] = torch.tensor(row_labels)
    return ids, labels


class Parser(nn.Module):
    """The encoder with a linear head over class x role; the head is thrown away afterwards."""

    def __init__(self, encoder: T5EncoderModel) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.d_model, len(CLASSES) * ROLES)

    def forward(self, ids_BL: Tensor) -> Tensor:
        """Logits [B, L, class x role]."""
        hidden_BLD = self.encoder(input_ids=ids_BL, attention_mask=(ids_BL != 0).long()).last_hidden_state
        logits: Tensor = self.head(hidden_BLD)
        return logits


def main() -> None:
    arguments = part_arguments(__doc__, LOOP.steps)
    torch.manual_seed(SEED)
    tokenizer = build_tokenizer()
    model = Parser(build(len(tokenizer)))

    def loss_at(step: int) -> tuple[Tensor, dict[str, float]]:
        ids, labels = batch(SEED, step, tokenizer)
        logits = model(ids)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
        return loss, {}

    folder = arguments.work / "text_encoder"
    fit(model, loss_at, replace(LOOP, steps=arguments.steps), folder, title="text encoder")
    model.eval()
    with torch.no_grad():
        ids, labels = batch(SEED, 10_000_000, tokenizer, held_out=True)
        right = (model(ids).argmax(-1) == labels)[labels != IGNORED].float().mean()
    print(f"held-out captions: {right:.4f} of the words told which event they name, and when")
    model.encoder.save_pretrained(folder / "final", safe_serialization=True)
    tokenizer.save_pretrained(folder / "tokenizer")


if __name__ == "__main__":
    main()
