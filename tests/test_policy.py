"""The policy: what it refuses and how it says so, who may do what, and the Unity Catalog grants that it amounts to."""
import re
from pathlib import Path

import pytest
import yaml
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from databricks.bundles.registered_models import Privilege, RegisteredModel
from databricks.bundles.schemas import Schema
from databricks.sdk.service import catalog as sdk

from finetune_accel.core.errors import BadInput
from finetune_accel.core.policy import GRANTED_ON, ChampionRules, Grant, Policy, default_policy, grants, grants_bundle, grants_sql, load_policy
from finetune_accel.core.signing import fingerprint

KEYS = {name: ec.generate_private_key(ec.SECP256R1()) for name in ("ada", "bob", "cleo", "eve")}
NOT_IN_SDK = "CREATE_MODEL_VERSION"  # documented, but neither the SDK's nor the bundles' enumerations have it (databricks-sdk-py#1022)


def pem(key) -> str:
    public = key.public_key() if hasattr(key, "public_key") else key
    return public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


def secret(key) -> str:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()


PRINT = {name: fingerprint(pem(key)) for name, key in KEYS.items()}


def content(**changes) -> dict:
    """A policy as a mapping: keys by file and as text, everything else as in the notebook."""
    return {"people": [{"name": "ada", "key": "keys/ada.pub", "may": ["register", "promote"], "principal": "ada@example.com"},
                       {"name": "bob", "key": pem(KEYS["bob"]), "may": ["approve"], "principal": "bob@example.com"},
                       {"name": "cleo", "key": "keys/cleo.pub", "may": ["approve", "promote"]}],
            "groups": [{"principal": "analysts", "may": ["serve"]}], "champion": {"evidence_days": 30, "approval_days": 7},
            "environments": {"dev": {"approvals": 0}, "prod": {"approvals": 2, "parity": ["exact"]}},
            "licences": {"models": ["Apache-2.0", "MIT"], "data": None}, "data_classes": ["customer"]} | changes


def person(**changes) -> list[dict]:
    """The people of `content`, the first of them changed."""
    first, *others = content()["people"]
    return [first | changes, *others]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "keys").mkdir()
    for name, key in KEYS.items():
        (tmp_path / f"keys/{name}.pub").write_text(pem(key))
    return tmp_path


def load(folder: Path, written: dict | str | bytes) -> Policy:
    raw = written if isinstance(written, bytes) else (written if isinstance(written, str) else yaml.safe_dump(written, sort_keys=False)).encode()
    (folder / "policy.yml").write_bytes(raw)
    return load_policy(folder / "policy.yml")


# --- what is refused: what is written, where the message says it is wrong, and a word of rule or fix

REFUSED = {
    "an unknown key": (content(peeple=[]), "policy.yml.peeple", "did you mean `people`"),
    "an unknown key of a person": (content(people=person(kye="x")), "policy.yml.people.0.kye", "did you mean `key`"),
    "an unknown rule": (content(champion={"aprovals": 1}), "policy.yml.champion.aprovals", "did you mean `approvals`"),
    "an unknown rule somewhere": (content(environments={"prod": {"openings": 1}}), "policy.yml: environments.prod.openings", "test_openings"),
    "an unknown licence kind": (content(licences={"weights": []}), "policy.yml.licences.weights", "use one of: models, data"),
    "nobody": (content(people=[]), "policy.yml.people", "at least 1"),
    "no people": ({key: value for key, value in content().items() if key != "people"}, "policy.yml.people", "is required"),
    "a person without key": (content(people=[{"name": "ada", "may": []}]), "policy.yml.people.0.key", "add `key: ...`"),
    "an unknown right": (content(people=person(may=["deploy"])), "policy.yml.people.0.may.0", "'register', 'approve', 'promote' or 'serve'"),
    "a right that is no list": (content(people=person(may="promote")), "policy.yml.people.0.may", "must be a list"),
    "approvals as text": (content(champion={"approvals": "1"}), "policy.yml.champion.approvals", "without quotes"),
    "negative approvals": (content(champion={"approvals": -1}), "policy.yml.champion.approvals", "greater than or equal to 0"),
    "true as a number": (content(champion={"approvals": True}), "policy.yml.champion.approvals", "whole number"),
    "no days": (content(environments={"prod": {"evidence_days": 0}}), "policy.yml: environments.prod.evidence_days", "greater than or equal to 1"),
    "an engine that was refused": (content(champion={"parity": ["refused"]}), "policy.yml.champion.parity.0", "'differs'"),
    "no parity": (content(champion={"parity": []}), "policy.yml.champion.parity", "at least 1"),
    "an environment without rules": (content(environments={"prod": None}), "policy.yml.environments.prod", "mapping"),
    "a name of two lines": (content(people=person(name="ada\nbob")), "policy.yml.people.0.name", "one line"),
    "a name with a space around": (content(people=person(name="ada ")), "policy.yml.people.0.name", "one line"),
    "an invisible letter": (content(people=person(principal="ada\u200b@example.com")), "policy.yml.people.0.principal", "visible text"),
    "an empty principal": (content(groups=[{"principal": "", "may": []}]), "policy.yml.groups.0.principal", "one line"),
    "a person twice": (content(people=[*person(), {"name": "Ada", "key": "keys/eve.pub", "may": []}]), "policy.yml: people", "ada stands twice"),
    "a key twice": (content(people=[*person(), {"name": "eve", "key": pem(KEYS["ada"]), "may": []}]), "policy.yml: people", "key of her own"),
    "an account twice": (content(people=[*person(), {"name": "eve", "key": "keys/eve.pub", "may": [], "principal": "ADA@example.com"}]),
                         "policy.yml: people", "cannot approve for herself"),
    "a group twice": (content(groups=[{"principal": "a", "may": []}, {"principal": "A", "may": []}]), "policy.yml: groups", "stands twice"),
    "more approvals than approvers": (content(champion={"approvals": 3}), "policy.yml: champion", "and 2 can be had"),
    "more approvals somewhere": (content(environments={"prod": {"approvals": 3}}), "policy.yml: environments.prod", "let more people approve"),
    "one who approves and promotes alone": ({"people": [{"name": "ada", "key": "keys/ada.pub", "may": ["approve", "promote"]}]},
                                            "policy.yml: champion", "and 0 can be had"),
    "a private key": (content(people=person(key=secret(KEYS["ada"]))), "policy.yml: people.0.key", "is a private key"),
    "a private key in a file": (content(people=person(key="keys/private.pem")), "policy.yml: people.0.key (ada)", "make a new key"),
    "another curve": (content(people=person(key=pem(ec.generate_private_key(ec.SECP384R1())))), "policy.yml: people.0.key (ada)", "P-256"),
    "an RSA key": (content(people=person(key=pem(rsa.generate_private_key(65537, 2048)))), "policy.yml: people.0.key (ada)", "P-256"),
    "an Ed25519 key": (content(people=person(key=pem(ed25519.Ed25519PrivateKey.generate()))), "policy.yml: people.0.key (ada)", "P-256"),
    "half a key": (content(people=person(key=pem(KEYS["ada"])[:60])), "policy.yml: people.0.key (ada)", "P-256"),
    "a key that is not there": (content(people=person(key="keys/adda.pub")), "policy.yml: people.0.key (ada)", "there is no file"),
    "a key outside": (content(people=person(key="../ada.pub")), "policy.yml: people.0.key (ada)", "beneath the policy's folder"),
    "a key of this machine": (content(people=person(key="/etc/hostname")), "policy.yml: people.0.key (ada)", "beneath the policy's folder"),
    "an empty key": (content(people=person(key="")), "policy.yml: people.0.key (ada)", "must be a PEM text or a file"),
    "a folder as key": (content(people=person(key="keys")), "policy.yml: people.0.key (ada)", "there is no file"),
    "a file that is no key": (content(people=person(key="keys/long.bin")), "policy.yml: people.0.key (ada)", "at most 10,000"),
    "bytes as key": (content(people=person(key="keys/bytes.bin")), "policy.yml: people.0.key (ada)", "UTF-8"),
    "a token": (content(people=person(principal="dapi" + "0" * 32)), "policy.yml.people.0.principal", "Databricks token"),
    "an empty file": ("", "policy.yml", "starts with `people:`"),
    "a list": ("- people", "policy.yml", "starts with `people:`"),
    "a key of the file twice": ("people: []\npeople: []", "policy.yml", "stands twice"),
    "a tag": ("people: !!python/object:os.system x", "policy.yml", "tags"),
    "an alias": ("people: &x []\ngroups: *x", "policy.yml", "aliases"),
    "latin-1": ("people: ä".encode("latin-1"), "policy.yml", "UTF-8"),
    "a huge file": (b"#" * 1_000_001, "policy.yml", "at most 1,000,000"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(folder, name):
    (folder / "keys/private.pem").write_text(secret(KEYS["ada"]))
    (folder / "keys/long.bin").write_bytes(b"x" * 10_001)
    (folder / "keys/bytes.bin").write_bytes(b"\xff\xfe\x00")
    written, place, says = REFUSED[name]
    with pytest.raises(BadInput) as refused:
        load(folder, written)
    assert refused.value.place == place, str(refused.value)
    assert says in str(refused.value) and refused.value.fix
    body = secret(KEYS["ada"]).splitlines()[1]
    assert body not in str(refused.value) and "dapi0" not in str(refused.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(BadInput, match="there is no file"):
        load_policy(tmp_path / "policy.yml")


# --- what holds

def test_people_and_their_rights(folder):
    policy = load(folder, content())
    assert [one.name for one in policy.people] == ["ada", "bob", "cleo"] and policy.person_of(PRINT["bob"]).may == ("approve",)
    assert policy.may(PRINT["ada"], "promote") and not policy.may(PRINT["ada"], "approve") and not policy.may(PRINT["ada"], "anything")
    assert policy.person_of(PRINT["eve"]) is None and not policy.may(PRINT["eve"], "serve")
    policy.require(PRINT["ada"], "promote")
    with pytest.raises(BadInput, match=r"policy.yml: bob may not promote. Fix: .*bob: may: \[approve, promote\]"):
        policy.require(PRINT["bob"], "promote")
    with pytest.raises(BadInput, match=rf"no person of it has the key {PRINT['eve']}, .*key: YOU.pub, may: \[serve\]"):
        policy.require(PRINT["eve"], "serve")


def test_who_has_left_keeps_her_name(folder):
    policy = load(folder, content(people=[*content()["people"], {"name": "eve", "key": "keys/eve.pub", "may": []}]))
    assert policy.person_of(PRINT["eve"]).name == "eve"
    with pytest.raises(BadInput, match=r"eve may not promote.*may: \[promote\]"):
        policy.require(PRINT["eve"], "promote")


def test_rules_of_an_environment_go_before_those_of_everywhere(folder):
    policy = load(folder, content())
    everywhere = ChampionRules(approvals=1, approval_days=7, evidence_days=30, test_openings=1, parity=["exact", "admitted"])
    assert policy.champion_rules("staging") == everywhere
    assert policy.champion_rules("prod") == ChampionRules(approvals=2, approval_days=7, evidence_days=30, parity=["exact"])
    assert policy.champion_rules("dev").approvals == 0
    assert load(folder, {"people": content()["people"]}).champion_rules("prod") == ChampionRules()


def test_licences_and_data_classes(folder):
    policy = load(folder, content())
    assert policy.check_licences("apache-2.0", ["anything"]) == [], "SPDX's identifiers have no case; a null list allows any"
    assert policy.check_licences(None, []) == [], "no base model, nothing to ask"
    assert policy.check_licences("GPL-3.0-only", []) == ["the base model's licence 'GPL-3.0-only' is not among licences.models of the policy"]
    assert len(policy.check_licences("", [])) == len(policy.check_licences("MIT OR Apache-2.0", [])) == 1
    strict = load(folder, content(licences={"data": ["CC-BY-4.0"]}))
    assert strict.check_licences("anything", ["CC-BY-4.0", "own", "own", "MIT"]) == [
        f"the data's licence '{one}' is not among licences.data of the policy" for one in ("own", "MIT")]
    assert policy.check_data_classes(["customer", "public"]) == ["data of the class 'public' is not among data_classes of the policy"]
    none = load(folder, content(licences={"models": []}, data_classes=[]))
    assert none.check_licences("MIT", []) and none.check_data_classes(["customer"])
    free = load(folder, content(licences=None, data_classes=None))
    assert free.check_licences("x", ["y"]) == free.check_data_classes(["z"]) == []


def test_the_digest_is_of_the_file_and_of_the_keys(folder):
    before = load(folder, content())
    assert re.fullmatch(r"[0-9a-f]{64}", before.sha256) and load(folder, content()).sha256 == before.sha256
    assert load(folder, content(data_classes=["customer", "internal"])).sha256 != before.sha256
    (folder / "keys/ada.pub").write_text(pem(KEYS["ada"]).replace("\n", "\r\n"))
    assert load(folder, content()).sha256 == before.sha256, "the same key, wrapped otherwise"
    (folder / "keys/ada.pub").write_text(pem(KEYS["eve"]))
    assert load(folder, content()).sha256 != before.sha256


def test_without_a_policy_the_own_key_may_everything():
    policy = default_policy(pem(KEYS["ada"]), "ada")
    assert all(policy.may(PRINT["ada"], action) for action in ("register", "approve", "promote", "serve")) and not policy.may(PRINT["bob"], "serve")
    rules = policy.champion_rules("prod")
    assert rules.approvals == 0 and rules.test_openings > 1000 and rules.parity == ["exact", "admitted"]
    assert policy.check_licences("x", ["y"]) == policy.check_data_classes(["z"]) == [] and policy.people[0].public == pem(KEYS["ada"])
    assert policy.sha256 != default_policy(pem(KEYS["bob"])).sha256


# --- grants

SQL = """\
GRANT USE CATALOG ON CATALOG `prod` TO `ada@example.com`;
GRANT USE SCHEMA, CREATE MODEL ON SCHEMA `prod`.`default` TO `ada@example.com`;
GRANT EXECUTE, APPLY TAG, CREATE MODEL VERSION, MANAGE ON FUNCTION `prod`.`default`.`mine` TO `ada@example.com`;
GRANT USE CATALOG ON CATALOG `prod` TO `bob@example.com`;
GRANT USE SCHEMA ON SCHEMA `prod`.`default` TO `bob@example.com`;
GRANT EXECUTE, APPLY TAG ON FUNCTION `prod`.`default`.`mine` TO `bob@example.com`;
GRANT USE CATALOG ON CATALOG `prod` TO `analysts`;
GRANT USE SCHEMA ON SCHEMA `prod`.`default` TO `analysts`;
GRANT EXECUTE ON FUNCTION `prod`.`default`.`mine` TO `analysts`;
"""


def test_the_grants_of_a_policy(folder):
    policy = load(folder, content())
    assert grants_sql(policy, "prod.default.mine").splitlines()[1:] == SQL.splitlines()
    assert policy.sha256 in grants_sql(policy, "prod.default.mine").splitlines()[0]
    assert grants(policy, "prod.default.mine")[3:6] == [
        Grant("CATALOG", "prod", "bob@example.com", ("USE_CATALOG",)), Grant("SCHEMA", "prod.default", "bob@example.com", ("USE_SCHEMA",)),
        Grant("FUNCTION", "prod.default.mine", "bob@example.com", ("EXECUTE", "APPLY_TAG"))]


def test_a_principal_that_is_named_as_person_and_as_group_has_both_rights(folder):
    policy = load(folder, content(groups=[{"principal": "bob@example.com", "may": ["promote"]}]))
    mine = [one.privileges for one in grants(policy, "a.b.c") if one.principal == "bob@example.com" and one.securable == "FUNCTION"]
    assert mine == [("EXECUTE", "APPLY_TAG", "MANAGE")]


def test_who_may_nothing_gets_nothing(folder):
    policy = load(folder, content(people=[*person(), {"name": "eve", "key": "keys/eve.pub", "may": [], "principal": "eve@example.com"}]))
    assert "eve" not in grants_sql(policy, "a.b.c") and "cleo" not in grants_sql(policy, "a.b.c")
    assert grants_sql(default_policy(pem(KEYS["ada"])), "a.b.c").startswith("-- nothing to GRANT")


@pytest.mark.parametrize("hostile", ["`; DROP SCHEMA x; --", "a`b``c", "x TO `admins`", "*/ GRANT", "o'brien", "ops \\` team"])
def test_names_cannot_leave_their_quotes(folder, hostile):
    policy = load(folder, content(groups=[{"principal": hostile, "may": ["serve"]}]))
    name = re.sub(r"[ ./]", "", hostile)
    for line in grants_sql(policy, f"prod.{name}.{name}").splitlines()[-3:]:
        outside = re.sub(r"`(?:[^`]|``)*`", "N", line)  # what SQL reads outside of quoted names
        assert re.fullmatch(r"GRANT [A-Z ,]+ ON (CATALOG N|SCHEMA N\.N|FUNCTION N\.N\.N) TO N;", outside), line
        assert re.findall(r"`((?:[^`]|``)*)`", line)[-1].replace("``", "`") == hostile


@pytest.mark.parametrize("model", ["mine", "b.c", "a.b.c.d", "a..c", ".b.c", "a.b.c d", "a.b.c/d", "a.b.c\nGRANT", "a.b.", "a.b." + 256 * "c"])
def test_only_names_of_unity_catalog(folder, model):
    policy = load(folder, content())
    for emit in (grants, grants_sql, grants_bundle):
        with pytest.raises(BadInput, match="catalog.schema.model"):
            emit(policy, model)


def test_databricks_own_classes_take_the_resources(folder):
    resources = grants_bundle(load(folder, content()), "prod.default.home-intents")
    schema, model = resources["schemas"]["default"], resources["registered_models"]["home_intents"]
    assert Schema.from_dict(schema).as_dict() == schema
    known = {**model, "grants": [{**one, "privileges": [p for p in one["privileges"] if p != NOT_IN_SDK]} for one in model["grants"]]}
    assert RegisteredModel.from_dict(known).as_dict() == known and known != model
    with pytest.raises(ValueError):  # once they know it, NOT_IN_SDK can go
        RegisteredModel.from_dict(model)
    with pytest.raises(Exception, match="(?i)unexpected|unknown"):  # they do check
        RegisteredModel.from_dict({**model, "alias": "champion"})


def test_privileges_are_those_of_databricks():
    emitted = {one for privileges in GRANTED_ON.values() for one in privileges} - {NOT_IN_SDK}
    assert emitted <= {one.value for one in sdk.Privilege} and emitted <= {one.value for one in Privilege}
    assert set(GRANTED_ON) <= {one.value for one in sdk.SecurableType}
