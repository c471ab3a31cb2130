#!/usr/bin/env python3
"""Measures the cuda backend, kernel by kernel, beside PyTorch's attention in the same process.

    run.py --ceilings FILE            measures all it can, the most telling first, into results.csv
    run.py --limit 120                and stops in time; what was left out is said
    run.py --readme                   measures nothing: fills the table of gpu/README.md from results.csv

Times are the device's own (CUDA events), medians over rounds in which the variants that are
compared take turns. Every result is checked first: each kernel against attention in double on a small
case, and two rows of each result that is timed. Effective operations are those of dense attention
over the visible pairs, 4 a channel; tops_done counts what was multiplied. Needs nothing but
libsparge.so; torch, where there is one.
"""
import argparse
import csv
import ctypes as c
import math
import operator
import random
import signal
import statistics
import struct
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import harness  # noqa: E402
from harness import ROOT, fill_in, read_csv, write_text  # noqa: E402

F16, REF, CUDA, CAUSAL_END, INT8, FLOAT, HALF, FP8 = 1, 1, 3, 1, 0, 2, 3, 4  # of sparge.h
PV = {"float": FLOAT, "int8": INT8, "f16": HALF, "fp8": FP8}
BLOCK_Q, BLOCK_K = 128, 64

# What a kernel multiplies with, and the ceiling (of gpu/ceilings.cu) of each of its two products.
LADDER = {
    (1, "float"): ("f32", "f32"), (2, "float"): ("f32", "f32"), (3, "int8"): ("dp4a", "dp4a"),
    (4, "int8"): ("mma_s8", "mma_s8"), (4, "f16"): ("mma_s8", "mma_f16"),
    (5, "f16"): ("wgmma_s8", "wgmma_f16"), (5, "fp8"): ("wgmma_s8_e4m3", "wgmma_s8_e4m3"),
}
# The largest mean distance from attention in double, relative to its size, on normal numbers; o is
# in f16.
BOUND = {"float": 2e-3, "f16": 3e-2, "int8": 6e-2, "fp8": 8e-2}
IDEAS = {
    (1, "float"): "a thread owns a row, everything from global memory",
    (2, "float"): "tiles in shared memory",
    (3, "int8"): "the paper's int8 codes, four multiply-adds an instruction (dp4a)",
    (4, "int8"): "tensor cores (mma.sync), codes copied ahead (cp.async)",
    (4, "f16"): "the same with P.V in f16",
    (5, "f16"): "Hopper: wgmma, bulk copies, roles for warps; P.V in f16",
    (5, "fp8"): "the same with P.V in fp8",
}
COLUMNS = [
    "what", "kernel", "pv", "dim", "n", "heads", "causal", "sparsity", "blocks_a_row", "calls", "ms",
    "ms_min", "ms_quantize", "ms_predict", "tops", "tops_done", "ceiling", "percent_of_ceiling",
    "efficiency", "prepare_percent_of_dense", "l1"
]

# seconds for making, checking or a round: then a kernel hangs, and SIGALRM ends the process
PATIENCE = 90


class Late(Exception):
    """There is no time left."""


class Lost(Exception):
    """The device answers no call any more, as after an error inside a kernel."""


# ---- sparge.h ------------------------------------------------------------------------------------------

class Error(c.Structure):
    _fields_ = [("text", c.c_char * 256)]


def ints(*names):
    return [(name, c.c_int64) for name in names]


class View(c.Structure):
    _fields_ = [("data", c.c_void_p), ("dtype", c.c_int)] + ints("batch", "head", "token")


class Problem(c.Structure):
    _fields_ = ints("batch", "heads", "kv_heads", "q_len", "k_len", "dim", "dim_v")
    _fields_ += [(x, View) for x in "qkv"]


class Knobs(c.Structure):
    _fields_ = [(x, c.c_float) for x in ("theta", "tau", "topk", "lambda_")]


class Options(c.Structure):
    _fields_ = [("backend", c.c_int), ("isa", c.c_int), ("threads", c.c_int)]
    _fields_ += ints("block_q", "block_k", "skip_rows")
    _fields_ += [("causal", c.c_int), ("qk", c.c_int), ("pv", c.c_int), ("softmax_scale", c.c_float)]
    _fields_ += [("smooth_k", c.c_bool), ("sink", c.c_bool), ("rules", c.c_int), ("thresholds", Knobs)]
    _fields_ += [("per_head", c.c_void_p), ("progress", c.c_void_p), ("user", c.c_void_p)]
    _fields_ += [("kernel", c.c_int), ("stream", c.c_void_p), ("workspace", c.c_void_p)]
    _fields_ += ints("workspace_bytes")


class Mask(c.Structure):
    _fields_ = [("bits", c.c_void_p)] + ints("batch", "heads", "q_blocks", "k_blocks", "words")


class Counts(c.Structure):
    _fields_ = ints("pairs", "qk_done") + [("pv_done", c.c_double)]
    _fields_ += ints("tokens", "qk_tokens", "pv_tokens")


class Result(c.Structure):
    _fields_ = [("o", View), ("lse", c.c_void_p), ("mask", c.c_void_p), ("trace", c.c_void_p)]
    _fields_ += [("head_counts", c.c_void_p), ("counts", Counts), ("backend", c.c_int),
                 ("isa", c.c_int)]
    _fields_ += [("threads", c.c_int), ("kernel", c.c_int), ("pv", c.c_int)] + ints("workspace")
    _fields_ += [(x, c.c_double) for x in ("seconds_predict", "seconds_quantize", "seconds_attend")]


class Library:
    def __init__(self, path):
        try:
            self.so = c.CDLL(str(path))
        except OSError as e:
            sys.exit(f"the library cannot be loaded: {e}")
        self.so.sparge_options_default.restype = Options
        self.so.sparge_backend_available.restype = c.c_bool
        self.so.sparge_device_free.argtypes = [c.c_void_p]
        self.so.sparge_device_free.restype = None

    def call(self, name, *args):
        error = Error()
        if getattr(self.so, name)(*args, c.byref(error)) != 0:
            raise RuntimeError(f"{name}: {error.text.decode()}")

    def alloc(self, count):
        data = c.c_void_p()
        self.call("sparge_device_alloc", c.c_int64(count), c.byref(data))
        return data.value

    def copy(self, to, source, count):
        self.call("sparge_device_copy", c.c_void_p(to) if isinstance(to, int) else to,
                  c.c_void_p(source) if isinstance(source, int) else source, c.c_int64(count))

    def fetch(self, data, count):
        host = c.create_string_buffer(count)
        self.copy(host, data, count)
        return host.raw

    def free(self, data):
        self.so.sparge_device_free(data)


# ---- A case: tensors on the device, and what is right --------------------------------------------------

def halves(raw):
    return struct.unpack(f"<{len(raw) // 2}e", raw)


class Case:
    """q, k, v and o of one shape, normal numbers in f16, and a workspace."""

    def __init__(self, lib, dim, n, heads):
        self.lib, self.dim, self.n, self.heads = lib, dim, n, heads
        self.head_bytes = 2 * n * dim
        self.tensors, self.blocks, self.workspace = [], {}, (None, 0)
        draw = random.Random(f"{dim} {n}")
        pool = struct.pack(f"<{1 << 18}e", *(draw.gauss(0, 1) for _ in range(1 << 18)))
        try:
            for _ in "qkvo":
                self.tensors.append(lib.alloc(heads * self.head_bytes))
            for tensor in self.tensors[:3]:
                self.fill(tensor, pool, draw)
        except RuntimeError:
            self.free()
            raise
        self.problem = Problem(1, heads, heads, n, n, dim, dim,
                               *(self.view(x) for x in self.tensors[:3]))

    def fill(self, tensor, pool, draw):
        """Pieces of the pool in random order; from 16 MiB on, copies of what is there."""
        total, piece = self.heads * self.head_bytes, 1 << 13
        first = min(total, 1 << 24)
        host = b"".join(pool[at:at + piece] for at in (2 * draw.randrange((len(pool) - piece) // 2)
                                                       for _ in range(-(-first // piece))))
        self.lib.copy(tensor, host, first)
        while first < total:
            more = min(first, total - first)
            self.lib.copy(tensor + first, tensor, more)
            first += more

    def view(self, data):
        return View(data, F16, self.heads * self.n * self.dim, self.n * self.dim, self.dim)

    def options(self, kernel, pv, causal):
        o = self.lib.so.sparge_options_default(0)
        o.backend, o.kernel, o.pv, o.qk = CUDA, kernel, PV[pv], FLOAT if kernel <= 2 else INT8
        o.causal = CAUSAL_END if causal else 0
        need = c.c_int64()
        self.lib.call("sparge_workspace_bytes", c.byref(self.problem), c.byref(o), c.c_bool(False),
                      c.byref(need))
        if self.workspace[1] < need.value:
            self.lib.free(self.workspace[0])
            self.workspace = None, 0
            self.workspace = self.lib.alloc(need.value), need.value
        o.workspace, o.workspace_bytes = self.workspace
        return o

    def mask(self, bits):
        k_blocks = -(-self.n // BLOCK_K)
        return Mask(bits, 1, self.heads, -(-self.n // BLOCK_Q), k_blocks, (k_blocks + 31) // 32)

    def random_mask(self, sparsity):
        """Each block is kept with probability 1 - sparsity (to 1/256). Its bytes, and it on the device."""
        mask = self.mask(None)
        count = self.heads * mask.q_blocks * mask.words * 32
        draw, keep, bits = random.Random(17), round(256 * (1 - sparsity)), 0
        for place in range(
                8):  # from the lowest digit of `keep` on: or where it is 1, and where it is 0
            more = draw.getrandbits(count)
            bits = bits | more if keep >> place & 1 else bits & more
        raw = bits.to_bytes(count // 8, "little")
        mask.bits = self.lib.alloc(len(raw))
        self.lib.copy(mask.bits, raw, len(raw))
        return raw, mask

    def sums(self, head):
        """For the last row of a head, in double: of every key block sum exp(s), and that times v."""
        if head not in self.blocks:
            at, row = head * self.head_bytes, 2 * self.dim
            q = halves(self.lib.fetch(self.tensors[0] + at + self.head_bytes - row, row))
            k, v = (halves(self.lib.fetch(t + at, self.head_bytes)) for t in self.tensors[1:3])
            blocks, dim = [], self.dim
            for j in range(0, self.n, BLOCK_K):
                keys = range(j, min(j + BLOCK_K, self.n))
                s = (sum(map(operator.mul, q, k[t * dim:t * dim + dim])) for t in keys)
                w = [math.exp(x / math.sqrt(dim)) for x in s]
                columns = (v[j * dim + d:(keys[-1] + 1) * dim:dim] for d in range(dim))
                blocks.append((sum(w), [sum(map(operator.mul, w, column)) for column in columns]))
            self.blocks[head] = blocks
        return self.blocks[head]

    def distance(self, raw):
        """Of o to the truth, relative L1 over the last rows of two heads: they see every key."""
        off = size = 0.0
        words = self.mask(None).words
        for head in {0, self.heads - 1} if self.n <= 32768 else {0}:
            row = (head + 1) * -(-self.n // BLOCK_Q) - 1
            kept = int.from_bytes(raw[row * words * 4:(row + 1) * words *
                                      4], "little") if raw else -1
            blocks = [b for j, b in enumerate(self.sums(head)) if kept >> j & 1]
            weight = sum(b[0] for b in blocks)
            want = [sum(x) / weight
                    for x in zip(*(b[1] for b in blocks))] if blocks else [0.0] * self.dim
            at = self.tensors[3] + (head + 1) * self.head_bytes - 2 * self.dim
            got = halves(self.lib.fetch(at, 2 * self.dim))
            off += sum(abs(g - w) for g, w in zip(got, want))
            size += sum(map(abs, want))
        return off / size if size else off

    def poison(self):
        self.lib.copy(self.tensors[3], b"\xff" * self.head_bytes, self.head_bytes)  # NaN
        last = self.tensors[3] + (self.heads - 1) * self.head_bytes
        self.lib.copy(last, self.tensors[3], self.head_bytes)

    def free(self):
        for data in [*self.tensors, self.workspace[0]]:
            self.lib.free(data)
        self.tensors, self.workspace = [], (None, 0)


# ---- What can be timed: call() runs once and returns (attend, quantize, predict) in seconds -------------

def about(thing, seconds):
    """The columns that every row has."""
    case, attend = thing.case, [1e3 * x[0] for x in seconds]
    return {"what": thing.what, "dim": case.dim, "n": case.n, "heads": case.heads,
            "causal": int(thing.causal), "calls": len(seconds), "ms": statistics.median(attend),
            "ms_min": min(attend)}


class Sparge:
    def __init__(self, case, kernel, pv, causal=False, sparsity=0.0, predicts=False):
        self.case, self.kernel, self.pv, self.causal, self.predicts = case, kernel, pv, causal, predicts
        self.sparsity = sparsity
        self.what = "predicted" if predicts else "imposed" if sparsity else "dense"
        self.options = case.options(kernel, pv, causal)
        self.raw, self.mask = case.random_mask(sparsity) if sparsity or predicts else (None, None)
        self.result = Result(o=case.view(case.tensors[3]))
        if predicts:
            self.result.mask = c.addressof(self.mask)

    def call(self):
        lib, common = self.case.lib, (c.byref(self.case.problem), c.byref(self.options))
        # may have moved since
        self.options.workspace, self.options.workspace_bytes = self.case.workspace
        if self.predicts:
            lib.call("sparge_attention", *common, c.byref(self.result))
        else:
            mask = c.byref(self.mask) if self.mask else None
            lib.call("sparge_attend", *common, mask, c.byref(self.result))
        r = self.result
        return r.seconds_attend, r.seconds_quantize, r.seconds_predict

    def check(self):
        self.case.poison()
        self.call()
        raw = self.case.lib.fetch(self.mask.bits, len(self.raw)) if self.mask else None
        l1 = self.case.distance(raw)
        if not l1 <= BOUND[self.pv]:
            raise RuntimeError(
                f"kernel {self.kernel} {self.pv}, {self.what}: o is wrong, relative L1 {l1:.3g}")
        return l1

    def row(self, seconds, l1):
        r, case = self.result.counts, self.case
        attend, quantize, predict = (statistics.median(x) for x in zip(*seconds))
        done = 2 * case.dim * (r.qk_tokens + r.pv_tokens)
        return about(self, seconds) | {
            "kernel": self.kernel, "pv_dtype": self.pv, "sparsity": 1 - r.qk_done / max(1, r.pairs),
            "blocks_a_row": r.qk_done / (case.heads * -(-case.n // BLOCK_Q)), "ms_quantize":
            1e3 * quantize, "ms_predict": 1e3 * predict, "tops": 4e-12 * case.dim * r.tokens /
            max(attend, 1e-9), "tops_done": 1e-12 * done / max(attend, 1e-9), "l1": l1
        }

    def free(self):
        if self.mask:
            self.case.lib.free(self.mask.bits)


class Torch:
    """scaled_dot_product_attention by one back end, or FlexAttention over the mask of `like`, in bf16."""
    DEVICE = "cuda"

    def __init__(self, torch, case, what, causal=False, like=None):
        self.torch, self.case, self.what = torch, case, "torch " + what
        self.causal, self.like = causal, like
        self.backend = {"flash": "FLASH_ATTENTION", "cudnn": "CUDNN_ATTENTION"}.get(what)
        shape = (1, case.heads, case.n, case.dim)
        if getattr(case, "torch_inputs", None) is None:
            kind = {"device": self.DEVICE, "dtype": torch.bfloat16}
            case.torch_inputs = [torch.randn(shape, **kind) for _ in "qkv"]
        self.inputs = case.torch_inputs
        if like:
            self.prepare_flex()

    def prepare_flex(self):
        from torch.nn.attention.flex_attention import BlockMask, flex_attention
        torch, mask = self.torch, self.like.mask
        words = torch.frombuffer(bytearray(self.like.raw), dtype=torch.int32)
        words = words.view(1, self.case.heads, mask.q_blocks, mask.words, 1)
        dense = (words >> torch.arange(32, dtype=torch.int32) & 1).flatten(-2)[..., :mask.k_blocks]
        dense = dense.to(self.DEVICE)
        count = dense.sum(-1, dtype=torch.int32)
        index = torch.argsort(dense, dim=-1, descending=True, stable=True).to(torch.int32)
        # whole blocks alone: nothing inside a block is masked
        mask = BlockMask.from_kv_blocks(torch.zeros_like(count), index, count, index,
                                        BLOCK_SIZE=(BLOCK_Q, BLOCK_K))
        flex = torch.compile(flex_attention, dynamic=False)
        self.flex = lambda: flex(*self.inputs, block_mask=mask)
        try:
            self.flex()
        except Exception:  # its own tiles may be larger than the mask's blocks
            tile = {"BLOCK_M": BLOCK_Q, "BLOCK_N": BLOCK_K}
            self.flex = lambda: flex(*self.inputs, block_mask=mask, kernel_options=tile)

    def run(self):
        from torch.nn.attention import SDPBackend, sdpa_kernel
        if self.like:
            return self.flex()
        attention = self.torch.nn.functional.scaled_dot_product_attention
        with sdpa_kernel(getattr(SDPBackend, self.backend)):
            return attention(*self.inputs, is_causal=self.causal)

    def call(self):
        begin, end = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
        with self.torch.no_grad():
            begin.record()
            self.run()
            end.record()
        end.synchronize()
        return 1e-3 * begin.elapsed_time(end), 0.0, 0.0

    def check(self):
        """The last row of head 0, in double; FlexAttention's is over the mask's blocks."""
        torch = self.torch
        with torch.no_grad():
            got = self.run()[0, 0, -1].double()
            q, k, v = (x[0, 0].double() for x in self.inputs)
            s = k @ q[-1] / math.sqrt(self.case.dim)
            if self.like:
                words = self.like.mask.words
                row = -(-self.case.n // BLOCK_Q) - 1
                kept = int.from_bytes(self.like.raw[row * words * 4:(row + 1) * words * 4],
                                      "little")
                keep = torch.tensor([bool(kept >> (t // BLOCK_K) & 1) for t in range(self.case.n)])
                s = s.masked_fill(~keep.to(self.DEVICE), -math.inf)
            want = torch.softmax(s, 0) @ v
            l1 = float((got - want).abs().sum() / want.abs().sum())
        if not l1 <= 0.05:
            raise RuntimeError(f"{self.what}: o is wrong, relative L1 {l1:.3g}")
        return l1

    def row(self, seconds, l1):
        case, base = self.case, about(self, seconds)
        pairs = case.n * (case.n + 1) / 2 if self.causal else case.n * case.n
        tops = 4e-9 * case.dim * pairs * case.heads / max(base["ms"], 1e-6)
        sparsity = self.like.sparsity if self.like else 0.0
        return base | {"kernel": "", "pv_dtype": "bf16", "sparsity": sparsity, "tops": tops, "l1": l1}

    def free(self):
        pass


# ---- Measuring -----------------------------------------------------------------------------------------

class Session:
    def __init__(self, args, lib, torch):
        self.lib, self.torch, self.args = lib, torch, args
        self.end = time.monotonic() + args.limit
        self.rows, self.left_out, self.cases = [], [], {}
        self.ceilings = read_ceilings(args.ceilings)

    def left(self):
        return self.end - time.monotonic()

    def case(self, dim, n):
        """Four shapes at a time stay on the device."""
        if (dim, n) not in self.cases:
            while len(self.cases) >= 4:
                old = self.cases.pop(next(iter(self.cases)))
                old.torch_inputs = None
                old.free()
            self.cases[dim, n] = Case(self.lib, dim, n, self.args.heads)
        return self.cases[dim, n]

    def measure(self, makers, name):
        """Makes, checks and times some variants by turns, and notes a row for each; returns the rows."""
        things, seconds = [], []
        try:
            if self.left() < 1:
                raise Late
            for make in makers:
                thing = None
                signal.alarm(PATIENCE)
                try:
                    thing = make()
                    l1 = thing.check()
                    once = sum(thing.call())
                    things.append((thing, l1, once))
                except Exception as e:  # torch has many kinds; the others go on
                    self.demand_device(e)
                    print(f"{name}: {first_line(e)}", flush=True)
                    self.left_out.append(f"{name} ({first_line(e)})")
                    if thing:
                        thing.free()
            if not things:
                return []
            turn = max(sum(x[2] for x in things), 1e-6)
            rounds = 1 if self.args.tiny else max(3, min(15, int(2 / turn)))
            seconds = [[] for _ in things]
            for n in range(rounds):
                if self.left() < 2 * turn + 1 and n > 0:
                    break
                signal.alarm(PATIENCE)
                for (thing, _, _), times in zip(things, seconds):
                    times.append(thing.call())
        except Late:
            self.left_out.append(f"{name} (no time)")
        except RuntimeError as e:
            self.demand_device(e)
            self.left_out.append(f"{name} ({first_line(e)})")
        finally:
            signal.alarm(0)
            for thing, _, _ in things:
                thing.free()
        rows = [
            self.derive(x.row(times, l1)) for (x, l1, _), times in zip(things, seconds) if times
        ]
        dense = {(r["kernel"], r["pv_dtype"]): r for r in rows if r["what"] == "dense"}
        for r in rows:
            d = dense.get((r["kernel"], r["pv_dtype"]))
            if d and r["what"] == "imposed":
                r["efficiency"] = (1 - r["sparsity"]) * d["ms"] / r["ms"]
            if d and r["what"] == "predicted":
                r["prepare_percent_of_dense"] = 100 * (r["ms_quantize"] + r["ms_predict"]) / d["ms"]
            print(line_of(r), flush=True)
        self.rows += rows
        if self.rows:
            write_csv(self.args.out / "results.csv", self.rows)
        return rows

    def demand_device(self, e):
        try:
            self.lib.free(self.lib.alloc(1))
        except RuntimeError:
            raise Lost(first_line(e)) from e

    def derive(self, row):
        if (row["kernel"], row["pv_dtype"]) in LADDER:
            both = [self.ceilings.get(x) for x in LADDER[row["kernel"], row["pv_dtype"]]]
            if all(both):  # half of the operations each
                row["ceiling"] = 2 / (1 / both[0] + 1 / both[1])
                row["percent_of_ceiling"] = 100 * row["tops_done"] / row["ceiling"]
        return row


def first_line(e):
    return (str(e).strip().split("\n") or [""])[0][:160] or type(e).__name__


def read_ceilings(path):
    found = {}
    if path and Path(path).exists():
        with open(path, newline="") as file:
            for row in csv.DictReader(file):
                if row.get("unit") == "TOPS" and row["value"]:
                    found[row["what"]] = float(row["value"])
    if not found:
        print("no ceilings: percentages are left out")
    return found


def check_small(lib, kernel, pv):
    """One kernel with masks and without, causal and not, at sizes with ragged ends; the largest distance."""
    worst = 0.0
    for dim, n in ((128, 449), (64, 200)):
        case = Case(lib, dim, n, 2)
        for causal in (False, True):
            for sparsity in (0.0, 0.5):
                worst = max(worst, Sparge(case, kernel, pv, causal, sparsity).check())
        case.free()
    return worst


def small_cases(session):
    """The kernels that are right, each asked in a process of its own: one may crash or hang."""
    right = set()
    for kernel, pv in sorted(LADDER, reverse=True):
        if kernel not in session.args.kernels:
            continue
        command = [
            sys.executable, __file__, "--library", session.args.library, "--check",
            str(kernel), pv
        ]
        try:
            most = max(1, min(40, session.left()))
            done = subprocess.run(command, capture_output=True, text=True, timeout=most)
            said = first_line(done.stdout + done.stderr[-300:])
            if done.returncode == 0:
                right.add((kernel, pv))
        except subprocess.TimeoutExpired:
            said = "hangs, or has no time"
        print(f"check: kernel {kernel} {pv}: {said}", flush=True)
        if (kernel, pv) not in right:
            session.left_out.append(f"kernel {kernel} {pv} ({said})")
    return right


def line_of(r):
    parts = [
        f"{r['what']:>11}", f"kernel {r['kernel']} {r['pv_dtype']}" if r["kernel"] else r["pv_dtype"],
        f"D {r['dim']} N {r['n']}", "causal" if r["causal"] else "",
        f"sparsity {r['sparsity']:.2f}", f"{r['ms']:.3f} ms", f"{r['tops']:.0f} TOPS"
    ]
    if "percent_of_ceiling" in r:
        parts.append(f"{r['percent_of_ceiling']:.0f} % of the ceiling")
    if "efficiency" in r:
        parts.append(f"efficiency {100 * r['efficiency']:.0f} %")
    if "prepare_percent_of_dense" in r:
        parts.append(f"prediction and quantization {r['prepare_percent_of_dense']:.2f} % of dense")
    return ", ".join(x for x in parts if x)


def everything(session):
    """The order is the point: what tells most comes first."""
    long, short, longest = (384, 256, 512) if session.args.tiny else (32768, 8192, 131072)
    shares, torch = (0.3, 0.5, 0.7, 0.9), session.torch
    right = small_cases(session)

    def measure(name, *makers):
        return session.measure(makers, name)

    def mine(kernel, pv, dim, n, causal=False, sparsity=0.0, predicts=False):
        return lambda: Sparge(session.case(dim, n), kernel, pv, causal, sparsity, predicts)

    def theirs(what, dim, n, causal=False):
        return lambda: Torch(torch, session.case(dim, n), what, causal)

    def all_shares(kernel, pv, dim, n, causal=False):
        if (kernel, pv) in right:
            measure(f"kernel {kernel} {pv} D {dim} N {n}{' causal' * causal}, sparsity",
                    *(mine(kernel, pv, dim, n, causal, x) for x in (0.0, *shares)))

    def beside_torch(dim, n, causal=False):
        names = [(5, pv) for pv in ("fp8", "f16") if (5, pv) in right]
        measure(f"dense beside torch D {dim} N {n}{' causal' * causal}",
                *(mine(r, pv, dim, n, causal) for r, pv in names),
                *(theirs(x, dim, n, causal) for x in ("flash", "cudnn") if torch))

    def prediction(n):
        best = next((x for x in ((5, "fp8"), (5, "f16"), (4, "f16"), (4, "int8")) if x in right),
                    None)
        if best:
            measure(f"prediction N {n}", mine(*best, 128, n), mine(*best, 128, n, predicts=True))

    def climb(kernel, pv):
        """At the largest N where a call takes less than a second: found from a small one."""
        n, last = (short if session.args.tiny else 2048), None
        while (kernel, pv) in right and n <= long:
            rows = measure(f"kernel {kernel} {pv} N {n}",
                           *(mine(kernel, pv, 128, n, False, x) for x in (0.0, 0.5, 0.9)),
                           *(theirs(x, 128, n) for x in ("flash", "cudnn") if torch and n < long))
            if not rows or last or rows[0]["what"] != "dense":
                break
            last = n
            while n < long and rows[0]["ms"] * 4 * (n / last) ** 2 < 800:
                n *= 2
            if n == last:
                break

    if (5, "fp8") in right:
        measure("kernel 5 fp8 dense", mine(5, "fp8", 128, long))
    beside_torch(128, long)
    all_shares(5, "fp8", 128, long)
    for kernel, pv in ((4, "f16"), (3, "int8"), (2, "float"), (1, "float"), (4, "int8")):
        climb(kernel, pv)
    prediction(long)
    beside_torch(64, long)
    beside_torch(128, long, True)
    all_shares(5, "fp8", 128, long, True)
    all_shares(5, "fp8", 64, long)
    beside_torch(128, short)
    all_shares(5, "fp8", 128, short)
    prediction(short)
    all_shares(5, "f16", 128, long)
    if torch:
        for share in (0.5, 0.9):
            flex(session, measure, long, share, right)
    prediction(longest)
    beside_torch(64, long, True)
    beside_torch(64, short)
    all_shares(5, "f16", 64, long)


def flex(session, measure, n, share, right):
    """FlexAttention over the very mask that kernel 5 gets, by turns with it."""
    kernel = next((x for x in ((5, "fp8"), (5, "f16"), (4, "f16")) if x in right), None)
    if not kernel:
        return
    case = session.case(128, n)
    like = Sparge(case, *kernel, False, share)
    try:
        measure(f"FlexAttention at {share}", lambda: Sparge(case, *kernel, False, share),
                lambda: Torch(session.torch, case, "flex", like=like))
    finally:
        like.free()


# ---- What it ran on, and what is written ----------------------------------------------------------------

def machine_line():
    def said(*command):
        try:
            return subprocess.run(command, capture_output=True, text=True,
                                  timeout=20).stdout.strip()
        except (OSError, subprocess.TimeoutExpired):
            return ""
    asked = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.draw,power.limit"
    gpu = said("nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader").split("\n")[0]
    commit = said("git", "-C", str(ROOT), "describe", "--always", "--dirty")
    return f"{gpu or 'no nvidia-smi'}; commit {commit or 'unknown'}; {date.today()}"


def tidy(value):
    return f"{value:.6g}" if isinstance(value, float) else value


def write_csv(path, rows):
    harness.write_csv(path, [{k: tidy(v) for k, v in row.items()} for row in rows], COLUMNS)


def middle(rows, column):
    values = [float(r[column]) for r in rows if r[column]]
    return statistics.median(values) if values else None


def readme_cells(full, kernel, pv):
    """Of one kernel, at the largest N where sparsity was imposed on it: dense by the median of its groups."""
    own = [
        r for r in full
        if (r["kernel"], r["pv_dtype"]) == (str(kernel), pv) and r["what"] in ("dense", "imposed")
    ]
    if not own:
        return ["never run"] * 6
    n = max([int(r["n"]) for r in own if r["what"] == "imposed"] or [int(r["n"]) for r in own])
    here = [r for r in full if int(r["n"]) == n]
    dense = [r for r in own if r in here and r["what"] == "dense"]
    values = [middle(dense, "tops")]
    for share in (0.5, 0.9):
        near = [r for r in own if r in here and abs(float(r["sparsity"]) - share) < 0.02]
        values.append(middle(near, "tops"))
    values.append(middle(dense, "percent_of_ceiling"))
    cells = [str(n)] + ["not measured" if x is None else f"{x:.0f}" for x in values]
    torch = (middle([r for r in here if r["what"] == f"torch {x}"], "tops")
             for x in ("flash", "cudnn"))
    best = max((x for x in torch if x), default=None)
    return cells + [f"{values[0] / best:.2f}x" if best and values[0] else "not measured"]


def readme_table(rows):
    titles = ["kernel", "idea", "N", "effective TOPS, dense", "at 50 %", "at 90 %",
              "% of the measured ceiling", "over torch SDPA"]
    lines = ["| " + " | ".join(titles) + " |", "|--:|---|--:|--:|--:|--:|--:|--:|"]
    full = [r for r in rows if r["dim"] == "128" and r["causal"] == "0"]
    lines += ["| " + " | ".join([str(kernel), idea, *readme_cells(full, kernel, pv)]) + " |"
              for (kernel, pv), idea in IDEAS.items()]
    return lines


def write_readme(folder, readme):
    path, rows = folder / "results.csv", []
    note = "These kernels have never run on a GPU; no figure stands here until they have."
    if path.exists():
        rows = read_csv(path)
        machine = folder / "machine.txt"
        note = machine.read_text().strip() if machine.exists() else "Machine unknown"
        note += f". D = 128, {rows[0]['heads']} heads."
    fill_in(readme, "gpu_speed", [f"{note} Command: `gpu/on_gpu.sh`.", "", *readme_table(rows)])


def check_one(lib, kernel, pv):
    try:
        print(f"relative L1 at most {check_small(lib, kernel, pv):.2g}")
    except RuntimeError as e:
        sys.exit(first_line(e))


def cuda_torch():
    try:
        import torch
    except ImportError:
        print("torch is not here: no comparison")
        return None
    if not torch.cuda.is_available():
        print("torch has no CUDA here: no comparison")
        return None
    print(f"torch {torch.__version__}, CUDA {torch.version.cuda}")
    return torch


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", type=Path, default=ROOT / "build/gpu/libsparge.so")
    parser.add_argument("--ceilings", type=Path,
                        help="what gpu/ceilings printed, on this machine, now")
    parser.add_argument("--out", type=Path, default=HERE,
                        help="folder of results.csv and machine.txt")
    parser.add_argument("--limit", type=float, default=1e9, metavar="SECONDS")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--tiny", action="store_true",
                        help="sizes for the host model, to try this script")
    parser.add_argument("--readme", action="store_true",
                        help="only fill the table of gpu/README.md")
    parser.add_argument("--readme-file", type=Path, default=ROOT / "gpu/README.md",
                        help=argparse.SUPPRESS)
    parser.add_argument("--kernels", type=lambda x: {int(n) for n in x.split(",")},
                        default={1, 2, 3, 4, 5}, metavar="1,2,..", help="only these")
    parser.add_argument("--check", nargs=2, metavar=("RUNG", "PV"), help="only check this one")
    args = parser.parse_args()
    if args.readme:
        return write_readme(args.out, args.readme_file)
    if args.tiny:
        args.heads = 2
    lib = Library(args.library)
    if not lib.so.sparge_backend_available(CUDA):
        print("there is no CUDA device here")
        sys.exit(77)
    if args.check:
        return check_one(lib, int(args.check[0]), args.check[1])
    machine = machine_line()
    print(machine)
    args.out.mkdir(parents=True, exist_ok=True)
    write_text(args.out / "machine.txt", machine + "\n")
    session = Session(args, lib, None if args.tiny else cuda_torch())
    lost = None
    try:
        everything(session)
    except Lost as e:
        lost = e
        print(f"the device is lost: {e}")
    for name in session.left_out:
        print(f"left out: {name}")
    print(f"{len(session.rows)} rows in {args.out / 'results.csv'}")
    sys.exit(9 if lost else 0 if session.rows else 1)


if __name__ == "__main__":
    main()
