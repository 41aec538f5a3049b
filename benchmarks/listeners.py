"""Does a model that learns from ratings get better, by a judge that did not rate? With simulated listeners.

    python -m benchmarks.listeners [--prompts 600] [--raters 3] [--noise 0.1] [--work build/listeners]

A listening test of two clips of `mini-base` per prompt is planned, and rated by simulated listeners: the
tagger detects the events of each clip, and misperceives each answer with probability ``--noise``. Then
`milonga train run` learns from the database of ratings: a reward model of ratings alone, which ranks new
candidates, and DPO on both; and, as a control, DPO on the rated pairs alone. The tagger has rated, so it
proves nothing: the round trip through the captioner and CLAP `clap-b` had no part in it. Resumable.
"""

import argparse
import io
import itertools
import json
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any, Final

import numpy as np
import soundfile
import torch

from benchmarks.measuring import machine, write_report
from services.ratings.planning import Make, plan_items
from services.ratings.store import Answers, RatingStore, Verdict, summary
from training.evaluation.config import EvaluationConfig, Sampling, WorldPrompts
from training.evaluation.embedders import Loader, Sound
from training.evaluation.evaluate import evaluate, finished_evaluation
from training.evaluation.events import compare_events
from training.evaluation.prompts import world_prompts
from training.finetuning.dpo import DpoTraining, train_dpo
from training.preferences.pairs import PairsConfig
from training.preferences.sources import SourceConfig, open_source
from training.runs.ratings import with_ratings
from training.runs.recipes import dpo_mini, reward_mini
from training.runs.run import run_loop
from training.runs.run_recipes import LoopRun, ranked_mini, run_mini
from training.soundworld.captions import CaptionTruth, write_caption
from training.soundworld.scenes import SceneConfig, draw_truth

START: Final = "mini-base"
STEPS: Final = 12
BETA: Final = 250.0
SECOND_SEED: Final = 1_000_000
"""First seed of the second clips."""
WORLD: Final = SceneConfig(single=0.05, sequence=0.8)
"""Kinds of prompts: mostly sequences, whose order `mini-base` often gets wrong."""
FIGURES: Final = (
    "present_and_in_order", "presence", "order_given_presence",
    "round_trip_present_and_in_order", "clap.clap-b", "reward",
)  # fmt: skip
"""Figures of the report: the first three by the tagger, the next two by judges that had no part."""


def draw_prompts(count: int, *, seed: int = 0, without: Sequence[str] = ()) -> dict[str, CaptionTruth]:
    """Return distinct prompts of the sound world with their events, none of `without`."""
    prompts: dict[str, CaptionTruth] = {}
    for index in itertools.count():
        rng = np.random.default_rng([1_117, seed, index])
        truth = draw_truth(rng, WORLD)
        text = write_caption(truth, rng)
        if text not in without:
            prompts.setdefault(text, truth)
        if len(prompts) == count:
            return prompts
    raise AssertionError


class Listener:
    """A rater who hears what the tagger detects, and now and then something else."""

    def __init__(self, prompts: Mapping[str, CaptionTruth], *, noise: float, seed: int) -> None:
        """`noise` is the probability that an answer on a clip is the opposite of what the tagger says."""
        self._prompts, self._noise = prompts, noise
        self._rng = np.random.default_rng(seed)
        self._tagger = Loader("cpu").tagger("mini:tagger")

    def rate(self, prompt: str, left: bytes, right: bytes) -> tuple[Verdict, Answers]:
        """Return the better of two clips (files), and BATON's answers on each."""
        decoded = (soundfile.read(io.BytesIO(clip), dtype="float32") for clip in (left, right))
        sounds = [Sound(waveform_N=waveform, sampling_rate=rate) for waveform, rate in decoded]
        truth = self._prompts[prompt]
        heard = [compare_events(truth, found) for found in self._tagger.detect(sounds)]
        present = [self._perceived(one.present) for one in heard]
        in_order = [self._perceived(one.present and one.in_order is not False) for one in heard]
        answers = Answers(
            left_present=present[0],
            left_in_order=in_order[0],
            right_present=present[1],
            right_in_order=in_order[1],
        )
        one, other = zip(in_order, present, strict=True)
        if one != other:
            return ("left" if one > other else "right"), answers
        return ("both_good" if all(one) else "both_bad"), answers

    def _perceived(self, truth: bool) -> bool:
        return truth != (self._rng.random() < self._noise)


def plan(store: RatingStore, prompts: Sequence[str], *, steps: int = STEPS) -> None:
    """Add a study: two clips of `START` per prompt, of different noise, hidden repeats and known answers."""
    maker = open_source(SourceConfig(model=START, threads=1, device="cpu"))

    def make(prompt: str, seed: int) -> bytes:
        made = maker.generate(
            prompt, seed=seed, num_inference_steps=steps, guidance_scale=3.0, encoding="flac"
        )
        return made.clips[0].audio

    def side(first_seed: int) -> Make:
        """Make the clips of the pairs at once, as `plan_items` asks for them, and further ones on demand."""
        seeds = range(first_seed, first_seed + len(prompts))
        made = dict(zip(zip(prompts, seeds, strict=True), pool.map(make, prompts, seeds), strict=True))
        return lambda prompt, seed: made.get((prompt, first_seed + seed)) or make(prompt, first_seed + seed)

    try:
        with ThreadPoolExecutor(8) as pool:
            items = list(plan_items(prompts, side(0), side(SECOND_SEED), repeats=0.1, known=0.05))
    finally:
        maker.close()
    store.add_study(START, START, 0, items)


def rate_all(store: RatingStore, name: str, listener: Listener) -> None:
    """Let a listener rate every pair."""
    rater = store.rater(store.add_rater(name))
    while (shown := store.next_item(rater)[0]) is not None:
        verdict, answers = listener.rate(shown.prompt, store.clip(shown.left), store.clip(shown.right))
        store.rate(rater, shown.id, verdict, answers)


def collect(
    url: str, *, prompts: int, raters: int, noise: float, without: Sequence[str] = (), steps: int = STEPS
) -> dict[str, Any]:
    """Plan the study and have it rated, unless that is done; return its summary."""
    texts = draw_prompts(prompts, without=without)
    store = RatingStore(url)
    try:
        if not store.ratings():
            plan(store, list(texts), steps=steps)
            for number in range(raters):
                rate_all(store, f"listener {number + 1}", Listener(texts, noise=noise, seed=number))
        return summary(store.ratings())
    finally:
        store.close()


def dpo_of(steps: int) -> DpoTraining:
    """Return the recipe's DPO in `steps` steps, with the beta of the committed figures."""
    mini = dpo_mini()
    return replace(mini, beta=BETA, loop=replace(mini.loop, steps=steps, decay=1 - 25 / steps))


def loop_of(url: str, evaluation: EvaluationConfig, per_cluster: int, steps: int) -> LoopRun:
    """Return the whole loop on ratings alone: no truth of the sound world is in the reward model's data."""
    mini = run_mini()
    data = replace(
        mini.reward.data, soundworld=replace(mini.reward.data.soundworld, contrasts=0, generated=0)
    )
    preferences = ranked_mini(per_cluster=per_cluster)
    return replace(
        mini,
        name="listeners",
        reward=replace(reward_mini(), data=data),
        preferences=replace(
            preferences,
            ratings=url,
            candidates=replace(
                preferences.candidates, source=replace(preferences.candidates.source, threads=1, device="cpu")
            ),
            # A reward model of noisy ratings has small margins.
            pairs=PairsConfig(mode="ranked", rank_by="reward", margin=0.0),
        ),
        dpo=dpo_of(steps),
        evaluation=evaluation,
    )


def figures(report: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the deciding figures of a model, and their differences to the start with 95 % intervals."""
    (found,) = (one["differences"]["all"] for one in report["comparisons"] if one["name"] == name)
    return {figure: found[figure] for figure in FIGURES if figure in found}


def main() -> None:
    """Run everything that is not done, print and write the report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prompts", type=int, default=600)
    parser.add_argument("--raters", type=int, default=3)
    parser.add_argument("--noise", type=float, default=0.1)
    parser.add_argument("--per-cluster", type=int, default=8)
    parser.add_argument("--steps", type=int, default=200, help="steps of DPO, above 25")
    parser.add_argument("--evaluate", type=int, default=120, help="prompts of the run's own evaluation")
    parser.add_argument("--compare", type=int, default=360, help="prompts on which all models are compared")
    parser.add_argument("--work", type=Path, default=Path("build/listeners"))
    parser.add_argument("--output", type=Path, default=Path("build/bench/listeners.json"))
    arguments = parser.parse_args()
    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{work}/mlflow.db")
    torch.set_num_threads(1)
    began = time.process_time()

    world = WorldPrompts(count=arguments.compare)
    evaluation = EvaluationConfig(
        name="listeners", world=world, seeds=1, sampling=Sampling(num_inference_steps=10),
        captioner="mini:captioner", embedders=(), set_resamples=0, device="cpu",
    )  # fmt: skip
    held_out = [prompt.text for prompt in world_prompts(world.count, world.split)]
    url = f"sqlite:///{work}/ratings.db"
    rated = collect(
        url, prompts=arguments.prompts, raters=arguments.raters, noise=arguments.noise, without=held_out
    )
    print(json.dumps(rated, indent=1))

    direct = work / "direct"
    trained = train_dpo(with_ratings(dpo_of(arguments.steps), url, work / "direct.ratings"), direct)
    own = replace(evaluation, world=WorldPrompts(count=arguments.evaluate))
    run_loop(loop_of(url, own, arguments.per_cluster, arguments.steps), work / "run")
    models = {"base": START, "direct": f"file:{direct}", "loop": f"file:{work}/run/round-1/dpo"}
    sources = [f"{name}={uri}" for name, uri in models.items()]
    folder = work / "evaluation"
    found = finished_evaluation(evaluation, sources, folder) or evaluate(evaluation, sources, folder)
    reward = json.loads((work / "run/reward/evaluation.json").read_text(encoding="utf-8"))
    report = {
        "date": date.today().isoformat(),
        "machine": machine(),
        "torch": torch.__version__,
        "settings": {
            name: value for name, value in vars(arguments).items() if isinstance(value, int | float)
        },
        "cpu_seconds": round(time.process_time() - began),
        "ratings": rated,
        "rated_pairs": trained["data"]["examples"],
        "reward_pair_accuracy": reward["pair_accuracy"]["all"],
        "base": {name: found["models"][0]["figures"]["all"][name] for name in FIGURES},
        **{name: figures(found, name) for name in ("direct", "loop")},
    }
    write_report(arguments.output, report)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
