"""Fine-tune a denoiser by rewards: BATON (arXiv 2402.00744).

    milonga train baton --recipe mini --set data.pairs=pairs.parquet
    milonga train baton --recipe tango2 --set data.labelled=HD.json,RD.json --set data.pretraining=PD.json

Clips that people labelled (HD) or that a reward model scored (RD) are learned with the weight of their
reward; pretraining data (PD) keep the denoiser close to the start.

Shape legend: B batch, X a family's own shape of latents.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from services.errors import invalid
from services.models.reward.model import load_reward
from services.weights.loading import load_clap_model
from training.data.examples import Clip, Examples, LabelledClip, read_labelled, read_pairs
from training.data.prompts import places_of, report_prompts
from training.data.scenes import SceneClip, paraphrase
from training.finetuning.session import (
    FineTuning,
    Session,
    build_policy,
    errors_of,
    finish_session,
    loop_of,
    open_session,
    parquet_files,
    readable,
    report_data,
)
from training.loop.checks import Factor, Natural, Share, check_ranges
from training.loop.fit import Positions, adamw, examples_at, fit
from training.objectives.calibration import sigmoid
from training.objectives.diffusion import reward_weighted
from training.objectives.noising import Noising
from training.reward.data import ClapTokens
from training.reward.report import evaluate_head
from training.soundworld.captions import WEB_CAPTIONS, corrupt
from training.soundworld.scenes import SHORT, draw_truth

SCENES_SEED = 1_717


@dataclass(frozen=True, kw_only=True, slots=True)
class BatonData:
    """The sources of rewarded clips and of pretraining data."""

    labelled: tuple[Path, ...] = ()
    """Lists with labels, as BATON's JSON (`read_labelled`), HD and RD: labels are rewards."""
    pairs: tuple[Path, ...] = ()
    """Parquet files of preference pairs, or folders of them. Each clip is an example: its reward is the
    reward model's probability, without one 1 for the chosen and 0 for the rejected."""
    pretraining: tuple[Path, ...] = ()
    """JSON files of prompts and clips, PD; labels are ignored."""
    scenes: Natural = 0
    """Number of further scenes of the sound world, captioned as badly as the training data of `mini-base`."""
    audio_root: Path | None = None
    """Folder of the audio that they name by relative paths; none: each file's own folder."""
    max_unreadable: Share = 0.05
    """Share of clips that may be unreadable before the training is refused."""

    def __post_init__(self) -> None:
        check_ranges(self)

    def files(self) -> tuple[Path, ...]:
        """Return all files."""
        return (*self.labelled, *parquet_files(self.pairs), *self.pretraining)


@dataclass(frozen=True, kw_only=True, slots=True)
class BatonTraining(FineTuning):
    """One fine-tuning by rewards. The loop's batch counts rewarded clips; as many of pretraining join it."""

    data: BatonData = field(default_factory=BatonData)
    reward: str | None = None
    """URI of the reward model that scores the clips of pairs; none: 1 for the chosen, 0 for the rejected."""
    clap: str = "mini:clap-a"
    """URI of the CLAP model that it was trained on."""
    pretraining_weight: Factor = 1.0
    """Weight of the loss on pretraining data, if there are any."""

    def __post_init__(self) -> None:
        FineTuning.__post_init__(self)


def train_baton(config: BatonTraining, output: Path, *, fresh: bool = False) -> dict[str, Any]:
    """Run the whole program; `output` is then a generator's folder. Returns the report in its training.json.

    ``NAME.run``, next to `output`, has the journal, the checkpoints and, unless there is a shared cache,
    latents. However a run ended, the same call resumes it; with `fresh` it starts over.

    Raises:
        InvalidInputError: settings or data are wrong, or the run that is there has other settings.
        ModelError: the start or the reward model was refused.
        OutputError: `output` can't be written, or holds something else.
    """
    unusable: dict[str, str] = {}
    labelled, paired = read_rewarded(config.data, unusable)
    pretraining = read_pretraining(config.data, unusable) if config.pretraining_weight else []
    models = {"reward": config.reward, "clap": config.clap if config.reward else None}
    session, report = open_session(config, output, config.data.files(), models, fresh=fresh)
    if report is not None:
        return report
    policy = build_policy(config, session.start)
    _, unreadable = readable(
        [*labelled, *paired, *pretraining],
        lambda example: [example.clip],
        lambda example: example.prompt,
        session,
        config.data.max_unreadable,
        unusable,
    )
    # Pairs are flattened into a liked clip and the one that it is compared with.
    liked: list[tuple[Clip, Clip | None]] = [
        (chosen.clip, rejected.clip) for chosen, rejected in zip(paired[::2], paired[1::2], strict=True)
    ]
    liked += [(example.clip, None) for example in labelled if example.label > 0.5]
    content = report_data(
        [*labelled, *paired, *pretraining],
        [pair for pair in liked if not unreadable.keys() & {*pair}],
        session,
    )
    labelled, paired, pretraining = (
        [example for example in part if example.clip not in unreadable]
        for part in (labelled, paired, pretraining)
    )
    if config.reward and paired:
        paired, content["reward_model"] = rewards_as_labels(paired, config, session)
    rewarded = labelled + paired
    if not any(example.label > 0 for example in rewarded):
        raise invalid("data", f"none of {len(rewarded)} clips has a reward above 0: nothing to learn from")
    loop = loop_of(config, len(rewarded))
    fitted = fit(
        policy,
        adamw(policy, loop),
        partial(
            loss_of,
            config=config,
            batch=loop.batch,
            rewarded=rewarded,
            pretraining=pretraining,
            session=session,
        ),
        loop,
        session.run,
        accelerator=session.accelerator,
        title=f"baton {config.name}",
    )
    data = {
        "examples": len(rewarded),
        "pretraining": len(pretraining),
        "mean_reward": sum(example.label for example in rewarded) / len(rewarded),
        "unreadable": {clip.name: why for clip, why in unreadable.items()},
        "unusable_prompts": unusable,
        **content,
    }
    return finish_session(session, policy, "baton", fitted.steps, data)


def read_rewarded(
    data: BatonData, unusable: dict[str, str] | None = None
) -> tuple[list[LabelledClip], list[LabelledClip]]:
    """Return the clips of labelled files, and those of pairs with 1 for chosen and 0 for rejected.

    `unusable` is as in `read_labelled`. Raises `InvalidInputError` if there is none.
    """
    root = data.audio_root
    labelled = [one for path in data.labelled for one in read_labelled(path, root, unusable=unusable)]
    paired = [
        LabelledClip(prompt=pair.prompt, clip=clip, label=label, place=pair.place)
        for path in parquet_files(data.pairs)
        for pair in read_pairs(path, root, unusable=unusable)
        for clip, label in ((pair.chosen, 1.0), (pair.rejected, 0.0))
    ]
    if not labelled and not paired and not unusable:
        raise invalid("data", "holds no rewarded clips; give data.labelled (JSON) or data.pairs (Parquet)")
    return labelled, paired


def read_pretraining(data: BatonData, unusable: dict[str, str] | None = None) -> list[LabelledClip]:
    """Return pretraining data: those of the files, then scenes with a caption of the training split."""
    found = [
        example
        for path in data.pretraining
        for example in read_labelled(path, data.audio_root, label=1.0, unusable=unusable)
    ]
    for index in range(data.scenes):
        rng = np.random.default_rng([SCENES_SEED, index])
        truth = draw_truth(rng, SHORT)
        prompt = None
        while prompt is None:
            prompt = paraphrase(corrupt(truth, WEB_CAPTIONS, rng), rng, "train")
        clip = SceneClip(truth=truth, seed=(SCENES_SEED, index), duration=SHORT.duration, gain=0.0)
        found.append(LabelledClip(prompt=prompt, clip=clip, label=1.0))
    return found


def rewards_as_labels(
    examples: Sequence[LabelledClip], config: BatonTraining, session: Session
) -> tuple[list[LabelledClip], dict[str, Any]]:
    """Return the examples with the reward model's probabilities as labels, and a report on their prompts."""
    found = session.models["clap"]
    clap = load_clap_model(found, str(session.accelerator.device))
    model = load_reward(session.models["reward"].folder, clap, found.digest)
    tokens = ClapTokens(config.latents.cache or session.run, clap, found.digest, session.accelerator)
    # All of them can be read: the same reader has decoded them for the autoencoder.
    tokens.add(example.clip for example in examples)
    tokens.add_prompts(example.prompt for example in examples)
    logits_B = evaluate_head(model.head, Examples(labelled=tuple(examples)), tokens).logits_B
    rewards_B = sigmoid(model.calibrate(logits_B))
    name, quiet = session.models["reward"].identity.name, not session.accelerator.is_main_process
    return (
        [replace(example, label=float(r)) for example, r in zip(examples, rewards_B, strict=True)],
        report_prompts(places_of(examples), clap.prompt_warnings, name, quiet=quiet),
    )


def loss_of(
    policy: nn.Module,
    positions: Positions,
    *,
    config: BatonTraining,
    batch: int,
    rewarded: Sequence[LabelledClip],
    pretraining: Sequence[LabelledClip],
    session: Session,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return BATON's loss of the rewarded examples at `positions`, and of as many of pretraining."""
    seed = config.loop.seed
    picked = [rewarded[index] for index in examples_at(positions, len(rewarded), seed)]
    if pretraining:
        picked += [pretraining[index] for index in examples_at(positions, len(pretraining), seed)]
    clean_BX = session.latents.clips([example.clip for example in picked])
    streams = range(len(picked) // len(positions))
    parts = [session.noising(positions, clean_BX, batch, stream) for stream in streams]
    prompts = [example.prompt for example in picked]
    errors_B = errors_of(policy, clean_BX, prompts, Noising.joined(parts), session).policy_B
    rewards_B = torch.tensor([example.label for example in picked[: len(positions)]], device=errors_B.device)
    rewarded_B, *pretraining_B = errors_B.split(len(positions))
    loss = reward_weighted(
        rewarded_B, rewards_B, *pretraining_B, pretraining_weight=config.pretraining_weight
    )
    figures = {"reward": rewards_B.mean(), "rewarded_error": rewarded_B.detach().mean()}
    if pretraining_B:
        figures["pretraining_error"] = pretraining_B[0].detach().mean()
    return loss, figures
