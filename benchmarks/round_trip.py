"""How well the round trip agrees with the tagger: two judges of another kind, on the same generated clips.

    python -m benchmarks.round_trip                        # 700 clips of mini, 300 of mini-base
    python -m benchmarks.round_trip --clips-only           # generate them, judge them later
    python -m benchmarks.round_trip --clips mini=50 --clips mini-base=50 --steps 5

The tagger detects events in a clip; the captioner writes a sentence, which is read. Confusion tables with
agreement and Cohen's kappa: each class of event, all classes, all events of the prompt, order, simultaneity.
Neither judge is the truth. Resumable: ``--work`` keeps the clips of each generator, and the judgements of
each captioner, so that a new captioner judges the same clips.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any, Final

import numpy as np
import soundfile
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from benchmarks.measuring import write_report
from services.api.reading import compare
from services.models.mini.tagger import EventTagger
from services.weights.uri import resolve
from training.data.store import RowLog, batches
from training.evaluation.config import EvaluationConfig, Sampling, WorldPrompts
from training.evaluation.events import compare_events
from training.evaluation.round_trip import RoundTrip, open_round_trip
from training.evaluation.sources import PlannedClip, SourceClips, make_plan, open_source, prepare_clips
from training.soundworld.reading import truth_reading
from training.soundworld.synthesis import CLASSES, SAMPLING_RATE

CLIPS: Final = ("mini=700", "mini-base=300")
BATCH: Final = 8
RESAMPLES: Final = 2_000

Row = dict[str, Any]
"""What both judges say of a clip."""
Table = NDArray[np.int64]
"""Per clip the decisions of (neither, captioner only, tagger only, both) [N, 4]."""


def judge(
    trip: RoundTrip, tagger: EventTagger, planned: Sequence[PlannedClip], files: Sequence[Path]
) -> Iterator[Row]:
    """Yield what both judges say of each clip. Clips are of one length."""
    waveforms = [soundfile.read(file, dtype="float32")[0] for file in files]
    captions = trip.captions([(waveform, SAMPLING_RATE) for waveform in waveforms])
    detections = tagger.detect(torch.from_numpy(np.stack(waveforms)))
    for one, caption, detected in zip(planned, captions, detections, strict=True):
        truth = one.prompt.truth
        assert truth is not None
        judged = compare_events(truth, detected)
        read = compare(truth_reading(truth), trip.reader.read(caption))
        yield {
            "prompt": one.prompt.text,
            "relation": truth.relation,
            "caption": caption,
            "unread": read.found.unread,
            "tagger": {
                "events": sorted(detected),
                "present": judged.present,
                "related": judged.simultaneous if truth.relation == "while" else judged.in_order,
            },
            "captioner": {
                "events": sorted(read.found.events),
                "present": not read.missing,
                "related": read.in_order,
            },
        }


def counts_of(decisions: Sequence[Sequence[tuple[bool, bool]]]) -> Table:
    """Count the decisions of (tagger, captioner) of each clip."""
    places = [
        np.array([2 * tagger + captioner for tagger, captioner in clip], dtype=int) for clip in decisions
    ]
    return np.array([np.bincount(place, minlength=4) for place in places]).reshape(-1, 4)


def agreement_and_kappa(sums_R4: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the share of agreement and Cohen's kappa of tables [R, 4]; kappa is NaN without variance."""
    shares = sums_R4 / sums_R4.sum(-1, keepdims=True)
    agreement = shares[:, 0] + shares[:, 3]
    tagger, captioner = shares[:, 2] + shares[:, 3], shares[:, 1] + shares[:, 3]
    chance = tagger * captioner + (1 - tagger) * (1 - captioner)
    with np.errstate(invalid="ignore", divide="ignore"):
        return agreement, np.where(chance < 1, (agreement - chance) / (1 - chance), np.nan)


def confusion(counts_N4: Table) -> dict[str, Any]:
    """Return a confusion table with agreement, kappa and their 95 % bootstrap intervals over clips."""
    counts_N4 = counts_N4[counts_N4.sum(-1) > 0]
    if not len(counts_N4):
        return {"clips": 0}
    total = counts_N4.sum(0)
    picks_RN = np.random.default_rng(0).integers(0, len(counts_N4), (RESAMPLES, len(counts_N4)))
    resampled = np.stack([counts_N4[picks].sum(0) for picks in picks_RN])
    neither, captioner, tagger, both = map(int, total)
    found: dict[str, Any] = {
        "clips": len(counts_N4),
        "both": both,
        "tagger_only": tagger,
        "captioner_only": captioner,
        "neither": neither,
    }
    names = ("agreement", "kappa")
    for name, value, spread in zip(
        names, agreement_and_kappa(total[None]), agreement_and_kappa(resampled), strict=True
    ):
        if np.isnan(value[0]):
            found[name] = None
            continue
        low, high = np.nanquantile(spread, [0.025, 0.975])
        found[name] = [round(float(one), 4) for one in (value[0], low, high)]
    return found


def tables(rows: Sequence[Row]) -> dict[str, Any]:
    """Return the confusion tables of some clips by name."""

    def pairs(field: str, relation: str | None = None) -> Table:
        """Decisions on clips; with a relation, of its prompts whose events both judges find."""
        sides = [(row["tagger"], row["captioner"], row["relation"]) for row in rows]
        return counts_of(
            [
                [(bool(tagger[field]), bool(captioner[field]))]
                for tagger, captioner, kind in sides
                if relation is None or (kind == relation and tagger["present"] and captioner["present"])
            ]
        )

    by_class = {
        name: counts_of(
            [[(name in row["tagger"]["events"], name in row["captioner"]["events"])] for row in rows]
        )
        for name in CLASSES
    }
    found = {
        "all events of the prompt": confusion(pairs("present")),
        "in order (sequences)": confusion(pairs("related", "then")),
        "simultaneous (prompts with while)": confusion(pairs("related", "while")),
        "every event of every clip": confusion(sum(by_class.values(), np.zeros((len(rows), 4), dtype=int))),
    }
    return found | {f"event: {name}": confusion(table) for name, table in by_class.items()}


def text_table(found: Mapping[str, Any]) -> str:
    """Return confusion tables as Markdown."""
    head = ["decision", "both", "tagger only", "captioner only", "neither", "agreement", "kappa"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, table in found.items():
        if table.get("clips"):
            cells = [str(table[key]) for key in ("both", "tagger_only", "captioner_only", "neither")]
            cells += [
                "–" if table[key] is None else "{:.3f} [{:.3f}, {:.3f}]".format(*table[key])
                for key in ("agreement", "kappa")
            ]
            lines.append(f"| {' | '.join([name, *cells])} |")
    return "\n".join(lines)


def clips_of(name: str, count: int, steps: int, work: Path) -> tuple[Sequence[PlannedClip], SourceClips]:
    """Return the clips of a model, of held-out prompts; those that are missing are generated."""
    config = EvaluationConfig(
        world=WorldPrompts(count=count), seeds=1, sampling=Sampling(num_inference_steps=steps), batch=BATCH
    )
    plan = make_plan(config, [])
    return plan, prepare_clips(open_source(name), plan, config, work / "clips")


def judgements(
    trip: RoundTrip, tagger: EventTagger, plan: Sequence[PlannedClip], files: Sequence[Path], work: Path
) -> list[Row]:
    """Return what both judges say of each clip; clips that were judged before are not judged again."""
    name = f"{files[0].parent.name}-{trip.digest.removeprefix('sha256:')[:16]}.jsonl"
    with RowLog(work / name) as log:
        done = {row["prompt"] for row in log.rows}
        missing = [index for index, planned in enumerate(plan) if planned.prompt.text not in done]
        for numbers in tqdm(list(batches(missing, BATCH)), desc="judging", unit="batch", mininterval=5.0):
            for row in judge(trip, tagger, [plan[i] for i in numbers], [files[i] for i in numbers]):
                log.append(row)
        texts = {planned.prompt.text for planned in plan}
        return [row for row in log.rows if row["prompt"] in texts]


def main() -> None:
    """Judge the clips and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clips", action="append", help=f"MODEL=COUNT; default: {', '.join(CLIPS)}")
    parser.add_argument("--steps", type=int, default=10, help="denoising steps")
    parser.add_argument("--captioner", default="mini:captioner", help="URI")
    parser.add_argument("--clips-only", action="store_true", help="generate the clips, without judging them")
    parser.add_argument("--work", type=Path, default=Path("build/round-trip"))
    parser.add_argument("--output", type=Path, help="write the tables here as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    clips = {}
    for text in arguments.clips or CLIPS:
        name, _, count = text.partition("=")
        clips[name] = clips_of(name, int(count), arguments.steps, arguments.work)
    if arguments.clips_only:
        return
    trip = open_round_trip(arguments.captioner, "cpu")
    tagger = EventTagger.from_pretrained(resolve("mini:tagger").folder).float().eval()
    rows = {
        name: judgements(trip, tagger, plan, found.files, arguments.work)
        for name, (plan, found) in clips.items()
    }
    rows["all"] = [row for own in list(rows.values()) for row in own]
    report: dict[str, Any] = {
        "date": date.today().isoformat(),
        "steps": arguments.steps,
        "generators": {name: found.identity["digest"] for name, (_, found) in clips.items()},
        "captioner": trip.digest,
        "torch": torch.__version__,
    }
    for name, own in rows.items():
        read_whole = sum(not row["unread"] for row in own) / len(own)
        report[name] = {"clips": len(own), "captions_read_whole": round(read_whole, 4), **tables(own)}
        print(f"\n{name}, {len(own)} clips\n\n{text_table(tables(own))}")
    if arguments.output:
        write_report(arguments.output, report)


if __name__ == "__main__":
    main()
