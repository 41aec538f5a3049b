"""The mini CLAP tokenizer: RoBERTa's special tokens, and one token a word of the sound world's grammar."""

from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from training.soundworld.captions import words

TEXT_LENGTH = 40
"""Most tokens of a caption; the longest of the grammar has 21."""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """``<s> a dog barks </s>``, lower case; padding is 1, as RoBERTa's position embeddings want it."""
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    vocabulary = {token: i for i, token in enumerate([*special, *words()])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=TEXT_LENGTH,
        model_input_names=["input_ids", "attention_mask"],
    )
