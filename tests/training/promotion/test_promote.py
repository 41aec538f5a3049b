"""After a failure of any step pin and alias are restored, and the challenger stops."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from services.errors import (
    DigestMismatchError,
    FieldViolation,
    InvalidInputError,
    MilongaError,
    ModelFormatError,
    ModelNotFoundError,
    ServiceUnavailableError,
)
from services.weights.lineage import LEDGER_RUN_TAG, Lineage
from services.weights.registry import DIGEST_TAG, RegisteredVersion
from services.weights.uri import ResolvedModel, resolve
from tests.services.ratings.studies import planned_store, rate_all
from tests.training.promotion.fixtures import UNET, MemoryTarget, make_promoter, make_version
from training.evaluation.config import evaluation_smoke
from training.objectives.statistics import Interval
from training.promotion import promote as promotion
from training.promotion.errors import (
    BusyError,
    GatesRefusedError,
    RollbackError,
    RolloutError,
    UnrecordedError,
    exit_code,
)
from training.promotion.gates.gates import Gate, GatesConfig, Verdict
from training.promotion.gates.human import RatingsSource
from training.promotion.ledger import EVIDENCE, GATES, LedgerEntry, history_lines
from training.promotion.promote import Promoter, bootstrap, promote, resume, roll_back
from training.promotion.registry import PROMOTION_TAG, Registry

CONFIG = GatesConfig(
    evaluation=evaluation_smoke(),
    gates=(Gate(metric="presence", minimum_difference=0.0),),
    independent=("judge",),
    text="# gates\n",
)


class World:
    """Two versions, the first of them served, the second the challenger."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.registry = Registry()
        self.champion = make_version(self.registry, folder)
        self.candidate = make_version(self.registry, folder)
        self.registry.set_alias("milonga-tango", "champion", self.champion.version)
        self.registry.set_alias("milonga-tango", "challenger", self.candidate.version)
        self.target = MemoryTarget(self.champion.uri)
        self.promoter, self.reported = make_promoter(self.target, self.registry)
        self.passes = True
        world = self

        class Examined:
            """Gates whose outcome is known; the real ones are tested with real models."""

            def __init__(self, config: GatesConfig, judges: object) -> None:
                pass

            def examine(
                self,
                champion: RegisteredVersion,
                candidate: RegisteredVersion,
                target: Any,
                *_: object,
                check: Callable[[], None],
                **__: object,
            ) -> tuple[list[Verdict], dict[str, Any]]:
                check()
                target.start_challenger(candidate.uri, 1.0)
                target._step("gates")
                found = Interval(value=0.1, low=0.05 if world.passes else -0.2, high=0.2, count=9)
                verdict = Verdict(
                    gate=CONFIG.gates[0],
                    champion=found,
                    challenger=found,
                    difference=found,
                    passed=world.passes,
                )
                return [verdict], {"gates": [verdict.row()]}

        monkeypatch.setattr(promotion, "Examination", Examined)

    def promote(self, version: str | None = "2") -> str:
        return promote(self.promoter, CONFIG, model="milonga-tango", version=version)

    @property
    def alias(self) -> str | None:
        return self.registry.alias("milonga-tango", "champion")

    @property
    def entry(self) -> LedgerEntry:
        return self.promoter.ledger.entries()[0]

    def assert_untouched(self) -> None:
        assert (self.target.pin, self.target.served) == (self.champion.uri, self.champion.uri)
        assert self.target.challenger is None
        assert self.alias == self.champion.version

    def tags(self, version: RegisteredVersion) -> dict[str, str]:
        found = self.registry.client.get_model_version(version.name, version.version).tags
        return {k.removeprefix(PROMOTION_TAG): v for k, v in found.items() if k.startswith(PROMOTION_TAG)}


@pytest.fixture
def world(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    return World(tmp_path, monkeypatch)


def test_a_good_version_is_rolled_out_verified_and_named_champion(world: World) -> None:
    done = world.promote()
    assert world.target.done == ["challenger", "gates", "stop", "rollout", "verify"]
    assert (world.target.served, world.alias) == (world.candidate.uri, "2")
    assert "milonga-tango version 2 is promoted" in done
    entry = world.entry
    assert (entry.kind, entry.outcome, entry.phase) == ("promotion", "promoted", "alias")
    assert (entry.from_pin, entry.to_pin) == (world.champion.uri, world.candidate.uri)
    assert '"passed": true' in world.promoter.ledger.read_text(entry.run_id, EVIDENCE)
    assert world.promoter.ledger.read_text(entry.run_id, GATES) == "# gates\n"
    tags = world.tags(world.candidate)
    assert (tags[""], tags[".run"]) == ("promoted", entry.run_id)
    assert world.registry.client.get_run(entry.run_id).info.status == "FINISHED"


def test_the_ledgers_run_is_found_for_signed_clips(world: World) -> None:
    assert f"{PROMOTION_TAG}.run" == LEDGER_RUN_TAG
    assert "ledger_run" not in Lineage(world.registry.uri)(world.candidate)
    world.promote()
    lineage = Lineage(world.registry.uri)
    assert lineage(world.candidate)["ledger_run"] == world.entry.run_id
    assert lineage(replace(world.candidate, digest="sha256:" + "0" * 64)) == {}


def _people(world: World, ratings: str | None, prompts: int = 6) -> str:
    """Promote behind the gates of `CONFIG` and one of people's ratings."""
    human = Gate(metric="human_preference", minimum_difference=0.0, prompts=prompts)
    config = replace(CONFIG, gates=(human, *CONFIG.gates))
    source = None if ratings is None else RatingsSource(url=ratings)
    return promote(world.promoter, config, model="milonga-tango", version="2", ratings=source)


def _rated(world: World, folder: Path, prefers_candidate: bool) -> str:
    url = f"sqlite:///{folder}/ratings.db"
    store = planned_store(url, (world.champion, world.candidate))
    rate_all(store, "ann", prefers_b=prefers_candidate)
    store.close()
    return url


def test_people_who_prefer_the_candidate_promote_it(world: World, tmp_path: Path) -> None:
    _people(world, _rated(world, tmp_path, prefers_candidate=True))
    assert world.alias == world.candidate.version
    evidence = json.loads(world.promoter.ledger.read_text(world.entry.run_id, EVIDENCE))
    assert [gate["metric"] for gate in evidence["gates"]] == ["human_preference", "presence"]
    assert (evidence["ratings"]["prompts"], evidence["ratings"]["wins"]) == (10, 10)


def test_people_who_prefer_the_champion_refuse_the_candidate_before_a_challenger_starts(
    world: World, tmp_path: Path
) -> None:
    url = _rated(world, tmp_path, prefers_candidate=False)
    with pytest.raises(GatesRefusedError, match="refused on 10 prompts"):
        _people(world, url)
    world.assert_untouched()
    assert "challenger" not in world.target.done
    assert '"passed": false' in world.promoter.ledger.read_text(world.entry.run_id, EVIDENCE)


def test_too_few_ratings_are_a_refusal_that_says_how_many_are_missing(world: World, tmp_path: Path) -> None:
    url = _rated(world, tmp_path, prefers_candidate=True)
    with pytest.raises(GatesRefusedError, match="10 of 200 prompts are rated: 190 are missing"):
        _people(world, url, prompts=200)
    world.assert_untouched()


def test_without_a_database_nothing_begins(world: World) -> None:
    with pytest.raises(InvalidInputError, match="--ratings"):
        _people(world, None)
    assert world.promoter.ledger.entries() == []


def test_a_database_that_is_away_undoes_the_promotion(world: World, tmp_path: Path) -> None:
    (tmp_path / "ratings.db").write_bytes(b"no database" * 100)
    with pytest.raises(ServiceUnavailableError, match="database of ratings"):
        _people(world, f"sqlite:///{tmp_path}/ratings.db")
    world.assert_untouched()
    assert world.entry.outcome == "failed"


def test_a_file_of_ratings_that_is_not_there_undoes_the_promotion(world: World, tmp_path: Path) -> None:
    with pytest.raises(
        InvalidInputError, match=r"absent\.db, which is no file; `milonga ratings plan` makes one"
    ):
        _people(world, f"sqlite:///{tmp_path}/absent.db")
    world.assert_untouched()
    assert world.entry.outcome == "failed"


def test_without_a_version_the_alias_challenger_is_promoted(world: World) -> None:
    world.promote(None)
    assert world.alias == world.candidate.version


def test_what_is_served_already_is_not_promoted_again(world: World) -> None:
    world.promote()
    world.target.done.clear()
    assert "nothing to do" in world.promote()
    assert world.target.done == []
    assert len(world.promoter.ledger.entries()) == 1


def test_a_worse_version_is_refused(world: World) -> None:
    world.passes = False
    with pytest.raises(
        GatesRefusedError, match=r"presence: difference at least \+0, found .*-0.2000"
    ) as caught:
        world.promote()
    assert exit_code(caught.value) == 3
    world.assert_untouched()
    assert "rollout" not in world.target.done
    assert world.entry.outcome == "refused"
    assert world.entry.reason == str(caught.value)
    assert world.tags(world.candidate)[""] == "refused"
    assert world.registry.client.get_run(world.entry.run_id).info.status == "FAILED"


@pytest.mark.parametrize(
    ("step", "error", "code", "outcome"),
    [
        ("challenger", RolloutError("ImagePullBackOff"), 4, "failed"),
        ("gates", RolloutError("the challenger made no clip"), 4, "failed"),
        ("gates", KeyboardInterrupt(), 130, "interrupted"),
        ("gates", ServiceUnavailableError("the cluster can't be reached"), 6, "failed"),
        ("stop", ServiceUnavailableError("the cluster can't be reached"), 6, "failed"),
        ("rollout", RolloutError("not ready after 5 s"), 4, "failed"),
        ("rollout", KeyboardInterrupt(), 130, "interrupted"),
        ("verify", RolloutError("pod x serves sha256:…"), 4, "failed"),
        ("verify", ServiceUnavailableError("forbidden"), 6, "failed"),
        ("verify", ValueError("a fault of ours"), 1, "failed"),
    ],
)
def test_a_failure_of_any_step_is_undone(
    world: World, step: str, error: BaseException, code: int, outcome: str
) -> None:
    world.target.fails[step] = error
    with pytest.raises(type(error)) as caught:
        world.promote()
    assert exit_code(caught.value) == code
    world.assert_untouched()
    assert world.entry.outcome == outcome
    if str(error):
        assert str(error) in world.entry.reason
    world.promote()  # and nothing stands in the way of the next try
    assert world.alias == world.candidate.version


def test_an_alias_that_fails_to_move_is_undone(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str, alias: str, version: str | None) -> None:
        point(name, alias, version)
        monkeypatch.undo()
        raise ServiceUnavailableError("the MLflow server went away")  # after it had done so

    point = world.registry.set_alias
    monkeypatch.setattr(world.registry, "set_alias", fail)
    with pytest.raises(ServiceUnavailableError):
        world.promote()
    world.assert_untouched()
    assert world.target.done[-3:] == ["stop", "rollout", "verify"]


def test_a_rollback_that_fails_needs_a_person_and_can_be_resumed(world: World) -> None:
    world.target.fails["rollout"] = RolloutError("not ready")
    world.target.always.add("rollout")
    with pytest.raises(RollbackError, match=r"promote resume`.*because: not ready") as caught:
        world.promote()
    assert exit_code(caught.value) == 7
    assert (world.entry.outcome, world.entry.phase) == (None, "restoring")
    with pytest.raises(BusyError, match="phase restoring; complete or undo it with `milonga promote resume`"):
        world.promote()
    world.target.fails.clear()
    assert "is undone" in resume(world.promoter)
    world.assert_untouched()
    assert (world.entry.outcome, world.entry.reason) == ("failed", "not ready")


def test_an_alias_that_somebody_else_moves_meanwhile_stays(world: World, tmp_path: Path) -> None:
    third = make_version(world.registry, tmp_path)
    world.target.before = lambda step: (
        world.registry.set_alias("milonga-tango", "champion", third.version) if step == "verify" else None
    )
    with pytest.raises(InvalidInputError, match=r"points to version 3, expected version 1: somebody else"):
        world.promote()
    assert (world.target.served, world.alias) == (world.champion.uri, third.version)


def test_a_challenger_registered_meanwhile_stops_the_promotion(world: World, tmp_path: Path) -> None:
    third = make_version(world.registry, tmp_path)
    world.target.before = lambda step: (
        world.registry.set_alias("milonga-tango", "challenger", third.version) if step == "gates" else None
    )
    with pytest.raises(InvalidInputError, match="challenger: points to version 3, expected version 2"):
        world.promote(None)
    world.assert_untouched()


def test_after_a_lost_lock_nothing_is_changed(world: World) -> None:
    def lose(step: str) -> None:
        world.target.held.lost = step == "verify"

    world.target.before = lose
    with pytest.raises(BusyError) as caught:
        world.promote()
    assert exit_code(caught.value) == 5
    assert world.target.pin == world.candidate.uri  # not ours to undo
    assert world.entry.outcome is None


def die(world: World, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the promoter were killed in `step`: nothing is undone."""

    class Killed(BaseException):
        pass

    world.target.fails[step] = Killed()
    with monkeypatch.context() as patched:
        patched.setattr(promotion, "restore", lambda *_: (_ for _ in ()).throw(Killed()))
        with pytest.raises(RollbackError):
            world.promote()
    world.target.done.clear()
    assert world.entry.outcome is None


@pytest.mark.parametrize("step", ["challenger", "gates", "stop"])
def test_a_promotion_whose_promoter_died_before_the_rollout_is_undone(
    world: World, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    die(world, step, monkeypatch)
    with pytest.raises(BusyError, match="promote resume`"):
        world.promote()
    assert world.target.done == []
    assert "undone" in resume(world.promoter)
    world.assert_untouched()
    assert world.entry.reason == "its promoter died in the phase gates"
    with pytest.raises(InvalidInputError, match="nothing is unfinished"):
        resume(world.promoter)


@pytest.mark.parametrize("step", ["rollout", "verify"])
def test_a_promotion_whose_promoter_died_after_the_pin_is_completed(
    world: World, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    die(world, step, monkeypatch)
    assert "is completed" in resume(world.promoter)
    assert (world.target.served, world.alias) == (world.candidate.uri, world.candidate.version)
    assert (world.target.challenger, world.entry.outcome) == (None, "promoted")


def test_a_promotion_that_cannot_be_completed_is_undone(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    die(world, "rollout", monkeypatch)
    world.target.fails["verify"] = RolloutError("pod x serves another digest")
    with pytest.raises(RolloutError):
        resume(world.promoter)
    world.assert_untouched()


def test_a_foreign_pin_is_left_alone(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    die(world, "rollout", monkeypatch)
    third = make_version(world.registry, tmp_path)
    world.target.pin = third.uri
    with pytest.raises(RollbackError, match="somebody else pinned milonga-tango version 3"):
        resume(world.promoter)
    assert (world.target.pin, world.entry.outcome) == (third.uri, "failed")


def test_a_ledger_that_fails_at_the_end_does_not_undo(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: object, **__: object) -> None:
        raise ServiceUnavailableError("the MLflow server can't be used")

    monkeypatch.setattr(world.promoter.ledger, "end", away)
    with pytest.raises(
        UnrecordedError, match="is promoted and served, but not recorded in the ledger"
    ) as caught:
        world.promote()
    assert exit_code(caught.value) == 8
    assert (world.target.served, world.alias) == (world.candidate.uri, world.candidate.version)


def test_two_rollbacks_go_two_versions_back(world: World, tmp_path: Path) -> None:
    third = make_version(world.registry, tmp_path)
    with pytest.raises(InvalidInputError, match="records nothing that was served here before"):
        roll_back(world.promoter)
    world.promote("2")
    world.promote("3")
    assert world.alias == third.version
    assert "version 2 is served again" in roll_back(world.promoter)
    assert (world.target.served, world.alias) == (world.candidate.uri, "2")
    assert "version 1 is served again" in roll_back(world.promoter)
    world.assert_untouched()
    with pytest.raises(InvalidInputError, match="records nothing"):
        roll_back(world.promoter)
    header, *lines = history_lines(world.promoter.ledger.entries())
    assert header.split() == ["began", "(UTC)", "kind", "from", "to", "outcome", "seconds", "who"]
    assert ["rolled back" in line for line in lines] == [True, True, False, False]
    assert "milonga-tango/2  milonga-tango/1  rolled back" in lines[0]


def test_a_failed_rollback_restores_the_version_before_it(world: World) -> None:
    world.promote()
    world.target.fails["verify"] = RolloutError("pod x serves another digest")
    with pytest.raises(RolloutError):
        roll_back(world.promoter)
    assert (world.target.served, world.alias) == (world.candidate.uri, "2")


def test_a_target_that_was_never_pinned_is_bootstrapped_once(world: World) -> None:
    world.target.pin = world.target.served = None
    with pytest.raises(InvalidInputError, match=r"nothing is pinned; .*`milonga promote bootstrap") as caught:
        world.promote()
    assert exit_code(caught.value) == 2
    world.registry.set_alias("milonga-tango", "champion", None)
    assert "is pinned and served" in bootstrap(world.promoter, world.champion)
    world.assert_untouched()
    assert world.target.done == ["rollout", "verify"]
    assert "nothing to do" in bootstrap(world.promoter, world.champion)
    with pytest.raises(InvalidInputError, match=r"version 1 is pinned; promote: .*--version 2"):
        bootstrap(world.promoter, world.candidate)


def test_a_bootstrap_that_fails_leaves_nothing_pinned(world: World) -> None:
    world.target.pin = world.target.served = None
    world.registry.set_alias("milonga-tango", "champion", None)
    world.target.fails["verify"] = RolloutError("no pod is ready")
    with pytest.raises(RolloutError):
        bootstrap(world.promoter, world.champion)
    assert (world.target.pin, world.alias) == (None, None)


@pytest.mark.parametrize(
    ("version", "message"),
    [("9", r"has no version 9 in the registry .*; it has 1, 2"), ("x", "has no version x")],
)
def test_a_version_that_is_not_there_is_refused(world: World, version: str, message: str) -> None:
    with pytest.raises(ModelNotFoundError, match=message) as caught:
        world.promote(version)
    assert exit_code(caught.value) == 2
    assert world.promoter.ledger.entries() == []


def test_versions_of_another_architecture_kind_or_without_digest_are_refused(
    world: World, tmp_path: Path
) -> None:
    other = make_version(world.registry, tmp_path, unet={**UNET, "block_out_channels": [8, 32]})
    with pytest.raises(ModelFormatError, match=r"another architecture .* unet/config.json has block_out_ch"):
        world.promote(other.version)
    reward = make_version(world.registry, tmp_path, kind="reward")
    with pytest.raises(ModelFormatError, match="of kind reward, must be tango"):
        world.promote(reward.version)
    world.registry.client.delete_model_version_tag("milonga-tango", "2", DIGEST_TAG)
    with pytest.raises(ModelFormatError, match=r"has the digest 'nothing' in its tag milonga.digest"):
        world.promote()
    assert (world.promoter.ledger.entries(), world.target.done) == ([], [])


def test_a_target_pinned_from_another_registry_is_refused(world: World) -> None:
    world.target.pin = world.champion.uri[:-4] + "0000"
    with pytest.raises(DigestMismatchError, match=r"set MLFLOW_TRACKING_URI to the registry"):
        world.promote()
    world.target.pin = world.champion.uri.replace("milonga-tango", "other")
    with pytest.raises(ModelNotFoundError):
        world.promote()


def test_an_alias_that_disagrees_with_the_pin_is_refused(world: World) -> None:
    world.registry.set_alias("milonga-tango", "champion", "2")
    with pytest.raises(InvalidInputError, match="champion: points to version 2, expected version 1"):
        world.promote()
    with pytest.raises(InvalidInputError, match="expected version 1"):
        promote(other_alias(world.promoter), CONFIG, model="milonga-tango", version="2")


def other_alias(promoter: Promoter) -> Promoter:
    return Promoter(
        target=promoter.target,
        registry=promoter.registry,
        ledger=promoter.ledger,
        report=promoter.report,
        alias="staging",
    )


def test_every_error_is_one_line(world: World) -> None:
    world.target.fails["rollout"] = RolloutError("two\nlines")
    with pytest.raises(MilongaError):
        world.promote()
    assert "\n" not in world.entry.reason


def test_neither_rollback_nor_bootstrap_moves_the_alias_of_another_place(
    world: World, tmp_path: Path
) -> None:
    world.promote()
    third = make_version(world.registry, tmp_path)
    world.registry.set_alias("milonga-tango", "champion", third.version)
    with pytest.raises(
        InvalidInputError, match=r"points to version 3, expected version 2: .*--alias"
    ) as caught:
        roll_back(world.promoter)
    assert exit_code(caught.value) == 2
    world.target.pin = world.target.served = None
    world.target.done.clear()
    with pytest.raises(InvalidInputError, match=r"champion points to version 3, .*--alias") as caught:
        bootstrap(world.promoter, world.champion)
    assert exit_code(caught.value) == 2
    assert (world.alias, world.target.done, len(world.promoter.ledger.entries())) == (third.version, [], 1)


@pytest.mark.parametrize("check", ["setup", "reach"])
def test_an_unreachable_target_is_not_changed(world: World, check: str) -> None:
    def refuse() -> None:
        world.target.fails[check] = ServiceUnavailableError("pods/portforward is forbidden")

    refuse()
    with pytest.raises(ServiceUnavailableError):
        world.promote()
    assert world.promoter.ledger.entries() == []
    world.promote()
    world.target.done.clear()
    refuse()
    with pytest.raises(ServiceUnavailableError):
        roll_back(world.promoter)
    world.target.pin = None
    world.registry.set_alias("milonga-tango", "champion", None)
    refuse()
    with pytest.raises(ServiceUnavailableError):
        bootstrap(world.promoter, world.candidate)
    assert (world.target.done, len(world.promoter.ledger.entries())) == ([], 1)


def test_a_promotion_is_not_resumed_where_the_target_is_unreachable(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    die(world, "rollout", monkeypatch)
    world.target.fails["reach"] = ServiceUnavailableError("pods/portforward is forbidden")
    with pytest.raises(ServiceUnavailableError):
        resume(world.promoter)
    assert (world.target.done, world.entry.outcome) == ([], None)


def test_a_promotion_that_was_restored_is_not_completed(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    die(world, "rollout", monkeypatch)
    world.target.pin = world.target.served = world.champion.uri  # while the ledger was away
    assert world.entry.phase == "rollout"
    assert "is undone" in resume(world.promoter)
    world.assert_untouched()
    assert world.entry.outcome == "failed"


def test_quick_steps_are_restored_first(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[tuple[str | None, object, object, float]] = []
    wait = world.target.wait

    def waiting(pin: str, seconds: float) -> None:
        waits.append((world.target.pin, world.target.challenger, world.alias, seconds))
        wait(pin, seconds)

    monkeypatch.setattr(world.target, "wait", waiting)
    point = world.registry.set_alias

    def lost(name: str, alias: str, version: str | None) -> None:
        point(name, alias, version)
        monkeypatch.setattr(world.registry, "set_alias", point)
        raise ServiceUnavailableError("its answer got lost")

    monkeypatch.setattr(world.registry, "set_alias", lost)
    with pytest.raises(ServiceUnavailableError):
        world.promote()
    assert waits[-1] == (world.champion.uri, None, "1", 600.0)
    assert waits[0][3] == world.promoter.deadline


def test_a_deployment_at_zero_is_restored_without_waiting(world: World) -> None:
    def scale(step: str) -> None:
        world.target.idle |= step == "rollout"

    world.target.before = scale
    world.target.fails["rollout"] = RolloutError("the Deployment generation is scaled to 0")
    with pytest.raises(RolloutError):
        world.promote()
    assert world.target.done.count("rollout") == 1
    assert world.entry.outcome == "failed"


@pytest.mark.parametrize(("lost_at", "stopped"), [("verify", 1), ("pin", 1)])
def test_a_lock_that_is_lost_during_a_rollback_stops_it(
    world: World, monkeypatch: pytest.MonkeyPatch, lost_at: str, stopped: int
) -> None:
    set_pin = world.target.set_pin

    def setting(pin: str | None, seconds: float) -> None:
        set_pin(pin, seconds)
        world.target.held.lost = lost_at == "pin" and pin == world.champion.uri

    def lose(step: str) -> None:
        world.target.held.lost |= lost_at == step

    monkeypatch.setattr(world.target, "set_pin", setting)
    world.target.before = lose
    world.target.fails["verify"] = RolloutError("pod x serves another digest")
    with pytest.raises(BusyError, match="lock was lost"):
        world.promote()
    assert world.target.done.count("stop") == stopped
    assert world.entry.outcome is None


def test_a_pin_that_somebody_else_changes_meanwhile_stays(world: World, tmp_path: Path) -> None:
    third = make_version(world.registry, tmp_path)

    def pin(step: str) -> None:
        if step == "rollout":
            world.target.pin = third.uri

    world.target.before = pin
    world.target.fails["rollout"] = RolloutError("the pin was changed by somebody else meanwhile")
    with pytest.raises(
        RollbackError, match="somebody else pinned milonga-tango version 3: it stays"
    ) as caught:
        world.promote()
    assert exit_code(caught.value) == 7
    assert (world.target.pin, world.alias, world.entry.outcome) == (third.uri, "1", "failed")
    assert world.target.challenger is None


def test_a_pin_that_somebody_else_changes_during_the_gates_is_not_replaced(
    world: World, tmp_path: Path
) -> None:
    third = make_version(world.registry, tmp_path)

    def pin(step: str) -> None:
        if step == "gates":
            world.target.pin = third.uri

    world.target.before = pin
    with pytest.raises(RollbackError, match="somebody else pinned milonga-tango version 3"):
        world.promote()
    assert world.target.pin == third.uri
    assert "rollout" not in world.target.done


def test_an_interruption_after_the_alias_says_what_is_served(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(world.registry, "tag", interrupt)
    with pytest.raises(UnrecordedError, match=r"version 2 is promoted and served, .*interrupted") as caught:
        world.promote()
    assert exit_code(caught.value) == 8
    assert (world.target.served, world.alias, world.entry.outcome) == (world.candidate.uri, "2", None)
    assert "is completed" in resume(world.promoter)
    assert world.entry.outcome == "promoted"


def test_an_undo_that_fails_needs_a_person(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    die(world, "stop", monkeypatch)
    world.target.fails["stop"] = RolloutError("x")
    with pytest.raises(RollbackError, match="could not be restored: x") as caught:
        resume(world.promoter)
    assert exit_code(caught.value) == 7


def test_a_folder_is_registered_after_all_checks(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = resolve("mini-base")
    aliases: list[object] = []

    def register(
        source: ResolvedModel, name: str, *, alias: str | None, uri: str
    ) -> tuple[RegisteredVersion, bool]:
        aliases.append(alias)
        return make_version(world.registry, tmp_path), True

    monkeypatch.setattr(promotion, "register", register)
    with pytest.raises(
        InvalidInputError, match=r"mini-base, and milonga-tango version 1 is pinned; register it"
    ):
        bootstrap(world.promoter, model)
    world.target.pin = world.target.served = None
    with pytest.raises(InvalidInputError, match="champion points to version 1"):
        bootstrap(world.promoter, model)
    world.registry.set_alias("milonga-tango", "champion", None)
    world.target.fails["reach"] = ServiceUnavailableError("forbidden")
    with pytest.raises(ServiceUnavailableError):
        bootstrap(world.promoter, model)
    assert aliases == []
    assert "version 3 is pinned and served" in bootstrap(world.promoter, model)
    assert aliases == [None]
    assert world.registry.alias("milonga-tango", "challenger") == "2"
    assert world.alias == "3"


def test_a_missing_target_leaves_no_lock_behind(world: World) -> None:
    class Nowhere(MemoryTarget):
        @property
        def place(self) -> str:  # type: ignore[override]
            raise InvalidInputError(FieldViolation("the Deployment generation", "is not there"))

        def lock(self) -> Any:
            raise AssertionError("it was locked")

    promoter, _ = make_promoter(Nowhere(), world.registry)
    for begin in (roll_back, resume, lambda one: bootstrap(one, world.champion)):
        with pytest.raises(InvalidInputError, match="is not there"):
            begin(promoter)
    with pytest.raises(InvalidInputError, match="is not there"):
        promote(promoter, CONFIG, model="milonga-tango")
