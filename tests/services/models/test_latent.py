"""What families share: conditionings, guidance, and the text that generators read."""

import pytest
import torch

from services.models.latent import Conditioning, guided_steps
from tests.tiny import tiny_pipeline


def test_rows_and_padding_are_each_others_inverse() -> None:
    embeds = torch.arange(12.0).reshape(2, 3, 2)
    mask = torch.tensor([[True, False, False], [True, True, False]])
    text = Conditioning(tensors={"embeds": embeds, "mask": mask})
    rows = text.rows()
    assert [row["embeds"].tolist() for row in rows] == [[[0, 1]], [[6, 7], [8, 9]]]
    again = Conditioning.of_rows([{k: v.half() for k, v in row.items()} for row in rows], 4)
    assert again.length == 4 and again["embeds"].dtype == torch.float32
    assert torch.equal(again["mask"][:, :3], mask) and not again["mask"][:, 3].any()
    assert torch.equal(again["embeds"][:, :3], embeds * mask[..., None])


def test_copies_of_a_row_stay_side_by_side() -> None:
    text = Conditioning(tensors={"mask": torch.tensor([[True, False], [True, True]])})
    assert text.repeat_interleave(2)["mask"].sum(1).tolist() == [1, 1, 2, 2]
    assert Conditioning.cat([text, text])["mask"].sum(1).tolist() == [1, 2, 1, 2]


def test_the_guided_steps_are_the_first_ones() -> None:
    assert [guided_steps(scale, 1.0, 8) for scale in (0, 1, 1.01, 3)] == [0, 0, 8, 8]
    assert [guided_steps(3.0, stop, 8) for stop in (0, 0.05, 0.5, 0.8, 1)] == [0, 0, 4, 6, 8]
    assert guided_steps(3.0, 0.29, 100) == 29, "0.29 * 100 is less than 29 in binary"
    assert guided_steps(3.0, 1.0, 8, folded=True) == 0


def test_moved_to_a_number_format_masks_stay_masks() -> None:
    text = Conditioning(tensors={"embeds": torch.zeros(1, 2, 3), "mask": torch.ones(1, 2, dtype=torch.bool)})
    moved = text.to(torch.device("cpu"), torch.bfloat16)
    assert (moved["embeds"].dtype, moved["mask"].dtype) == (torch.bfloat16, torch.bool)


@pytest.mark.parametrize(("words", "length"), [(1, 64), (63, 64), (64, 128), (300, 512), (600, 512)])
def test_text_is_padded_to_one_of_few_lengths(words: int, length: int) -> None:
    pipeline = tiny_pipeline(text_length=None)
    pipeline.tokenizer.model_max_length = 10**30
    assert pipeline.text_length("dog " * words) == length
    pipeline.tokenizer.model_max_length = 16
    assert pipeline.text_length("dog " * words) == 16
    assert tiny_pipeline().text_length("dog " * words) == 16
