"""Models and metrics: what an entry, a dictionary and a namespace are bound to."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Optional, Sequence, Tuple

import numpy as np
import numpy.typing as npt

from ._call import Handle, Owner, text
from ._files import Path, encoded
from ._native import ffi, lib
from .geometry import STYLES, Rope, index_of


@dataclass(frozen=True)
class ModelLayer:
    """One layer, as far as its cache is concerned."""

    kv_heads: int        # 0: not known
    head_dim_k: int      # 0: the layer has no cache
    head_dim_v: int
    rope: Optional[int]  # index into Model.ropes
    window: int          # tokens that its attention reaches back (sliding window); 0: all


class Model(Owner):
    """Facts about the model that made a cache."""

    def __init__(self, handle: Handle) -> None:
        self._handle = handle

    @classmethod
    def from_gguf(cls, path: Path, *, fingerprint: Optional[bytes] = None, base: float = 0.0, linear_scale: float = 0.0,
                  dims: int = 0, style: Optional[str] = None, context: int = 0,
                  freq_factors: Optional[Sequence[float]] = None) -> Model:
        """Of a GGUF file, whose header is enough. The other arguments replace what the file says of RoPE;
        `fingerprint` [16 bytes] replaces the hash of its header, which does not cover weights."""
        options, keep = _rope_options(base, linear_scale, dims, style, 0, context, freq_factors)
        model = cls(Handle("xkv_model", lib.xkv_model_from_gguf, (encoded(path), options), lib.xkv_model_free, keep))
        return model._named(fingerprint)

    @classmethod
    def of_layers(cls, layers: int, head_dim: int, *, base: float, dims: int = 0, style: str = "half-split",
                  linear_scale: float = 0.0, freq_factors: Optional[Sequence[float]] = None,
                  fingerprint: Optional[bytes] = None) -> Model:
        """Of `layers` equal layers. dims: rotated dims per head, 0: all."""
        options, keep = _rope_options(base, linear_scale, dims or head_dim, style, head_dim, 0, freq_factors)
        model = cls(Handle("xkv_model", lib.xkv_model_from_options, (layers, options), lib.xkv_model_free, keep))
        return model._named(fingerprint)

    def _named(self, fingerprint: Optional[bytes]) -> Model:
        if fingerprint is not None:
            if len(fingerprint) != 16:
                raise ValueError(f"fingerprint: {len(fingerprint)} bytes, expected 16")
            ffi.memmove(self.pointer.fingerprint, fingerprint, 16)
            self.pointer.has_fingerprint = 1
        return self

    def __enter__(self) -> Model:
        return self

    def __repr__(self) -> str:
        name = self.name or self.architecture or "unnamed"
        mark = self.fingerprint.hex() if self.fingerprint else "no fingerprint"
        return f"<xkv.Model {name}, {len(self.layers)} layers, {mark}>"

    @property
    def pointer(self) -> Any:
        """xkv_model *"""
        return self._handle.pointer

    @property
    def fingerprint(self) -> Optional[bytes]:
        """16 bytes; None when unknown."""
        return bytes(ffi.buffer(self.pointer.fingerprint)) if self.pointer.has_fingerprint else None

    @property
    def architecture(self) -> str:
        return text(self.pointer.architecture)

    @property
    def name(self) -> str:
        return text(self.pointer.name)

    @property
    def latent_dim(self) -> int:
        """MLA: elements of the latent in a K row; else 0."""
        return int(self.pointer.latent_dim)

    @property
    def layers(self) -> Tuple[ModelLayer, ...]:
        out = []
        for i in range(self.pointer.layer_count):
            layer = self.pointer.layers[i]
            rope = None if layer.rope == lib.XKV_NO_ROPE else layer.rope
            out.append(ModelLayer(layer.kv_heads, layer.head_dim_k, layer.head_dim_v, rope, layer.window))
        return tuple(out)

    @property
    def ropes(self) -> Tuple[Rope, ...]:
        return tuple(Rope.from_c(self.pointer.ropes[i]) for i in range(self.pointer.rope_count))


def _rope_options(base: float, linear_scale: float, dims: int, style: Optional[str], head_dim: int, context: int,
                  freq_factors: Optional[Sequence[float]]) -> Tuple[Any, Tuple[object, ...]]:
    o = ffi.new("xkv_rope_options *", lib.xkv_rope_options_default())
    o.base, o.linear_scale, o.dims, o.head_dim, o.context = base, linear_scale, dims, head_dim, context
    if style is not None:
        o.style = index_of(STYLES, style, "style")
    if freq_factors is None:
        return o, ()
    factors = np.ascontiguousarray(freq_factors, np.float64)
    if factors.shape != (dims // 2,):
        raise ValueError(f"freq_factors: shape {factors.shape}, expected ({dims // 2},): half of dims")
    o.freq_factors = ffi.cast("double *", factors.ctypes.data)
    return o, (factors,)


class Metric:
    """What errors cost: e^T M e for an error e of one head's row, K before RoPE.

    k, v: [layers, heads, head_dim, head_dim] float32, each block symmetric."""

    def __init__(self, k: npt.ArrayLike, v: npt.ArrayLike) -> None:
        self.k = np.ascontiguousarray(k, np.float32)
        self.v = np.ascontiguousarray(v, np.float32)
        if self.k.ndim != 4 or self.k.shape != self.v.shape or self.k.shape[2] != self.k.shape[3]:
            raise ValueError(f"k {self.k.shape}, v {self.v.shape}: expected [layers, heads, head_dim, head_dim] of both")
        self.pointer = ffi.new("xkv_metric *")
        self.pointer.layers, self.pointer.heads, self.pointer.head_dim = self.k.shape[:3]
        self.pointer.k = ffi.cast("float *", self.k.ctypes.data)
        self.pointer.v = ffi.cast("float *", self.v.ctypes.data)

    @classmethod
    def open(cls, path: Path) -> Metric:
        """Of a safetensors file with k_metric and v_metric; others in it are ignored."""
        handle = Handle("xkv_metric", lib.xkv_metric_open, (encoded(path),), lib.xkv_metric_free)
        m = handle.pointer
        shape = m.layers, m.heads, m.head_dim, m.head_dim
        size = 4 * m.layers * m.heads * m.head_dim * m.head_dim
        k, v = (np.frombuffer(ffi.buffer(p, size), np.float32).reshape(shape).copy() for p in (m.k, m.v))
        handle.close()
        return cls(k, v)
