import json
from pathlib import Path

import pytest

from services.errors import InvalidInputError
from services.generation.settings import GenerationSettings
from services.reward.settings import RewardSettings
from services.runtime.settings import ServerSettings, load_settings


def test_a_flag_wins_over_the_environment_and_none_is_no_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILONGA_LISTEN", "0.0.0.0:7000")
    monkeypatch.setenv("MILONGA_METRICS_PORT", "7001")
    settings = load_settings(ServerSettings, listen="127.0.0.1:1", metrics_port=None)
    assert (settings.listen, settings.metrics_port, settings.health_port) == ("127.0.0.1:1", 7001, None)


def test_texts_win_over_the_environment_and_are_parsed_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILONGA_EXACT", "false")
    monkeypatch.setenv("MILONGA_DEVICE", "cpu")
    texts = {"exact": "true", "batch_shapes": "[2, 4]", "dtype": "float16"}
    settings = load_settings(GenerationSettings, texts, dtype="bfloat16", threads=None)
    assert (settings.exact, settings.batch_shapes, settings.dtype) == (True, (2, 4), "bfloat16")
    assert (settings.device, settings.threads) == ("cpu", None)
    with pytest.raises(InvalidInputError, match=r"batch_shapes: is not JSON"):
        load_settings(GenerationSettings, {"batch_shapes": "1,2"})


def test_every_wrong_setting_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILONGA_METRICS_PORT", "http")
    with pytest.raises(InvalidInputError) as caught:
        load_settings(GenerationSettings, dtype="int4", grace_seconds=-1)
    assert {v.field for v in caught.value.violations} == {"metrics_port", "dtype", "grace_seconds"}
    assert "\n" not in str(caught.value)


def test_a_setting_that_must_be_given_says_how(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MILONGA_MODEL", raising=False)
    with pytest.raises(InvalidInputError, match=r"model: is missing; give --model or set MILONGA_MODEL"):
        load_settings(RewardSettings)


def test_no_token_is_ever_written_down() -> None:
    settings = load_settings(GenerationSettings, operator_token="of-the-operator")
    assert "of-the-operator" not in json.dumps(settings.model_dump(mode="json")) + repr(settings)


@pytest.mark.parametrize("listen", ["50051", "localhost", ":50051", "a:http", "a:70000"])
def test_an_address_without_host_or_port_is_refused(listen: str) -> None:
    with pytest.raises(InvalidInputError, match="host:port"):
        load_settings(ServerSettings, listen=listen)


@pytest.mark.parametrize(
    "flags", [{"tls_cert_file": Path("a")}, {"tls_key_file": Path("a")}, {"tls_client_ca_file": Path("a")}]
)
def test_tls_files_go_together(flags: dict[str, Path]) -> None:
    with pytest.raises(InvalidInputError, match="tls_key_file"):
        load_settings(ServerSettings, **flags)


@pytest.mark.parametrize(
    ("listen", "host"),
    [("127.0.0.1:1", "127.0.0.1"), ("0.0.0.0:1", "0.0.0.0"), ("[::]:1", "[::]"), ("unix:/a", "127.0.0.1")],
)
def test_health_and_metrics_use_the_host_of_the_service(listen: str, host: str) -> None:
    assert load_settings(ServerSettings, listen=listen).host == host
