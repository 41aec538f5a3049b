import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from training.mini.loop import LoopConfig, fit


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    """Give the test run its own handlers back."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def _model() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(4, 4)


def _problem(model: nn.Module, stop_at: int | None = None):  # type: ignore[no-untyped-def]
    def loss_at(step: int) -> tuple[Tensor, dict[str, float]]:
        if step == stop_at:
            signal.raise_signal(signal.SIGTERM)
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        return (model(x) - x.flip(1)).square().mean(), {}

    return loss_at


CONFIG = LoopConfig(steps=60, learning_rate=1e-2, warmup=5, ema=0.9)


def test_a_run_that_was_stopped_ends_bit_for_bit_like_one_that_was_not(tmp_path: Path) -> None:
    whole = _model()
    fit(whole, _problem(whole), CONFIG, tmp_path / "whole", title="whole")
    stopped = _model()
    with pytest.raises(SystemExit, match="130"):
        fit(stopped, _problem(stopped, stop_at=23), CONFIG, tmp_path / "stopped", title="stopped")
    resumed = _model()
    fit(resumed, _problem(resumed), CONFIG, tmp_path / "stopped", title="resumed")
    assert torch.load(tmp_path / "stopped" / "checkpoint.pt", weights_only=True)["step"] == CONFIG.steps
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert not list(tmp_path.rglob("*.tmp"))


def test_the_loss_falls_and_is_written_down(tmp_path: Path) -> None:
    model = _model()
    fit(model, _problem(model), CONFIG, tmp_path, title="x")
    rows = [json.loads(line) for line in (tmp_path / "journal.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 20, 40]
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_the_rate_warms_up_stays_and_falls_to_zero() -> None:
    config = LoopConfig(steps=1000, learning_rate=1.0, warmup=100, decay=0.25)
    rates = [config.learning_rate_at(step) for step in (0, 99, 500, 749, 875, 999)]
    assert rates == pytest.approx([0.01, 1.0, 1.0, 1.0, 0.5, 0.004])
