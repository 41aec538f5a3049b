import json
import logging
from collections.abc import Iterator

import pytest
import structlog

from services.runtime.logs import configure_logs


@pytest.fixture(autouse=True)
def _restore_logs() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()


def test_json_lines_carry_context_and_the_cause(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs("json", "info")
    log = structlog.get_logger()
    with structlog.contextvars.bound_contextvars(request_id="id-1"):
        log.debug("hidden")
        try:
            raise RuntimeError("cause")
        except RuntimeError as error:
            log.error("call", exc_info=error)
    (line,) = capsys.readouterr().err.splitlines()
    entry = json.loads(line)
    assert (entry["event"], entry["level"], entry["request_id"]) == ("call", "error", "id-1")
    assert entry["exception"][0]["exc_value"] == "cause"


def test_libraries_warnings_come_as_json_too(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs("json", "info")
    logging.getLogger("somelib").info("chatter")
    logging.getLogger("somelib").warning("beware of %s", "this")
    (line,) = capsys.readouterr().err.splitlines()
    assert json.loads(line)["event"] == "beware of this"
