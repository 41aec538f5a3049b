from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator  # type: ignore[import-untyped]

from services.errors import InvalidInputError
from services.models.clap.model import ClapModel, Waveform
from tests.tiny import tiny_clap, tiny_reward
from training.data.examples import Clip, FileClip, check_readable
from training.loop.fit import LoopConfig, make_accelerator
from training.reward.data import ClapTokens

DIGEST = "sha256:" + "0" * 64


@dataclass(frozen=True)
class Noise:
    """A clip of noise."""

    seconds: float
    domain: str = "noise"

    @property
    def name(self) -> str:
        return f"noise {self.seconds}"

    @property
    def digest(self) -> str:
        return f"{self.seconds:064.4f}"

    def read(self) -> tuple[Waveform, int]:
        if self.seconds > 50:
            raise ValueError("is too long\nreally")
        samples = np.random.default_rng(round(self.seconds * 1000)).standard_normal(
            round(self.seconds * 16_000)
        )
        return (samples * 0.1).astype(np.float32), 16_000


CLIPS: Sequence[Clip] = [Noise(seconds) for seconds in (0.3, 0.64, 1.0, 2.5)]


@pytest.fixture(scope="module")
def clap() -> ClapModel:
    return tiny_clap()


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return make_accelerator(LoopConfig(steps=1, batch=1, device="cpu"))


def test_tokens_are_those_of_the_reward_model(
    tmp_path: Path, clap: ClapModel, accelerator: Accelerator
) -> None:
    tokens = ClapTokens(tmp_path, clap, DIGEST, accelerator)
    assert tokens.add(CLIPS) == {}
    kept = tokens.audio(CLIPS)
    model = tiny_reward(clap)
    expected = model.audio_tokens([model.prepare(*clip.read()) for clip in CLIPS])
    assert kept.mask_BA.sum(1).tolist() == expected.mask_BA.sum(1).tolist()
    torch.testing.assert_close(
        kept.hidden_BAC[kept.mask_BA], expected.hidden_BAC[expected.mask_BA], rtol=2e-3, atol=2e-3
    )
    torch.testing.assert_close(kept.seconds_BA[kept.mask_BA], expected.seconds_BA[expected.mask_BA])
    prompts = ["a dog barks", "a cat", "the siren wails then a bell rings", "rain falls"]
    with torch.no_grad():
        ours = model.head(tokens.text(prompts), kept)
    torch.testing.assert_close(
        ours, model.reward(prompts, [model.prepare(*clip.read()) for clip in CLIPS]), rtol=1e-2, atol=1e-2
    )


def test_cached_tokens_of_prompts_equal_computed_ones(
    tmp_path: Path, clap: ClapModel, accelerator: Accelerator
) -> None:
    tokens = ClapTokens(tmp_path, clap, DIGEST, accelerator)
    prompts = ["a dog barks then a siren wails", "a cat"]
    fresh = tokens.text(prompts)
    tokens.add_prompts(prompts)
    kept = tokens.text(prompts)
    assert torch.equal(kept.mask_BL, fresh.mask_BL)
    torch.testing.assert_close(
        kept.hidden_BLC[kept.mask_BL], fresh.hidden_BLC[fresh.mask_BL], atol=2e-3, rtol=2e-3
    )
    assert not fresh.hidden_BLC.is_inference()


def test_cached_tokens_are_not_computed_again(
    tmp_path: Path, clap: ClapModel, accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = ClapTokens(tmp_path, clap, DIGEST, accelerator)
    first.add(CLIPS)
    expected = first.audio(CLIPS)
    monkeypatch.setattr(Noise, "read", lambda self: pytest.fail("read again"))
    again = ClapTokens(tmp_path, clap, DIGEST, accelerator)
    assert again.add(CLIPS) == {}
    assert torch.equal(again.audio(CLIPS).hidden_BAC, expected.hidden_BAC)
    assert not list(tmp_path.rglob("*.part"))
    monkeypatch.undo()
    # Another CLAP model has its own files, and damaged files are computed again.
    other = ClapTokens(tmp_path, clap, "sha256:" + "1" * 64, accelerator)
    other.add(CLIPS)
    assert len(list(tmp_path.iterdir())) == 2
    for path in tmp_path.rglob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:50])
    restored = ClapTokens(tmp_path, clap, DIGEST, accelerator)
    assert restored.add(CLIPS) == {}
    assert torch.equal(restored.audio(CLIPS).hidden_BAC, expected.hidden_BAC)


def test_worker_processes_read_clips(tmp_path: Path, clap: ClapModel, accelerator: Accelerator) -> None:
    clips: list[Clip] = [Noise(0.3 + n / 100) for n in range(20)]
    clips.insert(5, Noise(51.0))
    alone = ClapTokens(tmp_path / "a", clap, DIGEST, accelerator)
    parallel = ClapTokens(tmp_path / "b", clap, DIGEST, accelerator, workers=2)
    assert alone.add(clips) == parallel.add(clips) == {clips[5]: "is too long"}
    del clips[5]
    assert torch.equal(alone.audio(clips).hidden_BAC, parallel.audio(clips).hidden_BAC)


def test_scores_are_those_of_clap(tmp_path: Path, clap: ClapModel, accelerator: Accelerator) -> None:
    ClapTokens(tmp_path, clap, DIGEST, accelerator).add(CLIPS[:2])
    tokens = ClapTokens(tmp_path, clap, DIGEST, accelerator)
    tokens.add(CLIPS, scored=True)
    prompts = ["a dog barks"] * len(CLIPS)
    expected = clap.score(prompts, [clip.read()[0] for clip in CLIPS], 16_000)
    torch.testing.assert_close(tokens.scores(prompts, CLIPS), expected)
    tokens.add(CLIPS)  # without `scored`, existing embeddings are kept
    assert torch.equal(tokens.scores(prompts, CLIPS), tokens.scores(prompts, CLIPS))


def test_unreadable_clips_are_left_out_counted_and_listed(
    tmp_path: Path, clap: ClapModel, accelerator: Accelerator, capsys: pytest.CaptureFixture[str]
) -> None:
    broken: list[Clip] = [Noise(51.0), FileClip(path=tmp_path / "none.wav")]
    tokens = ClapTokens(tmp_path, clap, DIGEST, accelerator)
    unreadable = tokens.add([*CLIPS, *broken])
    assert unreadable == {broken[0]: "is too long", broken[1]: "No such file or directory"}
    assert len(tokens.audio(CLIPS).mask_BA) == len(CLIPS)
    check_readable(unreadable, 100, 0.05)
    printed = capsys.readouterr().err
    assert "2 of 100 clips can't be read and are left out:" in printed
    assert "none.wav: No such file or directory" in printed
    with pytest.raises(
        InvalidInputError, match=r"data: 2 of 30 clips can't be read, at most 5% may be: noise 51"
    ):
        check_readable(unreadable, 30, 0.05)
    check_readable({}, 0, 0.05)
