"""Attention over an entry without restoring it, for when memory is short."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Optional, Sequence, Tuple

import numpy as np
import numpy.typing as npt

from ._arrays import as_array
from ._call import Handle, Owner, call
from ._files import Span, span
from ._native import ffi, lib
from ._structs import record
from .entry import Entry
from .geometry import Tokens, index_of, int32_array, pointer_to

HOLDS = ("auto", "nothing", "coefficients", "rows")

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class AttentionInfo:
    """What an attention holds."""

    hold: str          # "nothing", "coefficients", "rows"
    token_count: int
    first_layer: int
    layer_count: int
    held_bytes: int


class Attention(Owner):
    """Rows and layers of an entry, ready to be attended to. May be used by several threads at once."""

    def __init__(self, entry: Entry, tokens: Span = None, layers: Span = None, *, positions: Optional[Tokens] = None,
                 hold: str = "auto", calls: int = 0, memory: int = 0) -> None:
        """tokens, layers: all, a number of leading ones, a slice or a range. positions: [tokens] that K is rotated for.

        hold: what stays in memory between calls: "nothing" (each call decodes), "coefficients", "rows", or "auto": the
        fastest for `calls` calls a layer (0: many) within `memory` bytes (0: any number)."""
        o = ffi.new("xkv_attention_options *", lib.xkv_attention_options_default())
        o.first_token, o.token_count = span(tokens, entry.geometry.tokens, "tokens")
        o.first_layer, o.layer_count = span(layers, entry.geometry.layers, "layers")
        at = int32_array(positions, "positions") if positions is not None else None
        if at is not None:
            if len(at) != o.token_count:
                raise ValueError(f"positions: {len(at)}, expected {o.token_count}")
            o.positions = pointer_to(at)
        o.hold, o.calls, o.memory = index_of(HOLDS, hold, "hold"), calls, memory
        self.geometry = entry.geometry
        self._handle = Handle("xkv_attention", lib.xkv_attention_open, (entry.entry_pointer, o), lib.xkv_attention_close,
                              (entry,))

    def __enter__(self) -> Attention:
        return self

    @property
    def info(self) -> AttentionInfo:
        info = ffi.new("xkv_attention_info *")
        lib.xkv_attention_get_info(self._handle.pointer, info)
        return record(AttentionInfo, info, hold=HOLDS[info.hold])

    def attend(self, layer: int, queries: Any, *, positions: Optional[Tokens] = None, causal: bool = False, window: int = 0,
               scale: float = 0.0, softcap: float = 0.0, rebuild: bool = False) -> Tuple[Floats, Floats]:
        """softmax(scale * Q K^T) V of one layer: output [count, heads, head_dim of V] and the logarithms of the sums of
        exp(score), lse [count, heads], for merge().

        queries: float32 [count, heads, head_dim of K] after RoPE; heads: a multiple of the KV heads. MLA: in absorbed form,
        [count, heads, latent_dim + rope_dim]; output is [count, heads, latent_dim], and scale is required.
        positions: [count] of the queries, for causal: then a query sees rows whose position is at most its own, and with a
        window only those fewer than so many before it. scale: 0: 1 / sqrt(head_dim). rebuild: rebuild V too."""
        array, dtype = as_array(queries)
        width, out_width = self._widths(layer)
        if dtype != "f32" or array.ndim != 3 or array.shape[2] != width:
            raise ValueError(f"queries: {dtype} of shape {array.shape}, expected f32 of (count, heads, {width})")
        if array.strides[2] != 4:
            array = np.ascontiguousarray(array)
        q = ffi.new("xkv_queries *")
        q.data, q.count, q.heads = ffi.cast("void *", array.ctypes.data), array.shape[0], array.shape[1]
        q.query_stride, q.head_stride = array.strides[0], array.strides[1]
        at = int32_array(positions, "positions") if positions is not None else None
        if at is not None:
            if len(at) != array.shape[0]:
                raise ValueError(f"positions: {len(at)}, expected {array.shape[0]}")
            q.positions = pointer_to(at)
        o = ffi.new("xkv_attend_options *", lib.xkv_attend_options_default())
        o.causal, o.window, o.scale, o.softcap, o.rebuild = causal, window, scale, softcap, rebuild
        output, lse = np.empty((*array.shape[:2], out_width), np.float32), np.empty(array.shape[:2], np.float32)
        call(lib.xkv_attend, self._handle.pointer, layer, q, o, _floats(output), _floats(lse))
        return output, lse

    def _widths(self, layer: int) -> Tuple[int, int]:
        """Elements of a query's head, and of an output's."""
        planes = {plane.kind: plane.head_dim for plane in self.geometry.planes if plane.layer == layer}
        if "latent" in planes:
            return planes["latent"] + planes.get("K-rope", 0), planes["latent"]
        if "K" not in planes or "V" not in planes:
            raise ValueError(f"layer {layer} has no keys and values")
        return planes["K"], planes["V"]


def merge(states: Sequence[Tuple[Any, Any]]) -> Tuple[Floats, Floats]:
    """Attention over all rows from that over parts of them: (output [..., dim], lse [...]) of each part, of one shape."""
    outputs = [np.ascontiguousarray(output, np.float32) for output, _ in states]
    sums = [np.ascontiguousarray(lse, np.float32) for _, lse in states]
    if not states or any(a.shape != outputs[0].shape or b.shape != outputs[0].shape[:-1] for a, b in zip(outputs, sums)):
        raise ValueError("states: expected at least one, and all of one shape: output [..., dim], lse [...]")
    c = ffi.new("xkv_attention_state[]", len(states))
    for state, output, lse in zip(c, outputs, sums):
        state.output, state.lse = _floats(output), _floats(lse)
    output, lse = np.empty_like(outputs[0]), np.empty_like(sums[0])
    lib.xkv_attention_merge(c, len(states), lse.size, output.shape[-1], _floats(output), _floats(lse))
    return output, lse


def _floats(array: Floats) -> Any:
    return ffi.cast("float *", array.ctypes.data)
