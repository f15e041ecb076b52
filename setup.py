"""Build the package from settings.ini: `pip install .`, `pip wheel --no-deps .`"""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

config = ConfigParser(delimiters=["="])
config.read(Path(__file__).parent / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    author=cfg["author"],
    keywords=cfg["keywords"],
    python_requires=f">={cfg['min_python']}",
    # The phase notebooks ride along inside the package, so that an installed wheel can run them.
    packages=[*find_packages(include=["finetune_accel", "finetune_accel.*"]), "finetune_accel.nbs"],
    package_dir={"finetune_accel.nbs": "nbs"},
    package_data={"finetune_accel": ["engagements/*.yaml", "*.j2", "page.html", "second_use_case.ipynb", "template/*", "template/**/*", "template/repo/.*",
                                     "template/repo/.github/workflows/*"],
                  "finetune_accel.nbs": ["[0-9]*.ipynb"]},
    install_requires=cfg["requirements"].split(),
    extras_require={name: cfg[f"{name}_requirements"].split() for name in ("gpu", "openvino", "ray", "scaffold", "spark", "sql", "docs", "dev")},
    entry_points={"console_scripts": cfg["console_scripts"].split(), "finetune_accel.validators": cfg["validators"].split()},
)
