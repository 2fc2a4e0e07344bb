#!/usr/bin/env python3
"""A second, independent, plain decoder of xkv entries, written from spec/ alone.

Needs numpy and, from PyPI, zstandard and xxhash. It proves that the specification is complete and makes the expected
files of tests/golden; it is no tool for users: xkv-unpack is faster by orders of magnitude.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from codec import STORED_DTYPE, Dictionary, decode_group, from_blocks, rans_decode
from container import BLOCK_SIZE, KIND_ENTRY, LOSSLESS, Refused, read_container, require, xxh128

KIND_NAMES = ("K", "V", "latent", "K-rope")


def decode_planes(box, dictionary):
    """The rows of every plane in order of position: [token_count, width]."""
    planes = [None] * len(box.planes)
    for group in (group for group in box.groups if group.planes):
        rows, first = decode_group(box, group, dictionary), 0
        for index in group.planes:
            planes[index] = rows[:, first : first + box.planes[index].columns]
            first += box.planes[index].columns
    return planes


def rebuild(box, planes):
    """The engine's file: the segments of FRAM one after the other."""
    in_file = [np.empty_like(plane) for plane in planes]
    for target, plane in zip(in_file, planes):
        target[box.framing.rows] = plane
    pieces, literal = [], 0
    for segment in box.framing.segments:
        if segment.plane_count == 0:
            pieces.append(box.framing.literals[literal : literal + segment.size])
            literal += segment.size
        else:
            chosen = slice(segment.first_plane, segment.first_plane + segment.plane_count)
            pieces.append(tensor_bytes(segment.layout, in_file[chosen], box.planes[chosen]))
    data = b"".join(pieces)
    if all(group.codec == LOSSLESS for group in box.groups):
        require(xxh128(data) == box.framing.source_hash, "F7", "checksum of the engine's file")
    return data


def tensor_bytes(layout, rows, planes):
    if layout == 0:
        return np.hstack(rows).tobytes()
    if layout == 1:
        return rows[0].T.tobytes()
    if layout == 2:
        return rows[0].reshape(len(rows[0]), planes[0].heads, -1).transpose(1, 0, 2).tobytes()
    return np.hstack(rows[::-1]).tobytes()


def decode_file(path, dictionaries):
    """The container, its planes, and the bytes of the engine's file where the entry has a framing."""
    box = read_container(path.read_bytes(), KIND_ENTRY)
    planes = decode_planes(box, dictionaries.get(box.metadata.get("dictionary.id")))
    return box, planes, rebuild(box, planes) if box.framing else None


def read_dictionaries(paths):
    return {d.id: d for d in (Dictionary(path.read_bytes()) for path in paths)}


# --- Comparison (spec/codec.md, section 3: two decoders agree within 1 ulp, or 2^-16 of the row's largest element) ---


def tensor_rows(data, segment, box):
    """The planes of a tensor segment as [row, dim] arrays: tensor_bytes() undone."""
    chosen = box.planes[segment.first_plane : segment.first_plane + segment.plane_count]
    elements = np.frombuffer(data, STORED_DTYPE[chosen[0].dtype])
    if segment.layout == 1:
        return [elements.reshape(-1, box.token_count).T]
    if segment.layout == 2:
        return [elements.reshape(chosen[0].heads, box.token_count, -1).transpose(1, 0, 2).reshape(box.token_count, -1)]
    widths = [plane.columns for plane in chosen]
    order = widths if segment.layout == 0 else widths[::-1]
    rows = np.hsplit(elements.reshape(box.token_count, -1), np.cumsum(order)[:-1])
    return rows if segment.layout == 0 else rows[::-1]


def numbers(stored):
    if stored.dtype == np.uint16:  # bf16
        return (stored.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return stored.astype(np.float64)


def ulps(a, b):
    """Distance in representable numbers of the type."""
    def ordinal(stored):
        bits = np.ascontiguousarray(stored).view(f"<u{stored.itemsize}").astype(np.int64)
        sign = 1 << (8 * stored.itemsize - 1)
        return np.where(bits & sign, -(bits & (sign - 1)), bits)
    return np.abs(ordinal(a) - ordinal(b))


def block_steps(x, y, dtype):
    """Largest difference of two tensors of blocks, in steps: the larger scale of the two blocks."""
    (a, step_a), (b, step_b) = from_blocks(x, dtype), from_blocks(y, dtype)
    step = np.maximum(np.abs(step_a), np.abs(step_b))
    return (np.abs(a - b) / np.where(step > 0, step, 1)).max()


def compare(box, found, expected):
    """Refuses files that do not agree, else says how near they are."""
    require(len(found) == len(expected), "compare", f"{len(found)} bytes, not {len(expected)}")
    at, worst, beyond, steps = 0, 0, 0.0, 0.0
    for segment in box.framing.segments:
        a, b = (data[at : at + segment.size] for data in (found, expected))
        if segment.plane_count == 0:
            require(a == b, "compare", f"literal bytes at {at} differ")
        elif a != b:
            dtype = box.planes[segment.first_plane].dtype
            for x, y in zip(tensor_rows(a, segment, box), tensor_rows(b, segment, box)):
                if dtype in BLOCK_SIZE:
                    steps = max(steps, block_steps(x, y, dtype))
                    require(steps <= 1.1, "compare", f"the tensor at {at} differs by {steps:.2f} steps")
                    continue
                distance, relative = ulps(x, y), relative_to_row(x, y)
                relative[distance <= (1 if x.itemsize == 2 else 0)] = 0
                require(np.all(relative <= 2**-16), "compare", f"the tensor at {at} differs")
                worst, beyond = max(worst, distance.max()), max(beyond, relative.max())
        at += segment.size
    if steps > 0:
        return f"within {steps:.2f} steps of the blocks"
    if worst == 0:
        return "identical"
    return f"within {worst} ulp" + (f", beyond 1 ulp within {beyond:.1e} of the row's largest" if beyond else "")


def relative_to_row(x, y):
    x, y = numbers(x), numbers(y)
    largest = np.abs(y).max(axis=1, keepdims=True)
    return np.abs(x - y) / np.where(largest > 0, largest, 1)


def check_golden(folder):
    dictionaries = read_dictionaries(sorted(folder.glob("*.xkvd")))
    entries = sorted(folder.glob("*.xkv"))
    require(entries, "compare", f"{folder} holds no entry")
    for path in entries:
        box, _planes, found = decode_file(path, dictionaries)
        (expected,) = (p for p in folder.glob(path.stem + ".*") if p.suffix not in (".xkv", ".xkvd"))
        difference = compare(box, found, expected.read_bytes())
        lossless = all(group.codec == LOSSLESS for group in box.groups)
        require(not lossless or difference == "identical", "compare", f"{path.name}: {difference}")
        print(f"{path.name}: {difference}")


# --- The examples of the specification ---


def hex_dump(page, heading, columns):
    """The bytes in these columns of the first block of code behind a heading."""
    lines = page.read_text().split(heading)[1].split("```")[1].strip().splitlines()
    return b"".join(bytes.fromhex(line[columns]) for line in lines)


def check_examples(folder):
    box = read_container(hex_dump(folder / "container.md", "## 13.", slice(6, 53)), KIND_ENTRY)
    k, v = decode_planes(box, None)
    require(k.tolist() == [[1, -1, 0.5, 0], [2, -2, 1, 0]], "example", "K of the container's example")
    require(v.view("<u2").ravel().tolist() == list(range(0x3C00, 0x3C08)), "example", "V of the container's example")
    require(box.token_ids.tolist() == [17, 4660], "example", "token ids of the container's example")
    values = rans_decode(hex_dump(folder / "codec.md", "Example: 3 tokens", slice(0, 38)), [13, 0, 29], 3)
    require(values.tolist() == [[1, 0, -2], [0, 0, 0], [300, -5, 40]], "example", "the rANS example")
    print("examples: as stated")


# --- Command line ---


def parse_arguments():
    parser = argparse.ArgumentParser(description="Decode an xkv entry by the specification.")
    parser.add_argument("entry", type=Path, nargs="?", help="entry (.xkv)")
    parser.add_argument("-D", "--dictionary", type=Path, action="append", default=[], help="dictionary (.xkvd)")
    parser.add_argument("-o", "--output", type=Path, help="the engine's file")
    parser.add_argument("--planes", type=Path, metavar="NPZ", help="write the planes instead, in order of position")
    parser.add_argument("--compare", type=Path, metavar="FILE", help="compare with another decoder's output")
    parser.add_argument("--check-golden", type=Path, metavar="DIR", help="decode each entry of DIR and compare")
    parser.add_argument("--check-examples", type=Path, metavar="SPEC", help="decode the examples of the specification")
    arguments = parser.parse_args()
    checks = arguments.check_golden or arguments.check_examples
    asked = arguments.output or arguments.planes or arguments.compare
    if not checks and not (arguments.entry and asked):
        parser.error("an entry and one of -o, --planes and --compare, or a check")
    return arguments


def decode(arguments):
    box, planes, data = decode_file(arguments.entry, read_dictionaries(arguments.dictionary))
    if arguments.planes:
        names = [f"layer{p.layer}.{KIND_NAMES[p.kind]}" for p in box.planes]
        np.savez(arguments.planes, positions=box.positions, **dict(zip(names, planes)))
    if arguments.output or arguments.compare:
        require(data is not None, "FRAM", "the entry holds no framing: use --planes")
    if arguments.output:
        arguments.output.write_bytes(data)
    if arguments.compare:
        print(f"{arguments.entry}: {compare(box, data, arguments.compare.read_bytes())}")


def main():
    arguments = parse_arguments()
    try:
        if arguments.check_examples:
            check_examples(arguments.check_examples)
        if arguments.check_golden:
            check_golden(arguments.check_golden)
        if arguments.entry:
            decode(arguments)
    except Refused as error:
        sys.exit(f"decode.py: {error}")


if __name__ == "__main__":
    main()
