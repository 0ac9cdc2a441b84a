"""Collect what `benchmarks.gpu` needs on a machine that has torch and transformers, but no network.

    python -m benchmarks.wheels DIR [--python 3.12]                   here; at most 64 MiB
    pip install --no-index --no-deps --target SITE DIR/*.whl          there
    PYTHONPYCACHEPREFIX=/tmp/pyc PYTHONPATH=SITE python -m benchmarks.gpu

Without TRL, datasets or liger-kernel their sides are left out, without beartype the tests, without tyro nothing. The
prefix matters where the libraries' folder cannot be written: without it each process compiles them again.
"""

import argparse
import subprocess
import sys
from pathlib import Path

PACKAGES = (
    "trl==1.16.0", "datasets==5.2.0", "dill==0.4.1", "multiprocess==0.70.19", "liger-kernel==0.8.5", "beartype==0.23.1",
    "tyro==1.0.17", "docstring-parser==0.18.0", "typeguard==4.6.1", "shtab==1.13.0",
)  # fmt: skip
LIMIT = 64 << 20  # bytes


def collect(folder: Path, python: str) -> int:
    """Download the wheels into the folder; returns the bytes of all its wheels. Exits if that fails or is too much."""
    options = ["--no-deps", "--only-binary=:all:", "--python-version", python, "--dest", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", *options, *PACKAGES], check=True)
    size = sum(path.stat().st_size for path in folder.glob("*.whl"))
    if size > LIMIT:
        sys.exit(f"{folder}: {size / 2**20:.1f} MiB of wheels, more than {LIMIT >> 20}")
    return size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the wheels go")
    parser.add_argument("--python", default="3.12", help="Python version of the other machine")
    a = parser.parse_args()
    print(f"{collect(a.folder, a.python) / 2**20:.1f} MiB in {a.folder}")


if __name__ == "__main__":
    main()
