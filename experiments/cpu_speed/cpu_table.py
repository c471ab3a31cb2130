# SPDX-License-Identifier: Apache-2.0
"""cpu_table.py: the figures of cpu/README.md: what is asked of each, how it follows from the cases
of a machine, and the tables with a column for each machine."""
import statistics
from collections.abc import Callable
from dataclasses import dataclass

from harness import fill_in, markdown, read_csv

N = 8192
NOT_MEASURED = "not measured"
CELLS = (8, 16)
BLOCKS = ((128, 64), (128, 32), (128, 16), (64, 16))  # the first is what others are compared with
VECTOR_ISAS = ("avx2", "avxvnni", "avx512vnni")  # with f32 kernels of their own


class Missing(Exception):
    """That was not measured."""


class Measured:
    """cases: of sparge bench and torch, each with the name of its `call`. apart: what is no case,
    by name. best: the last of the instruction sets."""

    def __init__(self, cases, apart=None, best=None):
        self.cases, self.found = cases, apart or {}
        self.best = best

    def apart(self, name):
        if self.found.get(name) is None:
            raise Missing(name)
        return self.found[name]

    def of(self, case, dim=128, column="ms", isa=None, threads=1, call="turns"):
        """The median over the calls. In int8 the products are of that instruction set too: another
        may stand in for one that lacks them."""
        isa = isa or ("" if case.startswith("torch") else self.best)
        ran = "qk_isa" if case.startswith("int8") else "isa"
        values = [row[column] for row in self.cases
                  if (row["call"], row["case"], row["isa"]) == (call, case, isa) and
                  (row.get(ran) or isa) == isa and
                  (int(row["q_len"]), int(row["dim"]), int(row["threads"])) == (N, dim, threads)]
        values = [float(x) for x in values if x not in (None, "")]
        if not values:
            raise Missing(case)
        return statistics.median(values)


@dataclass(frozen=True)
class Figure:
    """at least, goal: what is asked. of: the cell of a machine; Missing: not measured there."""
    name: str
    least: str
    goal: str
    of: Callable


# ---- Cells -----------------------------------------------------------------------------------

def dims(text_of):
    """The cell at 128 channels, and at 64 in brackets."""
    def cell(m):
        both = text_of(m, 128)
        try:
            return f"{both} ({text_of(m, 64)})"
        except Missing:
            return both
    return cell


def ratio(above, below, **where):
    """How often the time of one goes into that of the other."""
    return dims(lambda m, dim: f"{m.of(above, dim, **where) / m.of(below, dim, **where):.2f}x")


def over_torch(dtype, case, isa=None, threads=1):
    return lambda m, dim: (m.of(f"torch sdpa {dtype}", dim, threads=threads) /
                           m.of(case, dim, isa=isa, threads=threads))


def times(ratio_of):
    return dims(lambda m, dim: f"{ratio_of(m, dim):.2f}x")


def dense_and_half(threads):
    dense, half = (over_torch("f32", f"int8/int8 {case}", threads=threads)
                   for case in ("dense", "random 0.5"))
    return dims(lambda m, dim: f"{dense(m, dim):.2f}x; {half(m, dim):.2f}x")


def efficiency(kind, isa=None):
    def share(m, dim, sparsity):
        try:
            found = m.of(f"int8/int8 {kind} {sparsity}", dim, "efficiency", isa, call="isas")
        except Missing:
            return "-"
        return f"{100 * found:.0f}"

    def text(m, dim):
        shares = [share(m, dim, x) for x in (0.5, 0.7, 0.9)]
        if set(shares) == {"-"}:
            raise Missing(kind)
        return " / ".join(shares) + " %"
    return dims(text)


def spent(m, dim):
    """ms of prediction, quantization and packing, where the predictor's own mask is used."""
    return sum(m.of("int8/int8 predicted", dim, column) for column in ("ms_predict", "ms_quantize"))


def over_floor(reads):
    """The memory floor: q, k and v are float32 of N x dim, and the definition needs q and v once
    and k twice, for its mean first. With `reads` arrays in all, 3 or 4 (k still in a cache, or
    not), it is 4 reads N dim bytes at the bandwidth that the same call of sparge bench found for
    one core: sums over 256 MB."""
    def over(m, dim):
        rate = m.of("int8/int8 predicted", dim, "read_bytes_per_second")
        return spent(m, dim) / (1e3 * 4 * reads * N * dim / rate)
    return times(over)


def scaling(m, dim):
    one, two = (m.of("int8/int8 random 0.5", dim, "ms_attend", threads=n) for n in (1, 2))
    return one / two


def captured(m, stem):
    over, sparsity, l1 = m.apart(stem)
    return f"{over:.2f}x ({sparsity:.2f}, {l1:.3f})"


def memory(m, isa):
    return f"{m.apart(f'workspace {isa}') / 2**20:.0f} MiB"


def of_isa(isa, case, column, form):
    return dims(lambda m, dim: form.format(m.of(case, dim, column, isa, call="isas")))


def f32_ms(isa):
    return dims(lambda m, dim: "{:.0f}".format(
        m.of("int8/int8 dense", dim, "ms", isa, call="isas") *
        m.of("int8/int8 dense", dim, "speedup_vs_f32", isa, call="isas")))


def effective(isa):
    return dims(lambda m, dim: "{:.0f}".format(
        m.of("int8/int8 dense", dim, "speedup_vs_f32", isa, call="isas") *
        m.of("int8/int8 dense", dim, "baseline_pct_peak", isa, call="isas")))


def by_cells(isa, cell):
    def share(m, dim):
        predict, dense = (m.of(f"int8/int8 {case}", dim, column, isa, call=f"cell {cell}")
                          for case, column in (("predicted", "ms_predict"), ("dense", "ms")))
        return f"{100 * predict / dense:.2f} %"
    return dims(share)


def by_blocks(isa, q, k):
    """Time over that of the first of BLOCKS: dense; with 70 % left out."""
    def over(m, dim, case):
        other, first = (m.of(f"int8/int8 {case}", dim, "ms", isa, call=f"blocks {x} x {y}")
                        for x, y in ((q, k), BLOCKS[0]))
        return other / first
    return dims(lambda m, dim: "; ".join(
        f"{over(m, dim, case):.2f}" for case in ("dense", "random 0.7")))


# ---- The figures -----------------------------------------------------------------------------

CAPTURES = ("layer06_group2", "layer12_group1", "layer21_group0")
MASKS = {"dense": "dense", "50 % left out": "random 0.5", "90 % left out": "random 0.9"}
PREPARED = "prediction, quantization, packing:"
MEMORY = "memory beside inputs and output, 131072 tokens:"


def by_mask(name, ratio_of, asked=(("", ""), ) * 3):
    """A figure for each of MASKS."""
    return [Figure(f"{name}: {words}", *both, times(ratio_of(mask)))
            for (words, mask), both in zip(MASKS.items(), asked)]


SPEED = [
    *by_mask("int8 by AMX over torch's SDPA in bf16",
             lambda mask: over_torch("bf16", f"int8/int8 {mask}", "amx"),
             [("1.6x (2.0x)", "2.2x (2.8x)"), ("3.0x", "4x"), ("9x", "14x")]),
    Figure("dense int8 by AMX over AVX-512 VNNI, attention alone", "2.5x (2.5x)", "3.2x (3.2x)",
           times(lambda m, dim: m.of("int8/int8 dense", dim, "ms_attend", "avx512vnni") /
                 m.of("int8/int8 dense", dim, "ms_attend", "amx"))),
    *by_mask("int8 over torch's SDPA in bf16",
             lambda mask: over_torch("bf16", f"int8/int8 {mask}")),
    Figure("int8 over torch's SDPA in f32, 1 thread: dense; 50 % left out", "1.5x; 3x", "2x; 4x",
           dense_and_half(1)),
    Figure("int8 over torch's SDPA in f32, 2 threads: dense; 50 % left out", "1.5x; 3x", "2x; 4x",
           dense_and_half(2)),
    Figure("int8 over torch's FlexAttention in f32, 50 % left out", "", "",
           ratio("torch flex f32", "int8/int8 random 0.5")),
    Figure("int8 over torch's FlexAttention in bf16, 50 % left out", "", "",
           ratio("torch flex bf16", "int8/int8 random 0.5")),
    Figure("dense int8 over oneDNN's products in f32", "", "",
           ratio("f32/f32 onednn", "int8/int8 dense", call="isas")),
    Figure(f"{PREPARED} ms", "", "", dims(lambda m, dim: f"{spent(m, dim):.2f}")),
    Figure(f"{PREPARED} over the memory floor, k once", "1.4x", "1.15x", over_floor(3)),
    Figure(f"{PREPARED} over the memory floor, k twice", "", "", over_floor(4)),
    Figure(f"{PREPARED} share of dense int8", "1.5 %", "0.9 %",
           dims(lambda m, dim: f"{100 * spent(m, dim) / m.of('int8/int8 dense', dim):.2f} %")),
    Figure("2 threads over 1, attention alone, random mask of 50 %", "1.9x", "1.97x",
           times(scaling)),
    Figure("efficiency at 50 / 70 / 90 %, banded mask", "96 / 95 / 93 %", "99 / 98 / 97 %",
           efficiency("banded")),
    Figure("dense int12 over f32; relative L1 on normal data", "1.35x; 1e-3", "1.52x; 5e-4",
           lambda m: f"{m.of('int12/int12 dense', column='speedup_vs_f32', call='int12'):.2f}x; "
                     f"{m.apart('l1 int12'):.1e}"),
    Figure("dense bf16 over f32", "", "",
           dims(lambda m, dim: f"{m.of('bf16/bf16 dense', dim, 'speedup_vs_f32'):.2f}x")),
    *by_mask("int8 over bf16", lambda mask: lambda m, dim: (m.of(f"bf16/bf16 {mask}", dim) /
                                                            m.of(f"int8/int8 {mask}", dim))),
    *(Figure(f"relative L1 on normal data, {dtype}", "", "",
             lambda m, dtype=dtype: f"{m.apart(f'l1 {dtype}'):.1e}") for dtype in ("int8", "bf16")),
    *(Figure(f"{stem}, 4096 tokens, causal: int8 over dense f32 (sparsity, L1)", "", "2.5x",
             lambda m, stem=stem: captured(m, stem)) for stem in CAPTURES),
    Figure(f"{MEMORY} avx2 (K in words)", "56 MiB", "52 MiB", lambda m: memory(m, "avx2")),
    Figure(f"{MEMORY} VNNI and AMX (K in bytes)", "42 MiB", "38 MiB", lambda m: memory(m, "vnni")),
]

ASKED = {  # of an instruction set: at least, goal
    ("avx2", "peak"): ("78 (75)", "85 (82)"),
    ("avx2", "over"): ("1.50x (1.45x)", "1.68x (1.57x)"),
    ("avx2", "effective"): ("125", "144"),
    ("avx2", "efficiency"): ("96 / 95 / 93 %", "99 / 98 / 97 %"),
    ("avx512vnni", "peak"): ("75 (70)", "82 (78)"),
    ("avx512vnni", "over"): ("2.75x (2.4x)", "3.2x (2.9x)"),
    ("avx512vnni", "efficiency"): ("96 / 95 / 93 %", "99 / 98 / 97 %"),
    ("avx2", "cell 8"): ("3 %", ""),
    ("avx512vnni", "cell 8"): ("3 %", ""),
    ("amx", "cell 8"): ("8 %", ""),
    ("amx", "efficiency"): ("96 / 95 / 90 %", "99 / 98 / 96 %"),
}


def figures_of(isa):
    def figure(name, what, of):
        return Figure(f"{isa}: {name}", *ASKED.get((isa, what), ("", "")), of)
    if isa in VECTOR_ISAS:
        yield figure("dense f32, ms", "f32", f32_ms(isa))
        yield figure("dense f32, % of the FMA peak", "peak",
                     of_isa(isa, "int8/int8 dense", "baseline_pct_peak", "{:.1f}"))
    yield figure("dense int8, ms", "int8", of_isa(isa, "int8/int8 dense", "ms", "{:.1f}"))
    yield figure("dense int8 over dense f32", "over",
                 of_isa(isa, "int8/int8 dense", "speedup_vs_f32", "{:.2f}x"))
    if isa in VECTOR_ISAS:
        yield figure("dense int8, effective operations, % of the FMA peak", "effective",
                     effective(isa))
    yield figure("int8, 50 % left out, ms", "half",
                 of_isa(isa, "int8/int8 random 0.5", "ms", "{:.1f}"))
    yield figure("efficiency at 50 / 70 / 90 %, random mask", "efficiency",
                 efficiency("random", isa))
    for cell in CELLS:
        yield figure(f"prediction by cells of {cell} tokens, share of dense int8", f"cell {cell}",
                     by_cells(isa, cell))
    for q, k in BLOCKS[1:]:
        yield figure(f"blocks of {q} x {k}, time over those of {BLOCKS[0][0]} x {BLOCKS[0][1]}: "
                     "dense; 70 % left out", "blocks", by_blocks(isa, q, k))


ISAS = [figure for isa in (*VECTOR_ISAS, "amx") for figure in figures_of(isa)]


def table(m):
    """What was measured: a row for each figure that was."""
    rows = []
    for figure in SPEED + ISAS:
        try:
            rows.append({"figure": figure.name, "measured": figure.of(m)})
        except Missing:
            pass
    return rows


# ---- All machines ----------------------------------------------------------------------------

def machines(folder):
    """The figures of each machine, and its line, by its name."""
    found = {}
    known = {figure.name for figure in SPEED + ISAS}
    for path in sorted(folder.iterdir()):
        if not (path / "table.csv").is_file() or not (path / "machine.txt").is_file():
            raise SystemExit(f"{path} is no folder with table.csv and machine.txt")
        cells = {row["figure"]: row["measured"] for row in read_csv(path / "table.csv")}
        if strange := sorted(set(cells) - known):
            raise SystemExit(f"{path / 'table.csv'}: no table has '{strange[0]}'")
        found[path.name] = cells, (path / "machine.txt").read_text().strip()
    return found


def fill_readme(folder, readme, command):
    """Both tables: a figure that a machine lacks was not measured there."""
    found = machines(folder)
    lines = [f"* {name}: {line}." for name, (_, line) in found.items()]
    for marker, figures, before in (("cpu_speed", SPEED, [*lines, "", f"Command: {command}.", ""]),
                                    ("cpu_isas", ISAS, [])):
        rows = [[figure.name, figure.least, figure.goal,
                 *(cells.get(figure.name, NOT_MEASURED) for cells, _ in found.values())]
                for figure in figures]
        fill_in(readme, marker, [*before, *markdown(["figure", "at least", "goal", *found], rows)])
