"""`make test-peft`: PEFT's own tests of all its methods, run on LoraMoeConfig.

They are in the source package of the installed version, which is fetched once into .cache/.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import peft

HERE = Path(__file__).parent
REPOSITORY = HERE.parent.parent
SUITES = ("tests/test_custom_models.py", "tests/test_decoder_models.py")


def source() -> Path:
    """The folder of PEFT's source package."""
    cache = REPOSITORY / ".cache"
    name = f"peft-{peft.__version__}"
    if not (cache / name).is_dir():
        fetch = ["download", "--no-deps", "--no-binary", ":all:", "--no-build-isolation"]
        command = [
            sys.executable,
            "-m",
            "pip",
            *fetch,
            "--dest",
            cache,
            f"peft=={peft.__version__}",
        ]
        subprocess.run(command, check=True)
        with tarfile.open(cache / f"{name}.tar.gz") as archive:
            archive.extractall(cache, filter="data")
    return cache / name


def main() -> int:
    paths = [REPOSITORY, HERE, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "HF_HUB_OFFLINE": "1",
    }
    options = [
        *("-p", "guilomo_cases", "-p", "no:cacheprovider", "-p", "no:schemathesis"),
        *("--import-mode", "importlib", "--rootdir", ".", "-c", os.devnull, "-W", "ignore"),
        *("-q", "-r", "fE"),
    ]
    command = [sys.executable, "-m", "pytest", *options, *SUITES, *sys.argv[1:]]
    return subprocess.run(command, cwd=source(), env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
