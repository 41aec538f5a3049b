"""How well the round trip agrees with the tagger: two judges of another kind, on the same generated clips.

    python -m benchmarks.round_trip --prompts 500              # × mini and mini-base: 1,000 clips; resumable
    python -m benchmarks.round_trip --prompts 50 --steps 5     # a first look

The tagger detects events in a clip; the captioner writes a sentence, which is read. Confusion tables: all
events of the prompt there (by either), their order, and event by event. Judgements are kept in --work.
"""

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from services.api.reading import compare, read_events
from services.models.captioner.model import Captioner
from services.models.latent import clip_generator
from services.models.mini import mini_folder
from services.models.mini.tagger import EventTagger
from services.models.tango.loading import load_tango
from services.models.tango.pipeline import TangoPipeline
from training.data.store import RowLog, batches
from training.evaluation.events import compare_events
from training.evaluation.prompts import PROMPTS, held_out_prompts
from training.soundworld.reading import truth_reading
from training.soundworld.synthesis import CLASSES

MODELS = ("mini", "mini-base")
BATCH = 8
BEAMS = 4


def judge_clips(
    name: str,
    numbers: Sequence[int],
    pipeline: TangoPipeline,
    tagger: EventTagger,
    captioner: Captioner,
    steps: int | None,
    prompts: int,
) -> list[dict[str, Any]]:
    """Generate the clips of some held-out prompts; return what both judges say of each."""
    reader = read_events(mini_folder("captioner"))
    assert reader is not None
    drawn = held_out_prompts(prompts, PROMPTS)
    output = pipeline(
        [drawn[number][0] for number in numbers],
        num_inference_steps=steps,
        generator=[clip_generator(0, number) for number in numbers],
    )
    clips = [captioner.prepare(waveform, output.sampling_rate) for waveform in output.audios]
    captions = [found[0].text for found in captioner.generate(captioner.encode(clips), (BEAMS,))]
    rows = []
    for number, caption, detected in zip(
        numbers, captions, tagger.detect(torch.from_numpy(output.audios)), strict=True
    ):
        prompt, truth = drawn[number]
        judged = compare_events(truth, detected)
        read = compare(truth_reading(truth), reader.read(caption))
        rows.append(
            {
                "model": name,
                "number": number,
                "prompt": prompt,
                "relation": truth.relation,
                "classes": list(truth.classes),
                "caption": caption,
                "tagger": {
                    "events": sorted(detected),
                    "present": judged.present,
                    "in_order": judged.in_order,
                },
                "captioner": {
                    "events": list(read.found.events),
                    "present": not read.missing,
                    "in_order": read.in_order,
                    "unread": read.found.unread,
                },
            }
        )
    return rows


def confusion(pairs: Sequence[tuple[bool, bool]]) -> dict[str, Any]:
    """Return the counts of (tagger, captioner), the share of agreement, and Cohen's kappa."""
    counts, total = Counter(pairs), len(pairs)
    if not total:
        return {"clips": 0}
    agreement = (counts[True, True] + counts[False, False]) / total
    tagger, captioner = (sum(pair[side] for pair in pairs) / total for side in (0, 1))
    chance = tagger * captioner + (1 - tagger) * (1 - captioner)
    return {
        "clips": total,
        "both": counts[True, True],
        "tagger_only": counts[True, False],
        "captioner_only": counts[False, True],
        "neither": counts[False, False],
        "agreement": round(agreement, 4),
        "kappa": round((agreement - chance) / (1 - chance), 4) if chance < 1 else None,
    }


def tables(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the confusion tables of some clips."""
    sides = [(row["tagger"], row["captioner"]) for row in rows]
    ordered = [
        (bool(tagger["in_order"]), bool(captioner["in_order"]))
        for row, (tagger, captioner) in zip(rows, sides, strict=True)
        if row["relation"] == "then" and tagger["present"] and captioner["present"]
    ]
    by_event = [
        (event in tagger["events"], event in captioner["events"])
        for tagger, captioner in sides
        for event in CLASSES
    ]
    return {
        "all_events_of_the_prompt": confusion([(t["present"], c["present"]) for t, c in sides]),
        "in_order_of_sequences_where_both_find_all_events": confusion(ordered),
        "event_by_event": confusion(by_event),
        "captions_read_whole": round(sum(not c["unread"] for _, c in sides) / max(1, len(sides)), 4),
    }


def main() -> None:
    """Judge the clips and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--steps", type=int, help="denoising steps; default: the model's")
    parser.add_argument("--work", type=Path, default=Path("build/round-trip"))
    parser.add_argument("--output", type=Path, help="write the tables here as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    captioner = Captioner.from_pretrained(mini_folder("captioner"))
    tagger = EventTagger.from_pretrained(mini_folder("tagger")).float().eval()
    report: dict[str, Any] = {"steps": arguments.steps, "torch": torch.__version__}
    rows: list[dict[str, Any]] = []
    for name in MODELS:
        pipeline = load_tango(mini_folder(name))
        pipeline.set_progress_bar_config(disable=True)
        with RowLog(arguments.work / f"{name}-{arguments.steps}.jsonl") as log:
            done = {row["number"] for row in log.rows}
            missing = [number for number in range(arguments.prompts) if number not in done]
            for numbers in tqdm(list(batches(missing, BATCH)), desc=name, unit="batch", mininterval=5.0):
                for row in judge_clips(
                    name, numbers, pipeline, tagger, captioner, arguments.steps, arguments.prompts
                ):
                    log.append(row)
            own = [row for row in log.rows if row["number"] < arguments.prompts]
        report[name] = tables(own)
        rows += own
    report["all"] = tables(rows)
    text = json.dumps(report, indent=1)
    if arguments.output:
        arguments.output.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
