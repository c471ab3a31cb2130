#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""run.py [--check] [WORD...]: plants the bugs of bugs.txt one at a time into a copy of the sources,
builds what the bug's test runs, runs that test, and says which bugs it did not see.

--check: only whether each bug still finds its place. WORD: bugs whose first line holds one."""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
COPY = ROOT / "build/planted"
BUILD = COPY / "build/dev"
SECONDS = 300  # a bug may make a loop endless, which counts as seen


def bugs(words):
    """(name, file, test and its parts, what goes, what comes): see the head of bugs.txt. What goes
    is found whatever white space is between its words."""
    for part in re.split(r"\n(?==== )", (HERE / "bugs.txt").read_text())[1:]:
        head, *lines = part.rstrip().splitlines()
        old, new = (["\n".join(x[2:] for x in lines if x[0] == sign) for sign in "-+"])
        if not words or any(word in head for word in words):
            name, file, test = (x.strip() for x in head[3:].split("|"))
            yield name, file, test.split(), r"\s+".join(map(re.escape, old.split())), new


def planted(file, old, new):
    """The text of the file with the bug, or None: what goes is not there, or not there once."""
    there = (ROOT / file).is_file() and old
    text, places = re.subn(old, lambda _: new, (ROOT / file).read_text()) if there else ("", 0)
    return text if places == 1 else None


def run(*command, **how):
    return subprocess.run(command, capture_output=True, text=True, cwd=COPY, **how)


def prepare():
    """The copy as the sources are, configured; the command and the environment of every test."""
    names = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, check=True,
                           capture_output=True, text=True).stdout.split("\n")[:-1]
    for name in names:
        to = COPY / name
        to.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).exists() and not (to.exists()
                                           and to.read_bytes() == (ROOT / name).read_bytes()):
            to.write_bytes((ROOT / name).read_bytes())
            to.chmod((ROOT / name).stat().st_mode)
    BUILD.parent.mkdir(exist_ok=True)
    for venv in ("venv", "python-venv", "torch-venv"):
        if not (COPY / "build" / venv).is_symlink():
            (COPY / "build" / venv).symlink_to(ROOT / "build" / venv)
    run("cmake", "--preset", "dev", "-DSPARGE_CUDA=OFF",
        "-DCMAKE_C_FLAGS=-w", "-DCMAKE_CXX_FLAGS=-w", check=True)
    run("cmake", "--build", BUILD, check=True)  # CTest tells no command before its program is there
    tests = json.loads(run("ctest", "--test-dir", BUILD, "--show-only=json-v1").stdout)["tests"]
    return {test["name"]: (test["command"], environment(test)) for test in tests
            if "command" in test}


def environment(test):
    """Of a test of CTest. The Python package is that of the build tree, not an installed one."""
    told = {x["name"]: x["value"] for x in test["properties"]}.get("ENVIRONMENT", [])
    return {**os.environ, "PYTHONPATH": str(BUILD / "python"),
            **dict(x.split("=", 1) for x in told)}


def seen(command, environment, parts):
    """Does the test fail? None: it does not build, or there is no such part of it."""
    programs = [os.path.relpath(x, BUILD) for x in command if x.startswith(str(BUILD) + "/")]
    pytest = "pytest" in command
    if pytest:
        programs = ["tools/all", "python/all", "tests/python/all"]
        venv = "torch-venv" if any("/torch/" in part for part in parts) else "python-venv"
        command = [str(COPY / "build" / venv / "bin/python"), *command[1:]]
    built = run("cmake", "--build", BUILD, "--target", *programs)
    if built.returncode:
        print(built.stdout[-2000:])
        return None
    criterion = "--verbose" in command
    words = [f"--filter=*/@({'|'.join(parts)})"] if criterion and parts else parts
    try:
        test = run(*command, *words, timeout=SECONDS, env=environment)
        none = re.search("Tested: [^0-9]*0 |^0 passed, 0", test.stdout + test.stderr, re.M)
        none = none or pytest and test.returncode in (4, 5)  # no such file, no such test
        return None if none else test.returncode
    except subprocess.TimeoutExpired:
        return True


def main():
    check, words = "--check" in sys.argv, [x for x in sys.argv[1:] if x != "--check"]
    commands = {} if check else prepare()
    survived = []
    for name, file, (test, *parts), old, new in bugs(words):
        text = planted(file, old, new)
        what = "no such place" if text is None else ""
        if not check and text is not None:
            (COPY / file).write_text(text)
            caught = seen(*commands[test], parts)
            (COPY / file).write_text((ROOT / file).read_text())
            what = "cannot be run" if caught is None else "" if caught else "SURVIVED"
        survived += [name] if what else []
        print(f"{what or ('there' if check else 'caught'):14}  {file}: {name}", flush=True)
    print(f"{len(survived)} of them not caught" if survived else "all of them")
    return len(survived) > 0


sys.exit(main())
