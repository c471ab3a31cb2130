"""sets.py: capture sets: folders of .safetensors files with a manifest.json, single heads of them, and the
thresholds that belong to them. What is wrong with one ends the program with a line that names the file."""
import json
import sys
from dataclasses import dataclass
from math import prod
from pathlib import Path

import ml_dtypes  # noqa: F401: numpy has no bfloat16 of its own
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

SMOLLM2 = Path(__file__).resolve().parent / "smollm2-135m"  # that is committed
# One setting for all nine heads of it that keeps each within the relative L1 of 0.09 that the paper allows a language
# model; it was picked by hand on these very heads, so it says what is possible, not what a tuner would find blind.
CHOSEN = ["--sink", "--theta", "0.4", "--tau", "0.98", "--lambda=-5"]


@dataclass(frozen=True)
class Entry:
    """A file of a set. heads: the numbers of its query heads in the model. grid: T, H, W of its tokens, or None. scale:
    of the scores, or None, which is 1/sqrt(D)."""
    path: Path
    model: str
    sample: str
    layer: int
    step: int
    heads: tuple
    grid: tuple
    causal: bool
    scale: float

    @property
    def at(self):
        return {"sample": self.sample, "layer": self.layer, "step": self.step}


def read_json(path):
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        sys.exit(f"{path}: {getattr(error, 'strerror', None) or error}")


def manifest_of(folder):
    return read_json(Path(folder) / "manifest.json")


def entries(folder):
    """Those of a folder."""
    folder, manifest = Path(folder), manifest_of(folder)

    def either(file, key):
        """A file's own word, or that of the whole manifest."""
        return manifest.get(key) if file.get(key) is None else file[key]

    try:
        grid = manifest.get("grid")
        return [Entry(folder / file["file"], manifest["model"], manifest.get("sample", folder.name), file["layer"],
                      file.get("step", 0), tuple(file["query_heads"]), tuple(grid) if grid else None,
                      bool(either(file, "causal")), either(file, "scale"))
                for file in manifest["files"]]
    except KeyError as missing:
        sys.exit(f"{folder}/manifest.json: has no {missing}")
    except (TypeError, AttributeError):
        sys.exit(f"{folder}/manifest.json: is no manifest of a capture")


def tensors(path):
    """Its q, k and v, [B, H, N, D] or [B, G, N, D]."""
    try:
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        sys.exit(f"{path}: {error}")
    for name in "qkv":
        if name not in found or found[name].ndim != 4:
            sys.exit(f"{path}: has no tensor '{name}' of four axes")
    return {name: found[name] for name in "qkv"}


def attends(entry):
    """The options of sparge that say how its model attends."""
    return ["--causal"] * entry.causal + (["--scale", entry.scale] if entry.scale else [])


# ---- Thresholds -------------------------------------------------------------------------------

def read_params(path):
    tuned = read_json(path)
    if not isinstance(tuned, dict) or not {"heads", "causal", "scale", "sink", "smooth_k"} <= tuned.keys():
        sys.exit(f"{path}: is not of sparge tune")
    return tuned


def options_of(params):
    """The options of sparge run that thresholds were tuned for."""
    tuned = read_params(params)
    causal = [] if tuned["causal"] == "none" else [f"--causal={tuned['causal']}"]
    scale = [] if tuned["scale"] is None else ["--scale", tuned["scale"]]
    return ["--params", params, *causal, *scale, *["--sink"] * tuned["sink"],
            *["--no-smooth-k"] * (not tuned["smooth_k"])]


def changed(params, to, **knobs):
    """A copy of thresholds with some of them the same for every head."""
    tuned = read_params(params)
    for head in tuned["heads"]:
        head |= knobs
    Path(to).write_text(json.dumps(tuned))
    return to


# ---- Copies -----------------------------------------------------------------------------------

def copied(entry, to, change, dtype=np.float32):
    """A copy of a file, each tensor [B, H, N, D] changed, with a manifest of its own beside it. In float32 an output in
    it is not rounded to the float16 of the capture."""
    to.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: np.ascontiguousarray(change(x), dtype) for name, x in tensors(entry.path).items()}, to)
    (to.parent / "manifest.json").write_text(json.dumps({
        "model": entry.model, "sample": entry.sample, "causal": entry.causal, "scale": entry.scale,
        "files": [{"file": to.name, "layer": entry.layer, "query_heads": entry.heads}]}))
    return to


def reordered(entry, index, to, dtype=np.float32):
    """Its tokens in another order; of a capture with another grid than its manifest says there is none."""
    lengths = {x.shape[2] for x in tensors(entry.path).values()}
    if lengths != {len(index)}:
        sys.exit(f"{entry.path}: {min(lengths)} tokens, but its manifest says a grid of "
                 f"{' x '.join(map(str, entry.grid))}, which has {prod(entry.grid)}")
    return copied(entry, to, lambda x: x[:, :, index], dtype)


def beginning(entry, tokens, to):
    """Its first tokens."""
    return copied(entry, to, lambda x: x[:, :, :tokens])


def order(sparge, grid, name, folder, seed=0):
    """An order of the tokens of a grid, by sparge order."""
    sparge("order", *grid, "--order", name, "--seed", seed, "-o", folder / "index.npy")
    return np.load(folder / "index.npy")


# ---- Single heads -----------------------------------------------------------------------------

def heads(folder):
    """{(layer, head): (path, place in the file)} of every query head."""
    return {(entry.layer, head): (entry.path, place)
            for entry in entries(folder) for place, head in enumerate(entry.heads)}


def write_head(path, place, folder):
    """q, k and v [N, D] of the query head at a place of a file, as the .npy files that sparge run takes; in float32: an
    output in it is not rounded to the float16 of the capture."""
    found = tensors(path)
    count, kv_heads = found["q"].shape[1], found["k"].shape[1]
    paths = [folder / f"{name}.npy" for name in "qkv"]
    for to in paths:
        head = place if to.stem == "q" else place * kv_heads // count
        np.save(to, found[to.stem][0, head].astype(np.float32))
    return paths
