# SPDX-License-Identifier: Apache-2.0
"""Reads .pt files made here by experiments/tune/from_pt.py: python3 from_pt.py [PATH-OF-SPARGE
[TEST...]]

The files have the layout of torch.save, made without torch: pickle and zip with stand-ins for its
classes. Looked at are the values that come out, what is said of every wrong file, that no pickle
runs anything, and some thousand damaged files; with the program, what sparge makes of a file that
came out. Ends with "N passed, M failed". SPARGE_SEED=7 damages them otherwise.
"""
import collections
import contextlib
import copy
import hashlib
import importlib.util
import io
import json
import math
import os
import pickle
import random
import re
import resource
import stat
import struct
import subprocess
import sys
import traceback
import types
import zipfile

import numpy as np

sys.path.append(os.path.join(os.path.dirname(__file__), "../support"))
from counted import check, run_tests
from running import commands_of

sys.dont_write_bytecode = True
ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
PROGRAM = os.path.join(ROOT, "experiments/tune/from_pt.py")
spec = importlib.util.spec_from_file_location("reader", PROGRAM)
reader = importlib.util.module_from_spec(spec)
spec.loader.exec_module(reader)
SPARGE = os.path.abspath(sys.argv[1]) if len(sys.argv) > 1 else None
FINE, USAGE, FILE = 0, 2, 3
NAMES = ["is_sparse", "cdfthreshd", "simthreshd1", "simthreshd2", "pvthreshd"]
seed = int(os.environ.get("SPARGE_SEED", "1"))


# ---- torch.save ------------------------------------------------------------------------------

torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
CLASSES = {
    "f4": "Float", "f8": "Double", "f2": "Half", "bf16": "BFloat16", "u1": "Bool", "i4": "Int",
    "i8": "Long", "i2": "Short"
}
for c in CLASSES.values():
    setattr(torch, f"{c}Storage", type(f"{c}Storage", (), {"__module__": "torch"}))


def _rebuild_tensor_v2(*args):
    raise AssertionError("never called here")


_rebuild_tensor_v2.__module__ = "torch._utils"
utils._rebuild_tensor_v2 = _rebuild_tensor_v2
sys.modules.update({"torch": torch, "torch._utils": utils})


class Storage:
    def __init__(self, kind, key, elements):
        self.kind, self.key, self.elements = kind, key, elements


class Tensor:
    """values [heads] every `stride` elements from `offset` of a storage that has some more."""

    def __init__(self, values, kind="f4", offset=0, stride=1, size=None, more=0):
        self.values, self.kind, self.offset, self.stride = list(values), kind, offset, stride
        self.size, self.more = size, more

    def raw(self, order):
        last = self.offset + (len(self.values) - 1) * self.stride + 1
        x = np.full(last + self.more, 77, np.float64)
        x[self.offset:last:max(self.stride, 1)] = self.values
        if self.kind == "bf16":
            return (x.astype(np.float32).view(np.uint32) >> 16).astype(order +
                                                                       "u2").tobytes(), len(x)
        return x.astype(order + self.kind).tobytes(), len(x)


class Pickler(pickle.Pickler):
    def persistent_id(self, x):
        if isinstance(x, Storage):
            return "storage", getattr(torch, CLASSES[x.kind] + "Storage"), x.key, "cpu", x.elements
        return None

    def reducer_override(self, x):
        if not isinstance(x, Tensor):
            return NotImplemented
        size = (len(x.values),) if x.size is None else x.size
        return _rebuild_tensor_v2, (x.storage, x.offset, size, (x.stride,) * len(size), False,
                                    collections.OrderedDict())


def make_members(tensors, order="little", protocol=2):
    """data.pkl and the storages, as a dict of bytes."""
    members = {"data.pkl": b"", "byteorder": order.encode()}
    for i, tensor in enumerate(x for x in tensors.values() if isinstance(x, Tensor)):
        raw, elements = tensor.raw("<" if order == "little" else ">")
        tensor.storage = Storage(tensor.kind, str(i), elements)
        members[f"data/{i}"] = raw
    text = io.BytesIO()
    Pickler(text, protocol).dump(tensors)
    return members | {
        "data.pkl": text.getvalue(), "version": b"3\n", ".data/serialization_id": b"1" * 40
    }


def zipped(members, root="archive", compression=zipfile.ZIP_STORED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(f"{root}/{name}"), data, compression)
    return file.getvalue()


def key(layer, name):
    return f"transformer_blocks.{layer}.attn1.inner_attention.{name}"


def tensors_of(layers=(0, 1), **changed):
    """Of three heads in each layer: the first and the last are sparse."""
    values = {"is_sparse": Tensor([1, 0, 1], "u1"), "cdfthreshd": Tensor([0.97, 1, 0.5]),
              "simthreshd1": Tensor([-0.9375, 1, 0.0625]), "simthreshd2": Tensor([0, 0, 0]),
              "pvthreshd": Tensor([10, 3, 0])} | changed
    return {key(layer, name): copy.copy(values[name]) for layer in layers for name in NAMES}


# ---- Running it ------------------------------------------------------------------------------

def save(data, name="x.pt"):
    with open(name, "wb") as file:
        file.write(data)
    return name


def run(*args):
    """In this process: exit code and stderr. Anything but an exit is passed on."""
    said, code = io.StringIO(), FINE
    with contextlib.redirect_stderr(said):
        try:
            reader.main([*args])
        except SystemExit as done:
            code = done.code
    return code, said.getvalue()


def fine(data, *options, name="x.pt"):
    """What comes of a file that must work."""
    code, said = run(save(data, name), "-o", "o.json", *options)
    check(code == FINE and said == "", f"{name} {options}: exit 0, silent", code, said)
    with open("o.json") as file:
        return json.load(file)


def one_line(code, said, words, what):
    check(code == FILE, f"{what}: exit 3", code, said)
    check(said.startswith("from_pt: ") and said.endswith("\n") and said.count("\n") == 1 and
          len(said) > 20, f"{what}: one line", repr(said))
    check(words in said, f"{what}: says '{words}'", repr(said))


def wrong(words, data, *options, name="x.pt", output="no.json"):
    """Of a file that must not: one line, exit code 3, nothing written."""
    if data is not None:
        save(data, name)
    before = sorted(os.listdir("."))
    one_line(*run(name, "-o", output, *options), words, f"{words} {name}")
    check(sorted(os.listdir(".")) == before, f"{words}: no file left", os.listdir("."))


def wrong_tensors(words, tensors, **how):
    wrong(words, zipped(make_members(tensors, **how)))


# ---- What must work --------------------------------------------------------------------------

def test_values():
    data = zipped(make_members(tensors_of((10, 9))))
    x = fine(data, name="My-model_0.06_0.07.pt")
    head = dict(layer=9, head=0, dense=False, theta=-0.9375, tau=0.97, topk=None)
    check(
        list(x) == [
            "sparge_params", "version", "model", "tuner", "source", "source_sha256", "rules",
            "block_q", "block_k", "skip_rows", "causal", "smooth_k", "sink", "softmax_scale",
            "qk_dtype", "pv_dtype",
            "l1", "l2", "inputs", "heads"
        ], "fields", list(x))
    heads = x.pop("heads")
    check([(h["layer"], h["head"]) for h in heads] == [(n, h) for n in (9, 10) for h in range(3)],
          "order")
    off = heads[0].pop("lambda")
    check(heads[0] == head and abs(off + 10 * math.log(2)) < 1e-6, "a sparse head", heads[0], off)
    off = heads[4].pop("lambda")
    check(heads[4] == dict(head, layer=10, head=1, dense=True, theta=-1, tau=1) and
          abs(off + 3 * math.log(2)) < 1e-6, "a dense head", heads[4], off)
    check(heads[5]["lambda"] == 0 and math.copysign(1, heads[5]["lambda"]) == 1, "no -0", heads[5])
    version = x.pop("version")
    with open(os.path.join(ROOT, "sparge_options.h")) as file:
        check(re.search(r'SPARGE_VERSION +"(.*)"', file.read())[1] == version, "version", version)
    check(
        x == {
            "sparge_params": 1, "model": "My-model", "tuner": "upstream", "source":
            "My-model_0.06_0.07.pt", "source_sha256": hashlib.sha256(data).hexdigest(), "rules":
            "upstream", "block_q": 128, "block_k": 64, "skip_rows": 128, "causal": "none",
            "smooth_k": True, "sink": True, "softmax_scale": None, "qk_dtype": "int8",
            "pv_dtype": "fp8", "l1": 0.06,
            "l2": 0.07, "inputs": []
        }, "header", x)
    with open("o.json") as file:
        check(sum(line.startswith('  {"layer": ') for line in file) == 6, "one head a line")


def test_options():
    data = zipped(make_members(tensors_of()))
    x = fine(data, "--model", "m\udc80", "--rules", "default", "--l1", "0.5", "--block-q", "64",
             "--block-k", "128", "--causal", "start", "--qk-dtype", "f32", "--pv-dtype", "f16",
             name="a_0.1_0.2.pt")
    check((x["model"], x["l1"], x["l2"], x["block_q"], x["block_k"], x["skip_rows"], x["causal"],
           x["qk_dtype"], x["pv_dtype"], x["rules"]) == ("m?", 0.5, 0.2, 64, 128, 64, "start",
                                                         "f32", "f16",
                                             "default"), "options", x)
    x = fine(data, "--skip-rows", "16", name="wan_2_1.pt")
    check((x["model"], x["l1"], x["l2"], x["skip_rows"]) == ("wan_2_1", None, None, 16),
          "no bounds", x)
    for options in (["--block-q", "0"], ["--block-k", "1025"], ["--l1", "nan"], ["--l2", "-1"],
                    ["--causal", "yes"], ["--pv-dtype",
                                          "int4"], ["--skip-rows",
                                                    "x"], ["--rules",
                                                           "ours"], ["y.pt"], ["-o", "wan_2_1.pt"]):
        code, said = run("wan_2_1.pt", "-o", "o.json", *options)
        check(code == USAGE and "from_pt: error: " in said, f"{options}: usage", code, said)
    check(run("x.pt")[0] == USAGE and run()[0] == USAGE, "both files")
    with open("wan_2_1.pt", "rb") as file:
        check(file.read() == data, "the input stays")


def test_dtypes_and_layouts():
    half = [0.5, 0.25, 1.0]
    for order in ("little", "big"):
        for protocol in (2, 3, 4):
            for kind in CLASSES.keys() - {"i2", "u1", "i4", "i8"}:
                for where in (dict(), dict(offset=2), dict(stride=3),
                              dict(offset=5, stride=2, more=4)):
                    x = fine(zipped(make_members(tensors_of(
                        cdfthreshd=Tensor(half, kind, **where), is_sparse=Tensor([1, 1, 1], kind)),
                        order, protocol)))
                    check([h["tau"] for h in x["heads"]] == half * 2, f"{kind} {order} {where}",
                          x["heads"])
        for kind in ("u1", "i4", "i8"):
            x = fine(zipped(make_members(tensors_of(is_sparse=Tensor([0, 1, 1], kind)), order)))
            check([h["dense"] for h in x["heads"]] == [True, False, False] * 2, f"{kind} {order}")
    members = make_members(tensors_of())
    del members["byteorder"], members["version"], members[".data/serialization_id"]
    check(len(fine(zipped(members))["heads"]) == 6, "an older torch")
    x = fine(zipped(make_members(collections.OrderedDict(tensors_of()))))
    check(len(x["heads"]) == 6, "OrderedDict")
    x = fine(zipped(make_members(tensors_of(cdfthreshd=Tensor([0.5], stride=0, size=(3,))))))
    check([h["tau"] for h in x["heads"]] == [0.5, 1, 0.5] * 2, "expanded", x["heads"])
    x = fine(zipped(make_members(tensors_of(pvthreshd=Tensor([math.inf, 0, 1e39], "f8")))))
    check([h["lambda"] for h in x["heads"]] == [None, 0, None] * 2, "never skips", x["heads"])


def test_output():
    data = zipped(make_members(tensors_of()))
    os.umask(0o027)
    os.symlink("target.json", "link.json")
    code, said = run(save(data), "-o", "link.json")
    check(code == FINE and os.path.islink("link.json"), "a link is followed", said)
    check(stat.S_IMODE(os.stat("target.json").st_mode) == 0o640, "permissions")
    os.mkfifo("pipe")  # our own: a buggy program, run by root, could replace a device
    wrong("regular file", data, output="pipe")
    check(stat.S_ISFIFO(os.stat("pipe").st_mode), "what is no file is not replaced")
    wrong("regular file", data, output=".")
    wrong("No such file", data, output="nowhere/o.json")
    code, said = run("none.pt", "-o", "target.json")
    one_line(code, said, "none.pt: No such file", "no input")
    with open("target.json") as file:
        check(len(json.load(file)["heads"]) == 6, "an old output stays when a run fails")
    wrong("directory", None, name=".")
    rename = os.replace
    os.replace = lambda temporary, path: os.rmdir(temporary)  # what fails after the writing
    try:
        wrong("from_pt: o2.json: ", data, output="o2.json")
    finally:
        os.replace = rename
    wrong("not a zip", b"x" * 100, name="two\nlines.pt")


# ---- What sparge makes of it -----------------------------------------------------------------

def test_sparge():
    """Every head runs as it does alone with the authors' thresholds, rules and sink; a dense one
    skips too."""
    if not SPARGE:
        print("skipped: the program, which was not given")
        return
    _, runs, _, _ = commands_of(SPARGE, "sparge")
    r = np.random.default_rng(seed)
    n, dim = 700, 64
    walk = np.cumsum(r.normal(size=(1, 3, n, dim)),
                     axis=2) / 6  # neighbours are alike, and others far apart
    for name, x in ("q", walk), ("k", walk), ("v", r.normal(size=(1, 3, n, dim))):
        np.save(f"{name}.npy", x.astype(np.float32))
    heads = fine(zipped(make_members(tensors_of((4, 7), cdfthreshd=Tensor([0.9, 1, 0.5]),
                                                 pvthreshd=Tensor([9, 2, 0])))))
    files = "q.npy", "k.npy", "v.npy"
    got = runs("run", *files, "--rules", "upstream", "--params", "o.json", "--layer", "7", "-o",
               "o.npy")
    check(got["sparsity"] > 0.2, "something is skipped", got)
    whole = np.load("o.npy")

    def alike(h, below, *sink, rules="upstream"):
        runs("run", *files, "--rules", rules, "--theta", h["theta"], "--tau", h["tau"],
             f"--lambda={below}", "--skip-rows", 128, *sink, "-o", "one.npy")
        return np.array_equal(np.load("one.npy")[:, h["head"]], whole[:, h["head"]])

    _, dense, sparse = layer = heads["heads"][3:]
    for h in layer:
        check(alike(h, h["lambda"], "--sink"), "as it runs alone", h)
    check(not alike(sparse, sparse["lambda"]), "not without the sink")
    check(not alike(dense, -math.inf, "--sink"), "not without lambda, though it is called dense")
    check(not alike(dense, dense["lambda"], "--sink", rules="default"), "not by other rules")


# ---- What must not ---------------------------------------------------------------------------

def test_zip():
    members = make_members(tensors_of())
    data = zipped(members)
    wrong("not a zip", b"")
    wrong("not a zip", b"\x80\x02}q\x00." * 9)
    wrong("damaged or cut short", data[:len(data) // 2])
    wrong("damaged or cut short", data[:-1])
    wrong("damaged or cut short", data.replace(members["data/1"], b"\0" * len(members["data/1"]),
                                               1))
    wrong("compressed", zipped(members, compression=zipfile.ZIP_DEFLATED))
    wrong("no data.pkl", zipped({n: d for n, d in members.items() if n != "data.pkl"}))
    wrong("one folder", zipped({}))
    wrong("one folder", zipped(members).replace(b"archive/version", b"brchive/version"))
    twice = zipped(members | {"data/X": b"1234"}).replace(b"archive/data/X", b"archive/data/1")
    wrong("one name", twice)
    inner = zipped({"data/9": b"x" * 5000})
    at = inner.index(b"PK\1\2")
    outer, record = zipped({"data/8": inner[:at]}), bytearray(inner[at:inner.index(b"PK\5\6")])
    start, end = outer.index(b"PK\1\2"), outer.index(b"PK\5\6")
    struct.pack_into("<I", record, 42, outer.index(inner[:at]))  # one member within the other
    wrong("verlap", outer[:end] + record + struct.pack(
        "<4s4H2IH", b"PK\5\6", 0, 0, 2, 2, end - start + len(record), start, 0))
    wrong("byteorder", zipped(members | {"byteorder": b"middle"}))
    wrong("16 MiB", data + b"\0" * (16 << 20))
    wrong("1024 KiB", zipped(members | {"data.pkl": members["data.pkl"] + b"\0" * (1 << 20)}))


def test_storages():
    members = make_members(tensors_of())
    wrong("storage data/1 has 8 bytes", zipped(members | {"data/1": members["data/1"][:8]}))
    wrong("storage data/1 has 16 bytes", zipped(members | {"data/1": members["data/1"] + b"1234"}))
    wrong("no storage data/1", zipped({n: d for n, d in members.items() if n != "data/1"}))
    wrong_tensors("reaches to element 3", tensors_of(cdfthreshd=Tensor([1, 1, 1], size=(4,))))
    wrong_tensors("reaches to element 6",
                  tensors_of(cdfthreshd=Tensor([1, 1, 1], stride=2, size=(4, ))))
    wrong_tensors("size [3, 1]", tensors_of(cdfthreshd=Tensor([1, 1, 1], size=(3, 1))))
    wrong_tensors("size []", tensors_of(cdfthreshd=Tensor([1], size=())))
    wrong_tensors("size [0]", tensors_of(cdfthreshd=Tensor([1], size=(0,))))
    wrong_tensors("1 to 1024", tensors_of(cdfthreshd=Tensor([1], stride=0, size=(1 << 40,))))
    wrong_tensors("make no sense", tensors_of(cdfthreshd=Tensor([1, 1, 1], size=(-3,))))
    wrong_tensors("make no sense", tensors_of(cdfthreshd=Tensor([1, 1, 1], size=(True,))))
    wrong_tensors("torch.ShortStorage, which is refused",
                  tensors_of(is_sparse=Tensor([1, 1, 1], "i2")))
    text = make_members(tensors_of())["data.pkl"]
    for old, new in ((b"storage", b"staring"), (b"K\x03tq", b"I3\ntq"), (b"X\x01\0\0\x001q",
                                                                         b"K\x01q")):
        assert old in text
        wrong("data.pkl", zipped(members | {"data.pkl": text.replace(old, new)}))


def test_values_out_of_range():
    for bad in (math.nan, -0.01, 1.01, math.inf):
        wrong_tensors(f"layer 0, head 1: cdfthreshd is {bad:g}",
                      tensors_of(cdfthreshd=Tensor([1, bad, 0])))
    for bad in (math.nan, -1.01, 1.01):
        wrong_tensors(f"simthreshd1 is {bad:g}", tensors_of(simthreshd1=Tensor([1, bad, 0])))
    for bad in (math.nan, -0.01, -math.inf):
        wrong_tensors(f"pvthreshd is {bad:g}", tensors_of(pvthreshd=Tensor([1, bad, 0])))
    wrong_tensors("simthreshd2 is nan", tensors_of(simthreshd2=Tensor([math.nan, 0, 0])))
    for kind, bad in (("u1", 2), ("f4", 0.5), ("f2", math.nan), ("i8", -1)):
        wrong_tensors(f"is_sparse is {bad:g}, not 0 or 1",
                      tensors_of(is_sparse=Tensor([1, 0, bad], kind)))
    members = make_members(tensors_of())
    wrong("is nan",
          zipped(members | {"data/1": struct.pack("<3I", 0x7F800001, 0, 0)}))  # signalling


def test_layers():
    for name in NAMES:
        tensors = tensors_of((0, 7))
        del tensors[key(7, name)]
        wrong_tensors(f"layer 7 has no {name}", tensors)
        tensors = tensors_of((0, 7))
        tensors[key(7, name)] = Tensor([1, 1])
        wrong_tensors("layer 7 has different numbers of heads", tensors)
    good = tensors_of()
    wrong_tensors("or none of", good | {key(0, "to_q"): Tensor([1])})
    wrong_tensors("no layer number", good | {"blocks.attn1.pvthreshd": Tensor([1])})
    wrong_tensors("no layer number", good | {f"blocks.{'9' * 5000}.pvthreshd": Tensor([1])})
    wrong_tensors("layer 0 is both", good | {"single.0.pvthreshd": Tensor([1])})
    for x in ({}, {"a": 1}, {1: Tensor([1])}, good | {"b.1.pvthreshd": None}, Tensor, 5, None):
        members = make_members(x) if isinstance(x, dict) else {"data.pkl": pickle.dumps(x, 2)}
        wrong("data.pkl", zipped(members))


class Calls:
    """Pickled as a call of a function."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def test_malicious():
    members = make_members(tensors_of())
    calls = {
        "posix.system": Calls(os.system, "touch owned"), "exec": Calls(exec, "open('owned', 'w')"),
        "eval": Calls(eval, "open('owned', 'w')"), "io.open": Calls(open, "owned", "w"), "getattr":
        Calls(getattr, "a", "upper"), "Counter": collections.Counter()
    }
    for words, x in calls.items():
        for protocol in (2, 3, 4, 5):
            for where in (x, {"a": x}, tensors_of() | {"a": x}):
                data = make_members(where, protocol=protocol) if isinstance(where, dict) else {
                    "data.pkl": pickle.dumps(where, protocol)}
                wrong("refused", zipped(members | data))
        wrong(words, zipped({"data.pkl": pickle.dumps({"a": x}, 2)}))
    texts = {
        b"cos\nsystem\n(X\x0b\0\0\0touch ownedtR.": "os.system, which is refused",
        b"csubprocess\nPopen\n(X\x0b\0\0\0touch ownedtR.": "subprocess.Popen, which is refused",
        b"(S'touch owned'\nios\nsystem\n.": "refused", b"(cos\nsystem\nS'touch owned'\no.":
        "refused", b"Pstorage\n.": "PERSID", b"ctorch\nload\n.": "torch.load",
        b"\x80\x04\x8c\x05torch\x8c\x05_C.op\x93.": "data.pkl",
        b"\x80\x04\x8c\x05torch\x8c\x11FloatStorage.code\x93.": "torch.FloatStorage.code",
        b"ccollections\nOrderedDict\n(K\x01tR.": "data.pkl", b"ctorch\nFloatStorage\n)R.":
        "data.pkl", b"ctorch._utils\n_rebuild_tensor_v2\n}b.": "BUILD",
        b"\x80\x02ctorch\nFloatStorage\n)\x81.": "NEWOBJ",
        b"ctorch._utils\n_rebuild_tensor_v2\n)R.": "data.pkl", b"\x82\x01.": "EXT1",
        b"Nr\xff\xff\xff\x7f.": "too high", b"})" + b"\x85" * 500_000 + b"K\x01s.": "20000 tuples",
        b"})" + b"\x85" * 20_000 + b"K\x01s.": "dict", b"\x80\x04\x95" + b"\xff" * 8 + b"N.":
        "data.pkl", b"\x8e" + b"\xff" * 7 + b"\x7f.": "data.pkl", b"X\xff\xff\xff\xffa.":
        "data.pkl", b".": "data.pkl", b"": "data.pkl", b"((((": "data.pkl", b"K\x01K\x02R.":
        "data.pkl", b"h\x00.": "data.pkl"
    }
    for text, words in texts.items():
        wrong(words, zipped(members | {"data.pkl": text}))
    check("owned" not in os.listdir("."), "nothing was run", os.listdir("."))


def test_program():
    """As a user runs it."""
    data = zipped(make_members(tensors_of()))
    files = {
        "good.pt": (data, FINE, ""), "short.pt": (data[:-9], FILE, "cut short"), "nan.pt":
        (zipped(make_members(tensors_of(cdfthreshd=Tensor([math.nan] * 3)))), FILE, "nan"),
        "evil.pt": (zipped({"data.pkl": pickle.dumps(Calls(os.system,
                                                           "touch owned"))}), FILE, "refused")
    }
    for name, (content, code, words) in files.items():
        done = subprocess.run([sys.executable, PROGRAM, save(content, name), "-o", f"{name}.json"],
                              capture_output=True, text=True)
        check(done.returncode == code and done.stdout == "" and words in done.stderr and
              done.stderr.count("\n") == (code != FINE), name, done)
        check(os.path.exists(f"{name}.json") == (code == FINE), f"{name}: output")
    check(not {"owned", "torch"} & set(os.listdir(".")), "nothing was run", os.listdir("."))


# ---- Damage ----------------------------------------------------------------------------------

def mutate(r, data):
    """Some bytes flipped, set, cut off, left out, doubled or moved."""
    data = bytearray(data)
    for _ in range(r.choice((1, 1, 1, 2, 5))):
        at, n = r.randrange(len(data)) if data else 0, r.randint(1, 20)
        how = r.randrange(7)
        if not data:
            break
        if how <= 1:
            data[at] ^= 1 << r.randrange(8)
        elif how == 2:
            data[at] = r.choice((0, 1, 127, 128, 255, r.randrange(256), *b".Rtr}(cQ\x85\x93"))
        elif how == 3:
            del data[at:]
        elif how == 4:
            del data[at:at + n]
        elif how == 5:
            data[at:at] = data[at:at + n]
        else:
            other = r.randrange(len(data))
            data[at:at + n] = data[other:other + n]
    return bytes(data)


def test_damage():
    """Every outcome is a sound file, or one line."""
    r = random.Random(seed)
    accepted = 0
    whole = [make_members(tensors_of((0, 3)), order, protocol)
             for order in ("little", "big") for protocol in (2, 2, 4)]
    for i in range(1500):
        members = r.choice(whole)
        if i % 3 == 0:  # of the whole file
            data = mutate(r, zipped(members))
        else:  # of one member, under a checksum that is right
            name = r.choice(("data.pkl", r.choice(list(members))))
            data = zipped(members | {name: mutate(r, members[name])})
        save(data)
        with contextlib.suppress(FileNotFoundError):
            os.unlink("o.json")
        try:
            code, said = run("x.pt", "-o", "o.json")
        except Exception:
            check(False, f"seed {seed}, damage {i}", traceback.format_exc())
            continue
        if code != FINE:
            ok = code == FILE and said.startswith("from_pt: x.pt: ") and said.count("\n") == 1
            check(ok and os.listdir(".") == ["x.pt"], f"seed {seed}, damage {i}: one line", code,
                  said)
            continue
        accepted += 1
        with open("o.json") as file:
            heads = json.load(file, parse_constant=lambda word: [])["heads"]  # a NaN is no number
        check(
            said == "" and heads and all(-1 <= h["theta"] <= 1 and 0 <= h["tau"] <= 1 and
                                         (h["lambda"] is None or h["lambda"] <= 0) for h in heads),
            f"seed {seed}, damage {i}: sound", said, heads[:3])
    check(150 < accepted < 1100, "both outcomes occur", accepted)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    check(peak < 500, "MiB in all", peak)


run_tests(globals(), sys.argv[2:], "sparge-from-pt-")
