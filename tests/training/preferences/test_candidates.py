import contextlib
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Unpack

import pytest
import soundfile

from services.api.generation import Clip, Generation, GenerationOptions, Timings
from services.api.model import ModelVersion
from services.errors import InvalidInputError, MilongaError, OutputError
from tests.services.generation.serving import serving, tiny_engine
from tests.training.preferences.candidates_program import config as program_config
from tests.training.preferences.conftest import Models, Stages
from tests.waiting import until
from training.data.store import Row, read_json, read_rows
from training.preferences import candidates as stage
from training.preferences.candidates import CandidatesConfig, make_candidates, plan, read_candidates
from training.preferences.captions import selected, temporal
from training.preferences.sources import SourceConfig, model_of, open_source

CAPTIONS = ["A dog barks then a cat meows", "Rain falls"]
PERTURBED: list[Row] = [
    {"caption": caption, "strategy": strategy, "perturbed": f"{caption} {strategy}{n}", "kind": "swap"}
    for caption, strategy in ((CAPTIONS[0], "2"), (CAPTIONS[1], "2"), (CAPTIONS[0], "3"))
    for n in range(5)
]


def _paper() -> CandidatesConfig:
    return CandidatesConfig(source=SourceConfig())


def test_the_plan_is_the_papers() -> None:
    jobs = plan(_paper(), CAPTIONS, PERTURBED, CAPTIONS[:1])
    of = {name: [job for job in jobs if job.strategy == name] for name in ("1.1", "1.2", "2", "3")}
    assert [job.num_inference_steps for job in of["1.1"][:4]] == [5, 25, 50, 100]
    assert [len(of[name]) for name in of] == [8, 8, 12, 6]
    assert {job.num_inference_steps for job in jobs if job.strategy != "1.1"} == {50}
    assert {job.guidance_scale for job in jobs} == {3.0}
    assert [job.kind for job in of["3"]] == [None, *["swap"] * 5]
    assert all(job.caption in CAPTIONS for job in jobs)
    assert [job.number for job in jobs] == list(range(len(jobs)))
    assert len({job.seed for job in jobs}) == len(jobs)


def test_a_seed_is_a_function_of_the_configs_and_of_the_job() -> None:
    def seeds(config: CandidatesConfig, captions: list[str]) -> dict[tuple[str, str, int], int]:
        found = plan(config, captions, PERTURBED, captions)
        return {(job.strategy, job.prompt, job.slot): job.seed for job in found}

    all_of_them, fewer = seeds(_paper(), CAPTIONS), seeds(_paper(), CAPTIONS[1:])
    assert fewer.items() <= all_of_them.items()
    other = seeds(replace(_paper(), seed=1), CAPTIONS)
    assert not set(other.values()) & set(all_of_them.values())


def test_settings_that_can_not_work_are_refused() -> None:
    for wrong in ({"strategies": ("1.3",)}, {"steps": 0}, {"clips": 1}, {"varied_steps": (5,)}):
        with pytest.raises(ValueError):
            replace(_paper(), **wrong)


def test_clips_and_rows(stages: Stages, models: Models) -> None:
    rows = read_candidates(stages.candidates)
    jobs = plan(
        stages.candidates_config,
        selected(stages.captions),
        read_rows(stages.perturbed / "perturbed.jsonl"),
        temporal(stages.captions),
    )
    assert [row["number"] for row in rows] == [job.number for job in jobs]
    assert [row["seed"] for row in rows] == [job.seed for job in jobs]
    report = read_json(stages.candidates / "report.json")
    assert report["clips"] == len(rows) == len(list((stages.candidates / "clips").rglob("*.flac")))
    for row in rows:
        info = soundfile.info(stages.candidates / row["file"])
        assert (info.samplerate, info.channels) == (16_000, 1)
        assert row["duration"] == pytest.approx(0.32, abs=0.02)
        assert row["model"]["name"] == "tiny-tango"
        assert row["model"]["digest"].startswith("sha256:")


def test_shards_add_up_to_the_whole(stages: Stages, tmp_path: Path) -> None:
    arguments = (stages.candidates_config, stages.captions, stages.perturbed, tmp_path)
    make_candidates(*arguments, shard=(1, 2))
    with pytest.raises(InvalidInputError, match="is not complete; run the stage, or its other shards"):
        read_candidates(tmp_path)
    with pytest.raises(InvalidInputError, match="is 2 of 2"):
        make_candidates(*arguments, shard=(2, 2))
    make_candidates(*arguments, shard=(0, 2))
    assert read_candidates(tmp_path) == read_candidates(stages.candidates)
    for row in read_candidates(tmp_path):
        assert (tmp_path / row["file"]).read_bytes() == (stages.candidates / row["file"]).read_bytes()


def test_a_service_makes_the_same_clips(stages: Stages, tmp_path: Path) -> None:
    source = stages.candidates_config.source
    # Its weights are those of the folder, its identity is what the fixture says.
    with tiny_engine(batch_shapes=(source.batch,), exact=True) as engine, serving(engine) as served:
        config = replace(
            stages.candidates_config,
            source=replace(source, server=served.target),
            strategies=("1.1",),
        )
        make_candidates(config, stages.captions, None, tmp_path)
    there = {row["number"]: row for row in read_candidates(stages.candidates) if row["strategy"] == "1.1"}
    rows = read_candidates(tmp_path)
    assert len(rows) == len(there) > 0
    for row in rows:
        assert row["model"]["name"] == "tiny"
        own = (stages.candidates / there[row["number"]]["file"]).read_bytes()
        assert (tmp_path / row["file"]).read_bytes() == own


class _Failing:
    """A clip maker that makes so many clips and then fails."""

    def __init__(self, model: ModelVersion, content: bytes, count: int, error: Exception) -> None:
        self.made = 0
        clip = Clip(audio=content, encoding="flac", sampling_rate=16_000, duration=1.0, index=0, seed=0)
        timings = Timings(queued=0.0, encode=0.0, denoise=0.0, decode=0.0, total=0.0)
        self._generation = Generation(clips=(clip,), seed=0, model=model, warnings=(), timings=timings)
        self._count, self._error = count, error

    def generate(self, prompt: str, **options: Unpack[GenerationOptions]) -> Generation:
        if self.made == self._count:
            raise self._error
        self.made += 1
        return self._generation

    def close(self) -> None:
        pass


def test_a_failure_keeps_what_was_made_and_a_full_disk_is_told(
    stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = read_candidates(stages.candidates)
    model = ModelVersion(**rows[0]["model"])
    content = (stages.candidates / rows[0]["file"]).read_bytes()
    config = replace(stages.candidates_config, source=replace(stages.candidates_config.source, in_flight=1))
    arguments = (config, stages.captions, stages.perturbed, tmp_path)
    with pytest.raises(MilongaError, match="gone"):
        make_candidates(*arguments, maker=_Failing(model, content, 5, MilongaError("gone")), model=model)
    assert len(read_candidates(tmp_path, partly=True)) == 5
    full = OSError(28, "No space left on device")
    with monkeypatch.context() as patched:
        patched.setattr("services.files.os.replace", lambda *_: (_ for _ in ()).throw(full))
        with pytest.raises(OutputError, match="No space left on device"):
            make_candidates(*arguments, maker=_Failing(model, content, 99, full), model=model)
    rest = _Failing(model, content, 999, full)
    make_candidates(*arguments, maker=rest, model=model)
    assert rest.made == len(rows) - 5
    assert len(read_candidates(tmp_path)) == len(rows)


def test_clips_without_rows_and_torn_rows_are_mended(stages: Stages, tmp_path: Path) -> None:
    rows = read_candidates(stages.candidates)
    model = ModelVersion(**rows[0]["model"])
    content = (stages.candidates / rows[0]["file"]).read_bytes()
    arguments = (stages.candidates_config, stages.captions, stages.perturbed, tmp_path)
    make_candidates(*arguments, maker=_Failing(model, content, 999, MilongaError("")), model=model)
    whole = read_candidates(tmp_path)
    # As a kill leaves it: rows that follow from files, one cut off, one clip cut off and one missing.
    manifest = next(tmp_path.glob("manifest-*"))
    lines = manifest.read_bytes().splitlines(keepends=True)
    manifest.write_bytes(b"".join(lines[:6]) + lines[6][:30])
    for path in tmp_path.glob("report*.json"):
        path.unlink()
    (tmp_path / whole[10]["file"]).write_bytes(content[:20])
    (tmp_path / whole[12]["file"]).unlink()
    again = _Failing(model, content, 999, MilongaError(""))
    make_candidates(*arguments, maker=again, model=model)
    assert again.made == 2
    assert read_candidates(tmp_path) == whole


def test_another_configuration_is_told(stages: Stages) -> None:
    with pytest.raises(InvalidInputError, match=r"guidance_scale was 3\.0, is 2\.0"):
        make_candidates(
            replace(stages.candidates_config, guidance_scale=2.0),
            stages.captions,
            stages.perturbed,
            stages.candidates,
        )


def test_killed_and_run_again_it_makes_nothing_twice(
    stages: Stages, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = (program_config(models.tango), stages.captions, stages.perturbed)
    program = "tests.training.preferences.candidates_program"
    flags = [models.tango, str(stages.captions), str(stages.perturbed), str(tmp_path / "killed")]
    process = subprocess.Popen(
        [sys.executable, "-m", program, *flags], env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    manifest = tmp_path / "killed" / "manifest-00000-of-00001.jsonl"

    def four_are_made() -> bool:
        assert process.poll() is None, "it ended before it could be killed"
        return manifest.exists() and manifest.read_bytes().count(b"\n") >= 4

    try:
        until(four_are_made)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    jobs = plan(
        arguments[0],
        selected(stages.captions),
        read_rows(stages.perturbed / "perturbed.jsonl"),
        temporal(stages.captions),
    )
    there = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed").rglob("*.flac")}
    made = [path for path in there if not path.name.startswith(".")]
    assert 4 <= len(made) < len(jobs)

    prompts: list[str] = []
    model = model_of(arguments[0].source)
    with contextlib.closing(open_source(arguments[0].source)) as maker:
        generate = maker.generate

        def counted(prompt: str, **options: Unpack[GenerationOptions]) -> Generation:
            prompts.append(prompt)
            return generate(prompt, **options)

        monkeypatch.setattr(maker, "generate", counted)
        make_candidates(*arguments, tmp_path / "killed", maker=maker, model=model)
        assert len(prompts) == len(jobs) - len(made)
        make_candidates(*arguments, tmp_path / "whole", maker=maker, model=model)
    assert all(path.stat().st_mtime_ns == there[path] for path in made)
    assert manifest.read_bytes() == (tmp_path / "whole" / manifest.name).read_bytes()
    for row in read_candidates(tmp_path / "killed"):
        assert (tmp_path / "killed" / row["file"]).read_bytes() == (
            tmp_path / "whole" / row["file"]
        ).read_bytes()
    assert not [path for path in (tmp_path / "killed").rglob("*") if path.name.endswith(".part")]
    monkeypatch.setattr(stage, "_make", lambda *_: pytest.fail("made again"))
    make_candidates(*arguments, tmp_path / "killed")
