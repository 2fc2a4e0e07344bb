"""Reader of llama.cpp sequence files (state version 3, plain attention), independent of the C code under test."""
import struct

import numpy as np

F32, F16, BF16 = 0, 1, 30
STORAGE = {F32: np.dtype("<f4"), F16: np.dtype("<f2"), BF16: np.dtype("<u2")}


class Plane:
    """K or V of one layer: a [tokens, width] view into the file's bytes."""

    def __init__(self, values, ggml_type):
        self.values, self.ggml_type = values, ggml_type

    def get(self):
        if self.ggml_type == BF16:
            return (self.values.astype(np.uint32) << 16).view(np.float32)
        return self.values.astype(np.float32)

    def set(self, rows):
        if self.ggml_type == BF16:  # to nearest, ties to even
            bits = np.ascontiguousarray(rows, np.float32).view(np.uint32)
            rows = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
        self.values[...] = rows.astype(self.values.dtype)


class SequenceFile:
    """`K` and `V` are lists of planes, one a layer; writing to a plane changes `image`."""

    def __init__(self, path):
        self.image = bytearray(path.read_bytes())
        self.offset = 0
        magic, version, token_count = self._take("<III")
        assert (magic, version) == (0x67677371, 3), (hex(magic), version)
        self.tokens = list(self._take(f"<{token_count}i"))
        streams, self.cells = self._take("<II")
        assert streams == 1
        self.positions = np.array([self._take("<iIi")[0] for _ in range(self.cells)])
        self.transposed, layers = self._take("<II")
        self.K = [self._token_major() for _ in range(layers)]
        self.V = [self._dim_major() if self.transposed else self._token_major() for _ in range(layers)]
        assert self.offset == len(self.image), "bytes left over"

    def _take(self, layout):
        values = struct.unpack_from(layout, self.image, self.offset)
        self.offset += struct.calcsize(layout)
        return values

    def _array(self, ggml_type, shape):
        values = np.frombuffer(self.image, STORAGE[ggml_type], shape[0] * shape[1], self.offset).reshape(shape)
        self.offset += values.nbytes
        return values

    def _token_major(self):
        ggml_type, row_size = self._take("<iQ")
        return Plane(self._array(ggml_type, (self.cells, row_size // STORAGE[ggml_type].itemsize)), ggml_type)

    def _dim_major(self):
        ggml_type, _, width = self._take("<iII")
        return Plane(self._array(ggml_type, (width, self.cells)).T, ggml_type)
