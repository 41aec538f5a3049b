"""Words that a model does not use, on the embedded model."""

from dataclasses import replace
from pathlib import Path

import pytest

from services.audio.decoding import ReadClip
from services.errors import InvalidInputError
from services.models.architectures import architecture_of
from services.models.explaining.explainer import DiffusionExplainer
from services.models.mini import mini_folder
from training.evaluation.config import WorldPrompts, evaluation_smoke
from training.evaluation.evaluate import evaluate
from training.evaluation.unused_words import event_shares
from training.soundworld.scenes import SHORT, make_scene


@pytest.fixture(scope="module")
def explainer() -> DiffusionExplainer:
    architecture = architecture_of(mini_folder("mini"))
    return DiffusionExplainer(architecture.load(mini_folder("mini")), architecture)


def test_each_event_has_a_share_of_what_all_words_change(explainer: DiffusionExplainer) -> None:
    scene = make_scene(3, 2, replace(SHORT, single=0.0))
    clip = ReadClip(waveform=scene.waveform, sampling_rate=16_000)
    shares = event_shares(explainer, scene.caption, clip, 5)
    assert set(shares) == {event.event_class for event in scene.events} and len(shares) == 2
    assert all(0 < share <= 1 for share in shares.values())
    assert shares == event_shares(explainer, scene.caption, clip, 5)
    assert event_shares(explainer, "a prompt of another world", clip, 5) == {}


def test_an_event_that_the_denoiser_can_not_see_has_no_share(explainer: DiffusionExplainer) -> None:
    scene = make_scene(3, 2, replace(SHORT, single=0.0))
    clip = ReadClip(waveform=scene.waveform, sampling_rate=16_000)
    first = scene.events[0].event_class
    read = explainer.read

    def blind(prompt: str) -> object:
        # The tokens of the first event are masked from the start: masking them changes nothing.
        found = read(prompt)
        from training.evaluation.explanation_metrics import classes_of_phrases

        hidden = [name == first for name in classes_of_phrases(prompt, found.words)]
        mask = found.conditioning["mask"] & ~found.owners_WL[hidden].any(0)
        text = replace(found.conditioning, tensors={**found.conditioning.tensors, "mask": mask})
        return replace(found, conditioning=text)

    explainer.read = blind  # type: ignore[method-assign,assignment]
    try:
        shares = event_shares(explainer, scene.caption, clip, 5)
    finally:
        del explainer.read
    assert shares[first] == pytest.approx(0.0, abs=1e-6)
    assert shares[scene.events[1].event_class] > 0.1


def test_an_evaluation_reports_them_by_class(tmp_path: Path) -> None:
    config = replace(
        evaluation_smoke(), unused_words=True, world=WorldPrompts(count=2), embedders=(), scorers=(),
        reward=None, sheet=0,
    )  # fmt: skip
    report = evaluate(config, ["a=mini", "b=mini-base"], tmp_path / "out")
    figures = report["models"][0]["figures"]["all"]
    assert 0 <= figures["unused_words"]["value"] <= 1
    assert any(name.startswith("unused_words.") for name in figures)
    assert "unused_words" in report["comparisons"][0]["differences"]["all"]
    (tmp_path / "clips").mkdir()
    with pytest.raises(InvalidInputError):
        evaluate(config, ["mini", f"old={tmp_path / 'clips'}"], tmp_path / "other")
