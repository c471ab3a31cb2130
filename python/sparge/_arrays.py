# SPDX-License-Identifier: Apache-2.0
"""Arrays of numpy and tensors of torch as the library sees them, without copies."""
from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparge._native import ffi, lib

DTYPES = {"float32": lib.SPARGE_F32, "float16": lib.SPARGE_F16, "bfloat16": lib.SPARGE_BF16}
DLPACK_CPU = 1  # kDLCPU
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


def _of_torch(name: str, x: Any) -> tuple[str, str, Any, Any, int]:
    """dtype, device, shape, strides and address of a tensor."""
    if x.requires_grad and sys.modules["torch"].is_grad_enabled():
        raise ValueError(f"{name}.requires_grad is True, it must be False: there is no backward "
                         f"pass; call it under torch.no_grad(), or give {name}.detach()")
    dtype, device, kind = (str(value).split(".")[-1] for value in (
        x.dtype, x.device, getattr(x, "layout", "strided")))
    if device.split(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"{name} is on {device}, it must be on cpu or cuda")
    if kind != "strided" or getattr(x, "is_nested", False):
        kind = "nested" if kind in ("strided", "jagged") else kind
        raise TypeError(f"{name} is {kind}, it must be a strided tensor")
    if getattr(x, "is_neg", bool)():
        raise ValueError(f"{name}.is_neg() is True: its memory has the other sign; give "
                         f"{name}.resolve_neg()")
    try:
        data = x.data_ptr()
    except (RuntimeError, UserWarning):  # of tensors that stand for others while torch traces
        data = 0
    if not data and 0 not in x.shape:
        raise TypeError(f"{name} is a {type(x).__name__}, which has no memory to read")
    return dtype, device, tuple(x.shape), tuple(x.stride()), data


def _of_numpy(name: str, x: Any) -> tuple[str, str, Any, Any, int]:
    """The same of an array."""
    if isinstance(x, np.ma.MaskedArray):
        raise TypeError(f"{name} is a masked array, whose mask would be ignored: give "
                        f"{name}.filled(), or hide keys by k_bias")
    size = max(1, x.dtype.itemsize)
    if not x.dtype.isnative:
        raise TypeError(f"{name} is {x.dtype.str}, of another byte order, it must be of this "
                        f"machine's: give {name}.astype({x.dtype.name!r})")
    if not x.flags.aligned:  # then strides are whole numbers of elements too
        raise ValueError(f"{name} has elements that are not aligned: give {name}.copy()")
    return (x.dtype.name, "cpu", x.shape, tuple(stride // size for stride in x.strides),
            x.ctypes.data)


def _imported(name: str, x: Any) -> Any:
    """An array of numpy on the memory of what has __dlpack__."""
    if not hasattr(x, "__dlpack__"):
        raise TypeError(f"{name} is a {type(x).__name__}, it must be an array of numpy, a tensor "
                        "of torch, or have __dlpack__")
    if x.__dlpack_device__()[0] != DLPACK_CPU:
        raise ValueError(f"{name} is a {type(x).__name__} on another device (DLPack's number "
                         f"{int(x.__dlpack_device__()[0])}), it must be on the CPU")
    try:
        return np.from_dlpack(x)
    except (BufferError, RuntimeError, TypeError) as error:
        raise TypeError(f"{name} is a {type(x).__name__} of {getattr(x, 'dtype', 'no dtype')} that "
                        f"numpy cannot read: {error}") from None


def read(name: str, x: Any, layout: str = "HND") -> Tensor:
    """q, k, v or o as it was given; what is wrong with it is said in a sentence."""
    if not isinstance(layout, str) or layout not in LAYOUTS:
        raise ValueError(f"layout is {layout!r}, it must be 'HND' or 'NHD'")
    if not is_torch(x) and not isinstance(x, np.ndarray):
        x = _imported(name, x)
    dtype, device, shape, strides, data = (_of_torch if is_torch(x) else _of_numpy)(name, x)
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


def packed(name: str, x: Any, like: Tensor, shape: Sequence[int]) -> Any:
    """A small float32 array of this shape on the device of another, in one piece; its address is
    pointer()'s."""
    if not is_torch(x) and not isinstance(x, np.ndarray):
        x = _imported(name, x)
    dtype, device, found, _, _ = (_of_torch if is_torch(x) else _of_numpy)(name, x)
    if dtype != "float32":
        raise TypeError(f"{name} is {dtype}, it must be float32")
    if tuple(found) != tuple(shape):
        raise ValueError(f"{name} has the shape {list(found)}, it must be {list(shape)}")
    if device != like.device:
        raise ValueError(f"{name} is on {device} and {like.name} is on {like.device}, they must be "
                         "on one device")
    return x.contiguous() if is_torch(x) else np.ascontiguousarray(x)


def host(name: str, x: Any) -> NDArray[Any]:
    """What numpy or torch can read, as an array of numpy on the host."""
    try:
        return np.asarray(x.detach().cpu() if is_torch(x) else x)
    except (RuntimeError, TypeError, ValueError) as error:
        raise TypeError(f"{name} is a {type(x).__name__} that numpy cannot read: {error}") from None


def empty(name: str, shape: Sequence[int], like: Tensor, layout: str) -> Tensor:
    """An array of this shape [B, H, N, D], of the kind, dtype, device and layout of another."""
    order = (0, 1, 2, 3) if layout == "HND" else (0, 2, 1, 3)
    axes = [shape[n] for n in order][0 if like.batched else 1:]
    return read(name, new(axes, like, like.dtype), layout)


def new(shape: Sequence[int], like: Tensor, dtype: str) -> Any:
    """A packed array of the kind and device of another; dtype by numpy's name."""
    if is_torch(like.owner):
        return like.owner.new_empty(tuple(shape), dtype=getattr(sys.modules["torch"], dtype))
    return np.empty(tuple(shape), like.owner.dtype if dtype == like.dtype else dtype)


def pointer(x: Any, kind: str) -> Any:
    """The address of a packed array, as `kind`; it stays that of the array's owner."""
    return ffi.cast(kind, x.data_ptr() if is_torch(x) else x.ctypes.data)
