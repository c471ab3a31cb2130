# SPDX-License-Identifier: Apache-2.0
"""Looks at what the scripts of experiments/ share: python3 experiments.py SPARGE

Runs that are interrupted and go on, rows that are not as committed, what is missing; the tables of
paper.csv, bands.csv and items.py against each other; the driver's command line; the report. Ends
with "N passed, M failed".
"""
import argparse
import csv
import importlib.util
import io
import json
import math
import os
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

sys.path.append(os.path.join(os.path.dirname(__file__), "../support"))
from counted import check, run_tests
from running import save_safetensors, stopped, write

ROOT = Path(__file__).resolve().parents[2]
SPARGE = os.path.abspath(sys.argv[1])
sys.dont_write_bytecode = True
sys.path[:0] = [
    str(ROOT / "experiments"),
    str(ROOT / "experiments/capture"),
    str(ROOT / "experiments/cpu_speed"),
    str(ROOT / "paper_figs")
]
MACHINES = ROOT / "experiments/cpu_speed/machines"

import cpu_table  # noqa: E402
import errors  # noqa: E402
import harness  # noqa: E402
import item  # noqa: E402
import items  # noqa: E402
import sets  # noqa: E402
from item import Job, Kept  # noqa: E402
from items import ITEMS  # noqa: E402


def load(path):
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


# ---- What is not finite ------------------------------------------------------------------------

def test_errors():
    """An error that is not known is NaN, an empty cell and larger than all, and what is not finite
    is said."""
    want = np.random.default_rng(1).standard_normal((3, 5, 4))
    got = want * 1.01
    out = io.StringIO()
    with redirect_stderr(out):
        check(
            np.allclose(errors.relative_l1(got, want, "o"), 0.01) and out.getvalue() == "",
            "finite", out.getvalue())
        got[0, 2], want[0, 2] = np.nan, np.nan  # alike
        got[1, 0, 0] = np.inf
        got[2], want[2] = np.nan, np.nan
        x = errors.relative_l1(got, want, "head o")
    check(abs(x[0] - 0.01) < 1e-9 and np.isnan(x[1:]).all(), "the others; apart; none left", x)
    line = out.getvalue()
    check(
        line.startswith("head o has 24 NaN and 1 infinite") and "24 and 0: 1 are apart" in line,
        "counted", line)
    check(math.isnan(errors.worst([0.1, None, 0.2])) and math.isnan(errors.worst([0.1, ""])) and
          errors.worst([0.1, "0.3"]) == 0.3, "the worst")
    check([errors.cell(x) for x in (None, "", math.nan, 0.12345)] == ["", "", "", "0.123"], "cells")
    sys.path.append(str(ROOT / "experiments/lm"))
    from names import perplexity
    fine = {"surprise": 20.0, "tokens": 11}
    check(
        perplexity([fine]) == math.exp(2) and
        math.isnan(perplexity([fine, {"surprise": "", "tokens": 11}])) and
        math.isnan(perplexity([{"surprise": None, "tokens": 11}])),
        "perplexity of an unknown surprise")


def test_warnings_pass():
    """What a program says on stderr is not lost where it ends well."""
    q = np.full((20, 8), np.nan, np.float32)
    np.save("q.npy", q)
    out = io.StringIO()
    with redirect_stderr(out):
        x = harness.run_json(SPARGE, "run", "q.npy", "q.npy", "q.npy", "--check")
    check(x["l1"] is None and "160 NaN" in out.getvalue(), "the line of sparge", out.getvalue())


# ---- Items ------------------------------------------------------------------------------------

SCRIPT = """import os, sys
from pathlib import Path
sys.path.insert(0, {experiments!r})
import item
item.ROOT = Path({root!r})
from item import Job, run

def measure(key, how):
    n = key["n"]
    if os.path.exists("stop") and n == 2:
        raise KeyboardInterrupt
    assert how.folder.is_dir() and not list(how.folder.iterdir())
    with open("calls", "a") as file:
        file.write(str(n))
    first = {{"x": VALUE * n, "word": "a,b", "ms": len(open("calls").read())}}
    return [first, {{"x": 0.0, "word": "", "ms": 1}}][:1 + n % 2]

SEED, VALUE = 7, 0.5
JOBS = [Job({{"kind": "k", "n": n}}, smoke=n < 3, needs=NEEDS) for n in range(5)]
if __name__ == "__main__":
    run(__file__, JOBS, measure, ["ms"], lambda folder: JOBS[:int(folder.name)])
"""


def script(value="0.5", needs="[]"):
    """A small item of our own in ./thing, whose build folder is ./build."""
    os.makedirs("thing", exist_ok=True)
    text = SCRIPT.format(experiments=str(ROOT / "experiments"), root=os.getcwd())
    write("thing/run.py", text.replace("7, 0.5", f"7, {value}").replace("NEEDS", needs))


def run(*options, **how):
    return said(sys.executable, "thing/run.py", "--sparge", SPARGE, *options, **how)


def wrong(words, script, *options):
    """That a script of experiments/ ends with a line that has these words."""
    code, out, err = script_said(ROOT / "experiments" / script, "--sparge", SPARGE, *options)
    check(code in (1, 2) and words in err and "Traceback" not in err,
          f"{words!r} of {script} {options}", code, err)


def said(*command, **how):
    done = subprocess.run(command, capture_output=True, text=True, **how)
    return done.returncode, done.stdout, done.stderr


def script_said(path, *args):
    """The same of a script of ours, in a fork of this process, which has numpy already."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = os.fork()
        if child == 0:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            sys.argv = [str(path), *map(str, args)]
            sys.path.insert(0, str(Path(path).parent))
            try:
                runpy.run_path(str(path), run_name="__main__")
                code = 0
            except SystemExit as end:
                code = end.code or 0
                if isinstance(code, str):
                    code = print(code, file=sys.stderr) or 1
            except BaseException:
                code = traceback.print_exc() or 1
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return code, *(x.seek(0) or x.read() for x in (out, err))


def calls():
    text = Path("calls").read_text() if os.path.exists("calls") else ""
    Path("calls").unlink(missing_ok=True)
    return text


def test_full_then_smoke():
    script()
    code, out, err = run()
    check(code == 0 and "no out.csv" in out and calls() == "012", "smoke without committed rows",
          code, out, err)
    code, out, err = run("--full")
    rows = table("thing/out.csv")
    check(code == 0 and calls() == "01234" and len(rows) == 7, "full", code, out, err, rows)
    check([r["n"] for r in rows] == list("0112334"), "in order", rows)
    check(rows[1] == {"kind": "k", "n": "1", "x": "0.5", "word": "a,b", "ms": "2"}, "a row", rows)
    first = Path("thing/out.csv").read_bytes(), Path("thing/from.json").read_bytes()
    on = json.loads(first[1])
    check(
        list(on) == ["commit", "date", "machine", "cores", "isa", "compiler", "flags", "seed"],
        "it stands on", on)
    check(on["seed"] == 7 and all(on.values()), "all of it", on)
    run("--full")
    check((Path("thing/out.csv").read_bytes(), Path("thing/from.json").read_bytes()) == first,
          "the same bytes")
    code, out, err = run()
    check(code == 0 and "as committed" in out and err == "", "smoke", code, out, err)


def test_differences():
    script()
    run("--full")
    calls()
    for value, same in (("0.50001", True), ("0.5001", False), ("float('nan')", False)):
        script(value)
        code, out, err = run()
        check((code == 0) == same, f"0.5 became {value}", code, out, err)
        check(same or ("committed is 0.5" in err and "x is" in err), "says what", err)
        check(calls() == "012", "what was different is measured again", err)
    script()
    rows = Path("thing/out.csv").read_text()
    for old, new, words in (('k,1,0.5,"a,b"', 'k,1,0.5,"a,c"', "word is"), ("kind,n,x", "kind,n,y",
                                                                            "x is"),
                            ("k,1,0.0,,1\n", "", "2 rows, committed are 1"), (",ms\n", ",time\n",
                                                                              None)):
        check(old in rows, old)
        write("thing/out.csv", rows.replace(old, new))
        code, out, err = run()
        check((code == 0) == (words is None) and (words or "") in err, f"{old!r} became {new!r}",
              code, err)


def test_interruption():
    script()
    write("stop", "")
    code, out, err = run("--full")
    check(code == 1 and "goes on" in err and "Traceback" not in err and calls() == "01",
          "interrupted", code, err)
    check(not os.path.exists("thing/out.csv"), "nothing is written")
    os.remove("stop")
    code, out, err = run("--full")
    check(code == 0 and calls() == "234" and len(table("thing/out.csv")) == 7, "went on", code, err)
    write("stop", "")
    run("--full")
    os.remove("stop")
    calls()
    script("0.25")
    code, out, err = run("--full")
    check(calls() == "01234" and table("thing/out.csv")[1]["x"] == "0.25",
          "another script begins again", code, err)


def test_full_disk():
    script()
    code, out, err = run("--full", **small(350))
    done = calls()
    check(code == 1 and "File too large" in err and "Traceback" not in err, "no room", code, err)
    code, out, err = run("--full")
    check(
        len(done) > 1 and calls() == "01234"[len(done) - 1:], "what there was room for is kept",
        code, err, done)


def small(size):
    """How a process is run that may make no file larger than this."""
    return {"preexec_fn": partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, size))}


PAGE = """import sys
from pathlib import Path
sys.path[:0] = [{0!r} + "/experiments", {0!r} + "/paper_figs"]
import report
from harness import fill_in, run_main, write_csv, write_json
report.HERE = Path(".")
run_main(lambda: {1}, "page")
"""


def test_whole_or_not_at_all():
    """Under a limit on file sizes, as on a full disk, what was there stays, and a line says which
    file it is about."""
    long = "x" * 5000
    for name, call in (("report.html", "report.main()"),
                       ("rows.csv", f"write_csv('rows.csv', [{{'a': '{long}'}}])"),
                       ("README.md", f"fill_in(Path('README.md'), 'a', ['{long}'])"),
                       ("from.json", f"write_json('from.json', '{long}')")):
        write(name, "<!-- a -->\nbefore\n<!-- /a -->\n")
        write("page.py", PAGE.format(str(ROOT), call))
        before = sorted(os.listdir("."))
        code, out, err = said(sys.executable, "page.py", **small(3000))
        check(code == 1 and name in err and "File too large" in err and "Traceback" not in err,
              f"{name}: a line", err)
        check("before" in Path(name).read_text() and sorted(os.listdir(".")) == before,
              f"{name} as before")
        code, out, err = said(sys.executable, "page.py")
        check(code == 0 and Path(name).stat().st_size > 3000, f"{name} with room", code, err)
        os.remove(name)
    os.mkdir("pictures")
    for kind in "png", "svg":
        write(f"pictures/fig14.{kind}", "before")
    command = sys.executable, ROOT / "paper_figs/figures.py", "fig14", "--to", "pictures"
    code, out, err = said(*command, **small(3000))
    check(code == 1 and "fig14.png: File too large" in err and "Traceback" not in err, "a picture",
          code, err)
    check([Path(f"pictures/{x}").read_text()
           for x in sorted(os.listdir("pictures"))] == ["before"] * 2, "as before")


def test_links_and_devices():
    """A link stays one, and a device is written to."""
    os.mkdir("far")
    os.symlink("far/rows.csv", "rows.csv")
    harness.write_csv("rows.csv", [{"a": 1}])
    check(os.path.islink("rows.csv") and table("far/rows.csv") == [{"a": "1"}], "through a link")
    os.mkfifo("pipe")
    end = os.open("pipe", os.O_RDONLY | os.O_NONBLOCK)
    harness.write_csv("pipe", [{"a": 1}])
    check(os.read(end, 9) == b"a\n1\n" and os.listdir("far") == ["rows.csv"], "into a pipe")
    os.close(end)


def ends(number):
    """What reproduce.py does where it gets a signal while a program of its script is at work."""
    sign = Path("sign").resolve()
    write(
        "slow",
        f"#!/bin/sh\necho $$ >{sign}.new && mv {sign}.new {sign} && exec sleep 600 <&- >&- 2>&-\n")
    os.chmod("slow", 0o755)
    code, _, err = stopped([
        sys.executable, ROOT / "experiments/reproduce.py", "--only", "tune", "--sparge",
        os.path.abspath("slow")
    ], number, lambda _: sign.exists())
    try:
        os.kill(int(sign.read_text()), signal.SIGKILL)
        gone = False
    except ProcessLookupError:
        gone = True
    sign.unlink()
    return code, err, gone


def test_signals():
    """The driver ends after all that it has started."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # it may be ignored here
    for number in signal.SIGTERM, signal.SIGINT:
        code, err, gone = ends(number)
        check(gone, f"nothing of ours runs on after {number.name}", code, err)
        check(code == 1 and "reproduce.py: interrupted" in err and "Traceback" not in err,
              number.name, code, err)


def test_users_captures():
    """Other jobs, into a file of the user's; the same rules."""
    script()
    os.mkdir("4")
    write("4/manifest.json", "{}")
    write("stop", "")
    code, out, err = run("--captures", "4", "-o", "mine.csv")
    check(code == 1 and "goes on" in err and calls() == "01" and not os.path.exists("mine.csv"),
          "stopped", code, err)
    os.remove("stop")
    code, out, err = run("--captures", "4", "-o", "mine.csv")
    check(code == 0 and calls() == "23" and len(table("mine.csv")) == 6, "went on", code, err)
    check(
        sorted(os.listdir(".")) == ["4", "mine.csv", "thing"], "nothing else stays",
        os.listdir("."))
    for options, words in ((["--captures",
                             "4"], "belong together"), (["-o", "mine.csv"], "belong together"),
                           (["--captures", "0", "-o", "no.csv"], "nothing to measure"),
                           (["--captures", "4", "-o",
                             "no/where.csv"], "No such file"), (["--captures", "4", "-o",
                                                                 "thing"], "is a folder"),
                           (["--captures", "4", "-o", "no.csv", "--full"], "--full")):
        code, out, err = run(*options)
        check(code in (1, 2) and words in err and "Traceback" not in err, f"{options}", code, err)


def test_needs():
    script(needs="[Path('nowhere.txt'), 'no_such_module'] if n > 2 else [Path('thing'), 'json']")
    code, out, err = run()
    check(code == 0 and "3 of 3 jobs" in out, "smoke does not need it", code, out, err)
    code, out, err = run("--full")
    check(code == 1 and "without no_such_module, nowhere.txt" in err, "full does", code, err)
    check(not os.path.exists("thing/out.csv"), "nothing is written")


def test_kept_is_whole_or_absent():
    write("program", "")
    write("input", "1")
    args = argparse.Namespace(sparge="program", sparge_lm="nowhere", params=None)
    kept, job = Kept(Path("kept.json"), args, []), Job({"a": 1, "b": "x"},
                                                       needs=[Path("input"), "json"])
    check(kept.of(job) is None, "nothing yet")
    kept.add(job, [{"a": 1}])
    check(Kept(Path("kept.json"), args, []).of(job) == [{"a": 1}], "kept")
    check(
        sorted(os.listdir(".")) == ["input", "kept.json", "program"], "no spare file",
        os.listdir("."))
    for path in "program", "input":
        Kept(Path("kept.json"), args, [job]).add(job, [{"a": 1}])
        check(Kept(Path("kept.json"), args, [job]).of(job) == [{"a": 1}], "kept")
        write(path, "##")
        check(
            Kept(Path("kept.json"), args, [job]).of(job) is None,
            f"of another {path} it is not taken up")
    for text in "", "garbage", "3", "{}", '{"rows": 1}':
        write("kept.json", text)
        check(Kept(Path("kept.json"), args, []).rows == {}, "no rows of ours", text)


def test_bench_json():
    """Seconds of the program are the milliseconds of the committed tables, under their columns."""
    case = {
        "case": "c", "seconds_total": 0.0123456789, "seconds_predict": None, "seconds_quantize":
        1e-4, "seconds_attend": 0.0122, "tops": 2.0
    }
    write("bench", f"#!/bin/sh\necho '{json.dumps([case])}'\n")
    os.chmod("bench", 0o755)
    check(
        item.bench_json("./bench") == [{
            "case": "c", "ms": 12.3456789, "ms_predict": None, "ms_quantize": 0.1, "ms_attend":
            12.2, "tops": 2.0
        }], "milliseconds")
    found = item.bench_json(SPARGE, "--q-len", 64, "--dim", 16, "--repeat", 1, "--threads", 1,
                            "--sparsity", 0)[0] | {"call": "isas"}
    for path in MACHINES.glob("*/cases.csv"):
        committed = list(table(path)[0])
        check([key for key in found if key in committed] == committed, f"columns of {path}",
              list(found))


# ---- cpu_speed --------------------------------------------------------------------------------

def case_of(call, case, dim, isa="amx", threads=1, **figures):
    return {"call": call, "case": case, "isa": isa, "threads": threads, "q_len": cpu_table.N,
            "dim": dim} | figures


def test_cpu_figures():
    """What follows from cases: medians over the calls, of that instruction set, shape and number of
    threads; and nothing of what was not measured."""
    cases = [case_of("turns", "int8/int8 dense", 128, ms=x, ms_attend=x) for x in (9, 2, 1)]
    cases += [case_of("turns", "torch sdpa bf16", 128, "", ms=x) for x in (3, 4, 50)]
    cases += [
        case_of("turns", "int8/int8 dense", 64, ms=1.0, ms_attend=1.0),
        case_of("turns", "torch sdpa bf16", 64, "", ms=3.0),
        case_of("turns", "int8/int8 dense", 128, "avx512vnni", ms=6.0, ms_attend=5.0),
        case_of("isas", "int8/int8 dense", 128, ms=100.0, speedup_vs_f32=7.0),
        case_of("isas", "int8/int8 random 0.5", 128, ms=1.0, efficiency=0.987),
        case_of("isas", "int8/int8 random 0.9", 128, ms=1.0, efficiency=0.914),
        case_of("isas", "int8/int8 random 0.9", 128, threads=2, ms=1.0, efficiency=0.1),
        case_of("isas", "int8/int8 random 0.7", 128, qk_isa="avx512vnni", ms=1.0, efficiency=0.5),
        case_of("turns", "int8/int8 predicted", 128, ms=2.0, ms_predict=0.5, ms_quantize=1.5,
                read_bytes_per_second=4 * 3 * 8192 * 128 * 1e3),
        case_of("turns", "int8/int8 random 0.5", 64, ms=1.0, ms_attend=1.0),
        case_of("turns", "int8/int8 random 0.5", 64, threads=2, ms=1.0, ms_attend=0.5)
    ]
    apart = {"workspace vnni": 44 << 20, "l1 bf16": 0.00234, "l1 int8": None,
             "layer06_group2": (1.5, 0.25, 0.04)}
    rows = {row["figure"]: row["measured"]
            for row in cpu_table.table(cpu_table.Measured(cases, apart, "amx"))}
    prepared = "prediction, quantization, packing:"
    check(rows == {
        "int8 by AMX over torch's SDPA in bf16: dense": "2.00x (3.00x)",
        "dense int8 by AMX over AVX-512 VNNI, attention alone": "2.50x",
        "int8 over torch's SDPA in bf16: dense": "2.00x (3.00x)",
        f"{prepared} ms": "2.00", f"{prepared} over the memory floor, k once": "2.00x",
        f"{prepared} over the memory floor, k twice": "1.50x",
        f"{prepared} share of dense int8": "100.00 %",
        "relative L1 on normal data, bf16": "2.3e-03",
        "layer06_group2, 4096 tokens, causal: int8 over dense f32 (sparsity, L1)":
        "1.50x (0.25, 0.040)",
        "memory beside inputs and output, 131072 tokens: VNNI and AMX (K in bytes)": "44 MiB",
        "amx: dense int8, ms": "100.0", "amx: dense int8 over dense f32": "7.00x",
        "amx: int8, 50 % left out, ms": "1.0",
        "amx: efficiency at 50 / 70 / 90 %, random mask": "99 / - / 91 %"
    }, "figures", rows)
    names = [figure.name for figure in cpu_table.SPEED + cpu_table.ISAS]
    check(len(set(names)) == len(names), "each name once", names)


def cells_of(text):
    """(figure, column) to cell of the tables in a README, and the columns of each table."""
    cells, titles = {}, []
    for line in text[text.index("<!-- cpu_speed"):text.index("<!-- /cpu_isas")].splitlines():
        row = [cell.strip() for cell in line.strip("|").split("|")] if line[:1] == "|" else []
        if row[:1] == ["figure"]:
            titles.append(row)
        elif len(row) > 3 and "---" not in row[0]:
            cells |= {(row[0], name): cell for name, cell in zip(titles[-1][3:], row[3:])}
    return cells, titles


def test_cpu_tables():
    """The README has what is committed, and no figure moves to another machine."""
    readme = (ROOT / "cpu/README.md").read_text()

    def filled(machines):
        write("README.md", readme)
        return script_said(ROOT / "experiments/cpu_speed/run.py", "--readme", "--readme-file",
                           "README.md", "--machines", machines)

    check(filled(MACHINES) == (0, "", ""), "filled")
    check(Path("README.md").read_text() == readme, "cpu/README.md is up to date: run.py --readme")
    own = {path.name: {row["figure"]: row["measured"] for row in table(path / "table.csv")}
           for path in MACHINES.iterdir()}
    check({"zen3", "zen5", "xeon_vnni"} <= set(own), "machines", list(own))
    cells, titles = cells_of(readme)
    check([x[3:] for x in titles] == [sorted(own)] * 2, "a column each", titles)
    for (figure, name), cell in cells.items():
        check(cell == own[name].get(figure, "not measured"), figure, name, cell)
    check(all((figure, name) in cells for name in own for figure in own[name]), "all figures")

    figure = "avx2: dense int8, ms"
    for name, cell in ("b", "2.0"), ("a", "1.0"), ("empty", None):
        os.makedirs(f"machines/{name}")
        write(f"machines/{name}/machine.txt", f"line of {name}\n")
        write(f"machines/{name}/table.csv",
              "figure,measured\n" + (f'"{figure}",{cell}\n' if cell else ""))
    check(filled("machines")[0] == 0, "others")
    text = Path("README.md").read_text()
    cells, titles = cells_of(text)
    check(titles[0][3:] == ["a", "b", "empty"] and "* b: line of b." in text, "columns", titles)
    check([cells[figure, name] for name in ("a", "b", "empty")] == ["1.0", "2.0", "not measured"],
          "cells", cells)
    check(all(cell == "not measured" for (row, _), cell in cells.items() if row != figure),
          "nothing else", cells)
    write("machines/b/table.csv", "figure,measured\nspeed of light,1\n")
    code, _, err = filled("machines")
    check(code == 1 and "speed of light" in err, "a figure of no table", code, err)
    shutil.rmtree("machines/b")
    write("machines/b", "")
    code, _, err = filled("machines")
    check(code == 1 and "machines/b is no folder" in err, "a file", code, err)
    check(Path("README.md").read_text() == readme, "nothing is written")


def test_cpu_machine():
    """Machines by their processor; a name that is no folder's is refused before anything runs."""
    run = load(ROOT / "experiments/cpu_speed/run.py")
    for vendor, family, model, name in (
            ("AuthenticAMD", 25, 1, "zen3"), ("AuthenticAMD", 25, 0x21, "zen3"),
            ("AuthenticAMD", 25, 0x11, "zen4"), ("AuthenticAMD", 25, 0x61, "zen4"),
            ("AuthenticAMD", 25, 0xa0, "zen4"), ("AuthenticAMD", 26, 2, "zen5"),
            ("AuthenticAMD", 26, 0x50, "amd_26_80"), ("AuthenticAMD", 23, 49, "amd_23_49"),
            ("GenuineIntel", 6, 25, "intel_6_25"), ("GenuineIntel", 25, 1, "intel_25_1")):
        got = run.machine_name({"vendor_id": vendor, "cpu family": str(family),
                                "model": str(model)})
        check(got == name, name, got)
    for name in "../zen3", "a/b", "", "Zen 3":
        code, out, err = script_said(ROOT / "experiments/cpu_speed/run.py", "--machine", name,
                                     "--sparge", "nowhere", "--machines", "machines")
        check(code == 2 and f"'{name}'" in err and not os.path.exists("machines"), name, code, err)


def test_same():
    for old, new in ("1", "1.00005"), ("0", "0.0"), ("", ""), ("a", "a"):
        check(item.same(old, new), "the same", old, new)
    for old, new in ("1", "1.0002"), ("0", "0.001"), ("", "0"), ("nan", "nan"), ("None",
                                                                                 "1"), ("a", "b"):
        check(not item.same(old, new), "not the same", old, new)


# ---- Captures ---------------------------------------------------------------------------------

def test_sets():
    draw = np.random.default_rng(1)
    q, k, v = (draw.standard_normal((1, heads, 200, 8)).astype(np.float32) for heads in (4, 2, 2))
    save_safetensors("a.safetensors", q=("F16", q), k=("F16", k), v=("F16", v))
    manifest = {"model": "m", "sample": "s", "causal": True, "grid": [2, 10, 10], "tokens": 200,
                "files": [{"file": "a.safetensors", "layer": 3, "query_heads": [2, 3, 6, 7]}]}
    write("manifest.json", json.dumps(manifest))
    entry, = sets.entries(Path("."))
    check(entry.at == {"sample": "s", "layer": 3, "step": 0}, "where it is of", entry)
    check(entry.grid == (2, 10, 10) and entry.causal and entry.scale is None,
          "grid, causality, scale", entry)
    places = {(3, h): (Path("a.safetensors"), n) for n, h in enumerate((2, 3, 6, 7))}
    check(sets.heads(Path(".")) == places, "heads", sets.heads(Path(".")))
    os.mkdir("head")
    for got, x in zip(sets.head_of(Path("a.safetensors"), 2), (q[0, 2], k[0, 1], v[0, 1])):
        check(got.dtype == np.float32 and (got == x.astype(np.float16)).all(),
              "a head with its key head", got.shape)
    wider = sets.load_file(sets.copied(entry, sets.tensors(entry.path), Path("head/b.safetensors")))
    check(wider["q"].dtype == np.float32, "wider")
    save_safetensors("b16.safetensors", **{n: ("BF16", x) for n, x in zip("qkv", (q, k, v))})
    wide = sets.tensors("b16.safetensors")["q"].astype(np.float32)
    for file in "a.safetensors", "b16.safetensors":
        own = sets.tensors(file)
        kept = sets.load_file(sets.copied(entry, own, Path("kept/c.safetensors"), dtype=None))
        check(all(kept[n].dtype == own[n].dtype and (kept[n] == own[n]).all() for n in "qkv"),
              f"{file}: as it is")
    check(wide.shape == q.shape and np.abs(wide / q - 1).max() < 2**-7, "bfloat16",
          np.abs(wide / q - 1).max())
    copy, = sets.entries(Path("head"))
    check(copy.at == entry.at and copy.heads == entry.heads and copy.causal, "its manifest", copy)
    manifest |= {"causal": None, "softmax_scale": None}
    manifest["files"][0] |= {"causal": False, "softmax_scale": 0.25}
    write("manifest.json", json.dumps(manifest))
    entry, = sets.entries(Path("."))
    check(not entry.causal and entry.scale == 0.25, "a file's own word", entry)
    found = sets.tensors(entry.path)
    mixed, index = sets.reordered(entry, found, "random", seed=3)
    check(sorted(index) == list(range(200)) and list(index) != sorted(index), "an order", index[:9])
    check(
        all((mixed[n] == x.astype(np.float16)[:, :, index]).all()
            for n, x in zip("qkv", (q, k, v))), "reordered")
    sets.copied(entry, mixed, Path("head/b.safetensors"))
    check([copy.scale for copy in sets.entries(Path("head"))] == [0.25], "a copy's scale", copy)
    for first, rest in (True, range(20)), (False, range(180, 200)):
        write("manifest.json",
              json.dumps(manifest | {"grid": [2, 9, 10], "n_text": 20, "text_first": first}))
        entry, = sets.entries(Path("."))
        _, index = sets.reordered(entry, found, "hilbert")
        check(
            list(index[list(rest)]) == list(rest) and sorted(index) == list(range(200)),
            "text stays", first, index)
    cut = sets.beginning(found, 70)
    check((cut["k"] == k.astype(np.float16)[:, :, :70]).all() and cut["q"].shape == (1, 4, 70, 8),
          "the beginning")


def test_patches():
    patches = load(ROOT / "experiments/video/patches.py")
    patches.ROOT = Path(".")
    os.makedirs("build/video")
    clip = np.random.default_rng(1).integers(0, 256, (20, 16, 24, 3), dtype=np.uint8)
    np.save("build/video/c.npy", clip)
    entry, found = patches.capture("c", 5)
    check(entry.grid == (13, 2, 3) and not entry.causal and entry.heads == (0,), "a capture", entry)
    part = clip[5:18].astype(np.float64)
    check(found["q"].shape == (1, 1, 78, 192) and (found["q"] == found["v"]).all(), "q, k and v",
          found["q"].shape)
    for t, h, w in (0, 0, 0), (3, 1, 2), (12, 1, 1):
        want = (part[t, 8 * h:8 * h + 8, 8 * w:8 * w + 8] - part.mean()) / part.std()
        got = found["k"][0, 0, (t * 2 + h) * 3 + w]
        check(
            np.abs(got - want.ravel()).max() < 1e-4, f"the patch at {t}, {h}, {w}", got[:4],
            want.ravel()[:4])


def test_thresholds():
    """Those of the heads of a file, for attention as in its model; and what does not fit."""
    params = sets.read_params(ROOT / "experiments/tune/params_0.08_0.09.json")
    entry = sets.entries(sets.SMOLLM2)[1]

    def ends(words, call):
        err = io.StringIO()
        try:
            call()
        except SystemExit as error:
            err.write(str(error))
        check(words in err.getvalue(), words, err.getvalue())

    check(sets.thresholds(params, entry).heads == entry.heads == (3, 4, 5), "of its heads", entry)
    check(sets.attends(entry) == {"is_causal": "end", "softmax_scale": 0.125}, "as in its model")
    ends("for the model 'SmolLM2-135M-Instruct', not for 'n'",
         lambda: sets.thresholds(params, replace(entry, model="n")))
    ends("no thresholds for layer 7 head 3",
         lambda: sets.thresholds(params, replace(entry, layer=7)))


def make_set(folder, seed=1, heads=2, kv_heads=2, tokens=200, dtype="F16", name="a", **more):
    """A capture set of one file, and its manifest."""
    os.makedirs(folder, exist_ok=True)
    draw = np.random.default_rng(seed)
    tensors = {x: draw.standard_normal((1, count, tokens, 8)).astype(np.float32)
               for x, count in (("q", heads), ("k", kv_heads), ("v", kv_heads))}
    save_safetensors(f"{folder}/{name}.safetensors",
                     **{x: (dtype, value) for x, value in tensors.items()})
    manifest = {
        "model": "m", "sample": "s", "causal": False, "grid": [2, 10, 10], "files":
        [{"file": f"{name}.safetensors", "layer": 0, "query_heads": list(range(heads))}]
    } | more
    write(f"{folder}/manifest.json", json.dumps(manifest))
    return tensors, manifest


def of_captures(script, folder, *options):
    """Rows of a user's captures."""
    code, out, err = script_said(ROOT / f"experiments/{script}/run.py", "--sparge", SPARGE,
                                 "--captures", folder, *options, "-o", "rows.csv")
    check(code == 0 and err == "", f"{script} of {folder}", code, err)
    return table("rows.csv") if code == 0 else []


def tuned(folder, *options):
    code, out, err = said(SPARGE, "tune", folder, "--l1", "0.3", "--l2", "0.4", "-o",
                          f"{folder}.json", *options)
    check(code == 0, f"thresholds of {folder}", err)
    return "--params", f"{folder}.json"


def relative(got, want):
    return np.abs(got - want).sum() / np.abs(want).sum()


def test_good_captures():
    make_set("good")
    params = tuned("good")
    for script, rows in ("table9", 40), ("fig14", 2), ("table6", 3):
        check(len(of_captures(script, "good", *params)) == rows, f"rows of {script}")
    # a name that the scripts themselves use is a name like any other
    for script in "table9", "fig14", "table6":
        want = of_captures(script, "good", *params)
        for name in "committed", "captures", "model", "whole", "patches":
            shutil.copytree("good", name, dirs_exist_ok=True)
            got = of_captures(script, name, *params)
            check([list(row.values())[1:]
                   for row in want] == [list(row.values())[1:] for row in got], script, name)
    # two samples, and two files of one layer
    for n in "xy":
        make_set(f"many/{n}", seed=ord(n), sample=n)
    rows = of_captures("fig14", "many", *params)
    check([(r["sample"], r["head"]) for r in rows] == [("x", "0"), ("x", "1"), ("y", "0"),
                                                       ("y", "1")], "samples", rows)
    _, first = make_set("split", heads=4, kv_heads=2)
    entire = of_captures("fig14", "split", *tuned("split"))
    tensors = {n: x.astype(np.float32) for n, x in sets.load_file("split/a.safetensors").items()}
    for name, half in ("a", 0), ("b", 1):
        save_safetensors(f"split/{name}.safetensors",
                         q=("F16", tensors["q"][:, 2 * half:2 * half + 2]),
                         **{n: ("F16", tensors[n][:, half:half + 1]) for n in "kv"})
    files = [{"file": "a.safetensors", "layer": 0, "query_heads": [0, 1]},
             {"file": "b.safetensors", "layer": 0, "query_heads": [2, 3]}]
    write("split/manifest.json", json.dumps(first | {"files": files}))
    check(
        of_captures("fig14", "split", "--params", "split.json") == entire, "two files of a layer",
        entire)
    write("split/manifest.json",
          json.dumps(first | {"files": [files[0], files[1] | {"query_heads": [1, 2]}]}))
    wrong("another file has a head of it", "fig14/run.py", "--captures", "split", "--params",
          "split.json", "-o", "no.csv")
    # text around the grid, and a scale of the model's own
    make_set("text", grid=[2, 9, 10], n_text=20, softmax_scale=1.5)
    params = tuned("text", "--softmax-scale", "1.5")
    row = next(r for r in of_captures("table9", "text", *params)
               if (r["order"], r["thresholds"], r["judge"], r["head"]) == ("hilbert", "tuned", "on",
                                                                           "0"))
    for name, options in ("got", params), ("want", ("--dense", "--qk-dtype", "f32", "--pv-dtype",
                                                    "f32")):
        said(SPARGE, "order", "2", "9", "10", "--text-before", "20", "-o", "i.npy")
        mixed = {n: ("F32", x.astype(np.float32)[:, :, np.load("i.npy")]) for n, x in
                 sets.load_file("text/a.safetensors").items()}
        save_safetensors("mixed.safetensors", **mixed)
        code, out, err = said(SPARGE, "run", "mixed.safetensors", *options, "--softmax-scale",
                              "1.5", "-o",
                              f"{name}.npy")
        check(code == 0, "run", err)
    got, want = (np.load(f"{name}.npy")[0, 0].astype(np.float64) for name in ("got", "want"))
    check(
        abs(float(row["l1"]) / relative(got, want) - 1) < 1e-4, "L1 of the model's attention", row)
    # lengths, and causal attention as it is
    make_set("causal", tokens=1100, causal=True, grid=None)
    lengths = [(r["tokens"], r["heads"]) for r in of_captures("table7", "causal")]
    check(lengths == [("1024", "2"), ("1100", "2")], "lengths", lengths)
    check(len(of_captures("fig14", "causal", *tuned("causal", "--causal"))) == 2, "causal")


def test_capture_that_overflows():
    """Finite, but attention over one of its heads is not: that head's error is unknown, and so is
    the worst."""
    tensors, _ = make_set("large", tokens=100, grid=None)
    tensors["v"][0, 1] = 3e38
    save_safetensors("large/a.safetensors", **{n: ("F32", x) for n, x in tensors.items()})
    code, out, err = script_said(ROOT / "experiments/table7/run.py", "--sparge", SPARGE,
                                 "--captures", "large", "-o", "rows.csv")
    check(code == 0 and "layer 0 head 1" in err and "not finite" in err, "said", code, err)
    check([(r["heads"], r["worst_l1"]) for r in table("rows.csv")] == [("2", "")], "no worst error",
          table("rows.csv"))
    inner = said(SPARGE, "tune", "large", "-o", "p.json")
    row = load(ROOT / "experiments/tune/run.py").row_of(
        json.loads(Path("p.json").read_text())["heads"][1])
    check(row["l1_in"] == row["l1_out"] == "" and row["sparsity"] == 0 and row["dense"] is True,
          "a row of it", row, inner)


def test_bad_captures():
    tensors, manifest = make_set("good")
    tuned("good")
    file, = manifest["files"]
    given = ["--params", "good.json", "-o", "no.csv"]
    spoilt = [({"grid":
                [1, 10,
                 10]}, "200 tokens, but its manifest says a grid of 1 x 10 x 10, which are 100"),
              ({"grid": [3, 10, 10]}, "which are 300"),
              ({"n_text": 5}, "and 5 of text, which are 205"), ({"grid": 3}, "is no manifest"),
              ({"grid": [20, 10]}, "'grid' is [20, 10]"), ({"grid": ["2", 10,
                                                                     10]}, "'grid' is ['2'"),
              ({"causal": "none"}, "'causal' is 'none'"), ({"files": 1}, "is no manifest"),
              ({"files": [file | {"layer": "x"}]}, "manifest.json: "),
              ({"files": [{"file": "a.safetensors", "layer": 0}]}, "has no 'query_heads'"),
              ({"files": [file | {"file": "b.safetensors"}]}, "b.safetensors"),
              ({"files": []}, "no manifest.json with files"),
              ({"model": "n"}, "are for the model 'm', not for 'n'")]
    for n, (change, words) in enumerate(spoilt):
        shutil.copytree("good", f"bad{n}")
        write(f"bad{n}/manifest.json", json.dumps(manifest | change))
        for script in "table9", "fig14":
            wrong(words, f"{script}/run.py", "--captures", f"bad{n}", *given)
    for change, words in ({"grid": None}, "has no 'grid'"), ({"causal": True}, "no other order"):
        write("good/manifest.json", json.dumps(manifest | change))
        wrong(words, "table9/run.py", "--captures", "good", *given)
    wrong("was tuned with is_causal False, not 'end'", "fig14/run.py", "--captures", "good", *given)
    write("good/manifest.json", "{")
    wrong("good/manifest.json: Expecting", "fig14/run.py", "--captures", "good", *given)
    wrong("nowhere: has no manifest.json", "table6/run.py", "--captures", "nowhere", *given)
    write("good/manifest.json", json.dumps(manifest))
    for text, words in (("{", "Expecting"), ("[1]", "is no JSON object"),
                        ('{"heads": [1]}', "'sparge_params' must be")):
        write("p.json", text)
        wrong(f"p.json: {words}", "fig14/run.py", "--captures", "good", "--params", "p.json", "-o",
              "no.csv")
    wrong("belong together", "table6/run.py", "--captures", "good", "-o", "no.csv")
    nan = tensors["k"].copy()
    nan[0, 1, 7, 3] = np.nan
    for change, words in (({"v": None}, "no tensor 'v'"), ({"k":
                                                            ("F32", nan)}, "'k' is not finite"),
                          ({"q": ("I32", [1, 2, 200, 8], bytes(12800))}, "no tensor 'q'"),
                          ({"q": ("F32", tensors["q"][0])}, "no tensor 'q' of four axes"),
                          ({n: ("F32", np.repeat(x, 2, 0)) for n, x in tensors.items()},
                           "is a batch of 2"), ({"q": ("F32", tensors["q"][:, :, :50])},
                                                "q, k and v have 50, 200, 200 tokens")):
        both = {n: ("F32", x) for n, x in tensors.items()} | change
        save_safetensors("good/a.safetensors", **{n: x for n, x in both.items() if x})
        for script in "table9", "fig14":
            wrong(words, f"{script}/run.py", "--captures", "good", *given)
        wrong(words, "table7/run.py", "--captures", "good", "-o", "no.csv")
    write("good/a.safetensors", Path("good/a.safetensors").read_bytes()[:-1])
    wrong("good/a.safetensors: ", "table7/run.py", "--captures", "good", "-o", "no.csv")


# ---- What there is ----------------------------------------------------------------------------

def test_items():
    names = [name for x in ITEMS for name in {x.folder, *x.covers}]
    check(len(names) == len(set(names)), "each name once", sorted(names))
    paper = {r["item"] for r in table(ROOT / "experiments/paper.csv")}
    readme = (ROOT / "experiments/README.md").read_text()
    for x in ITEMS:
        folder = ROOT / "experiments" / x.folder
        check((folder / "run.py").exists() and f"| `{folder.name}`" in readme.replace(", `",
                                                                                      " | `"),
              "script and README", x.folder)
        has_none = x.folder in ("attention_map", "tune", "fig2", "fig3", "fig4", "fig5",
                                  "submass", "frontier")
        check(has_none != bool(set(x.covers) & paper), "the paper's numbers", x.folder)
    expected = {f"table{n}" for n in range(1, 12)} | {f"fig{n}" for n in (9, 10, 14, 15, 16, 17)}
    check(expected <= paper | {"table8"}, "every table is in paper.csv", sorted(expected - paper))
    check(paper <= set(names), "every number is shown in the report", sorted(paper - set(names)))


def test_paper():
    rows = table(ROOT / "experiments/paper.csv")
    places = {tuple(r[k] for k in ("item", "setting", "row", "column")) for r in rows}
    check(len(rows) == len(places), "each number once")
    for r in rows:
        check(math.isfinite(float(r["value"])) and r["source"], "a number and where it was read", r)


def test_bands():
    report = load(ROOT / "paper_figs/report.py")
    bands = table(ROOT / "experiments/bands.csv")
    count = {}
    for band in bands:
        count[band["item"]] = count.get(band["item"], 0) + 1
        check(band["low"] or band["high"], "a band has an end", band)
        low, high = report.ends(band)
        check(low <= high and (not band["paper"] or math.isfinite(high - low)),
              "two ends beside the paper's", band)
        check(band["unit"] in ("", "%", "points", "times"), "unit", band)
        check(not re.search(r" (over|less) ", band["what"]), "words that mean one thing", band)
        for word, units in ("minus", ("points", "")), ("divided by", ("times", )), ("change",
                                                                                    ("%", )):
            check(word not in band["what"] or band["unit"] in units,
                  f"the unit of what has '{word}'", band)
    check(count == {name: len(found) for name, found in report.MEASURED.items()},
          "a figure for each band", count)
    check(set(count) <= {x.folder for x in ITEMS}, "bands are of items", set(count))
    for paper, low, high, want in (("", "1", "", (1, math.inf)), ("4", "1", "", (1, 8)),
                                   ("3 4", "", "5", (1.5, 5)), ("-2 -4", "", "0", (-8, 0)),
                                   ("", "", "2", (-math.inf, 2))):
        check(
            report.ends({"paper": paper, "low": low, "high": high}) == want,
            "half or twice the paper's", paper, want)
    for name, found in report.checks().items():
        for band, value, holds in found:
            known = value is not None
            low, high = report.ends(band)
            check(holds is not False or band["reason"], "what does not hold has a reason", name,
                  band)
            check(holds == (low <= value <= high if known else None), "judged right", name, band,
                  value)


def test_scripts_start():
    """What begins with #! can be run, in the tree and in git."""
    _, listed, _ = said("git", "-C", ROOT, "ls-files", "-s", "*.py", "*.sh")
    found = [line.split(None, 3) for line in listed.splitlines()]
    for mode, _, _, path in found:
        with open(ROOT / path, "rb") as file:
            starts = file.read(2) == b"#!"
        check(starts == (mode == "100755") == os.access(ROOT / path, os.X_OK), "#! and the run bit",
              path, mode)


def test_nothing_is_built_for_a_word():
    """--list and what is mistyped: before anything is installed or built, by a Python that has no
    packages."""
    shutil.copytree(ROOT / ".ci", ".ci")
    for name in ("test.sh", "reproduce.sh", "experiments/harness.py", "experiments/items.py",
                 "experiments/reproduce.py"):
        os.makedirs(os.path.dirname(name) or ".", exist_ok=True)
        shutil.copy(ROOT / name, name)
    os.mkdir("bin")
    for name in "dpkg-query", "apt-get", "cmake", "sudo":
        write(f"bin/{name}", f"#!/bin/sh\necho {name} >>called\nexit 1\n")
        os.chmod(f"bin/{name}", 0o755)
    write("bin/python3", f"#!/bin/sh\nexec {sys.executable} -S -E -B \"$@\"\n")
    os.chmod("bin/python3", 0o755)
    how = {"env": os.environ | {"PATH": f"{os.path.abspath('bin')}:{os.environ['PATH']}"}}
    before = sorted(os.listdir("."))
    for command, want, words in (("./reproduce.sh --list", 0,
                                  "fig5"), ("./reproduce.sh --only fig5 --list", 0,
                                            "fig5"), ("./reproduce.sh --ful", 2,
                                                      "--ful"), ("./reproduce.sh fig3", 2, "fig3"),
                                 ("./reproduce.sh --only nonsense", 2,
                                  "nothing is called 'nonsense'"), ("./reproduce.sh --full --help",
                                                                    0, "all rows"),
                                 ("./test.sh nonsense", 2, "there are all, dev, clang"),
                                 ("./test.sh dev nonsens", 2, "no 'nonsens'"),
                                 ("./test.sh dev --deps", 2, "no '--deps'")):
        code, out, err = said("bash", *command.split(), **how)
        check(code == want and words in (err if want else out) and (want == 0 or out == ""),
              command, code, out, err)
        check(
            sorted(os.listdir(".")) == before, f"{command}: nothing is made or called",
            os.listdir("."))


def test_driver():
    def reproduce(*options):
        return script_said(ROOT / "experiments/reproduce.py", *options)

    code, out, err = reproduce("--list")
    check(code == 0 and err == "" and all(x.folder in out for x in ITEMS), "--list", out, err)
    heading, lines = out.splitlines()[0], {
        line.split()[0]: line for line in out.splitlines() if line.strip()
    }
    place = heading.index("full needs")
    check(heading.split()[:3] == ["item", "covers", "smoke,"], "a heading", heading)
    check(all(lines[x.folder][place:].startswith(", ".join(x.needs)) for x in ITEMS),
          "which item needs what", out)
    for options, words in ((["--only", "table99"], "table99"), (["--smoke", "--full"], "exclude"),
                           (["--fast"], "--fast"), (["--ful"], "--ful"),
                           (["--only", ""], "called ''"), (["--only", "fig2,"], "called ''")):
        code, out, err = reproduce(*options)
        check(code != 0 and words in err and "Traceback" not in err and out == "", f"{options}",
              code, err)
    driver = load(ROOT / "experiments/reproduce.py")
    check([x.folder for x in driver.chosen(["fig15, table4"])] == ["table9", "fig14"],
          "by other names")
    check(driver.chosen([]) == ITEMS, "all")


def test_commands_of_the_driver():
    """Which scripts it runs, with both programs."""
    driver = load(ROOT / "experiments/reproduce.py")
    programs, ran, argv = ["--sparge", "A", "--sparge-lm", "B"], [], sys.argv
    def run(*command):
        ran.append([str(word).removeprefix(f"{ROOT}/") for word in command])
        return 0
    driver.run = run
    for full in [], ["--full"]:
        sys.argv = ["reproduce.py", "--only", "fig9", *programs, *full]
        with redirect_stdout(io.StringIO()):
            code = driver.main()
        sys.argv = argv
        check(code == 0, "exit", code)
        needs = [[word.format(sparge="A", lm="B") for word in words]
                 for name, (_, commands) in driver.SOURCES.items() for words in commands
                 if name in driver.chosen(["fig9"])[0].needs]
        folder = driver.chosen(["fig9"])[0].folder
        want = [*needs * len(full), [f"experiments/{folder}/run.py", *programs, *full],
                ["paper_figs/figures.py"], ["paper_figs/report.py"]]
        check(ran == want, full, ran, want)
        ran.clear()


def test_how_and_how_long():
    args = argparse.Namespace(sparge="A", sparge_lm="B", full=False, captures=None, params=None)
    check(item.How(args).threads() == ["--threads", 1], "a smoke run may have neighbours")
    args.full = True
    check(item.How(args).threads() == ["--threads", "all"], "a full run is alone")

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    jobs, clock = [Job({"n": n}, seconds) for n, seconds in enumerate((1, 1, 2))], iter(range(0, 99,
                                                                                              3))
    before, item.time = item.time, argparse.Namespace(monotonic=lambda: next(clock))
    with redirect_stderr(Terminal()) as said:
        watch = item.Watch("name", jobs)
        for job in jobs:
            watch.begin(job)
            watch.end(job)
    item.time = before
    check([int(n) for n in re.findall(r"(\d+) s left", said.getvalue())] == [4, 9, 6],
          "the rest at the pace so far", said.getvalue())


def test_figures():
    def figures(*options):
        return script_said(ROOT / "paper_figs/figures.py", *options)

    rows = [
        f"mine,{sample},{layer},{step},{head},0.{step}{head}" for sample in "ab"
        for layer, head in ((3, 1), (7, 2)) for step in (0, 9)
    ]
    write("mine.csv", "\n".join(["source,sample,layer,step,head,sparsity", *rows]))
    write("lengths.csv",
          "\n".join(["text,tokens,sparsity", *(f"t{n},{1024 * n},0.{n}" for n in range(1, 9))]))
    names = ["fig14", "fig15", "fig16", "fig17"]
    for csv_, drawn in ("mine.csv", names), ("lengths.csv", ["table7"]):
        code, out, err = figures(*drawn, "--csv", csv_, "--to", "pictures")
        check(code == 0 and err == "" and f"wrote {len(drawn)} " in out, "drawn", drawn, out, err)
        check(
            all(
                Path(f"pictures/{name}.{kind}").stat().st_size > 2000 for name in drawn
                for kind in ("png", "svg")), "pictures", os.listdir("pictures"))
    check(all(f"t{n}" in Path("pictures/table7.svg").read_text() for n in range(1, 9)),
          "every text has a line")
    write("empty.csv", "source,sample,layer,step,head,sparsity\n")
    for options, words in ((["fig14", "--csv", "nowhere.csv", "--to",
                             "p"], "nowhere.csv: No such file"),
                           (["fig14", "--csv", "empty.csv", "--to", "p"], "empty.csv has no rows"),
                           (["fig14", "--csv", "lengths.csv", "--to", "p"],
                            "has no rows with head"), (["fig2", "--csv", "mine.csv", "--to",
                                                        "p"], "there are table7, fig14"),
                           (["--csv", "mine.csv", "--to",
                             "p"], "there are table7"), (["fig14", "--csv",
                                                          "mine.csv"], "needs --to"),
                           (["fig99"],
                            "the figures are"), (["fig14", "--csv", "mine.csv", "--to",
                                                  "mine.csv"], "mine.csv: File exists")):
        code, out, err = figures(*options)
        check(code in (1, 2) and words in err and "Traceback" not in err, f"{options}", code, err)


def test_report_of_unknown():
    """A band over an error that is not known is open: it neither holds nor fails over the
    others."""
    report = load(ROOT / "paper_figs/report.py")
    committed = report.of_item
    for figure, column in ("attention_map", "l1"), ("tune", "l1_out"), ("table9", "l1"):
        def of_item(name):
            found = committed(name)
            for row in found if name == figure else []:
                row[column] = "" if row is found[-1] or row.get("head") == found[-1].get(
                    "head") else row[column]
            return found
        report.of_item = committed
        before = [holds for _, _, holds in report.checks()[figure]]
        report.of_item = of_item
        after = [(value, holds) for _, value, holds in report.checks()[figure]]
        check(any(h is not None and now == (None, None) for h, now in zip(before, after)), figure,
              before, after)


def test_colours():
    """Who sees no red and green sees a scale of brightness."""
    figures = load(ROOT / "paper_figs/figures.py")
    axis = figures.fig9().axes[0]
    light = axis.images[0].cmap(np.linspace(0, 1, 64))[:, :3] ** 2.2 @ (0.2126, 0.7152, 0.0722)
    check((np.diff(light) > 0).all(), "ever brighter", light)
    check(axis.patch.get_hatch(), "what was not run is hatched")
    measured = ~np.isnan(np.asarray(axis.images[0].get_array().filled(np.nan)))
    check(len(axis.texts) == measured.sum(), "a number in each cell", len(axis.texts), measured)


def test_beside():
    """The paper and ours stand in one table, in one unit, with three digits."""
    report = load(ROOT / "paper_figs/report.py")
    for x, want in (0.61269,
                    "0.613"), (708.1,
                               "708"), (131.07,
                                        "131"), (23.3333,
                                                 "23.3"), (-0.00062439,
                                                           "-0.000624"), (0.0,
                                                                          "0"), (100.0,
                                                                                 "100"), (math.nan,
                                                                                          ""):
        check(report.digits(x) == want, "three digits", x, report.digits(x))
    with_numbers = {x.folder for x in ITEMS if any(r["item"] in x.covers for r in report.PAPER)}
    check(with_numbers == set(report.BESIDE), "every item with numbers of the paper", with_numbers)
    for name in report.BESIDE:
        columns, lines = report.BESIDE[name]()
        ours = [n for n, title in enumerate(columns) if title.startswith("ours")]
        check(
            ours and len(ours) < len(columns) and
            all(len(line) == len(columns) + 1 for line in lines), name, columns)
        both = [
            line for line in lines if not math.isnan(line[1]) and not math.isnan(line[1 + ours[0]])
        ]
        check(lines[0] in both, f"{name}: its first row has both", lines[0])
        for what, *values in both:
            ratio = values[ours[0]] / values[0] if values[0] else 1
            check("TOPS" in what or 0.01 < abs(ratio) < 100, f"{name}: one unit", what, values)


def test_commands_run_as_printed():
    """Those under "Not measured", over a tiny capture."""
    make_set("good")
    tuned("good")
    commands = [how.split() for _, _, how in items.MISSING if how.startswith("build/")]
    check(len(commands) > 5, "commands", commands)
    for program, *words in commands:
        words = [{"FOLDER": "good", "P.json": "good.json"}.get(word, word) for word in words]
        check(program in ("build/venv/bin/python", items.LM_PROGRAM), "the interpreter", program)
        if program == "build/venv/bin/python":
            code, out, err = script_said(ROOT / words[0], *words[1:], "--sparge", SPARGE)
            check(code == 0 and table("out.csv"), f"{words}", code, err)


def test_again():
    """Rows that are put together from others: some of those are measured again, or it is said that
    they are not."""
    sys.path.insert(0, str(ROOT / "experiments/lm"))
    again = load(ROOT / "experiments/lm/again.py")
    row = next(r for r in table(ROOT / "experiments/lm/ppl.csv")
               if (r["attention"], r["text"], r["tokens"]) == ("f32", "stb_image.txt", "1024"))
    again.weights.fetch, again.texts.fetch = lambda: Path("w.gguf"), lambda _: [Path("t.txt")]
    how = argparse.Namespace(lm=os.path.abspath("lm"))
    for factor, differs in (1, 0), (1.00005, 0), (1.0002, 1), (math.nan, 1):
        found = {"attention": "f32", "text": row["text"], "tokens": 1024, "sparsity": 0.0,
                 "perplexity": factor * float(row["perplexity"])}
        write("lm", f"#!/bin/sh\necho '{json.dumps({'rows': [found]})}'\n")
        os.chmod("lm", 0o755)
        said_, differences = again.ppl(how)
        check("measured again: f32" in said_ and len(differences) == differs, f"times {factor}",
              said_, differences)

    def offline():
        sys.exit("model: cannot download")

    again.weights.fetch = offline
    check(again.ppl(how) == ("not measured: model: cannot download", []), "offline", again.ppl(how))
    for name in "table1", "fig9", "submass":
        check("again=again." in (ROOT / f"experiments/{name}/run.py").read_text(), name)


def test_submass_rows():
    """Of a file that grows, what was measured at other lengths and with other thresholds stays
    out; and figures of texts beside dense attention."""
    sys.path.insert(0, str(ROOT / "experiments/submass"))
    measure = load(ROOT / "experiments/submass/measure.py")
    made = load(ROOT / "experiments/submass/run.py")
    from attentions import BY_LOSS, Attention
    write("p.json", "{}")
    both = [Attention("dense, f32", "f32"), Attention(BY_LOSS, "p.json", "0.5", "64x16")]
    (_, mine), given = both[1].name, []

    def lm(_args, _command, *words):
        given.append(words)
        return {"rows": [{"attention": name, "attention_sha256": sha, "tokens": tokens}
                         for name, sha in (("f32", None), ("p.json", "0" * 64), ("p.json", mine))
                         for tokens in (1024, 4096)]}

    measure.lm = lm
    rows = measure.rows_of(None, "ppl", both, 1024, [], [])
    check([(r["rule"], r["blocks"], r["attention_sha256"], r["tokens"]) for r in rows] ==
          [("dense, f32", "128x64", None, 1024), (BY_LOSS, "64x16", mine, 1024)], "rows", rows)
    check([words[words.index("--block-q"):][:4] for words in given] ==
          [("--block-q", "128", "--block-k", "64"), ("--block-q", "64", "--block-k", "16")] and
          given[0][-1] != given[1][-1], "blocks, and a file for each", given)

    texts = [{"tokens": "11", "text": f"{name}.txt", "kl": kl, "density_tokens": kl,
              "sparsity": "0"} for name, kl in (("a", "0.1"), ("b", "0.3"))]
    key = {"tokens": "11", "rule": BY_LOSS, "wanted": "0.5", "blocks": "64x16", "lambda": ""}
    dense = key | {"rule": "dense, f32", "wanted": "", "blocks": "128x64"}
    made.TABLES = {
        "ppl": [text | of | {"surprise": x} for of, found in ((dense, (20, 30)), (key, (21, 32)))
                for text, x in zip(texts, found)],
        "needle": [key | {"right": x} for x in "1101"],
        "time": [of | {"seconds_attention": x, "seconds": 9} for of, x in ((dense, 6), (key, 2))]}
    got = {name: float(x) for name, x in made.measure(key, None).items()}
    for name, want in {"change": math.exp(0.15) - 1, "change_a": math.exp(0.1) - 1,
                       "change_b": math.exp(0.2) - 1, "kl": 0.2, "density": 0.2, "density_b": 0.3,
                       "needles": 0.75, "seconds_attention": 2, "speed": 3}.items():
        check(abs(got[name] - want) < 1e-6, name, got[name], want)


def test_submass_numbers():
    """The number for a density lies between those of the grid; what tau leaves is like t."""
    sys.path.insert(0, str(ROOT / "experiments/submass"))
    measure = load(ROOT / "experiments/submass/measure.py")
    from attentions import CELLS, TAU
    measure.curve = lambda _captures, _rule, _blocks: 1 / (1 + 4 * measure.GRID)
    for rule, found in (CELLS, lambda x: x), (TAU, lambda x: 1 - x):
        rows = list(measure.found_at([], rule, "64x16"))
        for row, want in zip(rows, (0.25, 0.58333, 1)):
            x = found(float(row["value"]))
            check(abs(x / want - 1) < 0.02, f"{rule}, {row['wanted']}", x, want)
        check([row["wanted"] for row in rows] == ["0.5", "0.3", "0.2"], "each density", rows)
    measure.curve = lambda _captures, _rule, _blocks: 1 / (1 + 2 * measure.GRID)**0.1
    try:
        list(measure.found_at([], CELLS, "64x16"))
        check(False, "a density beyond the grid is refused")
    except SystemExit as why:
        check("widen GRID" in str(why), "beyond the grid", why)


def test_report():
    report = load(ROOT / "paper_figs/report.py")
    names = [name for x in ITEMS for name in x.figures]
    alts = [re.search(r' alt="([^"]*)"', report.picture(name))[1] for name in names]
    report.HERE = Path(".")
    report.main()
    text = Path("report.html").read_text()
    check(all(f'id="{x.folder}"' in text for x in ITEMS) and 'id="missing"' in text, "every item")
    check(not re.search(r'(src|href)="(?!data:|#|https://arxiv)', text), "needs no other file")
    for tag in ("section", "table", "div", "ul", "tr"):
        check(text.count(f"<{tag}") == text.count(f"</{tag}>"), "closed", tag)
    check(sorted(names) == sorted(items.CAPTIONS), "a caption for each figure", names)
    check(all(len(alt) > 30 for alt in alts), "what a picture shows", alts)
    for n in 14, 15, 16, 17:
        check(f"<!-- Fig {n}, by" in (ROOT / f"paper_figs/fig{n}.svg").read_text(),
              f"the number of Fig {n}")
    raw = [key for key in report.COLUMNS if "_" in key and f">{key}<" in text]
    check(raw == [], "no names of CSV columns", raw)
    failing = [
        band for found in report.checks().values() for band, _, holds in found if holds is False
    ]
    check(
        text.index('id="attention_map"') > text.index("Bands that do not hold") and
        text.count("does not hold</span>") == len(failing), "what does not hold, at the top")


run_tests(globals(), sys.argv[2:], "sparge-experiments-")
