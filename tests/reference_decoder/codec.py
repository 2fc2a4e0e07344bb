"""Decodes the payload of spec/codec.md and spec/dictionary.md, in f64 where they ask for f32 at least.

Written from the specification alone. A group comes back as one matrix: a row for each token, the group's planes side
by side, in the type in which the engine stores them (bf16 as u16, blocks of q8_0 and q4_0 as bytes).
"""

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from container import (
    BLOCK,
    BLOCK_SIZE,
    CROSS,
    CROSS_BASIS,
    DICT,
    KIND_DICTIONARY,
    LOSSLESS,
    NO_ROPE,
    SCALAR,
    SVD,
    SVDQ,
    Cursor,
    read_container,
    require,
    zstd_frame,
)

STORED_DTYPE = {0: "<f4", 1: "<f2", 2: "<u2", 3: "u1", 4: "u1"}
LANES = 32


# --- Parts ---


def part_matrix(box, part, rows, cols, element_size):
    """The bytes of a part of rows x cols elements, byte planes undone (methods 0 and 1)."""
    data = box.part_bytes(part)
    size = rows * cols * element_size
    if part.method == 0:
        require(len(data) == size, "P2", f"a part of {len(data)} bytes, not {size}")
        return data
    require(part.method == 1, "P2", f"method {part.method}")
    require(len(data) >= 4 * element_size + 4 and size <= 32768 * len(data), "P2", "size of a part")
    cursor = Cursor(data, "D2")
    frames = [cursor.bytes(size) for size in cursor.fields(f"{element_size}I")]
    cursor.finish()
    elements = np.empty((rows, cols, element_size), np.uint8)
    for b, frame in enumerate(frames):
        plane = np.frombuffer(zstd_frame(frame, rows * cols, "D2"), np.uint8)
        highest = b == element_size - 1
        elements[:, :, b] = plane.reshape(cols, rows).T if highest else plane.reshape(rows, cols)
    return elements.tobytes()


def stored_rows(box, part, rows, planes):
    """Rows as the engine stores them: a lossless chunk or the exact rows."""
    width = sum(plane.columns for plane in planes)
    if rows == 0:
        require(part.size == 0, "P2", "a part without elements has bytes")
        return np.empty((0, width), STORED_DTYPE[planes[0].dtype])
    data = part_matrix(box, part, rows, width, planes[0].element_size)
    return np.frombuffer(data, STORED_DTYPE[planes[0].dtype]).reshape(rows, width)


# --- Tables and rANS ---


@dataclass
class Table:
    shift: int
    symbol: list  # of each of the 4096 slots: (u, or None for the escape; f; start)


@functools.cache
def base_tables():
    tables = {}
    for line in (Path(__file__).parents[2] / "spec" / "tables.txt").read_text().splitlines():
        if line.startswith("#"):
            continue
        shape, rung, reach, escape, *half = map(int, line.split())
        require(len(half) == reach + 1, "tables.txt", line)
        slots, start = [], 0
        for u, f in [(u, half[abs(u)]) for u in range(-reach, reach + 1)] + [(None, escape)]:
            slots += [(u, f, start)] * f
            start += f
        require(start == 4096, "tables.txt", line)
        tables[shape, rung] = slots
    return tables


@functools.cache
def table(index):
    shape, rung = divmod(index - 1, 60)
    if rung < 28:
        return Table(0, base_tables()[shape, rung])
    return Table((rung - 28) // 4 + 1, base_tables()[shape, 24 + rung % 4])


def check_tables(indices):
    require(max(indices) <= 240, "E1", "index of a table")


def rans_decode(data, indices, count):
    """The integers [components, count] of one stream; indices holds the table of each component."""
    values = np.zeros((len(indices), count), np.int64)
    if count == 0 or not any(indices):
        require(len(data) == 0, "E2", "a stream without values has bytes")
        return values
    lanes = min(LANES, count)
    require(len(data) >= 4 * lanes and len(data) % 2 == 0, "E2", f"a stream of {len(data)} bytes")
    x = np.frombuffer(data, "<u4", lanes).tolist()
    require(min(x) >= 2**16, "E2", "a state below 2^16")
    words = iter(np.frombuffer(data, "<u2", offset=4 * lanes).tolist())

    def refill(lane):
        if x[lane] < 2**16:
            x[lane] = x[lane] << 16 | next(words)

    try:
        for j in (j for j, index in enumerate(indices) if index):
            for first in range(0, count, LANES):
                lanes_here = range(min(LANES, count - first))
                values[j, first : first + LANES] = rans_round(table(indices[j]), x, lanes_here, refill, words)
    except StopIteration:
        require(False, "E3", "words end early")
    require(next(words, None) is None, "E3", "words are left")
    require(all(state == 2**16 for state in x), "E3", "a lane does not end with 2^16")
    return values


def rans_round(table, x, lanes, refill, words):
    shift = table.shift
    half = 2**shift // 2
    q = [None] * len(lanes)
    for lane in lanes:
        slot = x[lane] & 4095
        u, f, start = table.symbol[slot]
        x[lane] = f * (x[lane] >> 12) + slot - start
        refill(lane)
        q[lane] = None if u is None else (u << shift) - half
    if shift:
        for lane in lanes:
            if q[lane] is not None:
                q[lane] += x[lane] & (2**shift - 1)
                x[lane] >>= shift
                refill(lane)
    for lane in lanes:
        if q[lane] is None:
            word = next(words)
            q[lane] = word - 2**16 if word >= 2**15 else word
    return q


# --- Dictionaries ---


@dataclass
class Basis:
    planes: list  # of the dictionary
    mean: np.ndarray  # m: [N]
    synthesis: np.ndarray  # b: [R, N]


@dataclass
class CrossBasis:
    counts: list  # leading coefficients of each group that take part
    components: np.ndarray  # p: [R, W]

    def part(self, group):
        """The components' elements that are the group's: [R, M_g]."""
        first = sum(self.counts[:group])
        return self.components[:, first : first + self.counts[group]]


class Dictionary:
    def __init__(self, data):
        self.box = read_container(data, KIND_DICTIONARY)
        self.id = self.box.content_id
        require(len(self.box.token_ids) == 0, "Y1", "a dictionary has no token ids")
        unit = self.box.metadata.get("dict.unit")
        require(isinstance(unit, float) and np.isfinite(unit) and unit > 0, "Y3", f"dict.unit {unit}")
        self.bases = [read_basis(self.box, group) for group in self.box.groups if group.planes]
        stages = [group for group in self.box.groups if group.codec == CROSS_BASIS]
        self.cross = read_cross_basis(self.box, stages[0], self.bases) if stages else None

    def group_of(self, planes):
        """Index of the dictionary's group that holds just these planes [Q6]."""
        def shape(of):
            return [(plane.layer, plane.kind, plane.heads, plane.head_dim) for plane in of]
        found = [i for i, basis in enumerate(self.bases) if shape(basis.planes) == shape(planes)]
        require(found, "Q6", "the dictionary has no group of these planes")
        return found[0]


def read_basis(box, group):
    planes = [box.planes[index] for index in group.planes]
    width, rank = sum(plane.width for plane in planes), group.rank
    heads = [plane.head_dim for plane in planes for _ in range(plane.heads)]
    size = 4 * width + 9 * rank + sum(4 + 2 * dim * dim for dim in heads)
    cursor = Cursor(part_matrix(box, group.parts[0], 1, size, 1), "Y2")
    mu = cursor.array("<f4", width).astype(np.float64)
    require(np.all(np.isfinite(mu)), "Y2", "mu is not finite")
    d, indices = read_component_header(cursor, rank)
    inverses = [np.linalg.inv(read_metric(cursor, dim)) for dim in heads]
    u = read_components(box, group, d, indices, width)
    return Basis(planes, times_blocks(mu[None, :], inverses)[0], times_blocks(u, inverses))


def read_component_header(cursor, rank):
    """d and table indices of a basis; its sigmas are for encoders."""
    sigma, d = (cursor.array("<f4", rank).astype(np.float64) for _ in range(2))
    require(np.all(np.isfinite(sigma)) and np.all(np.isfinite(d)), "Y2", "finite figures")
    require(np.all(sigma >= 0) and np.all(d > 0), "Y2", "signs of sigma and d")
    indices = cursor.array("u1", rank).tolist()
    check_tables(indices)
    return d, indices


def read_components(box, group, d, indices, width):
    require(group.parts[1].method == 2, "P2", "method of components")
    return rans_decode(box.part_bytes(group.parts[1]), indices, width) * d[:, None]


def read_cross_basis(box, group, bases):
    """Section 4: the cross basis at the end of a dictionary."""
    cursor = Cursor(part_matrix(box, group.parts[0], 1, 4 * len(bases) + 9 * group.rank, 1), "Y2")
    counts = cursor.array("<u4", len(bases)).tolist()
    require(all(count <= len(basis.synthesis) for count, basis in zip(counts, bases)), "Y4", "coefficients of a group")
    require(group.rank <= sum(counts) <= 262144, "Y4", "width of the cross stage")
    d, indices = read_component_header(cursor, group.rank)
    return CrossBasis(counts, read_components(box, group, d, indices, sum(counts)))


def read_metric(cursor, dim):
    scale = float(cursor.array("<f4", 1)[0])
    block = scale * cursor.array("<f2", dim * dim).reshape(dim, dim).astype(np.float64)
    require(np.all(np.isfinite(block)) and np.array_equal(block, block.T), "Y2", "a metric block")
    require(np.linalg.eigvalsh(block)[0] > 0, "Y2", "a metric block is not positive definite")
    return block


def times_blocks(rows, blocks):
    """rows x W for the block-diagonal W."""
    ends = np.cumsum([len(block) for block in blocks])
    return np.hstack([rows[:, end - len(block) : end] @ block for end, block in zip(ends, blocks)])


# --- Groups ---


def coded_span(box, chunk):
    """First and end of the coded tokens of a chunk."""
    first = max(box.sinks, chunk * box.chunk_tokens)
    end = min(box.token_count - box.window, (chunk + 1) * box.chunk_tokens)
    return first, max(first, end)


def decode_group(box, group, dictionary):
    planes = [box.planes[index] for index in group.planes]
    if group.codec == LOSSLESS:
        for part in group.parts[:2]:
            require(part.size == 0, "R5", "a lossless group has components or exact rows")
        counts = [min(box.chunk_tokens, box.token_count - c * box.chunk_tokens) for c in range(box.chunk_count)]
        return np.vstack([stored_rows(box, part, count, planes) for part, count in zip(group.parts[2:], counts)])
    exact = stored_rows(box, group.parts[1], box.sinks + box.window, planes)
    coefficients, basis, mean = {SVD: svd, DICT: dict_codec, SCALAR: scalar, SVDQ: svdq}[group.codec](
        box, group, planes, dictionary)
    first, end = box.sinks, box.token_count - box.window
    coded = mean + (coefficients * basis if basis.ndim == 1 else coefficients @ basis)
    coded = rotate(box, planes, coded, box.positions[first:end])
    return np.vstack([exact[:first], to_stored(coded, planes[0].dtype), exact[first:]])


def svd(box, group, planes, _dictionary):
    width, rank = sum(plane.width for plane in planes), group.rank
    data = part_matrix(box, group.parts[0], 1, rank * width + 2 * rank, 2)
    components = np.frombuffer(data, "<f2", rank * width).reshape(rank, width).astype(np.float64)
    scales = np.frombuffer(data, "<f4", rank, 2 * rank * width).astype(np.float64)
    require(np.all(np.isfinite(scales)) and np.all(scales >= 0), "D3", "scales")
    chunks = [np.empty((0, rank))]
    for chunk, part in enumerate(group.parts[2:]):
        first, end = coded_span(box, chunk)
        if first == end:
            require(part.size == 0, "P2", "a chunk without coded tokens has bytes")
        else:
            data = part_matrix(box, part, end - first, rank, 2)
            chunks.append(np.frombuffer(data, "<f2").reshape(end - first, rank).astype(np.float64))
    coefficients = np.vstack(chunks)
    require(np.all(np.isfinite(components)) and np.all(np.isfinite(coefficients)), "D3", "finite factors")
    return coefficients * scales, components, 0.0


def coded_coefficients(box, group, step, indices):
    """a_tj = q_tj * step, in f32, of the coded tokens."""
    require(np.isfinite(step) and step > 0, "Q3", f"step {step}")
    check_tables(indices)
    chunks = [np.empty((0, group.rank), np.int64)]
    for chunk, part in enumerate(group.parts[2:]):
        first, end = coded_span(box, chunk)
        require(part.size == 0 or part.method == 2, "P2", "method of a chunk")
        chunks.append(rans_decode(box.part_bytes(part), indices, end - first).T)
    return (np.vstack(chunks).astype(np.float32) * step).astype(np.float64)


def side_header(cursor):
    step = cursor.array("<f4", 1)[0]
    require(cursor.fields("I") == (0,), "Q3", "reserved field of a side part")
    return step


def check_dictionary(box, dictionary):
    named = box.metadata.get("dictionary.id")
    require(isinstance(named, bytes) and len(named) == 16, "Q5", "dictionary.id")
    found = dictionary.id if dictionary else b""
    require(found == named, "Q5", f"needs dictionary {named.hex()}, given {found.hex() or 'none'}")


def with_dictionary(box, group):
    """Coefficients of a dict group, its own, or of the cross stage."""
    cursor = Cursor(part_matrix(box, group.parts[0], 1, 8 + group.rank, 1), "Q4")
    step = side_header(cursor)
    return coded_coefficients(box, group, step, cursor.array("u1", group.rank).tolist())


def cross_coefficients(box, dictionary):
    """c: [tokens, R] of the entry's cross stage, None without one."""
    stage = box.groups[0]
    if stage.codec != CROSS:
        return None
    require(dictionary.cross and stage.rank <= len(dictionary.cross.components), "Q6", "the dictionary's cross stage")
    return with_dictionary(box, stage)


def dict_codec(box, group, planes, dictionary):
    check_dictionary(box, dictionary)
    index = dictionary.group_of(planes)
    basis = dictionary.bases[index]
    require(group.rank <= len(basis.synthesis), "Q1", f"rank {group.rank} above the dictionary's")
    coefficients = np.zeros((box.token_count - box.sinks - box.window, len(basis.synthesis)))
    coefficients[:, : group.rank] = with_dictionary(box, group)
    cross = cross_coefficients(box, dictionary)
    if cross is not None:
        share = cross @ dictionary.cross.part(index)[: cross.shape[1]]
        coefficients[:, : share.shape[1]] += share
    return coefficients, basis.synthesis, basis.mean


def scalar(box, group, planes, _dictionary):
    width = group.rank
    cursor = Cursor(part_matrix(box, group.parts[0], 1, 8 + 4 * len(planes) + 3 * width, 1), "Q4")
    step = side_header(cursor)
    scales = cursor.array("<f4", len(planes)).astype(np.float64)
    mean = cursor.array("<f2", width).astype(np.float64)
    require(np.all(np.isfinite(scales)) and np.all(scales > 0) and np.all(np.isfinite(mean)), "Q3", "scales and means")
    indices = cursor.array("u1", width).tolist()
    return coded_coefficients(box, group, step, indices), np.repeat(scales, [p.width for p in planes]), mean


def svdq(box, group, planes, _dictionary):
    width, rank = sum(plane.width for plane in planes), group.rank
    require(group.parts[0].method == 2, "P2", "method of the side part of svdq")
    cursor = Cursor(box.part_bytes(group.parts[0]), "Q2")
    step = side_header(cursor)
    scales, mean_step = cursor.array("<f4", len(planes)).astype(np.float64), float(cursor.array("<f4", 1)[0])
    steps = np.append(scales, mean_step)
    require(np.all(np.isfinite(steps)) and np.all(steps > 0), "Q3", "scales and the step of the mean")
    exponents = cursor.array("u1", rank).astype(np.float64)
    indices, basis_indices = cursor.array("u1", rank).tolist(), cursor.array("u1", rank + 1).tolist()
    check_tables(basis_indices)
    rows = rans_decode(cursor.data[cursor.at :], basis_indices, width)
    rows = rows * np.append(mean_step, 2 ** (-exponents / 8))[:, None] * np.repeat(scales, [p.width for p in planes])
    require(np.all(np.abs(rows) <= np.finfo(np.float32).max), "Q3", "mean or components beyond f32")
    return coded_coefficients(box, group, step, indices), rows[1:], rows[0]


# --- To the engine's form ---


def rotate(box, planes, x, positions):
    """RoPE on the planes that have one."""
    x, first = x.copy(), 0
    for plane in planes:
        if plane.rope != NO_ROPE:
            rope = box.ropes[plane.rope]
            heads = x[:, first : first + plane.width].reshape(len(x), plane.heads, plane.head_dim)
            x[:, first : first + plane.width] = rotate_heads(rope, heads, positions).reshape(len(x), -1)
        first += plane.width
    return x


def rotate_heads(rope, heads, positions):
    half = len(rope.inv_freq)
    angles = positions[:, None] * rope.inv_freq
    cos, sin = (f(angles).astype(np.float32).astype(np.float64)[:, None, :] for f in (np.cos, np.sin))
    step = 2 if rope.style == 0 else 1
    a_dims = rope.first_dim + step * np.arange(half)
    b_dims = a_dims + (1 if rope.style == 0 else half)
    a, b = heads[:, :, a_dims], heads[:, :, b_dims]
    out = heads.copy()
    out[:, :, a_dims] = rope.scale * (a * cos - b * sin)
    out[:, :, b_dims] = rope.scale * (a * sin + b * cos)
    return out


def quantize(x, dtype):
    """Blocks of 32 elements (spec/codec.md, section 9), every operation in f32."""
    one = np.float32(1)
    x = x.astype(np.float32).reshape(-1, BLOCK)
    largest = np.take_along_axis(x, np.abs(x).argmax(axis=1)[:, None], 1)
    d = np.abs(largest) / np.float32(127) if dtype == 3 else np.where(largest == 0, 0, largest) / np.float32(-8)
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.where(np.isfinite(one / d), one / d, 0).astype(np.float32)
    scales = np.clip(d, -65504, 65504).astype("<f2").view("u1")
    if dtype == 3:
        q = x * inverse
        return np.hstack([scales, (np.sign(q) * np.floor(np.abs(q).astype(np.float64) + 0.5)).astype("i1").view("u1")])
    q = np.minimum((x * inverse + np.float32(8.5)).astype("u1"), 15)
    return np.hstack([scales, q[:, :16] | q[:, 16:] << 4])


def from_blocks(stored, dtype):
    """Elements and the scale of each, in f64, of rows of blocks."""
    blocks = np.ascontiguousarray(stored).reshape(-1, BLOCK_SIZE[dtype])
    d = np.ascontiguousarray(blocks[:, :2]).view("<f2").astype(np.float64)
    if dtype == 3:
        q = np.ascontiguousarray(blocks[:, 2:]).view("i1").astype(np.float64)
    else:
        q = np.hstack([blocks[:, 2:] & 15, blocks[:, 2:] >> 4]).astype(np.float64) - 8
    return d * q, np.broadcast_to(d, q.shape)


def to_stored(x, dtype):
    """Rounded to nearest, ties to even; what lies beyond the type's largest number becomes that number."""
    if dtype in BLOCK_SIZE:
        return quantize(x, dtype).reshape(len(x), -1)
    if dtype == 1:
        return np.clip(x, -65504, 65504).astype("<f2")
    if dtype == 0:
        largest = np.finfo(np.float32).max
        return np.clip(x, -largest, largest).astype("<f4")
    largest = 2.0**127 * (2 - 2.0**-7)
    bits = np.clip(x, -largest, largest).astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2")
