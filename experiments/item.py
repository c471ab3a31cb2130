# SPDX-License-Identifier: Apache-2.0
"""item.py: the common form of what regenerates a table or a figure: a script
experiments/NAME/run.py that lists jobs, and measures one of them. README.md here says what a run
does with them.
"""
import argparse
import hashlib
import importlib.util
import json
import math
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from harness import ROOT, bench_json, read_csv, run_main, stands_on, write_csv, write_json

# relative: figures are rounded, and the last bits of a double depend on the processor's libm
TOLERANCE = 1e-4


@dataclass
class Job:
    """One measurement. key: the columns that tell its rows from others. seconds: about how long it
    takes. smoke: whether a smoke run has it. needs: files that it reads, without which it is left
    out, or names of Python's modules."""
    key: dict
    seconds: float = 1.0
    smoke: bool = False
    needs: list = field(default_factory=list)

    def __str__(self):
        return ", ".join(map(str, self.key.values()))

    def missing(self):
        """What it needs and this machine has not."""
        return [
            need for need in self.needs
            if not (need.exists() if isinstance(need, Path) else importlib.util.find_spec(need))
        ]


class How:
    """What a job measures with."""

    def __init__(self, args):
        self.program, self.lm, self.full = args.sparge, args.sparge_lm, args.full
        self.captures, self.params = args.captures, args.params  # of the user's, or None
        self.folder = None  # an empty one, of this job

    def bench(self, *options):
        return bench_json(self.program, *options)

    def threads(self):
        """For sparge bench: it refuses several threads beside other processes, which a smoke run
        may have."""
        return ["--threads", "all" if self.full else 1]


# ---- What an interrupted run left -------------------------------------------------------------

def scripts():
    """The one that runs, and those of this project that it has loaded: what a measurement depends
    on."""
    ours, main = Path(__file__).resolve().parent, Path(sys.modules["__main__"].__file__)
    loaded = [
        Path(module.__file__) for module in list(sys.modules.values())
        if getattr(module, "__file__", None)
    ]
    return sorted({file for file in loaded if ours in file.parents} | {main})


def state(path):
    """What tells a file from one that takes its place."""
    at = Path(path).stat()
    return f"{path} {at.st_size} {at.st_mtime_ns}\n".encode()


class Kept:
    """Rows of finished jobs, in a file that is written after each of them. What came of other
    scripts, programs, thresholds or inputs is not taken up."""

    def __init__(self, path, args, jobs):
        needs = {need for job in jobs for need in job.needs if isinstance(need, Path)}
        files = [
            *map(Path, filter(None, [args.sparge, args.sparge_lm, args.params])), *sorted(needs)
        ]
        marks = [script.read_bytes()
                 for script in scripts()] + [state(file) for file in files if file.exists()]
        self.path, self.rows = path, {}
        self.mark = hashlib.sha256(b"".join(marks)).hexdigest()
        try:
            before = json.loads(path.read_text())
            self.rows = dict(before["rows"]) if before["mark"] == self.mark else {}
        except (FileNotFoundError, ValueError, TypeError, KeyError):  # none, or not ours
            pass

    def of(self, job):
        return self.rows.get(str(job))

    def add(self, job, rows):
        self.rows[str(job)] = rows
        write_json(self.path, {"mark": self.mark, "rows": self.rows}, indent=None)


# ---- Progress ---------------------------------------------------------------------------------

class Watch:
    """A line on a terminal: how much is done, and about how long the rest takes at the pace so
    far."""

    def __init__(self, name, jobs):
        self.name, self.left = name, sum(job.seconds for job in jobs)
        self.expected = self.spent = 0.0

    def begin(self, job):
        self.start = time.monotonic()
        pace = self.spent / self.expected if self.expected else 1.0
        if sys.stderr.isatty():
            print(f"\r\033[K{self.name}: {job}, {math.ceil(pace * self.left)} s left", end="",
                  file=sys.stderr, flush=True)

    def end(self, job):
        self.spent += time.monotonic() - self.start
        self.expected += job.seconds
        self.left -= job.seconds
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr, flush=True)


# ---- A run ------------------------------------------------------------------------------------

def measure_all(name, jobs, measure, how, kept):
    """The rows of all jobs, in their order."""
    watch = Watch(name, [job for job in jobs if not kept.of(job)])
    for job in jobs:
        if kept.of(job):
            continue
        watch.begin(job)
        with tempfile.TemporaryDirectory() as folder:
            how.folder = Path(folder)
            found = measure(job.key, how)
        kept.add(job, [job.key | row for row in (found if isinstance(found, list) else [found])])
        watch.end(job)
    return [row for job in jobs for row in kept.of(job)]


def same(old, new):
    try:
        return math.isclose(float(old), float(new), rel_tol=TOLERANCE, abs_tol=1e-9)
    except ValueError:
        return old == new


def differences(job, rows, committed, times):
    """In words, what a job found now and not in the committed run."""
    known = [row for row in committed if all(row.get(k) == str(v) for k, v in job.key.items())]
    if len(known) != len(rows):
        return [f"{job}: {len(rows)} rows, committed are {len(known)}"]
    return [
        f"{job}: {column} is {new[column]}, committed is {old.get(column)}"
        for old, new in zip(known, rows) for column in new
        if column not in times and not same(str(old.get(column)), str(new[column]))
    ]


def compare(jobs, kept, path, times):
    """Ends the program where rows are not as committed."""
    if not path.exists():
        print(f"{path.parent.name}: no out.csv yet to compare with; --full makes it")
        return
    committed = read_csv(path)
    found = [line for job in jobs for line in differences(job, kept.of(job), committed, times)]
    if found:
        sys.exit("\n".join(found[:20]))
    print(f"{path.parent.name}: as committed")


# ---- The command line -------------------------------------------------------------------------

def arguments(captures, params):
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true",
                        help="all jobs, into out.csv here (else some, compared with it)")
    parser.add_argument("--sparge", default=str(ROOT / "build/release/tools/sparge"),
                        help="the program")
    parser.add_argument("--sparge-lm", default=str(ROOT / "build/release/experiments/lm/sparge-lm"),
                        help="the program")
    if captures:
        parser.add_argument(
            "--captures", type=Path, metavar="FOLDER",
            help="measure these instead: a folder with manifest.json, or a folder of such folders")
        parser.add_argument("--output", "-o", type=Path, metavar="OUT.csv",
                            help="where their rows go")
    parser.set_defaults(captures=None, output=None, params=None)
    if params:
        parser.add_argument("--params", type=Path, metavar="P.json",
                            help="their thresholds, by sparge tune")
    args = parser.parse_args()
    given = [name for name in ("captures", "output", "params") if getattr(args, name)]
    if given and given != ["captures", "output"] + ["params"] * params:
        parser.error("--captures, -o" + " and --params" * params + " belong together")
    if given and args.full:
        parser.error("--full is of the items here, and --captures are measured whole")
    return args


def measure_captures(args, name, jobs, measure):
    """The same measurement over captures of the user's."""
    if not jobs:
        sys.exit(f"{name}: nothing to measure in {args.captures}")
    if args.output.is_dir():
        sys.exit(f"{name}: {args.output}: is a folder")
    kept = Kept(args.output.with_name(args.output.name + ".part"), args, jobs)
    write_csv(args.output, measure_all(name, jobs, measure, How(args), kept))
    kept.path.unlink()


def measure_item(args, here, jobs, measure, times, again):
    folder = ROOT / "build" / ("full" if args.full else "smoke") / here.name
    folder.mkdir(parents=True, exist_ok=True)
    chosen = [job for job in jobs if args.full or job.smoke]
    possible = [job for job in chosen if not job.missing()]
    kept = Kept(folder / "kept.json", args, possible)
    rows = measure_all(here.name, possible, measure, How(args), kept)
    missing = sorted(
        {str(need).replace(f"{ROOT}/", "") for job in chosen for need in job.missing()})
    print(f"{here.name}: {len(possible)} of {len(chosen)} jobs, {len(rows)} rows", flush=True)
    if missing and args.full:
        sys.exit(f"{here.name}: nothing is written without {', '.join(missing)}")
    if args.full:
        write_csv(here / "out.csv", rows)
        seed = getattr(sys.modules["__main__"], "SEED", None)
        write_json(here / "from.json", stands_on(args.sparge) | {"seed": seed})
    elif rows:
        write_csv(folder / "out.csv", rows)
    kept.path.unlink(missing_ok=True)  # the next run measures again
    if rows and not args.full:
        compare(possible, kept, here / "out.csv", times)
    if again and not args.full:
        said, found = again(How(args))
        if found:
            sys.exit("\n".join(found))
        print(f"{here.name}: its rows are put together from others; {said}")


def run(script, jobs, measure, times=(), captures=None, params=False, again=None):
    """main() of a script. jobs: a list of Job. measure(key, how): a row of figures, or a list of
    them. times: the columns that differ from run to run. captures(folder): the jobs of a capture
    set of the user's, if the script can do that. params: whether that takes thresholds of the
    user's. again(how): for jobs that put together what is committed elsewhere, some of that
    measured in a smoke run: in words what, and how it differs."""
    here = Path(script).resolve().parent
    args = arguments(captures, params)

    def main():
        if args.captures:
            measure_captures(args, here.name, captures(args.captures), measure)
        else:
            measure_item(args, here, jobs, measure, times, again)

    run_main(main, here.name)
