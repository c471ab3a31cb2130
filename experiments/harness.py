"""harness.py: what the scripts of experiments/ share: run a program, keep a table, fill it into a README."""
import csv
import json
import platform
import subprocess
import sys
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run_json(program, *options):
    """What a program of ours printed, as an object; None: nothing. What it says beside that is passed on; where it
    fails, at the end."""
    done = subprocess.run([program, *map(str, options)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if done.returncode != 0:
        sys.exit(f"{Path(program).name} {' '.join(map(str, options))}: {done.stderr.strip()}")
    sys.stderr.write(done.stderr)
    return json.loads(done.stdout or "null")


def bench_json(program, *options):
    """The cases of sparge bench, with its seconds in milliseconds, as the tables here have them."""
    columns = {"seconds_total": "ms"} | {f"seconds_{part}": f"ms_{part}" for part in ("predict", "quantize", "attend")}
    return [{columns.get(key, key): float(f"{1e3 * x:.9g}") if key in columns and x is not None else x
             for key, x in case.items()} for case in run_json(program, "bench", "--json", *options)]


def write_csv(path, rows, columns=None):
    with open(path, "w", newline="") as file:
        out = csv.DictWriter(file, columns or list(rows[0]), lineterminator="\n", extrasaction="ignore")
        out.writeheader()
        out.writerows(rows)


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def markdown(titles, rows, words=1):
    """The lines of a table: the first columns are words, the others figures."""
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * words + "--:|" * (len(titles) - words)]
    return lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows]


def fill_in(path, name, lines):
    """Puts lines between the markers of that name."""
    text = path.read_text()
    before, _, rest = text.partition(f"<!-- {name} -->\n")
    _, found, after = rest.partition(f"<!-- /{name} -->")
    if not found:
        sys.exit(f"{path} has no <!-- {name} --> and <!-- /{name} -->")
    path.write_text(before + f"<!-- {name} -->\n" + "\n".join(lines) + f"\n<!-- /{name} -->" + after)


def commit():
    """Of the sources; what the scripts write does not make them dirty."""
    git = ["git", "-C", ROOT]
    name = subprocess.run([*git, "describe", "--always"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run([*git, "status", "--porcelain", "--", ".", ":!*.csv", ":!*.json", ":!*.md",
                              ":!paper_figs/*.*g", ":!*.html", ":!*.txt"], capture_output=True, text=True).stdout
    return name + "-dirty" * bool(changed)


def stands_on(program):
    """What a measurement stands on: sources, machine, and what compiled the program."""
    info = run_json(program, "info", "--json")
    model = next((line.split(":", 1)[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")),
                 platform.machine())
    return {"commit": commit(), "machine": model, "cores": info["cores"],
            "isa": [name for name, has in info["isa"].items() if has][-1], "compiler": info["compiler"],
            "flags": info["flags"]}


def machine_line(program):
    """The same in a line, with the day."""
    on = stands_on(program)
    return (f"{on['machine']}, {on['cores']} cores, {on['isa']}; {on['compiler']} {on['flags']}; "
            f"commit {on['commit']}; {date.today()}")
