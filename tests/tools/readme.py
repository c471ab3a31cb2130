#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What the README prints, as it prints it: readme.py PROGRAM.

The lines of its section "From the shell" run in a folder that has the committed files and the
program where they say; so do those of "From C", which compile docs/first.c. (Those of "From Python"
take the package: tests/python/test_readme.py.) Ends with "N passed, M failed".
"""
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tests/support"))
from counted import check, run_tests

PROGRAM = Path(sys.argv[1]).resolve()


def blocks(title):
    """The indented texts of a section, without their indentation."""
    section = (ROOT / "README.md").read_text().split(f"\n## {title}\n")[1].split("\n## ")[0]
    found = re.findall(r"(?:^(?:    .*)?\n)+", section, re.M)
    return [re.sub(r"^    ", "", x, flags=re.M).strip("\n") for x in found if x.strip()]


def runs(script):
    """Line by line in one shell, which ends at the first that fails; what it printed."""
    done = subprocess.run(["bash", "-euxc", script], capture_output=True, text=True)
    check(done.returncode == 0, script, done.returncode, done.stdout, done.stderr)
    return done.stdout


def set_up():
    """The names of the root, and a build folder of our own."""
    for path in ROOT.iterdir():
        if path.name != "build" and not path.name.startswith("."):
            os.symlink(path, path.name)
    os.makedirs("build/release/tools")
    os.symlink(PROGRAM, "build/release/tools/sparge")


def test_shell():
    set_up()
    lines, = blocks("From the shell")
    said = runs(lines)
    check(said.count('"sparsity"') == 3 and '"ok": true' in said, "three runs, one verdict", said)
    for name in "o.npy", "dense.npy", "map.png", "params.json":
        check((Path("build") / name).stat().st_size > 1000, name)


def test_c():
    commands, = blocks("From C")
    set_up()
    said = runs(commands).splitlines()[-1]
    check(re.fullmatch(r"sparsity 0\.\d{3}, \d+\.\d{3} s", said), "what it prints", said)


def test_words():
    words = len((ROOT / "README.md").read_text().split())
    check(words <= 900, "at most 900 words", words)


run_tests(globals(), sys.argv[2:], "readme")
