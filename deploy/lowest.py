"""Prints the requirements of training at the lowest versions that pyproject.toml allows, for pip.

torch is left out: its lowest build would bring CUDA's libraries.
"""

import re
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
for requirement in project["dependencies"] + project["optional-dependencies"]["train"]:
    name, lowest = re.fullmatch(r"([\w-]+)>=([\d.]+)", requirement).groups()
    if name != "torch":
        print(f"{name}=={lowest}")
