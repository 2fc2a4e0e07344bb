"""LMCache's objects: the KV of a chunk of tokens in all layers, as one piece of memory."""
from __future__ import annotations

from typing import Any, List, Tuple

import numpy as np

from .._arrays import Array
from .._page_store import At
from ..geometry import NUMPY_TYPES, Plane, index_of


class Objects:
    """[2, layers, tokens, heads * head_dim], K then V (LMCache's KV_2LTD); of MLA [1, layers, tokens, width] (KV_MLA_FMT)."""

    def __init__(self, layers: int, heads: int, head_dim: int, dtype: str, mla_latent: int = 0) -> None:
        index_of(tuple(NUMPY_TYPES), dtype, "dtype")
        if min(layers, heads, head_dim) < 1 or not 0 <= mla_latent < head_dim or (mla_latent and heads != 1):
            raise ValueError(f"layers {layers}, heads {heads}, head_dim {head_dim}, mla_latent {mla_latent}: no such cache")
        self._type, self._layers, self._split = NUMPY_TYPES[dtype], layers, mla_latent
        self._kinds, self._width = (1 if mla_latent else 2), heads * head_dim
        parts = [("K", head_dim), ("V", head_dim)]
        if mla_latent:
            parts = [("latent", mla_latent), ("K-rope", head_dim - mla_latent)]
        self.planes = [Plane(layer, kind, heads, dims, dtype) for layer in range(layers) for kind, dims in parts]
        self.settings = f"dtype={dtype} layers={layers} heads={heads} head_dim={head_dim} latent={mla_latent}"

    def of(self, memory: Any) -> Tuple[int, At]:
        """Tokens of an object, and its planes where they lie. ValueError: it has another size."""
        array = np.frombuffer(memory, self._type)
        row = self._kinds * self._layers * self._width
        if array.size == 0 or array.size % row:
            raise ValueError(f"an object of {array.nbytes} bytes is not the KV of {self.settings}: another group of layers, "
                             "another kind of state, or bytes of a serde")
        shaped = array.reshape(self._kinds, self._layers, -1, self._width)
        return shaped.shape[2], lambda _table: self._arrays(shaped)

    def _arrays(self, shaped: Array) -> List[Array]:
        if self._split:
            return [part for layer in shaped[0] for part in (layer[:, :self._split], layer[:, self._split:])]
        return [shaped[kind, layer] for layer in range(self._layers) for kind in range(2)]
