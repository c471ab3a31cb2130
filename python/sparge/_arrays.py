# SPDX-License-Identifier: Apache-2.0
"""Arrays of numpy and tensors of torch as the library sees them, without copies."""
from __future__ import annotations

import sys
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Sequence

import numpy as np

from sparge._native import ffi, lib

DTYPES = {"float32": lib.SPARGE_F32, "float16": lib.SPARGE_F16, "bfloat16": lib.SPARGE_BF16}
LAYOUTS = ("HND", "NHD")


@dataclass(frozen=True)
class Tensor:
    """q, k, v or o: [batch][head][token][channel] whatever its layout. Strides count elements."""

    name: str
    owner: Any  # the array or tensor, which keeps the memory
    data: int  # address
    dtype: str  # of DTYPES
    device: str  # "cpu" or "cuda:0"
    shape: tuple[int, int, int, int]
    strides: tuple[int, int, int, int]
    batched: bool  # has it an axis of batches of its own?

    def c(self, kind: str = "sparge_in") -> Any:
        """As sparge_in or sparge_out."""
        batch, head, token, _ = self.strides
        return ffi.new(kind + " *", [ffi.cast("void *", self.data), DTYPES[self.dtype], batch, head,
                                     token])[0]


def is_torch(x: Any) -> bool:
    """Is it a tensor of torch, or behaves like one?"""
    return hasattr(x, "data_ptr") and hasattr(x, "new_empty")


def read(name: str, x: Any, layout: str = "HND") -> Tensor:
    """q, k, v or o as it was given; what is wrong with it is said in a sentence."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout is {layout!r}, it must be 'HND' or 'NHD'")
    if is_torch(x):
        if x.requires_grad and sys.modules["torch"].is_grad_enabled():
            raise ValueError(f"{name}.requires_grad is True, it must be False: there is no backward "
                             f"pass; call it under torch.no_grad(), or give {name}.detach()")
        dtype, shape, strides = str(x.dtype).split(".")[-1], tuple(x.shape), tuple(x.stride())
        data, device = x.data_ptr(), str(x.device)
    else:
        if not isinstance(x, np.ndarray):
            if not hasattr(x, "__dlpack__"):
                raise TypeError(f"{name} is a {type(x).__name__}, it must be an array of numpy or a "
                                "tensor of torch")
            x = np.from_dlpack(x)
        dtype, shape, size = x.dtype.name, x.shape, max(1, x.dtype.itemsize)
        if not x.dtype.isnative or not x.flags.aligned or any(s % size for s in x.strides):
            raise ValueError(f"{name} has bytes in another order, or elements that are not aligned")
        strides, data, device = tuple(s // size for s in x.strides), x.ctypes.data, "cpu"
    if dtype not in DTYPES:
        raise TypeError(f"{name} is {dtype}, it must be float32, float16 or bfloat16")
    axes = "[B, H, N, D] or [H, N, D]" if layout == "HND" else "[B, N, H, D] or [N, H, D]"
    if len(shape) not in (3, 4):
        raise ValueError(f"{name} has the shape {list(shape)}, it must be {axes}")
    if shape[-1] > 1 and strides[-1] != 1 and 0 not in shape:
        raise ValueError(f"{name} has the stride {strides[-1]} in its last axis, it must be 1: the "
                         "channels of a token are contiguous")
    batched = len(shape) == 4
    shape, strides = ((1, *shape), (0, *strides)) if not batched else (shape, strides)
    order = (0, 1, 2, 3) if layout == "HND" else (0, 2, 1, 3)
    return Tensor(name, x, data, dtype, device, tuple(shape[n] for n in order),
                  tuple(strides[n] for n in order), batched)


def empty(name: str, shape: Sequence[int], like: Tensor, layout: str,
          dtype: str | None = None) -> Tensor:
    """An array of this shape [B, H, N, D], of the kind, dtype, device and layout of another."""
    dtype = dtype or like.dtype
    order = (0, 1, 2, 3) if layout == "HND" else (0, 2, 1, 3)
    axes = [shape[n] for n in order][0 if like.batched else 1:]
    return read(name, new(axes, like, dtype), layout)


def new(shape: Sequence[int], like: Tensor, dtype: str) -> Any:
    """A packed array of the kind and device of another; dtype by numpy's name."""
    if is_torch(like.owner):
        return like.owner.new_empty(tuple(shape), dtype=getattr(sys.modules["torch"], dtype))
    return np.empty(tuple(shape), like.owner.dtype if dtype == like.dtype else dtype)


def pointer(x: Any, kind: str) -> Any:
    """The address of a packed array, as `kind`; it stays that of the array's owner."""
    return ffi.cast(kind, x.data_ptr() if is_torch(x) else x.ctypes.data)


# ---- Devices ----------------------------------------------------------------------------------


def on_device(tensor: Tensor) -> Any:
    """A context in which the device of a tensor is the current one."""
    if tensor.device == "cpu":
        return nullcontext()
    return sys.modules["torch"].cuda.device(tensor.owner.device)


def stream(tensor: Tensor) -> Any:
    """The stream of CUDA on which torch works on that device."""
    current = sys.modules["torch"].cuda.current_stream(tensor.owner.device)
    return ffi.cast("void *", current.cuda_stream)
