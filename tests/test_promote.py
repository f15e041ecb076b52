"""Promotion: what moves an alias, what does not, and what a crash, a rival or a forger can do about it."""
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import finetune_accel
from rich.console import Console
from serving import HELLO, TOKEN, free_port, wait_until
from typer.testing import CliRunner

from finetune_accel.core import decision_log, promotion, promotion_commands, stores
from finetune_accel.core.cli import app
from finetune_accel.core.decision_log import DecisionLog
from finetune_accel.core.environments import open_office
from finetune_accel.core.errors import BadInput
from finetune_accel.core.evidence import EVIDENCE, artefact_digest, model_files, seal
from finetune_accel.core.policy import load_policy
from finetune_accel.core.promotion import Desk, Place, approve, bring, champions, open_move, register_run, rollback
from finetune_accel.core.runs import RunFolder
from finetune_accel.core.signing import own_key
from finetune_accel.core.sources import file_digest, files_digest

POLICY = """\
people:
  - {name: ada, key: ada.pub, may: [register, promote]}
  - {name: bob, key: bob.pub, may: [approve]}
  - {name: cleo, key: cleo.pub, may: [approve, promote]}
champion: {approvals: 1, approval_days: 14, evidence_days: 90, test_openings: 1, parity: [exact, admitted]}
licences: {models: [Apache-2.0, "not stated: ask whoever gave you the model"], data: [ours]}
data_classes: [customer]
"""


class Town:
    """People with keys, a policy, and environments with a store each, around one finished run."""

    def __init__(self, run_dir: Path, folder: Path, policy: str = POLICY):
        self.run, self.folder = RunFolder(run_dir), folder
        folder.mkdir()
        self.keys = {name: own_key(folder / f"{name}.pem") for name in ("ada", "bob", "cleo", "eve")}
        for name, key in self.keys.items():
            (folder / f"{name}.pub").write_text(key.public)
        self.write_policy(policy)
        self.log = DecisionLog(folder / "decisions")
        shutil.copytree(self.run.decisions.folder, self.log.folder)

    def write_policy(self, text: str) -> None:
        (self.folder / "policy.yml").write_text(text)
        self.policy = load_policy(self.folder / "policy.yml")

    def desk(self, name: str) -> Desk:
        return Desk(self.keys[name], self.policy, self.log)

    def place(self, environment: str) -> Place:
        return Place(environment, f"sqlite:///{self.folder}/{environment}/mlflow.db", f"{environment}.default.mine")

    def champion(self, environment: str = "prod") -> str | None:
        place = self.place(environment)
        return stores.alias_version(place.uri, place.model, "champion")

    def promote(self, version: str, who: str = "ada", environment: str = "prod", **more):
        return promotion.promote(self.desk(who), self.place(environment), version, "champion", "a test", **more)

    def register(self, environment: str = "prod") -> str:
        return register_run(self.desk("ada"), self.place(environment), self.run, "a test")

    def artefact(self, version: str, name: str, environment: str = "prod") -> Path:
        place = self.place(environment)
        return stores.fetch(place.uri, place.model, version, self.folder / name)

    def publish(self, artefact: Path, environment: str = "prod") -> str:
        """Put files into the store as somebody with rights to it can, and into the log as if they had been registered."""
        place = self.place(environment)
        version = stores.publish(place.uri, artefact, place.model, {})
        self.desk("ada").note("register", place, version=version, artefact=artefact_digest(artefact), why="a forger", evaluation="", train="")
        return version


@pytest.fixture(scope="module")
def run_dir(finished, tmp_path_factory):
    """The finished run, with a weight of its data's licence as the policy knows it."""
    return finished[0] / "runs/mine"


@pytest.fixture
def town(run_dir, tmp_path):
    return Town(run_dir, tmp_path / "town")


def accepted(town: Town) -> str:
    """Register, approve and promote; return the version, which is champion."""
    version = town.register()
    approve(town.desk("bob"), town.place("prod"), version, "looked at the report")
    decision = town.promote(version)
    assert decision.moved, decision.broken
    return version


def test_a_good_run_becomes_champion_and_each_step_is_in_the_log(town):
    version = accepted(town)
    assert town.champion() == version == "1" and champions(town.desk("ada"), town.place("prod")) == ["1"]
    steps = [(one["action"], one.get("who")) for one in town.log.entries() if one.get("environment") == "prod"]
    assert steps == [("register", "ada"), ("approve", "bob"), ("promote", "ada"), ("done", "ada")]
    assert town.register() == version, "the same evidence is not registered twice"
    artefact = town.artefact(version, "looked")
    bom = json.loads((artefact / EVIDENCE / "bom.json").read_text())
    assert bom["bomFormat"] == "CycloneDX" and any("torch" in str(part.get("name")) for part in bom["components"])
    facts = json.loads((artefact / EVIDENCE / "evidence.json").read_text())
    assert facts["model"] == files_digest(model_files(artefact)) == town.run.need("evaluate")["inputs"]["train/merged"]


# Each attempt changes the files of a version, the log or the policy, and names the check that must stop it.

def _json(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def _table(path: Path, column: str, change) -> None:
    table = pq.read_table(path)
    values = [change(value) for value in table[column].to_pylist()]
    pq.write_table(table.set_column(table.column_names.index(column), column, pa.array(values, table.schema.field(column).type)), path)


def _byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def _weights(artefact: Path) -> Path:
    return next((artefact / "model").glob("*.safetensors"))


def no_evidence(town, artefact):
    shutil.rmtree(artefact / EVIDENCE)


def no_certificate(town, artefact):
    (artefact / EVIDENCE / "parity.json").unlink()


def other_weights_claimed(town, artefact):
    _byte(_weights(artefact))
    digest = files_digest(model_files(artefact))
    _json(artefact / EVIDENCE / "evidence.json", lambda facts: facts.update(model=digest))


def other_weights_claimed_evaluated(town, artefact):
    other_weights_claimed(town, artefact)
    digest = files_digest(model_files(artefact))
    _json(artefact / EVIDENCE / "evaluate.json", lambda found: found["inputs"].update({"train/merged": digest}))


def lower_threshold(town, artefact):
    _json(artefact / EVIDENCE / "criteria.json", lambda criteria: criteria[1].update(at_least=None) or criteria[1].pop("at_least"))


def fewer_criteria(town, artefact):
    _json(artefact / EVIDENCE / "criteria.json", lambda criteria: criteria.pop())


def renamed_criterion(town, artefact):
    _json(artefact / EVIDENCE / "criteria.json", lambda criteria: criteria[1].update(metric="fuzzy_match"))


def better_scores(town, artefact):
    _table(artefact / EVIDENCE / "item_scores.parquet", "score", lambda score: 1.0 - score)


def better_answers(town, artefact):
    _table(artefact / EVIDENCE / "answers.parquet", "answer", lambda answer: '{"intent": "On"}')
    _table(artefact / EVIDENCE / "item_scores.parquet", "score", lambda score: 1.0)


def flattering_summary(town, artefact):
    _json(artefact / EVIDENCE / "evaluate.json", lambda found: found["criteria"][1].update(met=not found["criteria"][1]["met"]))


def edited_certificate(town, artefact):
    _json(artefact / EVIDENCE / "parity.json", lambda certificate: certificate.update(engine="openvino"))


def old_evaluation(town, artefact):
    _json(artefact / EVIDENCE / "evidence.json", lambda facts: facts.update(evaluated="2020-01-01T00:00:00+0000"))


def other_licence(town, artefact):
    _json(artefact / EVIDENCE / "evidence.json", lambda facts: facts.update(base_model={"source": "x", "digest": "y", "licence": "all rights reserved"}))


def other_data(town, artefact):
    _json(artefact / EVIDENCE / "evidence.json", lambda facts: facts["data"][0].update(origin="public stand-in"))


FORGED = [(no_evidence, "evidence"), (no_certificate, "evidence"), (other_weights_claimed, "model"), (other_weights_claimed_evaluated, "parity"),
          (lower_threshold, "criteria"), (fewer_criteria, "criteria"), (renamed_criterion, "criteria"), (better_scores, "verdicts"),
          (better_answers, "evidence"), (flattering_summary, "verdicts"), (edited_certificate, "parity"), (old_evaluation, "age"),
          (other_licence, "licences"), (other_data, "licences")]


def test_a_forger_who_may_sign_moves_nothing(town):
    """What somebody with the right key registers after editing it: refused by the check that looks at it."""
    champion = accepted(town)
    place = town.place("prod")
    for forge, stopped_by in FORGED:
        artefact = town.artefact(champion, forge.__name__)
        (artefact / "model.sig").unlink()
        forge(town, artefact)
        seal(artefact, town.keys["ada"])
        version = town.publish(artefact)
        approve(town.desk("bob"), place, version, "deceived")
        decision = town.promote(version)
        broken = {check.name: check for check in decision.broken}
        assert not decision.moved and stopped_by in broken, (forge.__name__, broken)
        assert broken[stopped_by].fix and town.champion() == champion
        last = town.log.entries()[-1]
        assert last["action"] == "refused" and stopped_by in last["broken"], "the attempt is in the log"


def test_files_that_were_changed_after_they_were_signed(town):
    champion = accepted(town)
    for change in (lambda artefact: _byte(_weights(artefact)), lambda artefact: (artefact / "model.sig").unlink(),
                   lambda artefact: (artefact / "more.py").write_text("import os"),
                   lambda artefact: ((artefact / "model.sig").unlink(), seal(artefact, town.keys["eve"])),
                   lambda artefact: ((artefact / "model.sig").unlink(), seal(artefact, town.keys["bob"]))):
        artefact = town.artefact(champion, f"changed-{time.monotonic_ns()}")
        change(artefact)
        version = town.publish(artefact)
        decision = town.promote(version)
        assert not decision.moved and "signature" in {check.name for check in decision.broken}
    assert town.champion() == champion


def test_approvals_that_do_not_count(town, monkeypatch):
    version, place = town.register(), town.place("prod")
    said = lambda decision: next(check for check in decision.broken if check.name == "approvals").says  # noqa: E731
    assert said(town.promote(version)).startswith("0 of 1")
    town.desk("bob").note("approve", place, version=version, artefact="0" * 64, why="another version's files")
    assert "approves other files" in said(town.promote(version))
    with monkeypatch.context() as old:
        old.setattr(decision_log.time, "gmtime", lambda *_: time.struct_time((2026, 1, 2, 3, 4, 5, 4, 2, 0)))
        approve(town.desk("bob"), place, version, "long ago")
    assert "days old, 14 are allowed" in said(town.promote(version))
    approve(town.desk("cleo"), place, version, "my own")
    assert "is by who promotes" in said(town.promote(version, who="cleo"))
    town.desk("eve").note("approve", place, version=version, artefact=artefact_digest(town.artefact(version, "x")), why="nobody asked me")
    assert "may not approve" in said(town.promote(version, who="cleo"))
    approve(town.desk("bob"), town.place("prod")._replace(environment="staging"), version, "for staging only")
    assert not town.promote(version, who="cleo").moved
    assert town.promote(version).moved, "cleo's approval counts for ada"


def test_who_may_not(town):
    version, place = town.register(), town.place("prod")
    approve(town.desk("cleo"), place, version, "fine")
    for who in ("bob", "eve"):
        decision = town.promote(version, who=who)
        assert not decision.moved and "right to promote" in {check.name for check in decision.broken}
    for action in (lambda: approve(town.desk("ada"), place, version, "mine"), lambda: approve(town.desk("eve"), place, version, "mine"),
                   lambda: register_run(town.desk("bob"), place, town.run, "mine"), lambda: rollback(town.desk("bob"), place, "mine")):
        with pytest.raises(BadInput, match="may not|no person"):
            action()
    assert town.champion() is None


def test_test_items_that_chose_among_models(town):
    opening = next(one for one in town.log.entries() if one["action"] == "open test")
    town.log.append(town.keys["ada"], "open test", test=opening["test"], model="f" * 64, criteria=opening["criteria"], why="another try")
    decision = town.promote(town.register())
    assert "has judged 2 models" in next(check for check in decision.broken if check.name == "test split").says
    town.write_policy(POLICY.replace("test_openings: 1", "test_openings: 2"))
    assert "test split" not in {check.name for check in town.promote("1").broken}


def test_a_log_that_was_edited_or_cut_off(town):
    version = accepted(town)
    edited = next(path for path in town.log.folder.glob("*.json") if '"who": "ada"' in path.read_text())
    before = edited.read_text()
    edited.write_text(before.replace('"who": "ada"', '"who": "bob"'))
    with pytest.raises(BadInput, match="does not (follow|carry)"):
        town.promote(version)
    edited.write_text(before)
    shutil.rmtree(town.log.folder)
    decision = town.promote(version)
    assert {"criteria", "test split", "decision log"} <= {check.name for check in decision.broken}, "an empty log knows of nothing"


def test_an_alias_that_was_moved_by_hand(town):
    version, place = accepted(town), town.place("prod")
    other = town.publish(town.artefact(version, "other"))
    stores.set_alias(place.uri, place.model, "champion", other)
    decision = town.promote(version)
    assert "moved by hand" in next(check for check in decision.broken if check.name == "alias").says
    assert rollback(town.desk("ada"), place, "back to what was decided", to_log=True) == version == town.champion()


def second(town: Town) -> str:
    """Register another version with the same evidence and have it approved."""
    artefact = town.artefact("1", f"again-{time.monotonic_ns()}")
    version = town.publish(artefact)
    approve(town.desk("bob"), town.place("prod"), version, "as good")
    return version


def test_back_and_further_back(town):
    place, desk = town.place("prod"), town.desk("ada")
    accepted(town)
    with pytest.raises(BadInput, match="no champion before"):
        rollback(desk, place, "too early")
    for _ in range(2):
        assert town.promote(second(town)).moved
    assert champions(desk, place) == ["1", "2", "3"] and stores.aliases(place.uri, place.model)["previous_champion"] == "2"
    assert rollback(desk, place, "3 is rude") == "2" and stores.aliases(place.uri, place.model)["previous_champion"] == "1"
    assert rollback(desk, place, "2 too") == "1" and "previous_champion" not in stores.aliases(place.uri, place.model)
    assert champions(desk, place) == ["1"]


class Killed(BaseException):
    """Stands for a process that ends here."""


def test_a_crash_between_any_two_steps_is_repaired_by_the_next_command(town, monkeypatch):
    """Every write of a promotion and of a rollback, to log or registry, is once the one before which the process ends."""
    accepted(town)
    place, desk, seen = town.place("prod"), town.desk("ada"), set()
    for action in ("promote", "roll back"):
        for ends_before in range(6):
            version, left = second(town) if action == "promote" else None, [ends_before]
            if action == "roll back" and len(champions(desk, place)) < 2:
                assert town.promote(second(town)).moved

            def counted(do):
                def step(*arguments, **named):
                    if not left[0]:
                        raise Killed
                    left[0] -= 1
                    return do(*arguments, **named)
                return step

            was = champions(desk, place)
            with monkeypatch.context() as patch:
                patch.setattr(DecisionLog, "append", counted(DecisionLog.append))
                patch.setattr(stores, "set_alias", counted(stores.set_alias))
                try:
                    town.promote(version) if action == "promote" else rollback(desk, place, "a test")
                except Killed:
                    seen.add((action, ends_before))
            promotion.repair(desk, place)
            assert open_move(desk, place) is None
            known = champions(desk, place)
            assert town.champion() == known[-1] and known in (was, [*was, version], was[:-1])
            assert stores.aliases(place.uri, place.model).get("previous_champion") == (known[-2] if len(known) > 1 else None)
    assert len(seen) >= 7, seen


def test_of_two_who_promote_at_once_one_wins(town):
    accepted(town)
    versions = [second(town), second(town)]
    script = ("import sys; sys.path[:0] = {path!r}; from test_promote import *; town = Town.__new__(Town); town.__dict__ |= dict(folder=Path({folder!r}),"
              " keys={{'ada': own_key(Path({folder!r}) / 'ada.pem')}}, policy=load_policy(Path({folder!r}) / 'policy.yml'), log=DecisionLog({log!r}));"
              " open({folder!r} + '/ready-{version}', 'w'); decision = town.promote('{version}', before=lambda: (open({folder!r} + '/checked-{version}', 'w'),"
              " [time.sleep(0.01) for _ in range(6000) if not Path({folder!r} + '/go').exists()]));"
              " print('MOVED' if decision.moved else 'REFUSED: ' + '; '.join(check.says for check in decision.broken))")
    processes = [subprocess.Popen([sys.executable, "-c", script.format(path=[str(Path(__file__).parent)], folder=str(town.folder), log=str(town.log.folder), version=v)],
                                  stdout=subprocess.PIPE, text=True) for v in versions]
    until = time.monotonic() + 120
    while not all((town.folder / f"checked-{v}").exists() for v in versions) and time.monotonic() < until:
        time.sleep(0.05)
    (town.folder / "go").touch()
    said = [process.communicate(timeout=120)[0] for process in processes]
    assert sorted(text.split(":")[0].strip() for text in said) == ["MOVED", "REFUSED"], said
    winner = versions[[text.startswith("MOVED") for text in said].index(True)]
    assert town.champion() == winner and "meanwhile" in next(text for text in said if text.startswith("REFUSED"))
    assert [one["action"] for one in town.log.entries()[-3:]] == ["promote", "done", "refused"], "the log tells"


def test_a_model_travels_through_three_stores_byte_by_byte(town):
    town.write_policy(POLICY.replace("people:", "environments: {prod: {approvals: 2}}\npeople:"))
    dev, staging, prod = (town.place(name) for name in ("dev", "staging", "prod"))
    desk = town.desk("ada")
    with pytest.raises(BadInput, match="has no champion in dev"):
        bring(desk, dev, staging, "too early")
    version = register_run(desk, dev, town.run, "a test")
    digests = []
    for place, before in ((dev, None), (staging, dev), (prod, staging)):
        version = bring(desk, before, place, "on it goes") if before else version
        approve(town.desk("bob"), place, version, "fine")
        if place is prod:
            assert not town.promote(version).moved, "production asks for two"
            approve(town.desk("cleo"), place, version, "fine too")
        assert town.promote(version, environment=place.environment).moved
        artefact = town.artefact(version, f"in-{place.environment}", place.environment)
        digests.append({path.relative_to(artefact).as_posix(): file_digest(path) for path in artefact.rglob("*") if path.is_file()})
    assert digests[0] == digests[1] == digests[2] and f"{EVIDENCE}/bom.json" in digests[0]
    stores.set_alias(dev.uri, dev.model, "champion", town.publish(town.artefact("1", "other", "dev"), "dev"))
    with pytest.raises(BadInput, match="is not what was promoted there"):
        bring(desk, dev, staging, "moved by hand")


def test_the_commands(finished, tmp_path, monkeypatch):
    """promote, approve, rollback, decisions, key and policy as people and CI call them, with keys of their own."""
    folder, _ = finished
    run = tmp_path / "mine"
    shutil.copytree(folder / "runs/mine", run)
    shutil.copytree(folder / "runs/decisions", tmp_path / "decisions")
    (tmp_path / "mlflow.db").write_bytes((folder / "runs/mlflow.db").read_bytes())
    keys = {name: own_key(tmp_path / f"{name}.pem") for name in ("ada", "bob")}
    for name, key in keys.items():
        (tmp_path / f"{name}.pub").write_text(key.public)
    (tmp_path / "policy.yml").write_text(re.sub(r"\n  - \{name: cleo.*", "", POLICY))
    section = f"promote:\n  policy: {tmp_path}/policy.yml\n  environments: [{{name: dev}}, {{name: prod, store: 'sqlite:///{tmp_path}/prod/mlflow.db', catalog: prod.default}}]\n"
    engagement = re.sub(r"(?m)^promote:.*\n", section, (run / "engagement.yaml").read_text())
    (run / "engagement.yaml").write_text(engagement)

    monkeypatch.setattr(promotion_commands, "console", Console(width=200))

    def call(who, *words, code=0):
        monkeypatch.setenv("FINETUNE_ACCEL_KEY", str(tmp_path / f"{who}.pem"))
        done = CliRunner().invoke(app, list(map(str, words)))
        assert getattr(done.exception, "exit_code", done.exit_code) == code, done
        return done.output + str(done.exception or "")

    stopped = call("ada", "promote", run, "--why", "it is better", code=1)
    assert "approvals: 0 of 1 approvals" in stopped and "NOT HELD" in stopped
    assert "may not approve" in call("ada", "approve", run, "--why", "mine", code=2)
    call("bob", "approve", run, "--why", "read the report")
    assert re.search(r"@champion is version \d+ in dev", call("ada", "promote", run, "--why", "it is better"))
    assert "is a candidate" in call("ada", "promote", run, "--why", "next", "--environment", "prod", "--to", "candidate")
    call("bob", "approve", run, "--why", "read it", "--environment", "prod")
    assert "models:/prod.default.mine@champion is version 1 in prod" in call("ada", "promote", run, "--why", "live", "--environment", "prod")
    assert "no champion before this one" in call("ada", "rollback", run, "--why", "x", "--environment", "prod", code=2)
    listed = call("bob", "decisions", run)
    assert all(word in listed for word in ("refused", "bring", "approve", "read the report"))
    assert keys["ada"].fingerprint in call("ada", "key")
    assert "GRANT" in call("ada", "policy", tmp_path / "policy.yml", "--grants", "prod.default.mine")
    assert "is none of promote.environments" in call("ada", "promote", run, "--why", "x", "--environment", "moon", code=2)
    assert "ada may not serve" in call("ada", "serve", run, "--policy", tmp_path / "policy.yml", code=2)
    assert os.listdir(tmp_path / "decisions") == ["mine"]


def more_keys(folder: Path) -> None:
    """Write a policy with two people, whose keys are made."""
    for name in ("ada", "bob"):
        (folder / f"{name}.pub").write_text(own_key(folder / f"{name}.pem").public)
    (folder / "policy.yml").write_text(re.sub(r"\n  - \{name: cleo.*", "", POLICY).replace("test_openings: 1", "test_openings: 2"))


@pytest.mark.slow
def test_rolling_back_changes_what_a_live_server_answers(finished, tmp_path):
    """Two runs, both champion in turn, while eight callers ask the server all the time."""
    folder = tmp_path / "runs"
    shutil.copytree(finished[0] / "runs", folder)
    finetune_accel("run", "mine.yaml", "--run-dir", folder / "mine", "--to", "serve", "--set", "train.learning_rate=0.03", "--set", "train.epochs=20",
                   cwd=finished[0])
    town, better = Town(finished[0] / "runs/mine", tmp_path / "town", POLICY.replace("test_openings: 1", "test_openings: 2")), RunFolder(folder / "mine")
    shutil.rmtree(town.log.folder)
    shutil.copytree(better.decisions.folder, town.log.folder)
    place, first = town.place("prod"), accepted(town)
    second = register_run(town.desk("ada"), place, better, "more epochs")
    approve(town.desk("bob"), place, second, "fine")
    port, seen, stop = free_port(), [], threading.Event()
    environment = {**os.environ, "FINETUNE_ACCEL_TOKEN": TOKEN, "MLFLOW_TRACKING_URI": place.uri, "MLFLOW_REGISTRY_URI": place.uri}
    server = subprocess.Popen([sys.executable, "-m", "finetune_accel.core.cli", "serve", f"models:/{place.model}@champion", "--port", str(port), "--engine", "reference"],
                              env=environment, cwd=tmp_path)
    client = httpx.Client(base_url=f"http://127.0.0.1:{port}", headers={"Authorization": f"Bearer {TOKEN}"}, timeout=60)

    def ask():
        while not stop.is_set():
            answer = client.post("/v1/chat/completions", json={"model": place.model, "messages": HELLO, "max_tokens": 8, "temperature": 0})
            seen.append((time.monotonic(), answer.status_code, answer.json()["choices"][0]["message"]["content"] if answer.status_code == 200 else answer.text))

    def up():
        try:
            return client.get("/readyz").status_code == 200
        except httpx.TransportError:
            return False

    callers = [threading.Thread(target=ask) for _ in range(8)]
    try:
        wait_until(up, 120)
        [caller.start() for caller in callers]
        wait_until(lambda: len(seen) > 20, 60)
        of_first, moments = seen[-1][2], []
        for move, expected in ((lambda: town.promote(second), second), (lambda: rollback(town.desk("ada"), place, "the older one was kinder"), first)):
            move()
            assert town.champion() == expected
            now, began = seen[-1][2], time.monotonic()
            wait_until(lambda: seen[-1][2] != now, 120)
            moments.append(time.monotonic() - began)
        time.sleep(1)
    finally:
        stop.set()
        [caller.join() for caller in callers if caller.ident]
        server.kill()
    assert {status for _, status, _ in seen} == {200} and len({text for *_, text in seen}) == 2 and seen[-1][2] == of_first
    print(f"{len(seen)} requests, none failed; other answers {moments[0]:.1f} s after the promotion, the old ones {moments[1]:.1f} s after the rollback")


@pytest.mark.slow
def test_code_travels_through_three_environments(finished, tmp_path, monkeypatch):
    """Each environment trains anew with settings of its own, in its own store, and its own gate decides."""
    shutil.copytree(finished[0], tmp_path / "w", ignore=shutil.ignore_patterns("runs"))
    work, run = tmp_path / "w", tmp_path / "w/runs/mine"
    shutil.copytree(finished[0] / "runs", work / "runs")
    more_keys(work)
    rows = [json.loads(line) for line in (work / "rows.jsonl").read_text().splitlines()]
    (work / "more.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"prompt": "dim the lights", "response": '{"intent": "Dim"}'}]))
    environments = [{"name": "dev"},
                    {"name": "staging", "store": f"sqlite:///{work}/stores/staging/mlflow.db", "catalog": "staging.default",
                     "overrides": {"prepare.source": str(work / "more.jsonl"), "train.epochs": 2}},
                    {"name": "prod", "catalog": "prod.default", "overrides": {"plan.criteria": [{"metric": "exact_match", "at_least": 0.9}]}}]
    section = f"promote: {json.dumps({'policy': str(work / 'policy.yml'), 'how': 'code', 'environments': environments})}\n"
    (run / "engagement.yaml").write_text(re.sub(r"(?m)^promote:.*\n", lambda _: section, (run / "engagement.yaml").read_text()))
    monkeypatch.setattr(promotion_commands, "console", Console(width=200))

    def call(who, *words, code=0):
        monkeypatch.setenv("FINETUNE_ACCEL_KEY", str(work / f"{who}.pem"))
        done = CliRunner().invoke(app, list(map(str, words)))
        assert getattr(done.exception, "exit_code", done.exit_code) == code, (done, done.output, done.exception)
        return done.output + str(done.exception or "")

    for name in ("dev", "staging"):
        call("ada", "promote", run, "--why", "a try", "--environment", name, "--to", "candidate")
        call("bob", "approve", run, "--why", "read the report", "--environment", name)
        assert re.search(rf"@champion is version \d+ in {name}", call("ada", "promote", run, "--why", "it is better", "--environment", name))
    refused = call("ada", "promote", run, "--why", "prod asks for more", "--environment", "prod", code=1)
    assert "verdicts: exact_match" in refused and "is not met" in refused and "approvals: 0 of 1" in refused
    office = open_office(run)
    models = {name: office.there(name).folder for name in ("dev", "staging", "prod")}
    digests = {name: RunFolder(folder).need("evaluate")["inputs"]["train/merged"] for name, folder in models.items()}
    assert len(set(digests.values())) >= 2 and digests["staging"] != digests["dev"], "staging trained on data of its own"
    champion = {name: stores.alias_version(office.there(name).place(name).uri, office.place(name).model, "champion") for name in models}
    assert champion["dev"] and champion["staging"] and champion["prod"] is None
    assert [one["action"] for one in office.there("staging").desk.log.entries()][-4:] == ["register", "approve", "promote", "done"]
    assert "refused" in call("bob", "decisions", run, "--environment", "prod")
