"""Write requirements.lock: each package of `.[dev]` as constraints.txt pins it, with the SHA-256 of the file that pip takes here."""
import json
import platform
import subprocess
import sys
from pathlib import Path

repo = Path(__file__).parent.parent
report = subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--report", "-", "-c", "constraints.txt", "-e", ".[dev]"],
                        cwd=repo, check=True, stdout=subprocess.PIPE, text=True).stdout
found = {one["metadata"]["name"].lower().replace("_", "-"): (one["metadata"]["version"], one["download_info"]["archive_info"]["hashes"]["sha256"])
         for one in json.loads(report)["install"] if "archive_info" in one["download_info"]}
lines = [f"{name}=={version} --hash=sha256:{digest}" for name, (version, digest) in sorted(found.items())]
system = f"{platform.system()} {platform.machine()}, Python {'.'.join(platform.python_version_tuple()[:2])}, torch's CPU build"
head = f"# What CI installs, for {system}. `make lock` writes it; `make locked` installs it, and a file with another hash is refused."
(repo / "requirements.lock").write_text("\n".join([head, *lines]) + "\n")
print(f"requirements.lock: {len(lines)} packages")
