"""The training Job: its manifest, its creation, and the command."""

import io
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from services.cli import run
from services.errors import InvalidInputError, ServiceUnavailableError
from tests.training.cluster.jobs_api import UID, JobsApi
from tests.training.commands.test_promote import KUBECONFIG
from tests.training.promotion.targets.api import namespace_served
from training.cluster import submit
from training.cluster.jobs import Jobs
from training.cluster.submit import (
    EXIT_CODES,
    JobExistsError,
    JobOverrides,
    create,
    find,
    next_steps,
    read_manifest,
    recipe_and_settings,
    with_overrides,
)
from training.exits import exit_code

ROOT = Path(__file__).resolve().parents[3]
MANIFEST = ROOT / "k8s" / "jobs" / "align.yaml"
NOBODY = io.StringIO()


def the_job() -> dict[str, Any]:
    return read_manifest(None, NOBODY)


def container(job: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = job["spec"]["template"]["spec"]["containers"][0]
    return found


def job_of(*args: str, name: str = "mine") -> str:
    pod = {"containers": [{"name": "x", "args": [*args]}]}
    job = {"kind": "Job", "metadata": {"name": name}, "spec": {"template": {"spec": pod}}}
    return str(yaml.safe_dump(job))


# The manifest


def test_it_is_the_file_that_kubectl_takes_and_a_wheel_carries_it() -> None:
    assert the_job() == yaml.safe_load(MANIFEST.read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    copied = project["tool"]["hatch"]["build"]["targets"]["wheel"]["hooks"]["custom"]["force-include"]
    assert [(ROOT / source, ROOT / target) for source, target in copied.items()] == [submit._PATHS[::-1]]


def test_only_the_overrides_change_the_manifest() -> None:
    before = the_job()
    overrides = JobOverrides(
        settings=["dpo.beta=200", "name=$(HOME)"], name="align-7", image="x:1", namespace="other"
    )
    job = with_overrides(before, overrides)
    assert before == the_job()
    assert (job["metadata"]["name"], job["metadata"]["namespace"]) == ("align-7", "other")
    assert job["metadata"]["annotations"].keys() - before["metadata"]["annotations"].keys() == {
        "milonga.dev/submission"
    }
    assert container(job)["args"] == [
        *("train", "run", "--recipe=align", "--output=/work/runs/$(MILONGA_RUN)"),
        *("--set=dpo.beta=200", "--set=name=$$(HOME)"),
    ]
    assert container(job)["image"] == "x:1"
    for key in ("args", "image"):
        container(job)[key] = container(before)[key]
    assert job["spec"] == before["spec"]
    assert job["metadata"]["labels"] == before["metadata"]["labels"]


def test_without_a_name_it_is_called_by_recipe_and_time() -> None:
    job = with_overrides(the_job(), JobOverrides(recipe="smoke"))
    assert submit._NAME.fullmatch(job["metadata"]["name"])
    assert job["metadata"]["name"].startswith("smoke-20")
    assert job["metadata"]["namespace"] == "milonga"


@pytest.mark.parametrize("name", ["Align", "align_7", "-a", "a" * 64, "a.b"])
def test_invalid_names_are_refused(name: str) -> None:
    with pytest.raises(InvalidInputError, match=f"--name: is '{name}"):
        with_overrides(the_job(), JobOverrides(name=name))


def test_settings_of_the_manifest_stay_and_come_first() -> None:
    words = ("train", "run", "--recipe", "smoke", "--set", "processes=4", "--set=rounds=2", "-o", "/x")
    job = read_manifest(Path("-"), io.StringIO(job_of(*words)))
    assert recipe_and_settings(job, JobOverrides(settings=["rounds=3"])) == (
        "smoke",
        ["processes=4", "rounds=2", "rounds=3"],
    )
    overrides = JobOverrides(recipe="mini", settings=["rounds=3"], name="x")
    assert container(with_overrides(job, overrides))["args"] == [
        *("train", "run", "--recipe=mini", "--set", "processes=4", "--set=rounds=2", "-o", "/x"),
        "--set=rounds=3",
    ]
    assert recipe_and_settings(
        read_manifest(Path("-"), io.StringIO(job_of("train", "run"))), JobOverrides()
    ) == (
        "mini",
        [],
    )


def test_of_many_objects_it_is_the_training_job() -> None:
    others = ["kind: Service", job_of("promote", name="promote"), job_of("train", "run", name="align")]
    assert read_manifest(Path("-"), io.StringIO("\n---\n".join(others)))["metadata"]["name"] == "align"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kind: Service", "standard input has the Jobs none; expected exactly one"),
        ("a: [", "standard input can't be read: while parsing"),
        ("kind: Job", "the Job without name with the arguments of its image; expected train run"),
        (
            job_of("train", "dpo", "--recipe=x"),
            "mine with the arguments train dpo --recipe=x; expected train",
        ),
        (
            f"{job_of('train', 'run', name='a')}\n---\n{job_of('train', 'run', name='b')}",
            "has the Jobs a, b; expected exactly one, or one named align",
        ),
    ],
)
def test_manifests_without_one_training_job_are_refused(text: str, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        read_manifest(Path("-"), io.StringIO(text))


# The cluster


def test_the_job_is_sent_once_and_checked_strictly() -> None:
    api = JobsApi(port=0)
    job = with_overrides(the_job(), JobOverrides(name="align-7"))
    with namespace_served(api, Jobs) as jobs:
        create(jobs, job, dry_run=True)
        assert api.jobs == {}
        made = create(jobs, job)
    assert made["metadata"]["uid"] == UID
    dry, real = [request for request in api.requests if request.method == "POST"]
    assert dry.query.pop("dryRun") == "All"
    assert dry.query == real.query == {"fieldManager": "milonga-train", "fieldValidation": "Strict"}
    assert real.body == job


def test_an_existing_job_of_that_name_is_an_error_that_says_how_to_go_on() -> None:
    api = JobsApi(port=0)
    with namespace_served(api, Jobs) as jobs:
        first = with_overrides(the_job(), JobOverrides(name="align-7"))
        create(jobs, first)
        assert create(jobs, first)["metadata"]["uid"] == UID, (
            "created by the first request, whose answer was lost"
        )
        again = with_overrides(the_job(), JobOverrides(name="align-7"))
        with pytest.raises(
            JobExistsError, match=r"the Job align-7 exists in .* milonga already \(not over\); to follow it: "
        ) as caught:
            create(jobs, again)
        assert exit_code(caught.value, EXIT_CODES) == 5
        api.end("align-7", "Failed")
        with pytest.raises(JobExistsError, match=r"\(failed\); .* --follow align-7; .* delete job align-7"):
            create(jobs, again)


@pytest.mark.parametrize(
    ("status", "code", "kind", "message"),
    [
        ((404, 'namespaces "milonga" not found'), 2, InvalidInputError, "--namespace: is milonga, and the"),
        ((403, 'cannot create resource "jobs"'), 6, ServiceUnavailableError, "does not permit it: cannot"),
        ((400, 'unknown field "spec.x"'), 2, InvalidInputError, "--job: is refused by .*: unknown field"),
        ((422, "Invalid value"), 2, InvalidInputError, "--job: is refused by the cluster test: Invalid"),
        ((503, "shutting down"), 6, ServiceUnavailableError, "the cluster test can't be reached: shutting"),
    ],
)
def test_what_the_cluster_refuses_is_one_line(
    status: tuple[int, str], code: int, kind: type[Exception], message: str
) -> None:
    api = JobsApi(port=0, status={"POST": status})
    with namespace_served(api, Jobs) as jobs, pytest.raises(kind, match=message) as caught:
        create(jobs, with_overrides(the_job(), JobOverrides()))
    assert exit_code(caught.value, EXIT_CODES) == code
    assert "\n" not in str(caught.value)


def test_a_job_that_is_not_there_can_t_be_followed() -> None:
    with (
        namespace_served(JobsApi(port=0), Jobs) as jobs,
        pytest.raises(
            InvalidInputError, match="--follow: is gone, and there is no such Job in the namespace"
        ),
    ):
        find(jobs, "gone")


def test_the_next_steps_name_namespace_and_context() -> None:
    assert next_steps("a", "milonga") == (
        "to follow it: milonga train submit --follow a; to delete it: kubectl --namespace milonga delete "
        "job a"
    )
    assert next_steps("a", "other", "kind-x") == (
        "to follow it: milonga train submit --follow a --namespace other --context kind-x; to delete it: "
        "kubectl --context kind-x --namespace other delete job a"
    )


# The command


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kubeconfig whose cluster does not answer."""
    (tmp_path / "config").write_text(KUBECONFIG)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--recipe", "nonsense"], 2, "--recipe: is 'nonsense', must be one of align, mini"),
        (["--set", "dpo.beta=x"], 2, "dpo.beta: is 'x', must be a valid number"),
        (["--set", "dpo.beta=x", "--detach"], 2, "dpo.beta: is 'x', must be a valid number"),
        (["--name", "A"], 2, "--name: is 'A', must be of lowercase"),
        (["--job", "none.yaml"], 2, "--job: none.yaml can't be read: "),
        (["--follow", "align-7", "--recipe", "align"], 2, "--follow: excludes all options but --names"),
        (["--context", "kind-x"], 2, "--context: is kind-x: no cluster can be chosen"),
        ([], 6, "the cluster http://127.0.0.1:1 can't be reached: "),
        (["--dry-run"], 6, "the cluster http://127.0.0.1:1 can't be reached: "),
        (["--follow", "align-7"], 6, "the cluster http://127.0.0.1:1 can't be reached: "),
    ],
)
def test_wrong_input_is_one_line(
    nowhere: None, capsys: pytest.CaptureFixture[str], words: list[str], code: int, message: str
) -> None:
    assert run(["train", "submit", *words]) == code
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert out == ""


def test_show_calls_no_cluster_and_prints_a_manifest(
    nowhere: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["train", "submit", "--name", "align-7", "--set", "dpo.beta=200", "--show"]) == 0
    out, err = capsys.readouterr()
    job = yaml.safe_load(out)
    assert err == ""
    assert job["metadata"]["name"] == "align-7"
    assert container(job)["args"][-1] == "--set=dpo.beta=200"


def test_submit_follow_and_submit_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    api = JobsApi(port=0, logs={"a": ["t1 step 1"]})

    def finish() -> None:
        api.set_pod("a", "Succeeded")
        api.end("align-7", "Complete")

    api.acts = {1: lambda: api.set_pod("a", "Running"), 2: finish}
    with namespace_served(api, Jobs) as jobs:
        (tmp_path / "config").write_text(KUBECONFIG.replace("http://127.0.0.1:1", jobs.configuration.host))
        monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))
        submission = ["train", "submit", "--name", "align-7"]
        assert run([*submission, "--dry-run"]) == 0
        assert "would accept the Job align-7 in the namespace milonga" in capsys.readouterr().out
        assert run(submission) == 0
        out, err = capsys.readouterr()
        assert out == "step 1\n"
        assert [line.partition(" s  ")[2] or line for line in err.splitlines()] == [
            "the Job align-7 is created in the namespace milonga; it keeps running after Ctrl-C",
            "pod a runs on node node-1",
            "the Job align-7 is complete",
        ]
        assert run(["train", "submit", "--follow", "align-7"]) == 0
        assert capsys.readouterr().out == "step 1\n"
        assert run(submission) == 5
        assert "milonga already (complete); to follow it: " in capsys.readouterr().err
        assert run(["train", "submit", "--name", "align-8", "--detach"]) == 0
        assert (
            "the Job align-8 is created in the namespace milonga; to follow it: " in capsys.readouterr().out
        )
