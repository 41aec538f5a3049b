"""Fine-tune a denoiser on the chosen clips of pairs, or on clips with captions: the plain denoising loss.

    milonga train sft --recipe mini --set data.pairs=pairs.parquet
    milonga train sft --recipe mini --set captions=captions.jsonl
    accelerate launch -m services.cli train sft --recipe tango2 …

`milonga serve generation --model file:…` serves what it writes, and `train_dpo` can start from it. It is the
paper's first step (one epoch), and the control that any gain of DPO is measured against.

Shape legend: B batch, X a family's own shape of latents.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from training.data.captions import CaptionExample, read_examples
from training.data.examples import Clip
from training.data.recordings import list_files
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


def train_sft(config: SftTraining, output: Path, *, fresh: bool = False) -> dict[str, Any]:
    """Run the whole program; `output` is then a generator's folder. Returns the report in its training.json.

    ``NAME.run``, next to `output`, has the journal, the checkpoints and, unless there is a shared cache,
    latents. However a run ended, the same call resumes it; with `fresh` it starts over.

    Raises:
        InvalidInputError: settings or data are wrong, or the run that is there has other settings.
        ModelError: the start was refused.
        OutputError: `output` can't be written, or holds something else.
    """
    unusable: dict[str, str] = {}
    pairs = config.data.read(unusable) if config.has_pairs else []
    root = config.data.audio_root
    captioned = [one for path in config.captions for one in read_examples(path, root, unusable)]
    chosen = [CaptionExample(clip=one.chosen, caption=one.prompt, place=one.place) for one in pairs]
    examples = chosen + captioned
    session, report = open_session(config, output, config.files(), {}, fresh=fresh)
    if report is not None:
        return report
    examples, unreadable = readable(
        examples,
        lambda example: [example.clip],
        lambda example: example.caption,
        session,
        config.data.max_unreadable,
        unusable,
    )
    left = {example.clip for example in examples}
    clips: list[tuple[Clip, Clip | None]] = [(pair.chosen, pair.rejected) for pair in pairs]
    clips += [(example.clip, None) for example in captioned]
    content = report_data(examples, [one for one in clips if one[0] in left], session)
    loop = loop_of(config, len(examples))
    policy = build_policy(config, session.start)
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
        "unusable_prompts": unusable,
        **content,
    }
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
