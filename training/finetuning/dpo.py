"""Align a denoiser with preferences: diffusion-DPO (Tango 2, arXiv 2404.09956, section 3.4).

    milonga train dpo --recipe mini --set data.pairs=pairs.parquet
    accelerate launch -m services.cli train dpo --recipe tango2 --set start=file:sft …

Its journal has, for each step: loss, implicit reward margin and accuracy, the denoising errors of chosen and
rejected clips and how far each has drifted from the reference's. Implicit accuracy misleads: it rises while
the model gets worse. Both drifts rising is the collapse that it does not show; `safeguard` and
`chosen_weight` are against it.

Shape legend: B pairs, X a family's own shape of latents.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

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
from training.loop.checks import Factor, Positive, Range, Share
from training.loop.fit import Positions, adamw, examples_at, fit
from training.objectives.diffusion import denoising_loss, diffusion_dpo, safe_scales
from training.objectives.noising import Noising


@dataclass(frozen=True, kw_only=True, slots=True)
class DpoTraining(FineTuning):
    """One alignment by diffusion-DPO. The loop's batch counts pairs."""

    data: PairData = field(default_factory=PairData)
    beta: Positive = 2000.0
    """Strength of the penalty for moving away from the reference model (the convention: `diffusion_dpo`)."""
    reference: str | None = None
    """URI of the reference model; none: the start."""
    chosen_weight: Factor = 0.0
    """Weight of the plain denoising loss of the chosen clip, added to DPO's to keep its error down; 1 is CRPO
    (arXiv 2412.21037). DPO's gradient is of the order of beta / 2 times that of this loss."""
    supervised_epochs: Annotated[float, Range(0, 10**6)] = 0.0
    """Passes over the chosen clips by the plain denoising loss before the `epochs` of DPO, by the same
    optimiser and schedule, as upstream's program does. It needs `epochs`."""
    safeguard: Share | None = None
    """Diffusion-SDPO (arXiv 2511.03317): scale the rejected clip's gradient so that the chosen clip's error
    falls, to first order, by at least this share of what it would fall by without the rejected clip
    (`safe_scales`). 0: the error does not rise; 1: the rejected clip is hardly used. None: plain DPO."""

    def __post_init__(self) -> None:
        FineTuning.__post_init__(self)
        if self.supervised_epochs and not self.epochs:
            raise ValueError("supervised_epochs needs epochs, those of DPO; it is not counted in loop.steps")


def train_dpo(config: DpoTraining, output: Path, *, fresh: bool = False) -> dict[str, Any]:
    """Run the whole program; `output` is then a generator's folder. Returns the report in its training.json.

    ``NAME.run``, next to `output`, has the journal, the checkpoints and, unless there is a shared cache,
    latents. However a run ended, the same call resumes it; with `fresh` it starts over.

    Raises:
        InvalidInputError: settings or data are wrong, the reference is of another architecture, or the run
            that is there has other settings.
        ModelError: start or reference was refused.
        OutputError: `output` can't be written, or holds something else.
    """
    unusable: dict[str, str] = {}
    pairs = config.data.read(unusable)
    session, report = open_session(
        config, output, config.data.files(), {"reference": config.reference}, fresh=fresh
    )
    if report is not None:
        return report
    policy = build_policy(config, session.start, session.models.get("reference", session.start))
    pairs, unreadable = readable(
        pairs,
        lambda pair: [pair.chosen, pair.rejected],
        lambda pair: pair.prompt,
        session,
        config.data.max_unreadable,
        unusable,
    )
    content = report_data(pairs, [(pair.chosen, pair.rejected) for pair in pairs], session)
    loop = loop_of(replace(config, epochs=config.epochs + config.supervised_epochs), len(pairs))
    fitted = fit(
        policy,
        adamw(policy, loop),
        partial(loss_of, config=config, batch=loop.batch, pairs=pairs, session=session),
        loop,
        session.run,
        accelerator=session.accelerator,
        title=f"dpo {config.name}",
    )
    data = {
        "examples": len(pairs),
        "unreadable": {clip.name: why for clip, why in unreadable.items()},
        "unusable_prompts": unusable,
        **content,
    }
    return finish_session(session, policy, "dpo", fitted.steps, data)


def loss_of(
    policy: nn.Module,
    positions: Positions,
    *,
    config: DpoTraining,
    batch: int,
    pairs: Sequence[Pair],
    session: Session,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss of the pairs at `positions`: all clips in one batch, chosen before rejected ones."""
    picked = [pairs[index] for index in examples_at(positions, len(pairs), config.loop.seed)]
    if positions[0] // batch < math.ceil(config.supervised_epochs * len(pairs) / batch):
        return _supervised_loss(policy, positions, batch, picked, session)
    clips = [pair.chosen for pair in picked] + [pair.rejected for pair in picked]
    clean_BX = session.latents.clips(clips)
    noising = session.noising(positions, clean_BX, batch)
    prompts = [pair.prompt for pair in picked] * 2
    errors = errors_of(policy, clean_BX, prompts, Noising.joined([noising] * 2), session)
    assert errors.reference_B is not None
    chosen_B, rejected_B = errors.policy_B.chunk(2)
    scales_B = None
    if config.safeguard is not None:
        scales_B = safe_scales(*errors.residuals_BX.chunk(2), margin=config.safeguard)
    preference = diffusion_dpo(
        chosen_B,
        rejected_B,
        *errors.reference_B.chunk(2),
        beta=config.beta,
        chosen_weight=config.chosen_weight,
        rejected_scales_B=scales_B,
    )
    figures = {} if scales_B is None else {"rejected_scale": scales_B.mean()}
    return preference.loss, figures | {
        "margin": preference.margins_B.mean(),
        "accuracy": preference.accuracy,
        "chosen_error": chosen_B.detach().mean(),
        "rejected_error": rejected_B.detach().mean(),
        "chosen_drift": preference.chosen_drifts_B.mean(),
        "rejected_drift": preference.rejected_drifts_B.mean(),
    }


def _supervised_loss(
    policy: nn.Module, positions: Positions, batch: int, pairs: Sequence[Pair], session: Session
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the denoising loss of the chosen clips."""
    clean_BX = session.latents.clips([pair.chosen for pair in pairs])
    noising = session.noising(positions, clean_BX, batch)
    errors = errors_of(policy, clean_BX, [pair.prompt for pair in pairs], noising, session)
    assert errors.reference_B is not None
    error = errors.policy_B.detach().mean()
    return denoising_loss(errors.policy_B), {
        "chosen_error": error,
        "chosen_drift": error - errors.reference_B.mean(),
    }
