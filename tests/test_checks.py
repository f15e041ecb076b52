"""Planted secrets, addresses and numbers in 20,000 clean rows are all found; what else is found is counted; redaction leaves none."""
import random
import time

from finetune_accel.core.checks import check_content, find_personal, redact_personal
from finetune_accel.core.errors import Broken
from finetune_accel.core.secrets import SECRET_PATTERNS, find_secret, redact
from finetune_accel.core.sources import fetch_package
from finetune_accel.core.standins import home_intents
from finetune_accel.core.template import ControlTokens

A = "aB3dE5gH7jK9mN1pQ4sT6vX8zC2fR0wY"
FAKES = {
    "Databricks token": "dapi" + "0123456789abcdef" * 2, "Hugging Face token": "hf_" + A, "OpenAI-style key": "sk-proj-" + A, "AWS access key": "AKIA" + "Q7ZL" * 4,
    "AWS secret key": "aws_secret_access_key=" + "aB3/" * 10, "GitHub token": "ghp_" + A + A[:8], "GitLab token": "glpat-" + A[:20],
    "Slack token": "xoxb-123456789012-" + A[:12], "Slack webhook": "https://hooks.slack.com/services/T0AB12CD3/B0AB12CD3/" + A[:24],
    "Google API key": "AIza" + A + A[:3], "Stripe key": "sk_live_" + A[:24], "npm token": "npm_" + A + A[:4], "PyPI token": "pypi-AgE" + A * 2,
    "Azure storage key": "AccountKey=" + (A * 3)[:86] + "==", "SendGrid key": "SG." + A[:22] + "." + (A * 2)[:43],
    "private key": "-----BEGIN PRIVATE KEY-----\n" + A + "\n-----END PRIVATE KEY-----", "JSON web token": f"eyJ{A}.eyJ{A}.{A}",
    "password in a connection string": "postgresql://me:hunter2@db.firma.de/x", "Azure shared access signature": "?sv=1&sig=" + A + A[:8] + "%3D",
    "password": "password=hunter2", "authorization header": "Authorization: Bearer " + A[:20]}
SECRETS = [secret for _ in range(2) for secret in FAKES.values()][:30]
PERSONAL = [f"{name}@{host}" for name in ("jo.b", "anna+x", "m_k", "j.o'neil"[:3] + "z", "A.Smith") for host in ("firma.de", "mail.example.com", "uni-x.ac.uk", "b.io")] + [
    "+1 212-736-5000", "+12127365001", "(212) 736-5002", "212-736-5003", "212.736.5004", "212 736 5005", "1-212-736-5006", "+44 20 7219 3000", "020 7219 3001",
    "+49 30 901820", "+49 (30) 901821", "+33 1 42 68 53 00", "+81 3-3580-3311", "+41 44 668 18 00", "+39 06 6982", "+34 912 345 678", "+61 2 9374 4000",
    "07911 123 456", "+31 20 551 7525", "+46 8 786 40 00"]


def clean_rows() -> list[str]:
    """Return 20,000 utterances and answers of a voice assistant, with the digits that real logs have beside them."""
    rng = random.Random(5)
    noise = ("", " at 2026-10-27 12:30:05", " v2.10.0.1234", " from 192.168.100.200", " account 123456789012", " for $1,234,567.89", " id 1700000000000",
             " order 0000-1234-5678", " i-0abcdef1234567890", " 01-12-2026", " (3.14159265358979)", " 10 000 000 000", " git@github.com:a/b.git")
    rows = [f"{row['prompt']}{rng.choice(noise)}\n{row['response']}" for row in home_intents(fetch_package("pypi:home-assistant-intents"), 5, 17)]
    return (rows * 6)[:20_000]


def test_planted_are_found_and_redacted():
    rows, rng = clean_rows(), random.Random(3)
    assert len(rows) == 20_000
    false = [(text, find_personal(text)) for text in rows if find_personal(text)]
    print(f"false positives: {len(false)} of {len(rows)} clean rows {false[:5]}")
    # every digit in these rows is a made-up level, date, version, address or id: looked at, none is a person's
    assert len(false) == 0
    planted = SECRETS + PERSONAL
    assert (len(SECRETS), len(PERSONAL)) == (30, 40)
    for secret, at in zip(planted, rng.sample(range(len(rows)), len(planted))):
        before, after = rows[at].split("\n")
        rows[at] = f"{before} {secret}, please\n{after}"
    hits = {at: find_personal(text) for at, text in enumerate(rows)}
    assert sum(map(bool, hits.values())) == len(planted), [s for s in planted if not find_personal(f"x {s}, please")]
    cleaned = [redact_personal(text, hits[at]) for at, text in enumerate(rows)]
    assert not any(map(find_personal, cleaned)) and not any(secret in "\n".join(cleaned) for secret in planted)


def test_every_kind_of_secret_is_found_and_redacted():
    assert set(FAKES) == set(SECRET_PATTERNS)
    for kind, fake in FAKES.items():
        assert find_secret(f"a {fake} b") == kind and fake not in redact(f"a {fake} b") and len(find_personal(f"a {fake} b")) == 1, kind


def test_hostile_texts_take_no_time():
    for piece in ("a.", "eyJ-", "a@", "-----BEGIN PRIVATE KEY-----", "1 ", "1-", "+1", "0(", "DE89 ", "x://a:", "a@a.", "sk-", "<|", "(212) "):
        start = time.perf_counter()
        find_personal(piece * (200_000 // len(piece)))
        assert time.perf_counter() - start < 5, piece


def test_a_conversation_is_checked_in_every_message():
    for at in range(3):
        texts = ["Be brief.", "hello", "hi"]
        texts[at] += " <|im_start|> jo@firma.de"
        talk = {"prompt": texts[1], "response": texts[2], "messages": [{"role": r, "content": t} for r, t in zip(("system", "user", "assistant"), texts)]}
        known = {"control": ControlTokens(["<|im_start|>"]), "languages": None}
        record, found = check_content(talk, control_tokens="escape", personal_data="redact", **known)
        assert found == {"control token": 1, "EMAIL": 1} and "firma" not in str(record) and "<|im_start|>" not in str(record)
        assert (record["prompt"], record["response"]) == (record["messages"][1]["content"], record["messages"][2]["content"])
        assert check_content(talk, control_tokens="escape", personal_data="report", **known)[1] == found
        assert isinstance(check_content(talk, control_tokens="set_aside", personal_data="report", **known), Broken)
        assert check_content(talk, control_tokens="escape", personal_data="set_aside", **known).rule == "personal data"
