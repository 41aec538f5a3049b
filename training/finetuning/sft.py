"""Fine-tune a denoiser on the chosen clips of pairs, or on clips with captions: the plain denoising loss.

    milonga train sft --recipe mini --set data.pairs=pairs.parquet
    milonga train sft --recipe mini --set captions=captions.jsonl
    accelerate launch -m services.cli train sft --recipe tango2 …

`milonga serve generation --model file:…` serves what it writes, and `train_dpo` can start from it. It is the
paper's first step (one epoch), and the control that any gain of DPO is measured against.

Shape legend: B batch, X a family's own shape of latents.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from training.data.captions import CaptionExample, read_examples
from training.data.examples import Clip
from training.data.recordings import list_files
from training.finetuning.held_out import compare_errors, held_out_errors
from training.finetuning.session import (
    FineTuning,
    PairData,
    Session,
    build_policy,
    errors_of,
    finish_session,
    loop_of,
    open_session,
    readable,
    report_data,
)
from training.loop.checks import Factor
from training.loop.fit import Positions, adamw, examples_at, fit
from training.objectives.diffusion import denoising_loss


@dataclass(frozen=True, kw_only=True, slots=True)
class SftTraining(FineTuning):
    """One supervised fine-tuning. Each pair's chosen clip is an example, as often as it was chosen."""

    data: PairData = field(default_factory=PairData)
    captions: tuple[Path, ...] = ()
    """Lists or folders of clips with captions (`training.data.captions`), with pairs or without."""
    min_snr: Factor = 0.0
    """Gamma of min-SNR weights (upstream takes 5 in pretraining); 0: all timesteps weigh the same."""

    def __post_init__(self) -> None:
        FineTuning.__post_init__(self)

    @property
    def has_pairs(self) -> bool:
        """Return whether pairs are read; without captions they must be there."""
        return bool(self.data.pairs) or not self.captions

    def files(self) -> tuple[Path, ...]:
        """Return the files of pairs and of captions. Raises `InvalidInputError` if there is none."""
        pairs = self.data.files() if self.has_pairs else ()
        return (*pairs, *(file for path in self.captions for file in list_files(path)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Captioned:
    """Examples from elsewhere than the config's files, and clips that are held out."""

    examples: tuple[CaptionExample, ...]
    held_out: tuple[CaptionExample, ...]
    """The report compares their denoising error before and after."""
    digest: str
    """Of what determines them; a run is bound to it."""
    unusable: Mapping[str, str]
    """The reason by the row of each unusable caption."""
    about: Mapping[str, Any]
    """Entries of the report on the data."""


def train_sft(
    config: SftTraining, output: Path, *, fresh: bool = False, captioned: Captioned | None = None
) -> dict[str, Any]:
    """Run the whole program; `output` is then a generator's folder. Returns the report in its training.json.

    `captioned` replaces the data of the config.

    ``NAME.run``, next to `output`, has the journal, the checkpoints and, unless there is a shared cache,
    latents. However a run ended, the same call resumes it; with `fresh` it starts over.

    Raises:
        InvalidInputError: settings or data are wrong, or the run that is there has other settings.
        ModelError: the start was refused.
        OutputError: `output` can't be written, or holds something else.
    """
    unusable: dict[str, str] = {}
    pairs = config.data.read(unusable) if config.has_pairs and captioned is None else []
    files: tuple[Path, ...] = ()
    if captioned is not None:
        given = captioned.examples
    else:
        root, files = config.data.audio_root, config.files()
        chosen = [CaptionExample(clip=one.chosen, caption=one.prompt, place=one.place) for one in pairs]
        read = [one for path in config.captions for one in read_examples(path, root, unusable)]
        given = (*chosen, *read)
    digests = {} if captioned is None else {"recordings_digest": captioned.digest}
    session, report = open_session(config, output, files, {}, fresh=fresh, digests=digests)
    if report is not None:
        return report
    held_out = captioned.held_out if captioned is not None else ()
    usable, unreadable = readable(
        [*given, *held_out],
        lambda example: [example.clip],
        lambda example: example.caption,
        session,
        config.data.max_unreadable,
        unusable if captioned is None else captioned.unusable,
    )
    held_out = tuple(example for example in held_out if example.clip not in unreadable)
    examples = usable[: len(usable) - len(held_out)]
    left = {example.clip for example in examples}
    clips: list[tuple[Clip, Clip | None]] = [(pair.chosen, pair.rejected) for pair in pairs]
    clips += [(example.clip, None) for example in given[len(pairs) :]]
    content = report_data(examples, [one for one in clips if one[0] in left], session)
    loop = loop_of(config, len(examples))
    policy = build_policy(config, session.start)
    before = held_out_errors(policy, held_out, session)
    fitted = fit(
        policy,
        adamw(policy, loop),
        partial(loss_of, config=config, batch=loop.batch, examples=examples, session=session),
        loop,
        session.run,
        accelerator=session.accelerator,
        title=f"sft {config.name}",
    )
    data = {
        "examples": len(examples),
        "unreadable": {clip.name: why for clip, why in unreadable.items()},
        "unusable_prompts": unusable if captioned is None else dict(captioned.unusable),
        **content,
        **(captioned.about if captioned is not None else {}),
    }
    if held_out:
        data["held_out"] = compare_errors(before, held_out_errors(policy, held_out, session))
    return finish_session(session, policy, "sft", fitted.steps, data)


def loss_of(
    policy: nn.Module,
    positions: Positions,
    *,
    config: SftTraining,
    batch: int,
    examples: Sequence[CaptionExample],
    session: Session,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the denoising loss of the clips at `positions`."""
    picked = [examples[index] for index in examples_at(positions, len(examples), config.loop.seed)]
    clean_BX = session.latents.clips([example.clip for example in picked])
    noising = session.noising(positions, clean_BX, batch)
    captions = [example.caption for example in picked]
    errors_B = errors_of(policy, clean_BX, captions, noising, session).policy_B
    weights_B = (
        session.objective.min_snr_weights(noising.timesteps_B.to(errors_B.device), config.min_snr)
        if config.min_snr
        else None
    )
    return denoising_loss(errors_B, weights_B), {"chosen_error": errors_B.detach().mean()}
