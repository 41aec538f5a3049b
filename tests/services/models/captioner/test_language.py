"""Language models as they are published: Vicuna's tokenizer is a SentencePiece file."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

from services.models.captioner.config import PROMPT
from services.models.captioner.language import load_caption_tokenizer
from services.models.captioner.model import Captioner, check_captioner
from tests.tiny import tiny_captioner

TEXT = "USER: Describe the audio you hear. ASSISTANT: a dog barks while rain falls then an engine runs"


@pytest.fixture(scope="module")
def vicuna(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small SentencePiece model that has Llama's settings."""
    folder = tmp_path_factory.mktemp("vicuna")
    draw = random.Random(0)
    words = TEXT.split()
    lines = [" ".join(draw.choice(words) for _ in range(12)) for _ in range(500)]
    with (folder / "tokenizer.model").open("wb") as model:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            vocab_size=380,
            model_type="bpe",
            byte_fallback=True,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            minloglevel=2,
        )
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "legacy": False,
        "sp_model_kwargs": {},
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": None,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def test_prompts_are_tokenised_as_sentencepiece_does(vicuna: Path, tmp_path: Path) -> None:
    tokenizer = load_caption_tokenizer(vicuna, 380)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(vicuna / "tokenizer.model"))
    prompt = [1, *pieces.encode(PROMPT)]
    for caption in ("", "A dog barks", " a dog barks", "rain falls, then…"):
        ids = tokenizer(PROMPT + caption)["input_ids"]
        assert ids == [1, *pieces.encode(PROMPT + caption)]
        assert ids[: len(prompt)] == prompt
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2
    assert tokenizer.decode(tokenizer("A dog barks")["input_ids"], skip_special_tokens=True) == "A dog barks"
    # What the converter writes has the same tokens.
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    again = load_caption_tokenizer(tmp_path, 380)
    assert again(PROMPT)["input_ids"] == prompt


def qwen(vocabulary: int) -> Qwen2ForCausalLM:
    """Grouped queries, and one tensor for input and output embeddings, of which files have one copy."""
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        tie_word_embeddings=True,
    )
    return Qwen2ForCausalLM(config)


def gpt2(vocabulary: int) -> GPT2LMHeadModel:
    """Learned positions, other names of layers."""
    config = GPT2Config(vocab_size=vocabulary, n_embd=24, n_layer=2, n_head=2, initializer_range=0.3)
    return GPT2LMHeadModel(config)


@pytest.mark.parametrize("build", [qwen, gpt2])
def test_other_language_models(tmp_path: Path, build: Callable[[int], torch.nn.Module]) -> None:
    tiny = tiny_captioner()
    torch.manual_seed(0)
    model = build(len(tiny.tokenizer)).eval().requires_grad_(False)
    captioner = Captioner(tiny.encoder, tiny.projector, model, tiny.tokenizer, tiny.config)
    captioner.save_pretrained(tmp_path, dtype="float16")
    check_captioner(tmp_path)
    audio = torch.randn(2, 6, 24, generator=torch.Generator().manual_seed(0))
    loaded = Captioner.from_pretrained(tmp_path)
    for clip, row in zip(audio, loaded.generate(audio, beams=(1, 3)), strict=True):
        for one in row:
            output = loaded.language_model.generate(
                inputs_embeds=loaded.prompts(clip[None]),
                num_beams=one.beams,
                do_sample=False,
                max_new_tokens=8,
                eos_token_id=2,
                pad_token_id=2,
            )
            assert one.text == loaded.tokenizer.decode(output[0], skip_special_tokens=True).strip()
    assert loaded.generate(audio)[0][0].text
