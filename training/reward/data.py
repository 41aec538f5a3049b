"""Training data of reward models: examples by split, and a cache of the frozen CLAP model's tokens.

Examples from BATON's JSON files, Parquet files of preference pairs and the sound world are combined. They are
split by prompt, so that no clip of a held-out prompt is in the training split. The tokens of each clip are
computed once, and cached in the run's folder and in memory.

Shape legend: B batch, A audio tokens of a clip, L text tokens of a prompt, C width of a token, D width of an
embedding.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from accelerate.utils import gather_object  # type: ignore[import-untyped]
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from services.errors import OutputError
from services.models.clap.model import AudioTokens, ClapModel, TextTokens, Waveform
from training.data.examples import (
    DECODER,
    Clip,
    Examples,
    check_prompts,
    read_labelled,
    read_pairs,
    short_message,
)
from training.data.scenes import SPLITS, SoundworldData, soundworld_examples
from training.loop.checks import Range, Share, check_ranges
from training.loop.progress import progress
from training.soundworld.scenes import Split, split_of

BATCH = 8
"""Clips per forward pass of CLAP."""
SHARD = 512
"""Clips per cache file: at most so many are computed again after a kill."""
TEXTS = 64
"""Prompts per forward pass of CLAP."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Sources of the examples."""

    labelled: tuple[Path, ...] = ()
    """Lists with labels, as BATON's JSON (`training.data.examples.read_labelled`)."""
    pairs: tuple[Path, ...] = ()
    """Parquet files of preference pairs (`training.data.examples.read_pairs`)."""
    audio_root: Path | None = None
    """Folder that relative audio paths in these files start from; None: each file's own folder."""
    soundworld: SoundworldData = field(default_factory=lambda: SoundworldData(contrasts=0))
    """Examples of the sound world."""
    max_unreadable: Share = 0.05
    """Maximum share of unreadable clips; above it, training is refused."""
    workers: Annotated[int, Range(0, 4096)] = 0
    """Worker processes that read or render clips while this one runs CLAP; 0: no workers."""

    def __post_init__(self) -> None:
        check_ranges(self)


def load_examples(
    config: DataConfig, unusable: dict[str, str], *, quiet: bool = False
) -> dict[Split, Examples]:
    """Return the examples of all sources by split (90, 5 and 5 %, by the prompt's text).

    `unusable` is as in `read_labelled`. Raises `InvalidInputError` if a file can't be read or has another
    format, or too many prompts are unusable.
    """
    root = config.audio_root
    labelled = [one for path in config.labelled for one in read_labelled(path, root, unusable=unusable)]
    pairs = [pair for path in config.pairs for pair in read_pairs(path, root, unusable=unusable)]
    check_prompts(unusable, len(labelled) + len(pairs), config.max_unreadable, quiet=quiet)
    splits = {}
    for split in SPLITS:
        world = soundworld_examples(config.soundworld, split)
        splits[split] = Examples(
            labelled=(*(e for e in labelled if split_of(e.prompt) == split), *world.labelled),
            pairs=(*(p for p in pairs if split_of(p.prompt) == split), *world.pairs),
        )
    return splits


@dataclass(frozen=True, slots=True)
class _ClipTokens:
    """The cached outputs of CLAP for a clip."""

    hidden_AC: Tensor
    """float16."""
    seconds_A: Tensor
    """Centre of each token, in seconds from the clip's start."""
    embedding_D: Tensor
    """The pooled embedding; of width 0 if it was not computed."""


class _ClipDataset(Dataset[tuple[Waveform, int] | str]):
    """Reads clips by index: a waveform and its sampling rate, or the reason why it can't be read."""

    def __init__(self, clips: Sequence[Clip]) -> None:
        self.clips = clips

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> tuple[Waveform, int] | str:
        try:
            return self.clips[index].read()
        except (OSError, ValueError) as error:
            return short_message(error)


class ClapTokens:
    """CLAP's tokens of clips and prompts, computed once.

    Tokens of clips are cached on disk by the digest of the clip's content, in files of up to `SHARD` clips
    (float16), in a folder by CLAP's digest. Files are written atomically, so a resumed run computes only what
    is missing. Tokens of prompts are cached in memory.
    """

    def __init__(
        self, folder: Path, clap: ClapModel, clap_digest: str, accelerator: Accelerator, *, workers: int = 0
    ) -> None:
        self.folder = folder / f"tokens-{clap_digest.removeprefix('sha256:')[:16]}-{DECODER}"
        self.clap, self.accelerator, self.workers = clap, accelerator, workers
        self._files: set[Path] = set()
        self._known: dict[str, _ClipTokens] = {}
        self._entries: dict[Clip, _ClipTokens] = {}
        self._texts: dict[str, Tensor] = {}

    def add(self, clips: Iterable[Clip], *, scored: bool = False) -> dict[Clip, str]:
        """Compute the missing tokens of `clips`, divided among the processes.

        `scored` also computes the embeddings that `scores` needs. Returns the unreadable clips with reasons.
        Raises `OutputError` if the cache can't be written.
        """
        self._load()
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        unique = list(dict.fromkeys(clips))
        digests: dict[Clip, str] = {}
        unreadable: dict[int, str] = {}
        own = range(rank, len(unique), processes)
        missing = []
        for number in own:
            try:
                digests[unique[number]] = digest = unique[number].digest
            except (OSError, ValueError) as error:
                unreadable[number] = short_message(error)
                continue
            known = self._known.get(digest)
            if known is None or (scored and not known.embedding_D.numel()):
                missing.append(number)
        loader = DataLoader(
            _ClipDataset([unique[number] for number in missing]),
            batch_size=BATCH,
            num_workers=self.workers if len(missing) > BATCH else 0,
            collate_fn=list,
        )
        bar = progress(total=len(missing), desc="CLAP tokens", unit="clip", disable=rank > 0)
        pending: dict[str, _ClipTokens] = {}
        with bar:
            for index, batch in enumerate(loader):
                numbers = missing[index * BATCH :][: len(batch)]
                waveforms = {}
                for number, clip in zip(numbers, batch, strict=True):
                    if isinstance(clip, str):
                        unreadable[number] = clip
                    else:
                        waveforms[digests[unique[number]]] = clip
                pending |= self._compute(waveforms, scored)
                bar.update(len(batch))
                if (index + 1) % (SHARD // BATCH) == 0:
                    self._save(pending)
                    pending = {}
            self._save(pending)
        self.accelerator.wait_for_everyone()
        if processes > 1:
            everywhere = gather_object([(dict(unreadable), {n: digests.get(unique[n]) for n in own})])
            unreadable = {n: reason for there, _ in everywhere for n, reason in there.items()}
            digests = {unique[n]: digest for _, there in everywhere for n, digest in there.items() if digest}
        self._load()
        self._entries |= {clip: self._known[d] for clip, d in digests.items() if d in self._known}
        return {unique[number]: reason for number, reason in sorted(unreadable.items())}

    def add_prompts(self, prompts: Iterable[str]) -> None:
        """Compute the tokens of prompts that are used repeatedly."""
        missing = sorted(set(prompts) - self._texts.keys())
        for start in range(0, len(missing), TEXTS):
            part = missing[start : start + TEXTS]
            tokens = self.clap.text_tokens(part)
            for prompt, hidden_LC, mask_L in zip(part, tokens.hidden_BLC, tokens.mask_BL, strict=True):
                self._texts[prompt] = hidden_LC[mask_L].half().cpu()

    def audio(self, clips: Sequence[Clip]) -> AudioTokens:
        """Return the tokens of clips that were added, padded, float32 on CLAP's device."""
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
        """Return the tokens of prompts on CLAP's device, computed now unless all of them were added."""
        if any(prompt not in self._texts for prompt in prompts):
            tokens = self.clap.text_tokens(prompts)
            # Clones, because autograd refuses tensors of inference mode.
            return TextTokens(hidden_BLC=tokens.hidden_BLC.clone(), mask_BL=tokens.mask_BL.clone())
        rows = [self._texts[prompt] for prompt in prompts]
        lengths = torch.tensor([len(row) for row in rows])
        hidden_BLC = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask_BL = torch.arange(hidden_BLC.shape[1]) < lengths[:, None]
        return TextTokens(
            hidden_BLC=hidden_BLC.to(self.clap.device).float(), mask_BL=mask_BL.to(self.clap.device)
        )

    def scores(self, prompts: Sequence[str], clips: Sequence[Clip]) -> Tensor:
        """Return CLAP scores [B], the cosine of pooled embeddings, of clips that were added with `scored`."""
        audio_BD = torch.stack([self._entries[clip].embedding_D for clip in clips]).float()
        return (self.clap.embed_text(prompts) * nn.functional.normalize(audio_BD, dim=-1)).sum(-1)

    def _compute(self, waveforms: Mapping[str, tuple[Waveform, int]], scored: bool) -> dict[str, _ClipTokens]:
        """Return the tokens of a few clips, by digest."""
        if not waveforms:
            return {}
        # The reward model pads short clips with silence; CLAP scores keep the model's own padding.
        windows = [self.clap.prepare(wave, rate, padding="pad") for wave, rate in waveforms.values()]
        tokens = self.clap.audio_tokens(windows, [wave.shape[-1] / rate for wave, rate in waveforms.values()])
        embeddings_BD = torch.empty(len(waveforms), 0)
        if scored:
            embeddings_BD = self.clap.embed_windows([self.clap.prepare(*clip) for clip in waveforms.values()])
        return {
            digest: _ClipTokens(
                hidden_AC[mask_A].half().cpu(), seconds_A[mask_A].float().cpu(), embedding_D.cpu()
            )
            for digest, hidden_AC, seconds_A, mask_A, embedding_D in zip(
                waveforms, tokens.hidden_BAC, tokens.seconds_BA, tokens.mask_BA, embeddings_BD, strict=True
            )
        }

    def _save(self, tokens: Mapping[str, _ClipTokens]) -> None:
        if not tokens:
            return
        entries = list(tokens.values())
        name = hashlib.sha256(" ".join([*tokens, str(entries[0].embedding_D.shape)]).encode()).hexdigest()
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
            save_file(tensors, temporary, metadata={"digests": json.dumps(list(tokens))})
            temporary.replace(path)
        except (OSError, SafetensorError) as error:
            temporary.unlink(missing_ok=True)
            raise OutputError(f"{path} can't be written: {error}") from error

    def _load(self) -> None:
        """Load the files that are not in memory yet. Damaged files are deleted."""
        for path in sorted(set(self.folder.glob("*.safetensors")) - self._files):
            try:
                with safe_open(path, framework="pt") as file:
                    digests = json.loads(file.metadata()["digests"])
                    lengths = file.get_tensor("lengths").tolist()
                    hidden = torch.split(file.get_tensor("hidden"), lengths)
                    seconds = torch.split(file.get_tensor("seconds"), lengths)
                    entries = map(_ClipTokens, hidden, seconds, file.get_tensor("embeddings"))
                    for digest, entry in zip(digests, entries, strict=True):
                        if entry.embedding_D.numel() or digest not in self._known:
                            self._known[digest] = entry
                self._files.add(path)
            except (OSError, ValueError, KeyError, SafetensorError):
                path.unlink(missing_ok=True)
