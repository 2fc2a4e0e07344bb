"""Arrays of the caller as views: numpy, anything with __dlpack__ (torch, jax, cupy's host arrays, ...), or with the
buffer protocol. Nothing is copied; strides and read-only memory are fine."""
from __future__ import annotations

from typing import Any, List, Optional, Sequence, Tuple

import numpy as np
import numpy.typing as npt

from ._native import ffi
from .geometry import DTYPES, NUMPY_TYPES, Geometry, Plane

_HOST_DEVICES = (1, 3, 11, 13)  # DLPack: CPU; memory of CUDA, ROCm and oneAPI that the host can use (pinned, shared)

Array = npt.NDArray[Any]


def as_array(data: Any) -> Tuple[Array, str]:
    """A numpy array over the memory of `data`, and its type: "f32", "f16" or "bf16" (as uint16).

    TypeError: it lies on a device, or has elements of another type."""
    _refuse_device(data)
    if not isinstance(data, np.ndarray):
        data = _host_array(data)
    name = data.dtype.name
    if name == "bfloat16":  # ml_dtypes
        data = data.view(np.uint16)
    for dtype, numpy_type in NUMPY_TYPES.items():
        if data.dtype == numpy_type:
            return data, dtype
    raise TypeError(f"elements of type {name}; expected float32, float16 or bfloat16 (or its bits as uint16)")


def _refuse_device(data: Any) -> None:
    where = getattr(data, "__dlpack_device__", None)
    if where is not None and not isinstance(data, np.ndarray) and int(where()[0]) not in _HOST_DEVICES:
        device = getattr(data, "device", None) or f"a device of DLPack type {int(where()[0])}"
        raise TypeError(f"the tensor is on {device}; xkv reads and writes host memory: pass tensor.cpu(), "
                        "or copy into it afterwards")


def _host_array(data: Any) -> Array:
    if str(getattr(data, "dtype", "")) == "torch.bfloat16":  # which numpy's DLPack does not know
        import torch
        return np.asarray(data.detach().view(torch.int16).numpy()).view(np.uint16)
    if hasattr(data, "detach"):  # torch: one that requires a gradient is read like any other
        return np.asarray(data.detach().numpy())
    if hasattr(data, "__array__") or not hasattr(data, "__dlpack__"):
        return np.asarray(data)
    return np.asarray(np.from_dlpack(data))


def shaped(array: Array, plane: Plane, what: str) -> Array:
    """[tokens, heads, head_dim] of an array of that shape or [tokens, heads * head_dim]; never a copy."""
    if array.ndim == 2 and array.shape[1] == plane.heads * plane.head_dim:
        split = array.strides[1] * plane.head_dim, array.strides[1]
        return np.lib.stride_tricks.as_strided(array, (array.shape[0], plane.heads, plane.head_dim),
                                               (array.strides[0], *split), writeable=array.flags.writeable)
    if array.ndim != 3 or array.shape[1:] != (plane.heads, plane.head_dim):
        raise ValueError(f"{what}: shape {array.shape}, expected (tokens, {plane.heads}, {plane.head_dim})")
    return array


class Views:
    """xkv_view[plane_count] over arrays of the caller, which are kept.

    `arrays[i]` belongs to plane i of `geometry`; None leaves the plane out, which the caller of the C function must
    know to be unused. `tokens` rows are used: the first ones, or those at `rows` [tokens]."""

    def __init__(self, geometry: Geometry, arrays: Sequence[Any], tokens: int, rows: Optional[Any] = None,
                 writable: bool = False) -> None:
        if len(arrays) != len(geometry.planes):
            raise ValueError(f"{len(arrays)} arrays for {len(geometry.planes)} planes")
        self.keep: List[object] = []
        self.pointer = ffi.new("xkv_view[]", max(len(arrays), 1))
        self._rows, self._least = self._row_index(rows, tokens)
        for i, (plane, data) in enumerate(zip(geometry.planes, arrays)):
            if data is not None:
                self._set(self.pointer[i], plane, data, writable)

    def _row_index(self, rows: Optional[Any], tokens: int) -> Tuple[Any, int]:
        if rows is None:
            return ffi.NULL, tokens
        index = np.asarray(rows)
        if index.shape != (tokens,) or index.dtype.kind not in "iu" or (tokens and int(index.min()) < 0):
            raise ValueError(f"rows: shape {index.shape} of {index.dtype}, expected {tokens} integers from 0 on")
        least = int(index.max()) + 1 if tokens else 0
        if least > 0xFFFFFFFF:
            raise ValueError(f"rows: {least - 1} does not fit 32 bits")
        index = np.ascontiguousarray(index, np.uint32)
        self.keep.append(index)
        return ffi.cast("uint32_t *", index.ctypes.data), least

    def _set(self, view: Any, plane: Plane, data: Any, writable: bool) -> None:
        what = f"{plane.kind} of layer {plane.layer}"
        array, dtype = as_array(data)
        array = shaped(array, plane, what)
        if array.shape[0] < self._least:
            raise ValueError(f"{what}: {array.shape[0]} rows, {self._least} needed")
        if writable and not array.flags.writeable:
            raise ValueError(f"{what}: the array is read-only")
        view.data = ffi.cast("void *", array.ctypes.data)
        view.token_stride, view.head_stride, view.dim_stride = array.strides
        view.rows, view.dtype = self._rows, DTYPES.index(dtype)
        self.keep.append(array)


def empty_planes(geometry: Geometry, wanted: Sequence[bool], tokens: int, dtype: Optional[str]) -> List[Optional[Array]]:
    """New arrays [tokens, heads, head_dim] for the wanted planes, in their own type (blocks: in f32) or in `dtype`."""
    return [np.empty((tokens, plane.heads, plane.head_dim), NUMPY_TYPES.get(dtype or plane.dtype, np.dtype(np.float32)))
            if want else None for plane, want in zip(geometry.planes, wanted)]
