"""Rows of 32 numbers and what ggml's reference code quantizes them to, for tests/unit/test_blocks.c.

    make_blocks.py OUT [--count N] [--ggml libggml-base.so]

One line a block: type, 32 f32 as their bits, the bytes of the block (all in hexadecimal). blocks.txt was made without
--ggml, by the lines below, which follow quantize_row_q8_0_ref() and quantize_row_q4_0_ref() operation by operation in
f32. With --ggml a real engine's library makes the blocks of the same numbers: tests/engine compares the two.
"""

import argparse
import ctypes
from pathlib import Path

import numpy as np

F32 = np.float32


def q8_0(x: np.ndarray) -> bytes:
    d = np.abs(x).max() / F32(127)
    v = x * (F32(1) / d if d else F32(0))
    q = np.trunc(v.astype(np.float64) + np.copysign(0.5, v))  # halves away from zero; exact in f64
    return np.float16(d).tobytes() + q.astype(np.int8).tobytes()


def q4_0(x: np.ndarray) -> bytes:
    d = (F32(0) if not x.any() else x[np.abs(x).argmax()]) / F32(-8)  # the first of several largest
    v = x * (F32(1) / d if d else F32(0)) + F32(8.5)
    q = np.minimum(v.astype(np.int8), 15).astype(np.uint8)
    return np.float16(d).tobytes() + (q[:16] | q[16:] << 4).tobytes()


def from_ggml(path: Path, name: str, size: int):
    function = getattr(ctypes.CDLL(str(path)), f"quantize_row_{name}_ref")

    def quantize(x: np.ndarray) -> bytes:
        block = ctypes.create_string_buffer(size)
        function(x.ctypes.data_as(ctypes.c_void_p), block, ctypes.c_int64(32))
        return block.raw

    return quantize


def numbers(count: int) -> list[np.ndarray]:
    """Noise of many sizes, and blocks that are hard to round: ties, equal magnitudes, zeros, scales that are subnormal
    or vanish as f16. NaN, infinities and scales beyond f16 are left out: ggml does not define them."""
    random = np.random.default_rng(7)
    steps = np.arange(32, dtype=F32)
    rows = [
        np.zeros(32),
        -np.zeros(32),
        steps - 16,
        16 - steps,
        np.where(steps % 2 == 0, 1, -1),
        np.where(steps % 2 == 0, -1, 1),
        np.append([127], (steps[:31] - 15) * 2.5),  # q8_0: halves
        np.append([-127], (steps[:31] - 15) * 0.5),
        np.append([-8], (steps[:31] - 15) * 0.5),  # q4_0: halves
        np.append([8], (steps[:31] - 15) * 0.5),
        np.append(np.zeros(31), [3.25]),
        np.append(np.zeros(31), [-3.25]),
        (steps - 11) * 2.0**-24,
        (steps - 11) * 2.0**-31,
        (steps - 11) * 2.0**-120,
        (steps - 20) * 2.0**14,
    ]
    while len(rows) < count:
        rows.append(random.standard_normal(32) * 2.0 ** random.integers(-22, 16))
    return [np.asarray(row, F32) for row in rows[:count]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=28)
    parser.add_argument("--ggml", type=Path)
    options = parser.parse_args()
    quantizers = {"q8_0": q8_0, "q4_0": q4_0}
    if options.ggml:
        quantizers = {name: from_ggml(options.ggml, name, size) for name, size in (("q8_0", 34), ("q4_0", 18))}
    with options.out.open("w") as out:
        for name, quantize in quantizers.items():
            for row in numbers(options.count):
                bits = " ".join(f"{b:08x}" for b in row.view(np.uint32))
                print(name, bits, quantize(row).hex(), file=out)


if __name__ == "__main__":
    main()
