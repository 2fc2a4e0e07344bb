"""Paged caches of serving engines: tensors whose axes are named, and the block table of a sequence."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any, List, Sequence, Tuple

from ._arrays import as_array
from ._call import Handle
from ._native import ffi, lib
from .geometry import DTYPES, KINDS, Geometry, Tokens, index_of, int32_array, pointer_to


@dataclass(frozen=True, eq=False)
class Pages:
    """One tensor of an engine's paged cache, which holds some kinds of planes of some layers. Nothing is copied.

    axes names the tensor's axes from the slowest to the fastest: L layers, K kinds, B blocks, N slots of a block, H heads,
    D dims of a head, X the fastest dims of a head (D then counts groups of them), C the dims of all kinds one behind the
    other, instead of K and D. L, K, N, H may be left out where there is one of it. As "KBNHD" for vLLM up to 0.25 with
    FlashAttention, "BNHD" for SGLang's K buffer of a layer; see xkv_pages in <xkv/format.h>."""

    tensor: Any
    axes: str
    table: Tokens                       # blocks of the sequence: token t is in slot t % N of block table[t // N]
    kinds: Tuple[str, ...] = ("K", "V")  # in the order of axis K or C
    first_layer: int = 0


def check_page_tokens(who: str, tokens: int) -> None:
    """ValueError: pages, or blocks, of more tokens than PageViews can have."""
    if not 1 <= tokens <= lib.XKV_MAX_BLOCK_TOKENS:
        raise ValueError(f"{who}: pages of {tokens} tokens are not supported: at most {lib.XKV_MAX_BLOCK_TOKENS}")


class PageViews:
    """xkv_view[plane_count] of tokens [first, first + count) of a sequence in pages, which are kept."""

    def __init__(self, geometry: Geometry, pages: Sequence[Pages], first: int, count: int, writable: bool = False) -> None:
        self.keep: List[object] = []
        tensors = ffi.new("xkv_pages[]", max(len(pages), 1))
        for c, page in zip(tensors, pages):
            self._set(c, page, writable)
        g, kept = geometry.to_c()
        self._handle = Handle("xkv_view", lib.xkv_views_from_pages, (g, tensors, len(pages), first, count), lib.xkv_views_free,
                              (pages, kept))

    @property
    def pointer(self) -> Any:
        return self._handle.pointer

    def _set(self, c: Any, page: Pages, writable: bool) -> None:
        array, dtype = as_array(page.tensor)
        if array.ndim != len(page.axes):
            raise ValueError(f"axes {page.axes!r} for a tensor of shape {array.shape}")
        if writable and not array.flags.writeable:
            raise ValueError("the pages are read-only")
        if not 1 <= len(page.kinds) <= 4:
            raise ValueError(f"kinds: {len(page.kinds)}, expected 1 to 4")
        sizes = dict(zip(page.axes, array.shape))
        strides, table = ffi.new("int64_t[]", list(array.strides)), int32_array(page.table, "table")
        axes = ffi.new("char[]", page.axes.encode())
        c.data, c.axes, c.strides = ffi.cast("void *", array.ctypes.data), axes, strides
        # From the first element to the end of the last one: strides must not be negative, which the library checks.
        c.size = array.itemsize + sum((n - 1) * abs(s) for n, s in zip(array.shape, array.strides)) if array.size else 0
        c.dtype, c.first_layer, c.layer_count = DTYPES.index(dtype), page.first_layer, sizes.get("L", 1)
        c.block_count, c.block_tokens, c.dim_split = sizes.get("B", 0), sizes.get("N", 1), sizes.get("X", 0)
        for i, kind in enumerate(page.kinds):
            c.kinds[i] = index_of(KINDS, kind, "kinds")
        c.kind_count = len(page.kinds)
        c.table, c.table_size = pointer_to(table), len(table)
        self.keep += [array, strides, axes, table]
        if "K" in sizes and sizes["K"] != len(page.kinds):
            raise ValueError(f"axis K of {sizes['K']} for {len(page.kinds)} kinds")
