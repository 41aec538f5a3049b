"""The data of a reward model's training: examples by split, and CLAP's tokens of their clips.

Examples come from BATON's JSON, from preference Parquet and from the sound world, and add up. They are
divided by their prompt, so that a held-out prompt was never in training with any clip. CLAP is frozen: its
tokens of each clip are made once, kept in the run's folder and then in memory.

Shape legend: B batch, A audio tokens of a clip, C width of a token, D width of an embedding.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from accelerate.utils import gather_object  # type: ignore[import-untyped]
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from services.errors import OutputError
from services.models.clap.model import AudioTokens, ClapModel, TextTokens, Waveform
from training.data.examples import Clip, Examples, read_labelled, read_pairs
from training.data.scenes import SPLITS, SoundworldData, soundworld_examples
from training.loop.progress import progress
from training.soundworld.scenes import Split, split_of

BATCH = 8
"""Clips of one pass through CLAP."""
SHARD = 512
"""Clips of one file of tokens: what a kill may cost."""
TEXTS = 64
"""Prompts of one pass through CLAP."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Where the examples come from."""

    labelled: tuple[Path, ...] = ()
    """JSON files in BATON's format (`training.data.examples.read_labelled`)."""
    pairs: tuple[Path, ...] = ()
    """Parquet files of preference pairs (`training.data.examples.read_pairs`)."""
    audio_root: Path | None = None
    """Folder of the audio that they name by relative paths; none: each file's own folder."""
    soundworld: SoundworldData = field(default_factory=lambda: SoundworldData(contrasts=0))
    """Examples from the sound world."""
    max_unreadable: float = 0.05
    """Share of clips that may be unreadable before the training is refused."""
    workers: int = 0
    """Processes that read clips (or make them) while this one runs CLAP; 0: it does both in turn."""

    def __post_init__(self) -> None:
        if not 0 <= self.max_unreadable <= 1:
            raise ValueError(f"max_unreadable is {self.max_unreadable}, must lie in [0, 1]")


def load_examples(config: DataConfig) -> dict[Split, Examples]:
    """The examples of each split (by the prompt's text: 90, 5 and 5 %), from all sources.

    Raises `InvalidInputError` for a file that is missing or not in its format.
    """
    labelled = [example for path in config.labelled for example in read_labelled(path, config.audio_root)]
    pairs = [pair for path in config.pairs for pair in read_pairs(path, config.audio_root)]
    found = {}
    for split in SPLITS:
        world = soundworld_examples(config.soundworld, split)
        found[split] = Examples(
            labelled=(*(e for e in labelled if split_of(e.prompt) == split), *world.labelled),
            pairs=(*(p for p in pairs if split_of(p.prompt) == split), *world.pairs),
        )
    return found


@dataclass(frozen=True, slots=True)
class _Entry:
    """What is kept of a clip."""

    hidden_AC: Tensor
    """float16."""
    seconds_A: Tensor
    embedding_D: Tensor
    """The pooled embedding; of width 0 where no score was wanted."""


class _Reading(Dataset[tuple[Waveform, int] | str]):
    """Clips, read when asked for; the reason where one can't be."""

    def __init__(self, clips: Sequence[Clip]) -> None:
        self.clips = clips

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> tuple[Waveform, int] | str:
        try:
            return self.clips[index].read()
        except (OSError, ValueError) as error:
            return _reason(error)


class ClapTokens:
    """CLAP's tokens of clips, on disk by content and in memory; and its tokens of prompts.

    Files hold up to `SHARD` clips as float16 under the digests of their content; the folder's name holds
    CLAP's. A file is written whole or not at all, so whatever was finished when a run was killed is not done
    again.
    """

    def __init__(
        self, folder: Path, clap: ClapModel, clap_digest: str, accelerator: Accelerator, *, workers: int = 0
    ) -> None:
        self.folder = folder / f"tokens-{clap_digest.removeprefix('sha256:')[:16]}"
        self.clap, self.accelerator, self.workers = clap, accelerator, workers
        self._files: set[Path] = set()
        self._known: dict[str, _Entry] = {}
        self._entries: dict[Clip, _Entry] = {}
        self._texts: dict[str, Tensor] = {}

    def add(self, clips: Iterable[Clip], *, scored: bool = False) -> dict[Clip, str]:
        """Make ready the tokens of `clips`, those that are missing being shared out among the processes.

        With `scored` also what `scores` needs. Returns the clips that can't be read, and why.
        """
        self._load()
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        wanted = list(dict.fromkeys(clips))
        digests: dict[Clip, str] = {}
        unreadable: dict[int, str] = {}
        own = range(rank, len(wanted), processes)
        missing = []
        for number in own:
            try:
                digests[wanted[number]] = digest = wanted[number].digest
            except (OSError, ValueError) as error:
                unreadable[number] = _reason(error)
                continue
            known = self._known.get(digest)
            if known is None or (scored and not known.embedding_D.numel()):
                missing.append(number)
        reading = DataLoader(
            _Reading([wanted[number] for number in missing]),
            batch_size=BATCH,
            num_workers=self.workers if len(missing) > BATCH else 0,
            collate_fn=list,
        )
        bar = progress(total=len(missing), desc="CLAP tokens", unit="clip", disable=rank > 0)
        made: dict[str, _Entry] = {}
        with bar:
            for place, batch in enumerate(reading):
                numbers = missing[place * BATCH :][: len(batch)]
                heard = {}
                for number, found in zip(numbers, batch, strict=True):
                    if isinstance(found, str):
                        unreadable[number] = found
                    else:
                        heard[digests[wanted[number]]] = found
                made |= self._embed(heard, scored)
                bar.update(len(batch))
                if (place + 1) % (SHARD // BATCH) == 0:
                    self._save(made)
                    made = {}
            self._save(made)
        self.accelerator.wait_for_everyone()
        if processes > 1:
            everywhere = gather_object([(dict(unreadable), {n: digests.get(wanted[n]) for n in own})])
            unreadable = {n: reason for there, _ in everywhere for n, reason in there.items()}
            digests = {wanted[n]: digest for _, there in everywhere for n, digest in there.items() if digest}
        self._load()
        self._entries |= {clip: self._known[d] for clip, d in digests.items() if d in self._known}
        return {wanted[number]: reason for number, reason in sorted(unreadable.items())}

    def add_prompts(self, prompts: Iterable[str]) -> None:
        """Make ready the tokens of prompts that come again and again."""
        missing = sorted(set(prompts) - self._texts.keys())
        for start in range(0, len(missing), TEXTS):
            part = missing[start : start + TEXTS]
            tokens = self.clap.text_tokens(part)
            for prompt, hidden_LC, mask_L in zip(part, tokens.hidden_BLC, tokens.mask_BL, strict=True):
                self._texts[prompt] = hidden_LC[mask_L].half().cpu()

    def audio(self, clips: Sequence[Clip]) -> AudioTokens:
        """Tokens of clips that were added, on CLAP's device."""
        entries = [self._entries[clip] for clip in clips]
        lengths = torch.tensor([len(entry.seconds_A) for entry in entries])
        pad = nn.utils.rnn.pad_sequence
        hidden_BAC = pad([entry.hidden_AC for entry in entries], batch_first=True)
        seconds_BA = pad([entry.seconds_A for entry in entries], batch_first=True)
        mask_BA = torch.arange(seconds_BA.shape[1]) < lengths[:, None]
        device = self.clap.device
        return AudioTokens(
            hidden_BAC=hidden_BAC.to(device).float(),
            seconds_BA=seconds_BA.to(device),
            mask_BA=mask_BA.to(device),
        )

    def text(self, prompts: Sequence[str]) -> TextTokens:
        """Tokens of prompts, on CLAP's device: from memory if all of them were added, else made now."""
        if any(prompt not in self._texts for prompt in prompts):
            made = self.clap.text_tokens(prompts)
            # Out of inference mode: autograd refuses what was made in it.
            return TextTokens(hidden_BLC=made.hidden_BLC.clone(), mask_BL=made.mask_BL.clone())
        rows = [self._texts[prompt] for prompt in prompts]
        lengths = torch.tensor([len(row) for row in rows])
        hidden_BLC = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask_BL = torch.arange(hidden_BLC.shape[1]) < lengths[:, None]
        return TextTokens(
            hidden_BLC=hidden_BLC.to(self.clap.device).float(), mask_BL=mask_BL.to(self.clap.device)
        )

    def scores(self, prompts: Sequence[str], clips: Sequence[Clip]) -> Tensor:
        """CLAP scores [B], from pooled embeddings: what the reward is compared with."""
        audio_BD = torch.stack([self._entries[clip].embedding_D for clip in clips]).float()
        return (self.clap.embed_text(prompts) * nn.functional.normalize(audio_BD, dim=-1)).sum(-1)

    def _embed(self, heard: Mapping[str, tuple[Waveform, int]], scored: bool) -> dict[str, _Entry]:
        """Tokens of a few clips, by digest."""
        if not heard:
            return {}
        # Silence after short clips, as the reward model hears them; for the scores CLAP's own way.
        windows = [self.clap.prepare(waveform, rate, padding="pad") for waveform, rate in heard.values()]
        tokens = self.clap.audio_tokens(windows, [wave.shape[-1] / rate for wave, rate in heard.values()])
        embeddings_BD = torch.empty(len(heard), 0)
        if scored:
            embeddings_BD = self.clap.embed_windows([self.clap.prepare(*pair) for pair in heard.values()])
        return {
            digest: _Entry(hidden_AC[mask_A].half().cpu(), seconds_A[mask_A].float().cpu(), embedding_D.cpu())
            for digest, hidden_AC, seconds_A, mask_A, embedding_D in zip(
                heard, tokens.hidden_BAC, tokens.seconds_BA, tokens.mask_BA, embeddings_BD, strict=True
            )
        }

    def _save(self, made: Mapping[str, _Entry]) -> None:
        if not made:
            return
        entries = list(made.values())
        name = hashlib.sha256(" ".join([*made, str(entries[0].embedding_D.shape)]).encode()).hexdigest()
        path = self.folder / f"{name[:16]}.safetensors"
        temporary = path.with_suffix(f".{self.accelerator.process_index}.part")
        tensors = {
            "hidden": torch.cat([entry.hidden_AC for entry in entries]),
            "seconds": torch.cat([entry.seconds_A for entry in entries]),
            "embeddings": torch.stack([entry.embedding_D for entry in entries]),
            "lengths": torch.tensor([len(entry.seconds_A) for entry in entries]),
        }
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file(tensors, temporary, metadata={"digests": json.dumps(list(made))})
            temporary.replace(path)
        except (OSError, SafetensorError) as error:
            temporary.unlink(missing_ok=True)
            raise OutputError(f"{path} can't be written: {error}") from error

    def _load(self) -> None:
        """Read what lies on disk and is not in memory. A damaged file is as good as none."""
        for path in sorted(set(self.folder.glob("*.safetensors")) - self._files):
            try:
                with safe_open(path, framework="pt") as file:
                    digests = json.loads(file.metadata()["digests"])
                    lengths = file.get_tensor("lengths").tolist()
                    hidden = torch.split(file.get_tensor("hidden"), lengths)
                    seconds = torch.split(file.get_tensor("seconds"), lengths)
                    entries = map(_Entry, hidden, seconds, file.get_tensor("embeddings"))
                    for digest, entry in zip(digests, entries, strict=True):
                        if entry.embedding_D.numel() or digest not in self._known:
                            self._known[digest] = entry
                self._files.add(path)
            except (OSError, ValueError, KeyError, SafetensorError):
                path.unlink(missing_ok=True)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).partition("\n")[0]
