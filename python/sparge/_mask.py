# SPDX-License-Identifier: Apache-2.0
"""Masks: which blocks of the attention map are computed, and of some of them which pairs."""
from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparge._arrays import host
from sparge._counts import Counted, Counts
from sparge._native import call, ffi, lib, text
from sparge._options import DEFAULTS, Causal, causal, pair, whole

Bools = NDArray[np.bool_]
Row = Sequence[int]  # batch, head, query block


class BlockMask(Counted):
    """Which blocks of an attention map are computed: of [H] or [B, H] heads, q_len x k_len tokens
    in blocks of block_q queries and block_k keys. Some blocks may be attended in part.

    Made by predict(), from_blocks(), from_tokens(), from_flex() and load(). It does not change.
    np.asarray(mask) is mask.blocks. Masks of the same sizes have ==, & and |, by pairs of tokens.
    TypeError is raised for wrong kinds and dtypes, ValueError for wrong values and shapes, and both
    for files that hold no mask.
    """

    def __init__(self, problem: Any, options: Any, batched: bool) -> None:
        """Of a sparge_problem's sizes and sparge_options' blocks and causality; no block is set."""
        self._problem = ffi.new("sparge_problem *", problem[0])
        self._byte = ffi.new("char *")  # stands for q, k and v, which are not read
        for x in (self._problem.q, self._problem.k, self._problem.v):
            x.data = self._byte
        self._problem.k_bias = ffi.NULL
        self._options = ffi.new("sparge_options *", options[0])
        self._options.per_head = self._options.progress = ffi.NULL
        self._mask = ffi.gc(ffi.new("sparge_mask *"), lib.sparge_mask_free)
        self._batched = batched
        call(lib.sparge_mask_alloc, self._mask, self._problem, self._options)

    @classmethod
    def _empty(cls, heads: Sequence[int], q_len: Any, k_len: Any, block: Any, is_causal: Causal,
               batched: bool) -> BlockMask:
        """Of so many [batch, heads]; no block is set."""
        sizes = {"batch": heads[0], "heads": heads[1], "kv_heads": heads[1], "dim": 1, "dim_v": 1,
                 "q_len": whole("q_len", q_len), "k_len": whole("k_len", k_len)}
        options = ffi.new("sparge_options *")
        lib.sparge_options_init(options, ffi.sizeof("sparge_options"), lib.SPARGE_VERSION_NUMBER,
                                lib.SPARGE_RULES_DEFAULT)
        options.block_q, options.block_k = (whole("block", n) for n in pair("block", block))
        options.causal = causal(is_causal, q_len, k_len)
        return cls(ffi.new("sparge_problem *", sizes), options, batched)

    # ---- Making ----

    @classmethod
    def from_blocks(cls, blocks: Any, q_len: int, k_len: int, *,
                    block: tuple[int, int] = DEFAULTS["block"],
                    is_causal: Causal = False) -> BlockMask:
        """By blocks, each whole: bool or uint8 [B, H, i, j], [H, i, j] or [i, j], which is one
        head, with i = ceil(q_len / block[0]) and j = ceil(k_len / block[1]).

        What is_causal hides of a block is not attended."""
        found, batched = read_bools("blocks", blocks, "i, j")
        mask = cls._empty(found.shape[:2], q_len, k_len, block, is_causal, batched)
        mask._set_blocks("blocks", found)
        return mask

    @classmethod
    def from_tokens(cls, pairs: Any, *, block: tuple[int, int] = DEFAULTS["block"],
                    is_causal: Causal = False) -> BlockMask:
        """By pairs of tokens: bool or uint8 [B, H, Nq, Nk], [H, Nq, Nk] or [Nq, Nk], which is one
        head; 0 is not attended. A block is computed if one of its visible pairs is attended.

        What is_causal hides is not attended, and does not count as left out."""
        found, batched = read_bools("pairs", pairs, "Nq, Nk")
        q_len, k_len = found.shape[2:]
        mask = cls._empty(found.shape[:2], q_len, k_len, block, is_causal, batched)
        found = np.ascontiguousarray(found)
        lib.sparge_mask_free(mask._mask)
        call(lib.sparge_mask_from_pairs, mask._mask, mask._problem, mask._options,
             ffi.cast("uint8_t *", found.ctypes.data))
        return mask

    @classmethod
    def from_flex(cls, flex: Any, *, is_causal: Causal = False) -> BlockMask:
        """Of a BlockMask of torch.nn.attention.flex_attention: [B, H] heads in its BLOCK_SIZE.

        mask_mod is asked for every pair of its partial blocks, not of its full ones. A mask made
        for one head stands for all there; here expand() says for how many. With is_causal, what
        causality hides does not count as left out: from_flex(m.to_flex(), is_causal=m.is_causal)
        is m."""
        from sparge import _flex
        return _flex.from_flex(flex, is_causal)

    def _like(self, **options: Any) -> BlockMask:
        """An empty mask that differs in some options."""
        changed = ffi.new("sparge_options *", self._options[0])
        for name, value in options.items():
            setattr(changed, name, value)
        return BlockMask(self._problem, changed, self._batched)

    def convert(self, block: tuple[int, int]) -> BlockMask:
        """The same pairs in blocks of other sizes, (queries, keys)."""
        block_q, block_k = (whole("block", n) for n in pair("block", block))
        to = self._like(block_q=block_q, block_k=block_k)
        lib.sparge_mask_free(to._mask)
        call(lib.sparge_mask_convert, self._mask, self._problem, self._options, to._options,
             to._mask)
        return to

    def expand(self, heads: int, batch: int | None = None) -> BlockMask:
        """A mask of one head for so many heads, and of one batch for so many; without `batch` as
        many as it has."""
        m, heads = self._mask, whole("heads", heads)
        batch = batch if batch is None else whole("batch", batch)
        for name, has, want in (("heads", m.heads, heads), ("batch", m.batch, batch)):
            if want is not None and has not in (1, want):
                raise ValueError(f"{name} is {want} and the mask has {has}: only 1 can be expanded")
        sizes = (m.batch if batch is None else batch, heads)
        to = BlockMask._empty(sizes, self.q_len, self.k_len, self.block, self.is_causal,
                              self._batched or batch is not None)
        index, bits = self._partials()
        of_head = [(n, (index[:, 0] == min(b, m.batch - 1)) & (index[:, 1] == min(h, m.heads - 1)))
                   for n, (b, h) in enumerate(np.ndindex(*sizes))]
        entries = [np.column_stack([np.tile(divmod(n, heads), (of.sum(), 1)), index[of, 2:]])
                   for n, of in of_head]
        to._fill(np.broadcast_to(self._blocks, (*sizes, *self._grid)),
                 np.concatenate([index[:0], *entries]),
                 np.concatenate([bits[:0], *(bits[of] for _, of in of_head)]))
        return to

    # ---- Files ----

    def save(self, path: str | os.PathLike[str]) -> None:
        """A file that `sparge run --mask` takes: .safetensors, which says its q_len, k_len, block
        and is_causal too, or else .npy, which holds whole blocks alone."""
        from sparge import _mask_file
        _mask_file.save(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, q_len: int | None = None,
             k_len: int | None = None, block: tuple[int, int] | None = None,
             is_causal: Causal | None = None) -> BlockMask:
        """A file of save() or of `sparge run --mask-out`. A .safetensors of save() knows all sizes;
        of others q_len and k_len must be given, and block and is_causal if they are not the
        defaults, (128, 64) and False."""
        from sparge import _mask_file
        given = {"q_len": q_len, "k_len": k_len, "block": block, "is_causal": is_causal}
        return _mask_file.load(path, given)

    # ---- What it is ----

    @property
    def shape(self) -> tuple[int, ...]:
        """[heads, q_blocks, k_blocks], with batch before it if q had that axis."""
        m = self._mask
        return (m.batch, m.heads, m.q_blocks, m.k_blocks)[0 if self._batched else 1:]

    @property
    def block(self) -> tuple[int, int]:
        """Queries and keys of a block."""
        return self._options.block_q, self._options.block_k

    @property
    def q_len(self) -> int:
        """Queries."""
        return int(self._problem.q_len)

    @property
    def k_len(self) -> int:
        """Keys."""
        return int(self._problem.k_len)

    @property
    def is_causal(self) -> Causal:
        """False, "end" (the last query sees all keys) or "start" (the first sees one)."""
        word: Any = text(lib.sparge_causal_string(self._options.causal))
        return False if word == "none" else word

    @property
    def blocks(self) -> Bools:
        """Which visible blocks are computed, whole or in part, as `shape` says. It cannot be
        written to."""
        found = self._blocks.reshape(self.shape)
        found.flags.writeable = False
        return found

    @property
    def visible(self) -> Bools:
        """Which blocks have a pair that causality does not hide, [q_blocks, k_blocks]."""
        last = np.minimum(self._first(0) + self.block[0], self.q_len) - 1
        return last[:, None] + self._offset >= self._first(1)

    @property
    def partial(self) -> int:
        """How many of the blocks are attended in part."""
        return len(self._partials()[0])

    def to_tokens(self) -> Bools:
        """The visible pairs that are attended, [H, Nq, Nk] or [B, H, Nq, Nk]; a byte each."""
        found = np.empty((*self.shape[:-2], self.q_len, self.k_len), bool)
        call(lib.sparge_mask_to_pairs, self._mask, self._problem, self._options,
             ffi.cast("uint8_t *", found.ctypes.data))
        return found

    def to_flex(self, device: Any = "cpu") -> Any:
        """As a BlockMask of torch.nn.attention.flex_attention, on a device of torch. Blocks that
        causality crosses or that are attended in part ask its mask_mod, which is right for every
        pair: without torch.compile flex_attention asks nothing else.

        Compiled, flex_attention wants blocks that its own tiles divide; convert((128, 128)) gives
        its default."""
        from sparge import _flex
        return _flex.to_flex(self, device)

    @cached_property
    def head_counts(self) -> list[Counts]:
        """What attention over the mask counts in each head, batch after batch."""
        found = ffi.new("sparge_counts []", self._mask.batch * self._mask.heads)
        call(lib.sparge_mask_count, self._mask, self._problem, self._options, found)
        return [Counts.read(c) for c in found]

    @property
    def density_blocks(self) -> float:
        """Share of the visible blocks that are computed."""
        return self.counts.density_blocks

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        if copy is False:
            raise ValueError("copy is False: a mask holds bits, its array is always a copy")
        return self.blocks.astype(dtype or bool)

    def __reduce__(self) -> Any:  # for copies, and for other processes
        sizes = self.q_len, self.k_len, self.block, self.is_causal, self._batched
        return _made_of, (self._blocks, *self._partials(), sizes)

    def __repr__(self) -> str:
        seen = f"is_causal={self.is_causal!r}" if self.is_causal else "not causal"
        partial = f", {self.partial} in part" if self.partial else ""
        return (f"BlockMask({list(self.shape)} of {self.q_len} x {self.k_len} tokens in blocks of "
                f"{self.block[0]} x {self.block[1]}, {seen}, density {self.density:.4f}{partial})")

    # ---- Two of them ----

    def _sizes(self) -> tuple[Any, ...]:
        """What two masks must share. For squares "start" and "end" are the same."""
        m = self._mask
        return m.batch, m.heads, self.q_len, self.k_len, *self.block, self._offset

    def __eq__(self, other: object) -> bool:
        """Do both compute the same blocks and attend to the same pairs? [H] is the same as a batch
        of 1."""
        if not isinstance(other, BlockMask):
            return NotImplemented
        if self._sizes() != other._sizes() or not np.array_equal(self._blocks, other._blocks):
            return False
        return not (self.partial or other.partial) or all(
            np.array_equal(a, b) for (_, a), (_, b) in zip(self._rows(), other._rows()))

    def __and__(self, other: object) -> BlockMask:
        """The pairs that both attend to."""
        if not isinstance(other, BlockMask):
            return NotImplemented
        return self._combine(other, np.bitwise_and)

    def __or__(self, other: object) -> BlockMask:
        """The pairs that one of them attends to."""
        if not isinstance(other, BlockMask):
            return NotImplemented
        return self._combine(other, np.bitwise_or)

    def _combine(self, other: BlockMask, how: Callable[..., NDArray[np.uint32]]) -> BlockMask:
        if self._sizes() != other._sizes():
            raise ValueError(f"{self} and {other} must have the same sizes")
        to = self._like()
        for (row, a), (_, b) in zip(self._rows(), other._rows()):
            to._set_row(row, how(a, b))
        return to

    # ---- Within ----

    @property
    def _grid(self) -> tuple[int, int]:
        return self._mask.q_blocks, self._mask.k_blocks

    def _has_causality(self, is_causal: Causal) -> bool:
        """Is it this? Of a square "end" and "start" are the same."""
        both = {causal(is_causal, self.q_len, self.k_len), self._options.causal}
        square = self.q_len == self.k_len and lib.SPARGE_CAUSAL_NONE not in both
        return len(both) == 1 or square

    @property
    def _offset(self) -> int:
        """Query t sees keys up to t + this (sparge_causal)."""
        offsets = {lib.SPARGE_CAUSAL_END: self.k_len - self.q_len, lib.SPARGE_CAUSAL_START: 0}
        return offsets.get(self._options.causal, self.k_len)

    def _first(self, axis: int) -> NDArray[np.int64]:
        """The first query (axis 0) or key (axis 1) of each block."""
        return np.arange(self._grid[axis]) * self.block[axis]

    def _words(self) -> NDArray[np.uint32]:
        """The mask's own memory, [batch, heads, q_blocks, words]."""
        m = self._mask
        shape = (m.batch, m.heads, m.q_blocks, m.words)
        return _view(m.bits, np.uint32, shape)

    @property
    def _blocks(self) -> Bools:
        """As `blocks`, [batch, heads, q_blocks, k_blocks]."""
        bits = np.unpackbits(self._words().view(np.uint8), axis=-1, bitorder="little")
        found: Bools = bits[..., :self._mask.k_blocks].astype(bool) & self.visible
        return found

    def _partials(self) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
        """The blocks attended in part: batch, head, q_block and k_block [n, 4], and their pairs in
        bits [n, block_q, ceil(block_k / 8)]."""
        m, (block_q, block_k) = self._mask, self.block
        lines, octets = m.batch * m.heads * m.q_blocks, -(-block_k // 8)
        first = _view(m.partial_first, np.int64, (lines + 1, )) if m.partial_first else np.zeros(1)
        count = int(first[-1])
        if not count:
            return np.zeros((0, 4), np.int64), np.zeros((0, block_q, octets), np.uint8)
        line = np.repeat(np.arange(lines), np.diff(first))
        index = np.column_stack([*np.unravel_index(line, (m.batch, m.heads, m.q_blocks)),
                                 _view(m.partial_block, np.int32, (count, ))])
        bits = _view(m.partial_bits, np.uint8, (count, block_q, 4 * -(-block_k // 32)))
        kept = self._blocks[tuple(index.T)]
        return index[kept], bits[kept, :, :octets]

    def _set_blocks(self, name: str, blocks: NDArray[Any]) -> None:
        """Sets an empty mask by an argument [B, H, i, j], whose shape is checked."""
        shape = (self._mask.batch, self._mask.heads, *self._grid)
        if blocks.shape != shape:
            raise ValueError(f"{name} is [B, H, i, j] = {list(blocks.shape)}, it must be "
                             f"{list(shape)}: {self.q_len} queries and {self.k_len} keys in blocks "
                             f"of {self.block[0]} and {self.block[1]}")
        self._fill(blocks)

    def _fill(self, blocks: NDArray[Any], index: NDArray[np.int64] | None = None,
              bits: NDArray[np.uint8] | None = None) -> None:
        """Sets an empty mask: [batch, heads, q_blocks, k_blocks], and what _partials() gives, whose
        rows of blocks ascend. The library checks the rest when the mask is used."""
        m, (block_q, block_k) = self._mask, self.block
        octets = np.packbits(blocks != 0, axis=-1, bitorder="little")
        self._words().view(np.uint8)[..., :octets.shape[-1]] = octets
        if index is None or bits is None or not len(index):
            return
        sizes = (m.batch, m.heads, m.q_blocks)
        line = np.ravel_multi_index(tuple(index[:, :3].T), sizes)
        first = np.zeros(np.prod(sizes) + 1, np.int64)
        first[1:] = np.cumsum(np.bincount(line, minlength=len(first) - 1))
        words = np.zeros((len(index), block_q, 4 * -(-block_k // 32)), np.uint8)
        words[..., :bits.shape[2]] = bits
        m.partial_block = _owned(index[:, 3].astype(np.int32), "int32_t *")
        m.partial_bits = _owned(words, "uint32_t *")
        m.partial_first = _owned(first, "int64_t *")

    def _rows(self) -> Iterator[tuple[Row, NDArray[np.uint32]]]:
        """The pairs of each row of blocks, [block_q, ceil(k_len / 32)], in memory that is used
        again."""
        m = self._mask
        pairs = np.empty((self.block[0], -(-self.k_len // 32)), np.uint32)
        for row in np.ndindex(m.batch, m.heads, m.q_blocks):
            lib.sparge_mask_get_row(m, self._problem, self._options, *row,
                                    ffi.cast("uint32_t *", pairs.ctypes.data))
            yield row, pairs

    def _set_row(self, row: Row, pairs: NDArray[np.uint32]) -> None:
        """Of an empty mask, in the order of _rows()."""
        call(lib.sparge_mask_set_row, self._mask, self._problem, self._options, *row,
             ffi.cast("uint32_t *", pairs.ctypes.data))


# ---- Arrays ----


def read_bools(name: str, x: Any, axes: str) -> tuple[NDArray[Any], bool]:
    """bool or uint8 [B, H, *axes], [H, *axes] or [*axes] with all four axes, and had it that of
    batches? Of numpy or torch."""
    x = host(name, x)
    if x.dtype not in (np.bool_, np.uint8):
        raise TypeError(f"{name} is {x.dtype}, it must be bool or uint8")
    if not 2 <= x.ndim <= 4:
        raise ValueError(f"{name} has the shape {list(x.shape)}, it must be [B, H, {axes}], "
                         f"[H, {axes}] or [{axes}]")
    return x.reshape((1, ) * (4 - x.ndim) + x.shape), x.ndim == 4


def _made_of(blocks: Bools, index: NDArray[np.int64], bits: NDArray[np.uint8],
             sizes: Any) -> BlockMask:
    """A mask of what __reduce__() gives."""
    mask = BlockMask._empty(blocks.shape[:2], *sizes)
    mask._fill(blocks, index, bits)
    return mask


def _view(pointer: Any, dtype: Any, shape: Sequence[int]) -> NDArray[Any]:
    """Memory of the library as an array."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer(ffi.buffer(pointer, size), dtype).reshape(shape) if size else np.empty(
        shape, dtype)


def _owned(x: NDArray[Any], kind: str) -> Any:
    """A copy in memory that sparge_mask_free frees."""
    to = lib.malloc(x.nbytes)
    if not to:
        raise MemoryError(f"no memory for {x.nbytes} bytes of a mask")
    ffi.memmove(to, ffi.from_buffer(x), x.nbytes)
    return ffi.cast(kind, to)
