"""Recipes: functions that return a whole config. A variant is `replace(recipe(), …)`, or ``--set``."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Final, TypeVar

from services.errors import invalid
from training.captioning.data import CaptionData, WorldClips
from training.captioning.train import CaptionerTraining
from training.data.latents import LatentConfig
from training.data.scenes import SoundworldData
from training.data.specaugment import SpecAugmentConfig
from training.finetuning.baton import BatonData, BatonTraining
from training.finetuning.distill import DistillTraining, WorldPrompts
from training.finetuning.dpo import DpoTraining
from training.finetuning.sft import SftTraining
from training.loop.fit import LoopConfig
from training.objectives.noising import NoisingConfig
from training.reward.data import DataConfig
from training.reward.train import HeadConfig, RewardTraining

Recipe = TypeVar("Recipe")


def reward_mini() -> RewardTraining:
    """The embedded reward model: minutes on two cores, from annotators who err one time in twenty."""
    return RewardTraining(
        name="reward",
        clap="mini:clap-a",
        objective="both",
        data=DataConfig(
            soundworld=SoundworldData(contrasts=2_000, rebuilt=0.2, generated=50, noise=0.05), workers=2
        ),
        loop=LoopConfig(
            steps=900, batch=32, learning_rate=1e-3, warmup=100, ema=0.995, device="cpu", threads=1
        ),
        label_smoothing=0.05,
        evaluate_every=100,
        patience=4,
    )


def reward_smoke() -> RewardTraining:
    """Seconds, for tests: a few steps on a few scenes. It learns nothing."""
    return RewardTraining(
        name="smoke",
        clap="mini:clap-a",
        objective="both",
        data=DataConfig(soundworld=SoundworldData(contrasts=12, held_out=6, long=0.0, rebuilt=0.0)),
        loop=LoopConfig(steps=6, batch=4, warmup=2, device="cpu", threads=1),
        head=HeadConfig(width=16, heads=2, layers=1, feedforward=16),
        evaluate_every=3,
    )


def reward_baton() -> RewardTraining:
    """BATON's reward model (arXiv 2402.00744) on LAION's CLAP: binary cross-entropy on people's labels.

    Give ``data.labelled`` and ``data.audio_root``. The objective and the frozen CLAP are the paper's. Its
    learning rate and number of steps are not known to us: these are ours, for about 2,700 labelled clips. So
    is the head: the paper's is a multilayer perceptron on pooled embeddings.
    """
    return RewardTraining(
        name="baton",
        clap="laion:630k-audioset-best.pt",
        objective="bce",
        data=DataConfig(workers=4),
        loop=LoopConfig(
            steps=2_000, batch=64, learning_rate=1e-4, warmup=100, weight_decay=0.05, mixed_precision="bf16"
        ),
        head=HeadConfig(width=256, heads=8, layers=2, feedforward=512, dropout=0.2),
        label_smoothing=0.05,
        evaluate_every=50,
        patience=10,
        license="CC-BY-NC-SA-4.0",
    )


REWARD: Final[Mapping[str, Callable[[], RewardTraining]]] = {
    "mini": reward_mini,
    "smoke": reward_smoke,
    "baton": reward_baton,
}
"""Recipes of `milonga train reward`."""


def captioning_mini() -> CaptionerTraining:
    """A new projector and new adapters between the embedded captioner's encoder and its language model, as in
    SLAM-AAC's pre-training, on scenes: minutes on two cores. The embedded captioner, whose language model
    learned with its projector, is better.
    """
    return CaptionerTraining(
        name="captioner",
        start="mini:captioner",
        scratch=True,
        data=CaptionData(world=WorldClips(scenes=2_048, held_out=128, rebuilt=0.25, wording="plain")),
        loop=LoopConfig(
            steps=1_000, batch=16, learning_rate=2e-3, warmup=30, decay=0.9, device="cpu", threads=1
        ),
        # An event lasts a second or so: stripes of SLAM-AAC's width could cover it.
        spec_augment=SpecAugmentConfig(time_width=16),
        evaluate_every=100,
    )


def captioning_smoke() -> CaptionerTraining:
    """Seconds, for tests: a few steps on a few scenes. It learns nothing."""
    return CaptionerTraining(
        name="captioner-smoke",
        start="mini:captioner",
        data=CaptionData(
            world=WorldClips(scenes=8, held_out=4, long=0.0, rebuilt=0.0, wording="plain"), workers=1
        ),
        loop=LoopConfig(steps=6, batch=4, warmup=2, device="cpu", threads=1),
        evaluate_every=3,
    )


def captioning_slam_aac_pretrain() -> CaptionerTraining:
    """SLAM-AAC's pre-training (SLAM-LLM at a68e78f, ``slam_aac``): AudioCaps, Clotho, WavCaps and MACS.

    Give ``start``, a folder of `milonga convert-captioner` with EAT and Vicuna, and ``data.train``. Projector
    and adapters are new; nothing is validated, and the last weights are kept. Three epochs are the source's
    default; its released weights are of the fourth. Gradients are not clipped.
    """
    return CaptionerTraining(
        name="slam-aac-pretrained",
        start="file:slam-aac",
        scratch=True,
        epochs=3.0,
        data=CaptionData(),
        loop=LoopConfig(
            steps=1,
            batch=16,
            seed=666,
            learning_rate=1e-4,
            warmup=1_000,
            horizon=100_000,
            decay=0.99,
            weight_decay=0.0,
            betas=(0.9, 0.999),
            clip=0.0,
            mixed_precision="fp16",
            checkpoint_seconds=900.0,
        ),
        evaluate_every=0,
        dtype="float16",
    )


def captioning_slam_aac_audiocaps() -> CaptionerTraining:
    """SLAM-AAC's fine-tuning on AudioCaps, from what `captioning_slam_aac_pretrain` made.

    Give ``data.train`` and ``data.validation``. The weights with the lowest loss on validation are kept.
    """
    pretraining = captioning_slam_aac_pretrain()
    return replace(
        pretraining,
        name="slam-aac-audiocaps",
        start="file:build/captioning/slam-aac-pretrained",
        scratch=False,
        loop=replace(pretraining.loop, batch=4, seed=42, learning_rate=8e-6),
        evaluate_every=500,
    )


def captioning_slam_aac_clotho() -> CaptionerTraining:
    """SLAM-AAC's fine-tuning on Clotho with paraphrased captions; all else as for AudioCaps.

    Give ``data.train``, with the list of `milonga train paraphrase` too, and
    ``data.validation``.
    """
    audiocaps = captioning_slam_aac_audiocaps()
    return replace(audiocaps, name="slam-aac-clotho", loop=replace(audiocaps.loop, seed=10_086))


CAPTIONING: Final[Mapping[str, Callable[[], CaptionerTraining]]] = {
    "mini": captioning_mini,
    "smoke": captioning_smoke,
    "slam-aac-pretrain": captioning_slam_aac_pretrain,
    "slam-aac-audiocaps": captioning_slam_aac_audiocaps,
    "slam-aac-clotho": captioning_slam_aac_clotho,
}
"""Recipes of `milonga train captioning`."""


def recipe(recipes: Mapping[str, Callable[[], Recipe]], name: str) -> Recipe:
    """Return the config of the recipe `name`. Raises `InvalidInputError` if there is none."""
    if name not in recipes:
        raise invalid("--recipe", f"is {name!r}, must be one of {', '.join(recipes)}")
    return recipes[name]()


MINI_NOISING: Final = NoisingConfig(blank=0.25, blank_from=900, late=0.25, late_from=800)
"""As the mini denoisers were trained: order is decided in the first steps of inference, from noise alone."""
TANGO2_LOOP: Final = LoopConfig(
    steps=1,
    batch=32,
    accumulation=4,
    learning_rate=9.6e-7,
    warmup=200,
    betas=(0.9, 0.999),
    weight_decay=0.01,
    clip=0.0,
    mixed_precision="bf16",
    checkpoint_seconds=900.0,
)
"""AdamW as upstream has it, no clipping. docs/training.md lists what differs from upstream, with reasons."""
TANGO2_LATENTS: Final = LatentConfig(duration=10.24, normalise=True)
"""Clips without their mean, at a peak of 1/2 before the cut."""


def sft_mini() -> SftTraining:
    """One pass over some thousand chosen clips on two cores, in minutes."""
    return SftTraining(
        name="sft",
        loop=LoopConfig(
            steps=200,
            batch=32,
            learning_rate=1e-4,
            warmup=20,
            decay=0.9,
            ema=0.0,
            mixed_precision="bf16",
            device="cpu",
            threads=1,
        ),
        noising=replace(MINI_NOISING, condition_dropout=0.1),
    )


def sft_smoke() -> SftTraining:
    """Seconds, for tests: a few steps on a few pairs. It learns nothing."""
    return SftTraining(
        name="sft-smoke",
        loop=LoopConfig(steps=3, batch=4, learning_rate=1e-4, warmup=2, device="cpu", threads=1),
        noising=replace(MINI_NOISING, condition_dropout=0.1),
    )


def sft_tango2() -> SftTraining:
    """The paper's first epoch (TANGO.md, "Diffusion-DPO"): chosen clips only, all else as in `dpo_tango2`.

    Give ``start`` (Tango-full-FT, converted) and ``data.pairs`` (audio-alpaca). 470 steps of 15,025 pairs.
    """
    return SftTraining(
        name="tango2-sft",
        start="file:tango-full-ft-audiocaps",
        epochs=1.0,
        loop=replace(TANGO2_LOOP, steps=470, decay=1 - 200 / 470),
        latents=TANGO2_LATENTS,
    )


def dpo_mini() -> DpoTraining:
    """`mini-base` taught by some hundred pairs, on two cores in minutes."""
    return DpoTraining(
        name="dpo",
        loop=LoopConfig(
            steps=200,
            batch=32,
            learning_rate=1e-4,
            warmup=25,
            decay=1 - 25 / 200,
            mixed_precision="bf16",
            device="cpu",
            threads=1,
        ),
        noising=MINI_NOISING,
        beta=125.0,
    )


def dpo_mini_safeguarded() -> DpoTraining:
    """`dpo_mini` with Diffusion-SDPO's safeguard (arXiv 2511.03317), as its authors set it for SD 1.5.

    With a margin of 0 it does not act on `mini-base`: all factors were 1 in 64 pairs. With .9 their mean was
    .60, over 9 steps of 16 pairs.
    """
    return replace(dpo_mini(), name="dpo-safeguarded", safeguard=0.9)


def dpo_mini_crpo() -> DpoTraining:
    """`dpo_mini` with the chosen clips' denoising loss added, as CRPO (arXiv 2412.21037).

    TangoFlux adds it with a weight of 1 to a beta of 2000, where DPO's gradient is up to 1,000 times as
    large. This weight is a fifth of `dpo_mini`'s beta / 2.
    """
    return replace(dpo_mini(), name="dpo-crpo", chosen_weight=25.0)


def dpo_smoke() -> DpoTraining:
    """Seconds, for tests: a few steps on a few pairs. It learns nothing."""
    return DpoTraining(
        name="dpo-smoke",
        loop=LoopConfig(steps=3, batch=4, learning_rate=1e-4, warmup=2, device="cpu", threads=1),
        noising=MINI_NOISING,
        beta=500.0,
    )


def dpo_tango2() -> DpoTraining:
    """Tango 2 (arXiv 2404.09956): beta 2000, learning rate 9.6e-7, four epochs of effective batch 32.

    Give ``start`` (what `sft_tango2` made), ``reference`` (Tango-full-FT: upstream's reference is a copy from
    before the supervised epoch) and ``data.pairs`` (audio-alpaca). The paper's two A100 had 4 pairs each in
    4 parts: ``accelerate launch --num_processes 2``. 1,879 steps of 15,025 pairs.
    """
    return DpoTraining(
        name="tango2",
        start="file:build/sft/tango2-sft",
        reference="file:tango-full-ft-audiocaps",
        epochs=4.0,
        # Not bf16, whose rounding is larger than the margin (benchmarks/margins.py).
        loop=replace(TANGO2_LOOP, steps=1_879, decay=1 - 200 / 1_879, mixed_precision="tf32"),
        latents=TANGO2_LATENTS,
        beta=2000.0,
    )


def dpo_tango2_as_released() -> DpoTraining:
    """Tango 2 as upstream's program trains it (declare-lab/tango, tango2/tango2-train.py, by its README).

    Give ``start`` (Tango-full-FT, which is the reference too) and ``data.pairs`` (audio-alpaca). One
    optimiser and one schedule for the supervised epoch and four of DPO, in float32. Upstream's schedule
    counts six epochs of one process in parts of four, and is stepped once per process: on two, warm-up takes
    400 steps, and the rate would reach zero at step 11,280. The 2,348 steps of 15,025 pairs end at 0.82.
    """
    horizon, warmup = 11_280, 400
    return DpoTraining(
        name="tango2-as-released",
        start="file:tango-full-ft-audiocaps",
        epochs=4.0,
        supervised_epochs=1.0,
        loop=replace(
            TANGO2_LOOP,
            steps=2_348,
            warmup=warmup,
            horizon=horizon,
            decay=1 - warmup / horizon,
            mixed_precision="no",
        ),
        noising=NoisingConfig(stratified=False),
        latents=replace(
            TANGO2_LATENTS,
            normalise_cut=True,
            channel="first",
            posterior="sample",
            dtype="float32",
            encode_online=True,
        ),
        beta=2000.0,
    )


def baton_mini() -> BatonTraining:
    """`mini-base` by the embedded reward model's judgement of the clips of pairs, on two cores in minutes."""
    return BatonTraining(
        name="baton",
        loop=LoopConfig(
            steps=200,
            batch=16,
            learning_rate=1e-4,
            warmup=20,
            decay=0.9,
            mixed_precision="bf16",
            device="cpu",
            threads=1,
        ),
        noising=replace(MINI_NOISING, condition_dropout=0.1),
        data=BatonData(scenes=1_024),
        reward="mini:reward",
    )


def baton_smoke() -> BatonTraining:
    """Seconds, for tests: a few steps on a few clips. It learns nothing."""
    return BatonTraining(
        name="baton-smoke",
        loop=LoopConfig(steps=3, batch=4, learning_rate=1e-4, warmup=2, device="cpu", threads=1),
        noising=replace(MINI_NOISING, condition_dropout=0.1),
        data=BatonData(scenes=4),
    )


def baton_tango2() -> BatonTraining:
    """BATON (arXiv 2402.00744) on Tango-full-FT, as its authors did.

    Give ``start``, ``data.labelled`` (HD and RD) and ``data.pretraining`` (PD). The learning rate, the number
    of epochs and the regulariser's weight are ours.
    """
    return BatonTraining(
        name="tango-baton",
        start="file:tango-full-ft-audiocaps",
        epochs=10.0,
        loop=replace(TANGO2_LOOP, steps=1_000, learning_rate=1e-5, decay=0.8),
        noising=NoisingConfig(condition_dropout=0.1),
        latents=TANGO2_LATENTS,
    )


def distill_mini() -> DistillTraining:
    """A student of `mini` on two cores, in hours."""
    return DistillTraining(
        name="mini-student",
        start="mini",
        world=WorldPrompts(count=40_000),
        durations=(2.56, 2.56, 2.56, 2.56, 2.56, 5.12),
        loop=LoopConfig(
            steps=12_000,
            batch=16,
            learning_rate=5e-4,
            warmup=100,
            decay=0.4,
            ema=0.999,
            mixed_precision="bf16",
            device="cpu",
            threads=1,
        ),
    )


def distill_smoke() -> DistillTraining:
    """Seconds, for tests: a few steps on a few prompts. It learns nothing."""
    return DistillTraining(
        name="distill-smoke",
        start="mini",
        world=WorldPrompts(count=8),
        loop=LoopConfig(steps=3, batch=2, learning_rate=1e-4, warmup=2, device="cpu", threads=1),
    )


def distill_tango2() -> DistillTraining:
    """A student of Tango 2 (arXiv 2404.09956).

    Give ``start`` (Tango 2, converted) and ``prompts`` (AudioCaps' captions). ConsistencyTTA (arXiv
    2309.10740) distils Tango by batches of 64 at a rate of 1e-5; the number of steps is ours, as is all that
    differs between the two objectives. Not run: no GPU was to be had.
    """
    return DistillTraining(
        name="tango2-student",
        start="file:tango2",
        durations=(10.24,),
        loop=replace(
            TANGO2_LOOP,
            steps=20_000,
            batch=64,
            learning_rate=1e-5,
            warmup=500,
            decay=0.4,
            ema=0.999,
            clip=1.0,
        ),
        gradient_checkpointing=True,
    )


SFT: Final[Mapping[str, Callable[[], SftTraining]]] = {
    "mini": sft_mini,
    "smoke": sft_smoke,
    "tango2": sft_tango2,
}
"""Recipes of `milonga train sft`."""

DISTILL: Final[Mapping[str, Callable[[], DistillTraining]]] = {
    "mini": distill_mini,
    "smoke": distill_smoke,
    "tango2": distill_tango2,
}
"""Recipes of `milonga train distill`."""

DPO: Final[Mapping[str, Callable[[], DpoTraining]]] = {
    "mini": dpo_mini,
    "mini-crpo": dpo_mini_crpo,
    "mini-safeguarded": dpo_mini_safeguarded,
    "smoke": dpo_smoke,
    "tango2": dpo_tango2,
    "tango2-as-released": dpo_tango2_as_released,
}
"""Recipes of `milonga train dpo`."""

BATON: Final[Mapping[str, Callable[[], BatonTraining]]] = {
    "mini": baton_mini,
    "smoke": baton_smoke,
    "tango2": baton_tango2,
}
"""Recipes of `milonga train baton`."""
