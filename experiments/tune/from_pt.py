#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Turns the thresholds that SpargeAttn's own tuner saved, a .pt file of torch, into parameters of
sparge.

    from_pt.py CogVideoX-2b_0.06_0.07.pt -o cogvideox.json

A .pt file is a zip of data.pkl, a pickled dict of tensors, and data/0, data/1, ..., their numbers.
The dict has five tensors [heads] for each layer: is_sparse, cdfthreshd (tau), simthreshd1 (theta),
simthreshd2 (not used) and pvthreshd (-lambda in log2 units). torch is not needed, and no file can
make this program run anything: of the pickle only what such a dict consists of is accepted.

What comes out is what the authors' code does with the file: their rules, key block 0 kept by every
query (attention_sink, which their tuner leaves off and their inference turns on), and pvthreshd in
every head, also in those that they call dense. `sparge run CAPTURE --params OUT` then runs so.

Exit code 0: written; 2: wrong usage; 3: a file is wrong or cannot be read or written, said in one
line.
"""
import argparse
import contextlib
import hashlib
import io
import json
import math
import os
import pickle
import pickletools
import re
import sys
import zipfile
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

VERSION = "0.1.0"  # SPARGE_VERSION of sparge_options.h
LEAST_F32 = float(np.finfo(np.float32).min)

# Far above what a model needs, and low enough that no file costs much memory or time.
MAX_FILE = 16 << 20
MAX_PICKLE = 1 << 20
MAX_TUPLES = 20_000  # a tensor has four; the hash of a tuple in a tuple in a tuple ... needs stack
MAX_HEADS = 1024

# The tensors of one layer, and the range of each.
RANGES = {"is_sparse": (0, 1), "cdfthreshd": (0, 1), "simthreshd1": (-1, 1),
          "simthreshd2": (-math.inf, math.inf), "pvthreshd": (0, math.inf)}


class Bad(Exception):
    """What is wrong with a file."""


@contextlib.contextmanager
def damage_is(what: str) -> Iterator[None]:
    """For zipfile and pickle, which raise a dozen classes of exception on damaged data."""
    try:
        yield
    except Bad:
        raise
    except Exception as error:
        raise Bad(f"{what} ({type(error).__name__}: {error})") from None


# ---- The pickle ----------------------------------------------------------------------------------

class Kind(NamedTuple):
    """The element type of a storage: numpy's code without the byte order; bf16 as its bits."""
    code: str
    bf16: bool = False


KINDS = {"FloatStorage": Kind("f4"), "DoubleStorage": Kind("f8"), "HalfStorage": Kind("f2"),
         "BFloat16Storage": Kind("u2", bf16=True), "BoolStorage": Kind("u1"),
         "IntStorage": Kind("i4"), "LongStorage": Kind("i8")}

# All that a pickled dict of tensors consists of: nothing that sets an attribute or makes an object.
OPCODES = set(
    """PROTO FRAME STOP MARK MEMOIZE BINPUT LONG_BINPUT BINGET LONG_BINGET EMPTY_DICT SETITEM
    SETITEMS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 BINUNICODE SHORT_BINUNICODE BININT BININT1
    BININT2
    LONG1 NEWTRUE NEWFALSE NONE GLOBAL STACK_GLOBAL REDUCE BINPERSID""".split())


def is_count(x: object) -> bool:
    """A whole number that is not negative, and no bool."""
    return type(x) is int and x >= 0


def empty_dict() -> dict:
    """Stands for collections.OrderedDict, which is pickled empty and then filled."""
    return {}


def rebuild_tensor(storage: np.ndarray, offset: int, size: tuple, stride: tuple, *_:
                   object) -> np.ndarray:
    """Stands for torch._utils._rebuild_tensor_v2: elements [heads] of a storage."""
    if not (isinstance(storage, np.ndarray) and isinstance(size, tuple) and
            isinstance(stride, tuple) and len(size) == len(stride) and
            all(map(is_count, (offset, *size, *stride)))):
        raise Bad("the offset, size and stride of a tensor make no sense")
    if len(size) != 1 or not 1 <= size[0] <= MAX_HEADS:
        raise Bad(f"a tensor has size {list(size)}, where [heads] is expected, 1 to {MAX_HEADS}")
    last = offset + (size[0] - 1) * stride[0]
    if last >= storage.size:
        raise Bad(f"a tensor reaches to element {last} of a storage of {storage.size}")
    return storage[offset + stride[0] * np.arange(size[0])]


class Unpickler(pickle.Unpickler):
    """Knows three kinds of names, which stand for functions and values of this file."""

    def __init__(self, data: bytes, members: dict[str, bytes], order: str) -> None:
        super().__init__(io.BytesIO(data))
        self.members, self.order = members, order

    def find_class(self, module: str, name: str) -> object:
        if (module, name) == ("collections", "OrderedDict"):
            return empty_dict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return rebuild_tensor
        if module == "torch" and name in KINDS:
            return KINDS[name]
        raise Bad(f"data.pkl asks for {module}.{name}, which is refused")

    def persistent_load(self, pid: object) -> np.ndarray:
        """The numbers of a storage, named ("storage", class, key, device, number of elements)."""
        if not (isinstance(pid, tuple) and len(pid) == 5 and pid[0] == "storage" and
                isinstance(pid[1], Kind) and isinstance(pid[2], str) and is_count(pid[4])):
            raise Bad("data.pkl refers to something that is no storage")
        _, kind, key, _, elements = pid
        raw = self.members.get(f"data/{key}")
        if raw is None:
            raise Bad(f"there is no storage data/{key}")
        dtype = np.dtype(self.order + kind.code)
        if len(raw) != elements * dtype.itemsize:
            raise Bad(
                f"storage data/{key} has {len(raw)} bytes instead of {elements * dtype.itemsize}")
        numbers = np.frombuffer(raw, dtype)
        return (numbers.astype(np.uint32) << 16).view(np.float32) if kind.bf16 else numbers


def check_opcodes(data: bytes) -> None:
    """Refuses, before anything of a pickle is run, what is not needed or takes much memory or
    stack."""
    tuples = 0
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name not in OPCODES:
            raise Bad(f"data.pkl has the opcode {opcode.name}, which is refused")
        if opcode.name == "LONG_BINPUT" and argument > len(data):  # an index of an array
            raise Bad("data.pkl numbers its objects too high")
        tuples += opcode.name.startswith("TUPLE")
    if tuples > MAX_TUPLES:
        raise Bad(f"data.pkl has more than {MAX_TUPLES} tuples")


# ---- The file ------------------------------------------------------------------------------------

def read_zip(data: bytes) -> dict[str, bytes]:
    """The members of a zip by their names below its one folder; zipfile checks their checksums."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = archive.infolist()
        for member in members:
            if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
                raise Bad(f"{member.filename} is compressed or encrypted, which torch never does")
        if sum(member.file_size for member in members) > len(data):
            raise Bad("the members of the zip overlap")
        names = [member.filename.partition("/") for member in members]
        if len({root for root, _, _ in names}) != 1 or len(set(names)) != len(names):
            raise Bad("the members of the zip are not in one folder, or two have one name")
        return {name: archive.read(member) for (_, _, name), member in zip(names, members)}


def read_tensors(data: bytes) -> dict[str, np.ndarray]:
    """The tensors of a .pt file by name."""
    if len(data) > MAX_FILE:
        raise Bad(f"larger than {MAX_FILE >> 20} MiB: no file of thresholds")
    begun = data.startswith(b"PK\3\4")
    with damage_is("damaged or cut short" if begun else "not a zip file, as torch.save makes one"):
        members = read_zip(data)
    text, order = members.get("data.pkl"), members.get("byteorder", b"little")
    if text is None:
        raise Bad("there is no data.pkl: torch.save did not make it")
    if len(text) > MAX_PICKLE:
        raise Bad(f"data.pkl is larger than {MAX_PICKLE >> 10} KiB: no file of thresholds")
    if order not in (b"little", b"big"):
        raise Bad("byteorder is neither little nor big")
    with damage_is("data.pkl is damaged"):
        check_opcodes(text)
        tensors = Unpickler(text, members, "<" if order == b"little" else ">").load()
    if not (isinstance(tensors, dict) and tensors and all(
            isinstance(key, str) and isinstance(x, np.ndarray) for key, x in tensors.items())):
        raise Bad("data.pkl is no dict of tensors")
    return tensors


# ---- The parameters ------------------------------------------------------------------------------

def group(tensors: dict[str, np.ndarray]) -> dict[int, dict[str, list[float]]]:
    """The five lists of every layer; the number of a layer is the first in the name of its
    module."""
    layers, modules = {}, {}
    for key, tensor in tensors.items():
        *path, name = key.split(".")
        number = next((part for part in path if re.fullmatch("[0-9]{1,6}", part)), None)
        if number is None or name not in RANGES:
            raise Bad(f"no layer number, or none of {', '.join(RANGES)}: '{key}'")
        layer, module = int(number), ".".join(path)
        if modules.setdefault(layer, module) != module:
            raise Bad(f"layer {layer} is both '{modules[layer]}' and '{module}'")
        with np.errstate(invalid="ignore"):  # signalling NaNs
            layers.setdefault(layer, {})[name] = tensor.astype(np.float64).tolist()
    for layer, lists in layers.items():
        missing = [name for name in RANGES if name not in lists]
        if missing:
            raise Bad(f"layer {layer} has no {', '.join(missing)}")
        if len({len(values) for values in lists.values()}) != 1:
            counts = ", ".join(f"{name} {len(values)}" for name, values in lists.items())
            raise Bad(f"layer {layer} has different numbers of heads: {counts}")
    return dict(sorted(layers.items()))


def short(x: float) -> float:
    """The number with the fewest digits that is the same float32: 0.97 for 0.9700000286102295."""
    return float(str(np.float32(x)))


def make_heads(layers: dict[int, dict[str, list[float]]]) -> list[dict]:
    """One entry for each head, every value in its range."""
    heads = []
    for layer, lists in layers.items():
        for head in range(len(lists["is_sparse"])):
            value = {name: values[head] for name, values in lists.items()}
            for name, (low, high) in RANGES.items():
                if not low <= value[
                        name] <= high or name == "is_sparse" and value[name] % 1:  # NaN too
                    wanted = "0 or 1" if name == "is_sparse" else f"in [{low}, {high}]"
                    raise Bad(
                        f"layer {layer}, head {head}: {name} is {value[name]:g}, not {wanted}")
            dense = not value["is_sparse"]
            skip = 0.0 - value["pvthreshd"] * math.log(2)  # never -0
            heads.append({
                "layer": layer, "head": head, "dense": dense,
                "theta": -1.0 if dense else short(value["simthreshd1"]),
                "tau": 1.0 if dense else short(value["cdfthreshd"]), "topk": None,
                "lambda": None if skip < LEAST_F32 else short(skip)})
    return heads


def to_json(header: list[dict], heads: list[dict]) -> str:
    """One line for each group of the header and for each head."""
    lines = [" " + json.dumps(part, allow_nan=False)[1:-1] + ",\n" for part in header]
    rows = ["  " + json.dumps(head, allow_nan=False) for head in heads]
    return "{\n" + "".join(lines) + ' "heads": [\n' + ",\n".join(rows) + "\n ]\n}\n"


def write(path: str, text: str) -> None:
    """Writes a file as a whole or not at all. A link is followed; a device is not replaced."""
    path = os.path.realpath(path)
    if os.path.lexists(path) and not os.path.isfile(path):
        raise Bad("not a regular file")
    temporary = f"{path}.{os.getpid()}.tmp"
    with open(temporary, "x", encoding="ascii") as file:
        try:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise


# ---- The command line ----------------------------------------------------------------------------

def within(kind: type, low: float, high: float) -> Callable[[str], float]:
    """A reader of numbers in [low, high]."""
    def number(text: str) -> float:
        x = kind(text)
        if not low <= x <= high:
            raise ValueError
        return x
    return number


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The arguments, and what the name of the file says where they do not."""
    parser = argparse.ArgumentParser(prog="from_pt", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add, block, bound = parser.add_argument, within(int, 1, 1024), within(float, 0, 1)
    add("file", metavar="FILE", help="MODEL_l1_l2.pt, or another name")
    add("-o", "--output", metavar="OUT", required=True, help="the JSON file to write")
    add("--model", help="(from the name of FILE)")
    add("--l1", metavar="X", type=bound,
        help="relative L1 that tau was tuned for (from the name, or null)")
    add("--l2", metavar="X", type=bound, help="relative L1 with lambda (from the name, or null)")
    add("--rules", choices=["default", "paper", "upstream"], default="upstream", help="(upstream)")
    add("--block-q", metavar="N", type=block, default=128, help="(128; the authors' on Hopper: 64)")
    add("--block-k", metavar="N", type=block, default=64, help="(64; the authors' on Hopper: 128)")
    add("--skip-rows", metavar="N", type=block, help="(block-q)")
    add("--causal", choices=["none", "end", "start"], default="none", help="(none)")
    add("--qk-dtype", choices=["int8", "int12", "f32"], default="int8", help="(int8)")
    add("--pv-dtype", choices=["int8", "int12", "f32", "f16", "fp8"], default="fp8", help="(fp8)")
    args = parser.parse_args(arguments)
    if all(map(os.path.exists,
               (args.file, args.output))) and os.path.samefile(args.file, args.output):
        parser.error("OUT is FILE")
    args.source = os.path.basename(args.file)
    said = re.fullmatch(r"(.+)_(0\.[0-9]+)_(0\.[0-9]+)\.pt", args.source, re.DOTALL)
    model, l1, l2 = said.groups() if said else (args.source.removesuffix(".pt"), None, None)
    args.model = model if args.model is None else args.model
    args.l1 = float(l1) if args.l1 is None and said else args.l1
    args.l2 = float(l2) if args.l2 is None and said else args.l2
    args.skip_rows = args.skip_rows or args.block_q
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    path = args.file
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_FILE + 1)
        heads = make_heads(group(read_tensors(data)))
        model, source = (x.encode(errors="replace").decode() for x in (args.model, args.source))
        text = to_json([
            {"sparge_params": 1}, {"version": VERSION}, {"model": model},
            {"tuner": "upstream", "source": source,
             "source_sha256": hashlib.sha256(data).hexdigest()},
            {"rules": args.rules},
            {"block_q": args.block_q, "block_k": args.block_k, "skip_rows": args.skip_rows,
             "causal": args.causal, "smooth_k": True, "sink": True, "softmax_scale": None,
             "qk_dtype": args.qk_dtype, "pv_dtype": args.pv_dtype},
            {"l1": args.l1, "l2": args.l2}, {"inputs": []}], heads)
        path = args.output
        write(path, text)
    except (Bad, OSError) as error:
        wrong = isinstance(error, OSError) and error.strerror or str(error)[:300]
        line = f"from_pt: {path}: {wrong}"
        print("".join(c if c.isprintable() else "?" for c in line), file=sys.stderr)
        sys.exit(3)


if __name__ == "__main__":
    main()
