"""Fine-tune a denoiser on the chosen clips of preference pairs: the plain denoising loss.

    milonga train sft --recipe mini --set data.pairs=pairs.parquet
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

from training.data.examples import Pair
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
from training.loop.checks import check_minimum
from training.loop.fit import Positions, adamw, examples_at, fit
from training.objectives.diffusion import denoising_loss


@dataclass(frozen=True, kw_only=True, slots=True)
class SftTraining(FineTuning):
    """One supervised fine-tuning. Each pair's chosen clip is an example, as often as it was chosen."""

    data: PairData = field(default_factory=PairData)
    min_snr: float = 0.0
    """Gamma of min-SNR weights (upstream takes 5 in pretraining); 0: all timesteps weigh the same."""

    def __post_init__(self) -> None:
        FineTuning.__post_init__(self)
        check_minimum(self, 0, "min_snr")


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
    pairs = config.data.read(unusable)
    session, report = open_session(config, output, config.data.files(), {}, fresh=fresh)
    if report is not None:
        return report
    pairs, unreadable = readable(
        pairs,
        lambda pair: [pair.chosen],
        lambda pair: pair.prompt,
        session,
        config.data.max_unreadable,
        unusable,
    )
    content = report_data(pairs, [(pair.chosen, pair.rejected) for pair in pairs], session)
    loop = loop_of(config, len(pairs))
    policy = build_policy(config, session.start)
    fitted = fit(
        policy,
        adamw(policy, loop),
        partial(loss_of, config=config, batch=loop.batch, pairs=pairs, session=session),
        loop,
        session.run,
        accelerator=session.accelerator,
        title=f"sft {config.name}",
    )
    data = {
        "examples": len(pairs),
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
    pairs: Sequence[Pair],
    session: Session,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the denoising loss of the chosen clips at `positions`."""
    picked = [pairs[index] for index in examples_at(positions, len(pairs), config.loop.seed)]
    clean_BX = session.latents.clips([pair.chosen for pair in picked])
    noising = session.noising(positions, clean_BX, batch)
    errors_B = errors_of(policy, clean_BX, [pair.prompt for pair in picked], noising, session).policy_B
    weights_B = (
        session.objective.min_snr_weights(noising.timesteps_B.to(errors_B.device), config.min_snr)
        if config.min_snr
        else None
    )
    return denoising_loss(errors_B, weights_B), {"chosen_error": errors_B.detach().mean()}
