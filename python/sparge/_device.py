# SPDX-License-Identifier: Apache-2.0
"""Calls over tensors of a GPU: where the backend looks for the small arrays of a call."""
from __future__ import annotations

import sys
from contextlib import nullcontext
from typing import Any

from sparge import _arrays
from sparge._arrays import Tensor
from sparge._native import Watch, call, ffi, lib


def _on_device(tensor: Tensor) -> Any:
    """A context in which the device of a tensor is the current one."""
    if tensor.device == "cpu":
        return nullcontext()
    return sys.modules["torch"].cuda.device(tensor.owner.device)


def _stream(tensor: Tensor) -> Any:
    return sys.modules["torch"].cuda.current_stream(tensor.owner.device)


def stream(tensor: Tensor) -> Any:
    """The stream of CUDA on which torch works on that device."""
    return ffi.cast("void *", _stream(tensor).cuda_stream)


class Mirror:
    """Arrays of the host where the backend looks for them in one call: there, or on CUDA in device
    memory, from which a call brings back what it wrote, and waits for the stream."""

    def __init__(self, like: Tensor) -> None:
        self.like = like
        self.memory: list[Any] = []
        self.back: list[tuple[Any, Any, int]] = []

    def place(self, host: Any, size: int, back: bool) -> Any:
        """A pointer for the call, to `size` bytes that are written and come back, or are read."""
        if self.like.device == "cpu":
            return host
        memory = _arrays.new((max(1, size), ), self.like, "uint8")
        pointer = _arrays.pointer(memory, "void *")
        self.memory.append(memory)
        if back:
            self.back.append((host, pointer, size))
        else:
            _stream(self.like).synchronize()  # what the memory was before may still be written
            call(lib.sparge_device_copy, pointer, host, size)
        return pointer

    def call(self, watch: Watch, function: Any, *arguments: Any) -> None:
        """A call of the library, after which what it wrote is on the host."""
        with _on_device(self.like):
            watch.call(function, *arguments)
            if self.back:
                _stream(self.like).synchronize()
            for host, pointer, size in self.back:
                call(lib.sparge_device_copy, host, pointer, size)

    def mask(self, mask: Any, options: Any, back: bool) -> Any:
        """A sparge_mask of the host for the call."""
        m = ffi.new("sparge_mask *", mask[0])
        self.memory.append(m)
        rows = m.batch * m.heads * m.q_blocks
        m.bits = self.place(m.bits, 4 * rows * m.words, back)
        if m.partial_first:
            count, words = m.partial_first[rows], -(-options.block_k // 32)
            m.partial_first = self.place(m.partial_first, 8 * (rows + 1), back)
            m.partial_block = self.place(m.partial_block, 4 * count, back)
            m.partial_bits = self.place(m.partial_bits, 4 * count * options.block_q * words, back)
        return m
