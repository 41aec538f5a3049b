import json
from pathlib import Path

import numpy as np
import pytest

from services.api.reading import EVENTS, compare, read_events
from training.soundworld.captions import drop, replace_event, swap, write_caption
from training.soundworld.reading import grammar_events, grammar_reader, truth_reading, wordings
from training.soundworld.scenes import SceneConfig, draw_truth
from training.soundworld.synthesis import CLASSES

CONFIGS = (SceneConfig(), SceneConfig(duration=5.12, sequence=0.8, three=0.7))


@pytest.mark.parametrize("config", CONFIGS)
def test_every_caption_of_the_grammar_is_read_as_its_truth(config: SceneConfig) -> None:
    rng, reader = np.random.default_rng(3), grammar_reader()
    for _ in range(1_500):
        truth = draw_truth(rng, config)
        caption = write_caption(truth, rng)
        reading, wanted = reader.read(caption), truth_reading(truth)
        assert (set(reading.events), reading.steps, reading.unread) == (
            set(wanted.events),
            wanted.steps,
            "",
        ), caption


def test_a_mistake_in_a_caption_is_found() -> None:
    rng, reader = np.random.default_rng(4), grammar_reader()
    found = {"swapped": 0, "missing": 0, "replaced": 0}
    for _ in range(600):
        truth = draw_truth(rng, CONFIGS[1])
        if truth.relation != "then":
            continue
        for kind, mistake in (("swapped", swap), ("missing", drop), ("replaced", replace_event)):
            comparison = compare(truth_reading(truth), reader.read(write_caption(mistake(truth, rng), rng)))
            assert bool(comparison.missing) == (kind != "swapped")
            assert bool(comparison.added) == (kind == "replaced")
            assert comparison.in_order == (False if kind == "swapped" else None)
            found[kind] += 1
    assert min(found.values()) > 100


def test_the_events_are_the_classes_and_the_file_is_small(tmp_path: Path) -> None:
    assert set(wordings()) == set(CLASSES) == set(grammar_reader().events)
    (tmp_path / EVENTS).write_text(grammar_events())
    assert read_events(tmp_path) == grammar_reader()
    assert len(json.dumps(json.loads(grammar_events()))) < 100_000
