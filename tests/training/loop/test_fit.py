import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from services.errors import InvalidInputError, MilongaError, OutputError
from tests.training.loop.fit_program import CONFIG, train
from training.loop.fit import LoopConfig, examples_at, make_accelerator
from training.loop.run_folder import (
    CHECKPOINTS,
    JOURNAL,
    KEPT,
    Journal,
    JournalReader,
    claim_folder,
    load_checkpoint,
    read_journal,
    save_checkpoint,
)


def _losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read_journal(folder / JOURNAL) if "loss" in row]


def _evaluations(folder: Path) -> list[float]:
    return [row["evaluation"]["score"] for row in read_journal(folder / JOURNAL) if "evaluation" in row]


def _program(*arguments: str, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *launcher, "-m", "tests.training.loop.fit_program", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    train(folder)
    return folder


def test_a_journal_that_grows_is_read_up_to_its_last_whole_line(tmp_path: Path) -> None:
    reader = JournalReader(tmp_path / JOURNAL)
    assert list(reader.rows()) == []
    with (tmp_path / JOURNAL).open("w") as file:
        file.write('{"step": 0}\n{"st')
        file.flush()
        assert list(reader.rows()) == [{"step": 0}]
        file.write('ep": 1}\n')
        file.flush()
        assert list(reader.rows()) == [{"step": 1}]
    with Journal(tmp_path / JOURNAL, 1) as journal:  # resumed before step 1
        journal.write({"step": 1, "loss": 0.5})
    assert [row["step"] for row in reader.rows()] == [0, 1]


def test_the_loss_falls(unbroken: Path) -> None:
    losses = _losses(unbroken)
    assert len(losses) == CONFIG.steps
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    assert len(_evaluations(unbroken)) == 4


def test_a_run_killed_by_sigkill_goes_on_bit_for_bit(unbroken: Path, tmp_path: Path) -> None:
    killed = _program(str(tmp_path), "--kill-at", "23")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len(_losses(tmp_path)) == 23
    # Lines of steps beyond the checkpoint, and one cut off, as if the last checkpoint were older.
    with (tmp_path / JOURNAL).open("a") as journal:
        journal.write('{"step": 23, "loss": 9.0}\n{"step": 24, "lo')
    train(tmp_path)
    assert _losses(tmp_path) == _losses(unbroken)
    assert _evaluations(tmp_path) == _evaluations(unbroken)


def test_sigterm_saves_and_ends_with_130_and_the_handlers_come_back(unbroken: Path, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    config = replace(CONFIG, checkpoint_seconds=1e9)
    with pytest.raises(SystemExit, match="130"):
        train(tmp_path, config, stop_at=7)
    assert signal.getsignal(signal.SIGTERM) is before
    assert len(_losses(tmp_path)) == 8
    module, fitted = train(tmp_path, config)
    assert _losses(tmp_path) == _losses(unbroken)
    whole, _ = train(unbroken)
    for ours, theirs in zip(module.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert fitted.steps == CONFIG.steps


def test_a_finished_run_is_not_run_again(unbroken: Path) -> None:
    before = (unbroken / JOURNAL).read_text()
    _, fitted = train(unbroken)
    assert (unbroken / JOURNAL).read_text() == before
    scores = _evaluations(unbroken)
    assert (fitted.steps, fitted.best_step) == (CONFIG.steps, (scores.index(max(scores)) + 1) * 10)


def test_a_finished_run_may_grow_and_not_shrink(tmp_path: Path) -> None:
    short = replace(CONFIG, steps=20, decay=0.5)
    train(tmp_path, short)
    before = _losses(tmp_path)
    _, fitted = train(tmp_path, replace(short, steps=40))
    rates = [row["rate"] for row in read_journal(tmp_path / JOURNAL) if "rate" in row]
    assert fitted.steps == len(rates) == 40 and _losses(tmp_path)[:20] == before
    assert rates[20] == CONFIG.learning_rate > rates[19] > rates[39]
    with pytest.raises(InvalidInputError, match=r"loop\.steps: is 30, and .* holds a run of 40 steps; give"):
        train(tmp_path, replace(short, steps=30))


def test_a_batch_in_parts_gives_the_curve_of_a_whole_one(tmp_path: Path) -> None:
    train(tmp_path / "whole", dropout=0.0)
    train(tmp_path / "parts", replace(CONFIG, accumulation=4), dropout=0.0)
    assert _losses(tmp_path / "parts") == pytest.approx(_losses(tmp_path / "whole"), rel=1e-5)


def test_every_process_of_a_run_may_claim_its_folder(tmp_path: Path) -> None:
    for number in range(20):
        folder = tmp_path / str(number)
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda _, folder=folder: claim_folder(folder, {"loop.steps": 3}), range(8)))
        assert [path.name for path in folder.iterdir()] == ["run.json"]


def test_two_processes_give_the_curve_of_one(tmp_path: Path) -> None:
    train(tmp_path / "one", dropout=0.0)
    launcher: tuple[str, ...] = (
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        "--master-port=0",
        "--rdzv-backend=c10d",
    )
    launcher += ("--rdzv-endpoint=127.0.0.1:0",)
    done = _program(str(tmp_path / "two"), "--dropout", "0", "--accumulation", "2", launcher=launcher)
    assert done.returncode == 0, done.stderr
    assert _losses(tmp_path / "two") == pytest.approx(_losses(tmp_path / "one"), rel=1e-5)
    assert _evaluations(tmp_path / "two") == pytest.approx(_evaluations(tmp_path / "one"), rel=1e-5)


def test_the_best_weights_are_kept_when_patience_ends(tmp_path: Path) -> None:
    # A rate that throws the weights about: later evaluations are worse than an early one.
    config = replace(CONFIG, steps=400, learning_rate=3.0, ema=0.0, clip=0.0, checkpoint_seconds=1e9)
    module, fitted = train(tmp_path, config, patience=2)
    scores = _evaluations(tmp_path)
    assert fitted.steps < config.steps
    assert len(scores) == scores.index(max(scores)) + 1 + 2
    assert fitted.best_step == (scores.index(max(scores)) + 1) * 10
    again, _ = train(tmp_path, config, patience=2)
    for ours, theirs in zip(module.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_a_loss_that_is_not_finite_ends_the_run_in_one_line(tmp_path: Path) -> None:
    config = replace(CONFIG, learning_rate=1e9, warmup=0, clip=0.0)
    with pytest.raises(MilongaError, match=r"the loss is (nan|inf) at step \d+; lower the learning rate"):
        train(tmp_path, config)


def test_other_settings_are_refused_and_shown(tmp_path: Path) -> None:
    claim_folder(tmp_path, {"loop.steps": 3, "name": "a", "seconds": 1})
    claim_folder(tmp_path, {"loop.steps": 3, "name": "a", "seconds": 2}, free=("seconds",))
    with pytest.raises(InvalidInputError, match=r"\(loop.steps was 3, is 4; name was a, is b\).*--fresh"):
        claim_folder(tmp_path, {"loop.steps": 4, "name": "b", "seconds": 2}, free=("seconds",))
    (tmp_path / JOURNAL).write_text("x")
    claim_folder(tmp_path, {"loop.steps": 4}, fresh=True)
    assert json.loads((tmp_path / "run.json").read_text()) == {"loop.steps": 4}
    assert not (tmp_path / JOURNAL).exists()


def test_a_folder_that_is_a_file_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("")
    with pytest.raises(OutputError, match="can't be used"):
        claim_folder(tmp_path / "x", {})


def test_a_batch_must_divide_into_its_parts(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"batch: is 8, must be a multiple of processes \(1\) × acc"):
        train(tmp_path, replace(CONFIG, accumulation=3))


def test_the_last_two_checkpoints_stay_and_a_damaged_one_is_passed_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (1, 20, 3):
        save_checkpoint(tmp_path, step, {"step": step})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000003", "step-000000020"]
    assert len(list(tmp_path.iterdir())) == KEPT
    (tmp_path / "step-000000020" / "state.pt").write_bytes(b"half")
    assert load_checkpoint(tmp_path) == {"step": 3}
    assert "resuming from step-000000003" in capsys.readouterr().err
    (tmp_path / "step-000000003" / "state.pt").write_bytes(b"")
    with pytest.raises(MilongaError, match="no checkpoint is readable"):
        load_checkpoint(tmp_path)


def test_a_disk_that_is_full_leaves_the_older_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path, 1, {"step": 1})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="step 2 can't be written"):
        save_checkpoint(tmp_path, 2, {"step": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000001"]
    assert load_checkpoint(tmp_path) == {"step": 1}


def test_no_pickle_is_read_from_a_checkpoint(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, {"path": tmp_path})
    with pytest.raises(MilongaError, match="no checkpoint is readable"):
        load_checkpoint(tmp_path)


def test_the_data_order_is_a_permutation_in_each_pass_and_depends_on_nothing_else() -> None:
    whole = examples_at(np.arange(30), 10, seed=3)
    passes = whole.reshape(3, 10)
    assert all(sorted(row.tolist()) == list(range(10)) for row in passes)
    assert len({tuple(row.tolist()) for row in passes}) == 3
    parts = [examples_at(np.arange(30)[start::4], 10, seed=3) for start in range(4)]
    assert all((part == whole[start::4]).all() for start, part in enumerate(parts))


def test_the_rate_warms_up_stays_and_falls() -> None:
    config = LoopConfig(steps=1000, batch=1, warmup=100, decay=0.25)
    assert [config.rate_at(step) for step in (0, 99, 500, 749, 875, 999)] == pytest.approx(
        [0.01, 1.0, 1.0, 1.0, 0.5, 0.004]
    )


def test_tf32_is_of_one_training_only() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        accelerator = make_accelerator(replace(CONFIG, mixed_precision="tf32"))
        assert accelerator.mixed_precision == "no"
        assert torch.get_float32_matmul_precision() == "high"
        make_accelerator(CONFIG)
        assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"batch": 0}, {"accumulation": -1}, {"ema": 2.0}])
def test_settings_that_can_not_be(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must"):
        replace(CONFIG, **wrong)  # type: ignore[arg-type]


def test_checkpoints_are_where_they_are_said_to_be(unbroken: Path) -> None:
    assert sorted(path.name for path in (unbroken / CHECKPOINTS).iterdir()) == [
        "step-000000039",
        "step-000000040",
    ]
