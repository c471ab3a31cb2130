# SPDX-License-Identifier: Apache-2.0
"""Thresholds of every head of a layer, and the files of `sparge tune` that hold those of a model.

A file says for what its thresholds were tuned: rules, blocks, skip_rows, causality, smoothing, sink
and scale. A call takes these from it where its own arguments do not say them, and is refused where
they say something else, as `sparge run --params` does (tools/params.c).
"""
from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sparge._files import write_whole
from sparge._native import ffi, lib, text
from sparge._options import CAUSAL, RULES, THRESHOLDS

if TYPE_CHECKING:
    from sparge._options import Options

FORMAT = 1
# What a call must agree in, in the words of the file, and as the arguments of a call.
AGREE = {"rules": "rules", "block_q": "block", "block_k": "block", "cell": "cell",
         "skip_rows": "skip_rows", "causal": "is_causal", "sink": "sink", "smooth_k": "smooth_k",
         "softmax_scale": "softmax_scale"}
OLDER: dict[str, Any] = {"rules": "default", "cell": 0}  # where a file does not say it
LARGEST = 2**31 - 1  # number of a layer or a head
LARGEST_FLOAT = float(np.finfo(np.float32).max)


def short(x: float) -> float | None:
    """The number of the fewest digits that is this float32; None if it is not finite."""
    return float(str(np.float32(x))) if math.isfinite(x) else None


def described(options: Any) -> dict[str, Any]:
    """sparge_options as a file has them."""
    none = ffi.new("sparge_problem *", {"heads": 1, "kv_heads": 1, "dim": 1})
    whole = ffi.new("sparge_options *")
    lib.sparge_options_init(whole, ffi.sizeof("sparge_options"), lib.SPARGE_VERSION_NUMBER,
                            options.rules)
    whole.backend = lib.SPARGE_REF  # which has all rules
    whole.block_q, whole.skip_rows = options.block_q, options.skip_rows
    lib.sparge_options_resolve(none, whole, ffi.NULL)
    return {"rules": text(lib.sparge_rules_string(options.rules)),
            "qk_dtype": text(lib.sparge_dtype_string(options.qk_dtype)),
            "pv_dtype": text(lib.sparge_dtype_string(options.pv_dtype)),
            "block_q": options.block_q, "block_k": options.block_k, "cell": options.cell,
            "skip_rows": whole.skip_rows, "causal": text(lib.sparge_causal_string(options.causal)),
            "smooth_k": options.smooth_k, "sink": options.sink,
            "softmax_scale": short(options.softmax_scale) if options.softmax_scale > 0 else None}


def arguments(tuned: Mapping[str, Any]) -> Options:
    """What a file says of attention, as arguments of a call."""
    tuned = {**OLDER, **tuned}
    return {"rules": tuned["rules"], "block": (tuned["block_q"], tuned["block_k"]),
            "cell": tuned["cell"], "skip_rows": tuned["skip_rows"],
            "is_causal": False if tuned["causal"] == "none" else tuned["causal"],
            "smooth_k": tuned["smooth_k"], "sink": tuned["sink"],
            "softmax_scale": tuned["softmax_scale"]}


@dataclass(frozen=True, eq=False)
class Thresholds:
    """Thresholds of the heads of one layer, to be given to a call as params=.

    theta   [heads], as are tau and topk, -1: off, min_mass, 0: off, and lambda_, -inf: off
    heads   their numbers in the layer
    tuned   for what: the words of the file, without its heads
    source  who has them, for errors
    """

    theta: NDArray[np.float32]
    tau: NDArray[np.float32]
    topk: NDArray[np.float32]
    min_mass: NDArray[np.float32]
    lambda_: NDArray[np.float32]
    heads: tuple[int, ...]
    tuned: Mapping[str, Any] = field(repr=False)
    source: str = "params"

    @classmethod
    def read(cls, heads: Sequence[Mapping[str, Any]], tuned: Mapping[str, Any],
             source: str) -> Thresholds:
        """From the lines of a file."""
        def column(key: str, off: float) -> NDArray[np.float32]:
            return np.array([off if h.get(key) is None else h[key] for h in heads], np.float32)

        off = float(lib.SPARGE_OFF)
        return cls(column("theta", math.nan), column("tau", off), column("topk", off),
                   column("min_mass", 0), column("lambda", -math.inf),
                   tuple(h["head"] for h in heads), tuned, source)

    @property
    def options(self) -> Options:
        """The arguments of a call that these thresholds are for: what it does not say itself."""
        return arguments(self.tuned)

    def of(self, problem: Any, options: Any) -> dict[str, NDArray[np.float32]]:
        """For a sparge_problem under sparge_options, by the names of sparge_thresholds.

        ValueError: it has another number of heads, or the options are not those of `tuned`.
        """
        if problem.heads != len(self.heads):
            raise ValueError(f"{self.source} has thresholds for {len(self.heads)} heads "
                             f"({', '.join(map(str, self.heads))}), and q has {problem.heads}")
        now = described(options)
        for key, argument in AGREE.items():
            was, is_ = self.tuned.get(key, OLDER.get(key)), now[key]
            if key == "softmax_scale":  # the last bits of 1/sqrt(D) are nobody's choice
                was, is_ = (x or problem.dim**-0.5 for x in (was, is_))
                if math.isclose(was, is_, rel_tol=1e-6):
                    continue
            if was != is_:
                name = argument if argument != "block" else f"block ({key})"
                raise ValueError(f"{self.source} was tuned with {name} {_shown(was)}, not "
                                 f"{_shown(is_)}: give that, or leave {argument} out")
        return {c: getattr(self, name) for name, c in THRESHOLDS.items()}


def _shown(value: Any) -> str:
    return repr(False if value == "none" else value)


class Params:
    """Thresholds of the layers of a model: a file of `sparge tune`, made by load_params() or
    Tuned.params()."""

    def __init__(self, document: dict[str, Any], source: str = "params") -> None:
        """Of the JSON object of a file. ValueError: it is not one of `sparge tune`."""
        if not isinstance(document, dict):
            raise ValueError(f"{source}: is no JSON object")
        Reader(source, document).read_all()
        self._document, self._source = document, source
        self._heads: dict[int, list[dict[str, Any]]] = {}
        for head in sorted(document["heads"], key=lambda h: (h["layer"], h["head"])):
            self._heads.setdefault(head["layer"], []).append(head)

    @property
    def model(self) -> str | None:
        """Its name, where the file says it."""
        return self._document["model"]  # type: ignore[no-any-return]

    @property
    def weights_sha256(self) -> str | None:
        """Of the file of its weights, where the file says it."""
        return self._document.get("weights_sha256")

    @property
    def layers(self) -> tuple[int, ...]:
        """The numbers of the layers."""
        return tuple(self._heads)

    @property
    def options(self) -> Options:
        """The arguments of a call that these thresholds are for."""
        return arguments(self._document)

    def layer(self, number: int, heads: Iterable[int] | None = None) -> Thresholds:
        """Those of a layer: of all its heads, or of these, in their order.

        LookupError: the file lacks the layer, or one of the heads.
        """
        found = {h["head"]: h for h in self._heads.get(number, [])}
        chosen = list(found) if heads is None else list(heads)
        for head in chosen or [0]:
            if head not in found:
                raise LookupError(f"{self._source} has no thresholds for layer {number} head "
                                  f"{head}")
        tuned = {key: x for key, x in self._document.items() if key != "heads"}
        return Thresholds.read([found[head] for head in chosen], tuned, self._source)

    def of(self, problem: Any, options: Any) -> dict[str, NDArray[np.float32]]:
        """Thresholds.of() of the only layer. ValueError: there are several."""
        if len(self._heads) != 1:
            raise ValueError(f"{self._source} has {len(self._heads)} layers, a call is of one: "
                             "give params.layer(number)")
        return self.layer(self.layers[0]).of(problem, options)

    def changed(self, **thresholds: float | None) -> Params:
        """A copy with some of theta, tau, topk, min_mass and lambda_ the same for every head; None
        is off."""
        new = {name.rstrip("_"): x for name, x in thresholds.items()}
        if wrong := sorted(new.keys() - set(THRESHOLDS.values())):
            raise TypeError(f"changed() has no argument {wrong[0]!r}")
        heads = [{**head, **new} for head in self._document["heads"]]
        return Params({**self._document, "heads": heads}, self._source)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a file that `sparge run --params` reads. It appears whole or not at all."""
        write_whole(path, _lines(self._document).encode())

    def __repr__(self) -> str:
        heads = sum(map(len, self._heads.values()))
        return f"<Params of {self.model}: {heads} heads in {len(self._heads)} layers>"


def load_params(path: str | os.PathLike[str]) -> Params:
    """A file of `sparge tune`, or of experiments/tune/from_pt.py.

    OSError: it cannot be read. ValueError: it is cut short, or is no such file; the sentence names
    the key.
    """
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError(f"{path}: has a key twice; is it a file of sparge tune?")
        return found

    try:
        document = json.loads(Path(path).read_bytes(), object_pairs_hook=once)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: {error}; is it cut short?") from None
    return Params(document, str(path))


def _lines(document: Mapping[str, Any]) -> str:
    """JSON with a line for each key, and for each element of its lists, as the program writes
    it."""
    def value(x: Any) -> str:
        return json.dumps(x, ensure_ascii=False, allow_nan=False)

    def several(x: list[Any]) -> str:
        return "[\n" + ",\n".join("  " + value(e) for e in x) + "\n ]" if x else "[]"

    parts = [f' "{key}": {several(x) if isinstance(x, list) else value(x)}'
             for key, x in document.items()]
    return "{\n" + ",\n".join(parts) + "\n}\n"


# ---- Reading ----------------------------------------------------------------------------------


class Reader:
    """Checks a file, with the sentences of the program."""

    def __init__(self, source: str, document: Mapping[str, Any]) -> None:
        self.source, self.document = source, document
        self.at, self.object = "", document

    def must(self, right: bool, key: str, what: str) -> None:
        if not right:
            raise ValueError(f"{self.source}: '{self.at}{key}' must be {what}; is it a file of "
                             "sparge tune?")

    def whole(self, key: str, low: int, high: int) -> None:
        x = self.object.get(key)
        self.must(type(x) is int and low <= x <= high, key,
                  f"a whole number in [{low}, {high}]")

    def boolean(self, key: str) -> None:
        self.must(isinstance(self.object.get(key), bool), key, "true or false")

    def number(self, key: str) -> None:
        ends = ffi.new("double[2]")
        lib.sparge_range(key.encode(), ends, ends + 1)
        low, high = max(ends[0], -1e30), ends[1]  # JSON has no infinity
        x = self.object.get(key, math.nan)
        right = x is None or (type(x) in (int, float) and abs(x) <= LARGEST_FLOAT
                              and np.float32(low) <= np.float32(x) <= np.float32(high))
        self.must(bool(right), key, f"a number in [{low:g}, {high:g}], or null")

    def word(self, key: str, known: Iterable[str]) -> None:
        first, second, third = known
        self.must(self.object.get(key) in (first, second, third), key,
                  f"{first}, {second} or {third}")

    def read_all(self) -> None:
        name, largest = self.object.get("model", False), lib.SPARGE_MAX_BLOCK
        self.whole("sparge_params", FORMAT, FORMAT)
        self.must(name is None or isinstance(name, str), "model", "a name, or null")
        self.must(isinstance(self.object.get("weights_sha256") or "", str), "weights_sha256",
                  "a text, or null")
        if "rules" in self.object:
            self.word("rules", RULES)
        for key in ("block_q", "block_k", "skip_rows"):
            self.whole(key, 1, largest)
        if "cell" in self.object:
            self.whole("cell", 0, largest)
        self.word("causal", CAUSAL)
        self.boolean("smooth_k")
        self.boolean("sink")
        self.number("softmax_scale")
        self.must(isinstance(self.object.get("heads"), list), "heads", "a list")
        seen = set()
        for n, head in enumerate(self.document["heads"]):
            self.at, self.object = f"heads[{n}].", head if isinstance(head, dict) else {}
            self.read_head()
            place = head["layer"], head["head"]
            if place in seen:
                raise ValueError(f"{self.source}: has layer {place[0]} head {place[1]} twice")
            seen.add(place)

    def read_head(self) -> None:
        self.whole("layer", 0, LARGEST)
        self.whole("head", 0, LARGEST)
        self.boolean("dense")
        for key in ("theta", "tau", "topk", "lambda"):
            self.number(key)
        if "min_mass" in self.object:
            self.number("min_mass")
        self.must(self.object["theta"] is not None, "theta", "a number")
        by_mass = np.float32(self.object.get("min_mass") or 0) > 0
        self.must(bool(by_mass) or self.object["tau"] is not None
                  or self.object["topk"] is not None, "tau",
                  "a number where topk and min_mass are null")
