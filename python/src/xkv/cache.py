"""Caches: engine files, and planes in the caller's memory."""
from __future__ import annotations

from typing import Any, List, Optional, Sequence, Tuple, Union

import numpy as np

from ._arrays import Array, Views, as_array
from ._call import Handle, Owner, text
from ._files import Path, Readable, encoded
from ._native import ffi, lib
from .geometry import NUMPY_TYPES, Geometry, Plane, Rope, Tokens, int32_array
from .model import Model
from .pages import Pages, PageViews


class Cache(Owner):
    """A cache in an engine's file: a llama.cpp sequence file, a server's slot file, safetensors."""

    def __init__(self, handle: Handle, model: Optional[Model]) -> None:
        self._handle, self.model = handle, model
        self.geometry = Geometry.from_c(lib.xkv_cache_geometry(handle.pointer))

    @classmethod
    def open(cls, source: Union[Path, Readable], model: Optional[Model] = None, name: str = "memory") -> Cache:
        """A file, which is mapped, or its bytes, which are not copied and must not change. With the model K is coded
        before RoPE, which is better by far. A file that is not understood opens as `engine` "opaque"."""
        pointer = model.pointer if model else ffi.NULL
        if isinstance(source, (bytes, bytearray, memoryview)):
            data = ffi.from_buffer("uint8_t[]", source)
            arguments: Tuple[Any, ...] = (data, len(data), name.encode(), pointer)
            return cls(Handle("xkv_cache", lib.xkv_cache_from_memory, arguments, lib.xkv_cache_free, (data,)), model)
        return cls(Handle("xkv_cache", lib.xkv_cache_open, (encoded(source), pointer), lib.xkv_cache_free), model)

    def __enter__(self) -> Cache:
        return self

    def __repr__(self) -> str:
        return f"<xkv.Cache {self.engine}, {len(self.geometry.planes)} planes, {self.geometry.tokens} tokens>"

    @property
    def pointer(self) -> Any:
        """xkv_cache *"""
        return self._handle.pointer

    @property
    def engine(self) -> str:
        """What kind of file it is."""
        return text(lib.xkv_engine_name(lib.xkv_cache_framing(self.pointer).engine))

    @property
    def data(self) -> memoryview:
        """The whole file, read-only; valid until close()."""
        size = ffi.new("uint64_t *")
        data = lib.xkv_cache_data(self.pointer, size)
        return memoryview(ffi.buffer(data, size[0])).toreadonly()

    def plane(self, index: int) -> Array:
        """A copy of a plane: [tokens, heads, head_dim], rows in order of position; bf16 as uint16."""
        plane, view = self.geometry.planes[index], lib.xkv_cache_views(self.pointer)[index]
        tokens = self.geometry.tokens
        if plane.dtype not in NUMPY_TYPES:
            raise ValueError(f"{plane.kind} of layer {plane.layer} is in blocks of {plane.dtype}: pack and read it")
        rows = np.frombuffer(ffi.buffer(view.rows, 4 * tokens), np.uint32) if view.rows and tokens else np.arange(tokens)
        start = lib.xkv_cache_data(self.pointer, ffi.new("uint64_t *"))
        offset = int(ffi.cast("uintptr_t", view.data)) - int(ffi.cast("uintptr_t", start))
        in_file = np.ndarray((int(rows.max(initial=-1)) + 1, plane.heads, plane.head_dim),
                             NUMPY_TYPES[plane.dtype], self.data, offset,
                             (view.token_stride, view.head_stride, view.dim_stride))
        return in_file[rows]


class Planes:
    """Planes in the caller's memory, with their geometry: the form of a cache that is not a file."""

    def __init__(self, geometry: Geometry, arrays: Sequence[Any], rows: Optional[Any] = None) -> None:
        """arrays[i]: plane i, [tokens, heads, head_dim] or [tokens, width], of any strides; read where they lie.
        rows: [tokens] where the tokens are in each array. Or arrays are Pages: the tensors of a paged cache."""
        self.geometry, self.arrays = geometry, list(arrays)
        self.views: Union[Views, PageViews]
        if arrays and all(isinstance(pages, Pages) for pages in arrays):
            self.views = PageViews(geometry, arrays, 0, geometry.tokens)
        else:
            self.views = Views(geometry, arrays, geometry.tokens, rows)

    @classmethod
    def of_layers(cls, layers: Sequence[Tuple[Any, Any]], *, model: Optional[Model] = None,
                  ropes: Sequence[Rope] = (), positions: Optional[Tokens] = None,
                  token_ids: Tokens = (), rows: Optional[Any] = None) -> Planes:
        """layers[i]: (keys after RoPE, values), each [tokens, kv_heads, head_dim].

        RoPE is the model's, or `ropes`: one for all layers, or one for each. Without any of them K is coded as it is.
        positions: 0, 1, ... unless given. With `rows`, positions are required: they tell how many tokens there are."""
        if model is not None and (ropes or len(model.layers) != len(layers)):
            raise ValueError(f"{len(layers)} layers; the model has {len(model.layers)}, and its RoPE is not replaced")
        if len(ropes) not in (0, 1, len(layers)):
            raise ValueError(f"{len(ropes)} ropes for {len(layers)} layers")
        if rows is not None and positions is None:
            raise ValueError("with rows, positions are required")
        planes: List[Plane] = []
        arrays: List[Any] = []
        for i, layer in enumerate(layers):
            rope = model.layers[i].rope if model else (i if len(ropes) > 1 else 0) if ropes else None
            for kind, data in zip("KV", layer):
                array, dtype = as_array(data)
                if array.ndim != 3:
                    raise ValueError(f"{kind} of layer {i}: shape {array.shape}, expected [tokens, heads, head_dim]")
                planes.append(Plane(i, kind, array.shape[1], array.shape[2], dtype, rope if kind == "K" else None))
                arrays.append(data)
        if positions is None:
            positions = range(as_array(arrays[0])[0].shape[0] if arrays else 0)
        geometry = Geometry(tuple(planes), model.ropes if model else tuple(ropes),
                            int32_array(list(positions) if isinstance(positions, range) else positions, "positions"),
                            int32_array(token_ids, "token_ids"))
        return cls(geometry, arrays, rows)
