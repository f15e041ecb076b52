"""What CI installs is pinned by the hash of each file."""
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

REPO = Path(__file__).parent.parent
LINE = re.compile(r"([a-z0-9.-]+)==(\S+) --hash=sha256:([0-9a-f]{64})")
LOCK = {name: (pinned, line) for line in (REPO / "requirements.lock").read_text().splitlines()[1:] for name, pinned, _ in [LINE.fullmatch(line).groups()]}


def test_the_lock_is_what_the_constraints_pin_and_what_is_installed():
    pinned = dict(re.sub(r"[_.](?=.*==)", "-", line.lower()).split("==") for line in (REPO / "constraints.txt").read_text().splitlines() if "==" in line)
    pinned["triton"] = LOCK["triton"][0]  # comes with torch's CUDA build, which asks for a version of its own
    other = {name: found for name, (found, _) in LOCK.items() if pinned.get(name.replace(".", "-")) not in (found, found.split("+")[0])}
    assert not other, "run make lock"
    for extra in ("", "dev_"):
        asked = re.search(rf"^{extra}requirements = (.*)$", (REPO / "settings.ini").read_text(), re.M)[1].split()
        assert {name for one in asked if (name := re.match(r"[A-Za-z0-9._-]+", one)[0].lower().replace("_", "-")) not in LOCK} == set(), "run make lock"
    for name in ("torch", "transformers", "mlflow", "peft", "datasets", "papermill", "nbdev", "cryptography"):
        assert version(name) == LOCK[name][0], "this environment was not made from the constraints"


def test_a_changed_wheel_is_refused(tmp_path):
    """Of a small wheel one byte is changed; pip installs the one that the lock knows, and refuses the other."""
    (tmp_path / "one.lock").write_text(LOCK["py-serializable"][1] + "\n")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    subprocess.run([*pip, "download", "--no-deps", "--require-hashes", "-r", "one.lock", "-d", "there"], cwd=tmp_path, check=True, capture_output=True)
    (wheel,) = (tmp_path / "there").glob("*.whl")
    install = [*pip, "install", "--no-index", "--find-links", "there", "--no-deps", "--require-hashes", "-r", "one.lock", "--target"]
    assert subprocess.run([*install, "good"], cwd=tmp_path, capture_output=True).returncode == 0
    content = bytearray(wheel.read_bytes())
    content[len(content) // 2] ^= 1
    wheel.write_bytes(content)
    refused = subprocess.run([*install, "bad"], cwd=tmp_path, capture_output=True, text=True)
    assert refused.returncode != 0 and "DO NOT MATCH THE HASHES" in refused.stderr and not (tmp_path / "bad/py_serializable").exists()
