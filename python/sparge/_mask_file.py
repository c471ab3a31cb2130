# SPDX-License-Identifier: Apache-2.0
"""Files of masks, as the program `sparge` has them: a .npy of blocks, or a .safetensors that holds
partly attended blocks too (tools/mask_file.h). Beside its tensors a .safetensors of ours has the
sizes of the mask, as JSON in its metadata, which the program does not read."""
from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparge._files import write_whole
from sparge._mask import BlockMask
from sparge._optional import optional
from sparge._options import pair

METADATA = "sparge"  # one entry, since several would come in any order
SIZES = {"q_len", "k_len", "block", "is_causal"}
Arrays = Mapping[str, NDArray[Any]]


def _is_tensors(path: str | os.PathLike[str]) -> bool:
    return os.fsdecode(path).endswith(".safetensors")


# ---- Writing ----


def save(mask: BlockMask, path: str | os.PathLike[str]) -> None:
    """See BlockMask.save()."""
    blocks = mask._blocks.astype(np.uint8)
    if _is_tensors(path):
        index, bits = mask._partials()
        sizes = {size: getattr(mask, size) for size in sorted(SIZES)}
        data = optional("safetensors.numpy", "a .safetensors").save(
            {"partial_index": index, "blocks": blocks, "partial_bits": np.ascontiguousarray(bits)},
            {METADATA: json.dumps(sizes)})
    elif mask.partial:
        raise ValueError(f"{os.fsdecode(path)}: the mask has {mask.partial} partly attended blocks"
                         ", which a .npy does not hold; let the name end in .safetensors")
    else:
        buffer = io.BytesIO()
        np.save(buffer, blocks)
        data = buffer.getvalue()
    write_whole(path, data)


# ---- Reading ----


def load(path: str | os.PathLike[str], given: Mapping[str, Any]) -> BlockMask:
    """See BlockMask.load()."""
    name = os.fsdecode(path)
    arrays, own = _read_tensors(name) if _is_tensors(name) else (_read_npy(name), {})
    sizes = {**{size: value for size, value in given.items() if value is not None}, **own}
    try:
        for size in ("q_len", "k_len"):
            if size not in sizes:
                raise TypeError(f"the file does not say {size}, which must be given")
        mask = _mask(arrays, sizes)
    except (TypeError, ValueError, OverflowError) as error:
        raise type(error)(f"{name}: {error}") from None
    for size in own:
        value, has = given[size], getattr(mask, size)
        same = mask._has_causality(value) if size == "is_causal" and value is not None else (
            value is None or has == (pair(size, value) if size == "block" else value))
        if not same:
            raise ValueError(f"{name}: {size} is {value!r} and the file says {has!r}: leave "
                             "it out, and convert() the mask afterwards")
    return mask


def _read_npy(name: str) -> Arrays:
    with open(name, "rb"):  # what cannot be opened is said as open() says it
        pass
    try:
        return {"blocks": np.lib.format.open_memmap(name, mode="r")}
    except Exception as error:  # whatever numpy's parser of the header meets
        raise ValueError(f"{name}: not a .npy of blocks: {error}") from None


def _read_tensors(name: str) -> tuple[Arrays, dict[str, Any]]:
    safetensors = optional("safetensors", "a .safetensors")
    with open(name, "rb"):
        pass
    try:
        with safetensors.safe_open(name, "numpy") as file:
            wanted = ["blocks"]
            if any(key.startswith("partial_") for key in file.keys()):
                wanted += ["partial_index", "partial_bits"]
            found = {key: file.get_tensor(key) for key in wanted}
            sizes = json.loads((file.metadata() or {}).get(METADATA, "{}"))
            if not isinstance(sizes, dict) or not SIZES.issuperset(sizes):
                raise ValueError(f"its metadata is {sizes!r}")
    except (safetensors.SafetensorError, ValueError) as error:
        raise ValueError(f"{name}: not a mask: {error}") from None
    return found, sizes


def _mask(arrays: Arrays, sizes: Mapping[str, Any]) -> BlockMask:
    """A mask of the arrays of a file, which are checked."""
    blocks = arrays["blocks"]
    if blocks.ndim != 4:
        raise ValueError(f"blocks has the shape {list(blocks.shape)}, it must be [B, H, i, j]")
    mask = BlockMask.from_blocks(blocks, **sizes)
    index, bits = arrays.get("partial_index"), arrays.get("partial_bits")
    if index is None or bits is None:
        return mask
    if index.dtype != np.int64 or index.ndim != 2 or index.shape[1] != 4:
        raise ValueError(f"partial_index is {index.dtype} {list(index.shape)}, it must be int64 "
                         "[n, 4]: batch, head, block of queries, block of keys")
    shape = (len(index), mask.block[0], -(-mask.block[1] // 8))
    if bits.dtype != np.uint8 or bits.shape != shape:
        raise ValueError(f"partial_bits is {bits.dtype} {list(bits.shape)}, it must be uint8 "
                         f"{list(shape)}")
    if not len(index):
        return mask
    outside = np.flatnonzero(((index < 0) | (index >= blocks.shape)).any(axis=1))
    if len(outside):
        raise ValueError(f"partial_index[{outside[0]}] is {index[outside[0]].tolist()}, which is "
                         f"not in blocks {list(blocks.shape)}")
    line = np.ravel_multi_index(tuple(index[:, :3].T), blocks.shape[:3])
    falls = np.flatnonzero(np.diff(line) < 0)
    if len(falls):
        raise ValueError(f"partial_index[{falls[0] + 1}] comes after a later one; sort the entries")
    mask._fill(blocks, index, bits)
    mask.counts  # noqa: B018 (the library checks the entries)
    return mask
