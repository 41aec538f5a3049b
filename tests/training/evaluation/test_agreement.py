"""Confusion tables of the round trip and the tagger, by hand."""

import pytest

from benchmarks.round_trip import Row, confusion, counts_of, tables, text_table


def row(
    relation: str, tagger: tuple[list[str], bool, bool | None], captioner: tuple[list[str], bool, bool | None]
) -> Row:
    sides = (
        {"events": events, "present": present, "related": related}
        for events, present, related in (tagger, captioner)
    )
    return {"relation": relation, **dict(zip(("tagger", "captioner"), sides, strict=True))}


def test_agreement_and_kappa() -> None:
    """Agreement 0.7, by chance 0.5 (0.5 of the clips by the tagger, 0.6 by the captioner): kappa 0.4."""
    pairs = [(True, True)] * 20 + [(True, False)] * 5 + [(False, True)] * 10 + [(False, False)] * 15
    found = confusion(counts_of([[pair] for pair in pairs]))
    assert [found[key] for key in ("both", "tagger_only", "captioner_only", "neither")] == [20, 5, 10, 15]
    assert found["agreement"][0] == pytest.approx(0.7)
    assert found["kappa"][0] == pytest.approx(0.4)
    for value, low, high in (found["agreement"], found["kappa"]):
        assert low < value < high
    # A standard error of an agreement of 0.7 in 50 clips is 0.065.
    assert found["agreement"][2] - found["agreement"][1] == pytest.approx(2 * 1.96 * 0.0648, rel=0.15)


def test_decisions_that_never_vary_have_no_kappa() -> None:
    found = confusion(counts_of([[(True, True)]] * 5))
    assert (found["agreement"], found["kappa"]) == ([1.0, 1.0, 1.0], None)
    assert confusion(counts_of([])) == {"clips": 0}


def test_each_decision_is_about_the_clips_that_it_is_defined_for() -> None:
    rows = [
        row("then", (["dog", "siren"], True, True), (["dog", "siren"], True, False)),
        row("then", (["dog"], False, None), (["dog", "siren"], True, True)),
        row("while", (["dog", "rain"], True, True), (["dog", "rain"], True, True)),
        row("single", (["dog"], True, None), (["dog"], True, None)),
    ]
    found = tables(rows)
    present = found["all events of the prompt"]
    assert (present["both"], present["captioner_only"], present["clips"]) == (3, 1, 4)
    assert found["in order (sequences)"]["clips"] == 1
    assert found["in order (sequences)"]["tagger_only"] == 1
    assert found["simultaneous (prompts with while)"]["both"] == 1
    siren = found["event: siren"]
    assert (siren["both"], siren["tagger_only"], siren["captioner_only"], siren["neither"]) == (1, 0, 1, 2)
    every = found["every event of every clip"]
    assert every["both"] == 6
    assert every["captioner_only"] == 1
    assert "| event: siren | 1 | 0 | 1 | 2 | 0.750 [" in text_table(found)
