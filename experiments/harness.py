# SPDX-License-Identifier: Apache-2.0
"""harness.py: what the scripts of experiments/ share: run a program, write a file whole, keep a
table, fill it into a README, end in a line."""
import csv
import json
import os
import platform
import signal
import subprocess
import sys
import textwrap
from contextlib import contextmanager
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "build/release/python"))  # sparge, where PYTHONPATH has no other


# ---- How a script ends ------------------------------------------------------------------------

SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP


def interrupt(*_):
    """The first signal is an interruption like Ctrl-C; those after it do not disturb what tidies
    up."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def run_main(main, name=None):
    """Runs a script to its end. What a signal or the system does to it is said in a line."""
    name = name or Path(sys.argv[0]).name
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, interrupt)
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(f"\n{name}: interrupted; the same command goes on")
    except OSError as error:
        sys.exit(f"{name}: {error.filename or 'writing'}: {error.strerror}")


# ---- Programs ---------------------------------------------------------------------------------

def run_program(command, **how):
    """subprocess.run(), but a program is told to end where we are, and waited for."""
    with subprocess.Popen([str(word) for word in command], **how) as child:
        try:
            out, err = child.communicate()
        except KeyboardInterrupt:
            child.terminate()
            child.communicate()
            raise
    return subprocess.CompletedProcess(command, child.returncode, out, err)


def run_json(program, *options):
    """What a program of ours printed, as an object; None: nothing. What it says beside that is
    passed on; where it fails, at the end."""
    done = run_program([program, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                       text=True)
    if done.returncode != 0:
        sys.exit(f"{Path(program).name} {' '.join(map(str, options))}: {done.stderr.strip()}")
    sys.stderr.write(done.stderr)
    return json.loads(done.stdout or "null")


def bench_json(program, *options):
    """The cases of sparge bench, with its seconds in milliseconds, as the tables here have them."""
    columns = {"seconds_total": "ms"
               } | {f"seconds_{part}": f"ms_{part}" for part in ("predict", "quantize", "attend")}
    return [{
        columns.get(key, key):
        float(f"{1e3 * x:.9g}") if key in columns and x is not None else x
        for key, x in case.items()
    } for case in run_json(program, "bench", "--json", *options)]


# ---- Files ------------------------------------------------------------------------------------

@contextmanager
def writing(path, mode="w", **how):
    """A file to be written, which appears whole, in the place of the one before, or not at all."""
    path = Path(os.path.realpath(path))  # a link stays a link
    if path.exists(
    ) and not path.is_file():  # a device or a pipe; of a folder open() says what is wrong
        with open(path, mode, **how) as file:
            yield file
        return
    spare = path.with_name(f".{path.name[:50]}.{os.getpid()}")
    try:
        with open(spare, mode, **how) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(spare, path)
    except BaseException as error:
        spare.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, str(spare)):
            error.filename = str(path)
        raise


def write_text(path, text):
    with writing(path, encoding="utf-8") as file:
        file.write(text)


def write_json(path, value, **how):
    write_text(path, json.dumps(value, **{"indent": 1} | how) + "\n")


def write_csv(path, rows, columns=None):
    with writing(path, newline="") as file:
        out = csv.DictWriter(file, columns or list(rows[0]), lineterminator="\n",
                             extrasaction="ignore")
        out.writeheader()
        out.writerows(rows)


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def markdown(titles, rows, words=1):
    """The lines of a table: the first columns are words, the others figures."""
    lines = [
        "| " + " | ".join(titles) + " |", "|" + "---|" * words + "--:|" * (len(titles) - words)
    ]
    return lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows]


def fill_in(path, name, lines):
    """Puts lines between the markers of that name: rows of a table as they are, prose in lines of
    100 columns."""
    lines = [part for line in lines for part in
             ([line] if line.startswith("|") else textwrap.wrap(line, 100) or [""])]
    text = path.read_text()
    before, _, rest = text.partition(f"<!-- {name} -->\n")
    _, found, after = rest.partition(f"<!-- /{name} -->")
    if not found:
        sys.exit(f"{path} has no <!-- {name} --> and <!-- /{name} -->")
    write_text(path,
               before + f"<!-- {name} -->\n" + "\n".join(lines) + f"\n<!-- /{name} -->" + after)


# ---- What a measurement stands on -------------------------------------------------------------

def commit():
    """Of the sources; what the scripts write does not make them dirty."""
    git = ["git", "-C", ROOT]
    name = subprocess.run([*git, "describe", "--always"], capture_output=True,
                          text=True).stdout.strip()
    changed = subprocess.run([
        *git, "status", "--porcelain", "--", ".", ":!*.csv", ":!*.json", ":!*.md",
        ":!paper_figs/*.*g", ":!*.html", ":!*.txt"
    ], capture_output=True, text=True).stdout
    return name + "-dirty" * bool(changed)


def processor():
    """What Linux says of the first processor, by name."""
    with open("/proc/cpuinfo") as file:
        first = file.read().split("\n\n")[0]
    return {name.strip(): value.strip() for name, value in
            (line.split(":", 1) for line in first.splitlines() if ":" in line)}


def stands_on(program):
    """What a measurement stands on: sources and their day, machine, and what compiled the
    program."""
    info = run_json(program, "info", "--json")
    git = ["git", "-C", ROOT, "log", "-1", "--format=%cs"]
    day = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    return {
        "commit": commit(), "date": day, "machine":
        processor().get("model name", platform.machine()), "cores": info["cores"], "isa":
        [name for name, has in info["isa"].items() if has][-1], "compiler": info["compiler"],
        "flags": info["flags"]
    }


def machine_line(program):
    """The same in a line, with the day, and which processor of that name it is."""
    on, cpu = stands_on(program), processor()
    which = f" (family {cpu['cpu family']} model {cpu['model']})" if "cpu family" in cpu else ""
    return (f"{on['machine']}{which}, {on['cores']} cores, {on['isa']}; {on['compiler']} "
            f"{on['flags']}; commit {on['commit']}; {date.today()}")
