"""Language models as they are published: Vicuna's tokenizer is a SentencePiece file."""

import json
import random
from pathlib import Path

import pytest
import sentencepiece

from services.models.captioner.config import PROMPT
from services.models.captioner.language import load_caption_tokenizer

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
