"""Stages call services over TLS, as named callers: from configs, and from the options of commands."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from services.cli import run
from services.client import ServiceOptions
from services.errors import ServiceUnavailableError, UnauthenticatedError
from services.runtime.tokens import new_token, token_digest
from tests.services.generation.serving import serving as serving_generation
from tests.services.generation.serving import tiny_engine
from tests.services.runtime.certificates import make_authority, make_identity
from tests.services.scoring.serving import serving as serving_scores
from tests.training.preferences.conftest import Models, Stages
from training.preferences.candidates import make_candidates, read_candidates
from training.preferences.pipeline import connected, preferences_smoke
from training.preferences.scores import ScoresConfig, read_scores, score_candidates

TOKEN = new_token()


@dataclass(frozen=True, kw_only=True, slots=True)
class Secured:
    generation: str
    scoring: str
    options: ServiceOptions


@pytest.fixture(scope="module")
def secured(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    """Both services with TLS, a certificate for another name than their address, and callers."""
    folder = tmp_path_factory.mktemp("secured")
    authority = make_authority(folder, "authority")
    identity = make_identity(folder, "services", authority, "subjectAltName=DNS:milonga.test")
    callers, token = folder / "callers.toml", folder / "studio.token"
    callers.write_text(f"[callers.studio]\ntokens = ['{token_digest(TOKEN)}']\n")
    token.write_text(TOKEN)
    settings: dict[str, Any] = {
        "tls_cert_file": identity.cert_file, "tls_key_file": identity.key_file, "callers_file": callers
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        engine = stack.enter_context(tiny_engine(batch_shapes=(4,), exact=True))
        generation = stack.enter_context(serving_generation(engine, **settings))
        scoring = stack.enter_context(serving_scores({"clap-a": models.clap_a}, **settings))
        yield Secured(
            generation=generation.target,
            scoring=scoring.hosted.target,
            options=ServiceOptions(
                tls_ca=authority.cert_file,
                tls_server_name="milonga.test",
                token_file=token,
                timeout=120.0,
            ),
        )


def test_stages_call_secured_services(stages: Stages, secured: Secured, tmp_path: Path) -> None:
    base = preferences_smoke()
    config = connected(
        replace(
            base,
            candidates=replace(
                stages.candidates_config,
                strategies=("1.1",),
                source=replace(stages.candidates_config.source, server=secured.generation),
            ),
            scores=ScoresConfig(scorers=("clap-a",), server=secured.scoring),
        ),
        secured.options,
    )
    make_candidates(config.candidates, stages.captions, None, tmp_path / "candidates")
    score_candidates(config.scores, tmp_path / "candidates", tmp_path / "scores")
    made = read_candidates(tmp_path / "candidates")
    assert len(read_scores(tmp_path / "scores")) == len(made) > 0


def test_each_part_of_a_connection_is_needed(stages: Stages, secured: Secured, tmp_path: Path) -> None:
    config = ScoresConfig(scorers=("clap-a",), server=secured.scoring, **secured.options.given)
    for changed, error, says in (
        (replace(config, token_file=None), UnauthenticatedError, "--token-file"),
        (replace(config, tls_ca=None), ServiceUnavailableError, "--tls-ca"),
        (replace(config, tls_server_name=None), ServiceUnavailableError, "--tls-server-name"),
    ):
        with pytest.raises(error, match=says):
            score_candidates(changed, stages.candidates, tmp_path / "scores")


def test_a_connection_does_not_bind_a_folder(stages: Stages, secured: Secured, tmp_path: Path) -> None:
    config = ScoresConfig(scorers=("clap-a",), server=secured.scoring, **secured.options.given)
    report = score_candidates(config, stages.candidates, tmp_path / "scores")
    assert score_candidates(replace(config, timeout=7.0), stages.candidates, tmp_path / "scores") == report


def test_commands_take_the_options_of_a_connection(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--tls-ca", "ca.pem", "--tls-server-name", "here", "--token-file", "t", "--timeout", "5"]
    for command, prefix in (("preferences", ""), ("run", "preferences.")):
        server = ["--set", f"{prefix}candidates.source.server=h:1"]
        words = ["train", command, "--recipe", "smoke", "--show", *flags]
        assert run([*words, *server, "--set", f"{prefix}scores.timeout=9"]) == 0
        shown = capsys.readouterr().out
        for stage, seconds in (("candidates.source", "5.0"), ("scores", "9.0")):
            for line in ("tls_ca=ca.pem", "tls_server_name=here", "token_file=t", f"timeout={seconds}"):
                assert f"\n{prefix}{stage}.{line}\n" in shown
        assert run(words) == 2
        assert capsys.readouterr().err == (
            "error: --tls-ca, --tls-server-name, --token-file, --timeout: is for calls to a service; "
            "give --set candidates.source.server=HOST:PORT, scores.server or scores.reward_server as well\n"
        )


def test_a_wrong_timeout_names_its_option_or_its_setting(capsys: pytest.CaptureFixture[str]) -> None:
    for timeout in ("0", "nan", "inf"):
        assert run(["train", "preferences", "--timeout", timeout]) == 2
        assert capsys.readouterr().err.startswith(
            f"error: --timeout: is {timeout}, must be a number of seconds"
        )
        assert run(["train", "preferences", "--set", f"scores.timeout={timeout}"]) == 2
        assert f"scores.timeout={timeout}: timeout is {timeout}, must" in capsys.readouterr().err
