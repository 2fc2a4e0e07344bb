"""Reads the container of spec/container.md and checks its rules.

Written from the specification alone, to prove that it is complete. Plain, not fast: a file is read whole.
"""

import struct
from dataclasses import dataclass, field

import numpy as np
import xxhash
import zstandard

KIND_ENTRY, KIND_DICTIONARY = 1, 2
LOSSLESS, SVD, DICT, SCALAR, SVDQ, BASIS, CROSS, CROSS_BASIS = range(8)
K, V, LATENT, K_ROPE = range(4)
ELEMENT_SIZE = {0: 4, 1: 2, 2: 2, 3: 1, 4: 1}  # of f32, f16, bf16; rows of q8_0 and q4_0 blocks are bytes
BLOCK = 32  # elements
BLOCK_SIZE = {3: 34, 4: 18}
BLOCKS_FEATURE = 1
NO_ROPE = 2**32 - 1
INT32_MAX = 2**31 - 1


class Refused(Exception):
    """The file breaks a rule of the specification."""


def require(holds, rule, message):
    if not holds:
        raise Refused(f"{message} [{rule}]")


def round_up(value, multiple):
    return -(-value // multiple) * multiple


def xxh128(data):
    return xxhash.xxh3_128_digest(data)  # canonical form


def xxh64(data):
    return xxhash.xxh3_64_intdigest(data)


class Cursor:
    """Takes fields one after the other and refuses to pass the end."""

    def __init__(self, data, rule):
        self.data, self.rule, self.at = data, rule, 0

    def bytes(self, size):
        require(size <= len(self.data) - self.at, self.rule, f"{size} bytes at {self.at} pass the end")
        self.at += size
        return self.data[self.at - size : self.at]

    def fields(self, layout):
        layout = "<" + layout
        return struct.unpack(layout, self.bytes(struct.calcsize(layout)))

    def array(self, dtype, count):
        return np.frombuffer(self.bytes(np.dtype(dtype).itemsize * count), dtype)

    def finish(self):
        require(self.at == len(self.data), self.rule, f"{len(self.data) - self.at} bytes are left")


def zstd_frame(data, size, rule):
    """The content of exactly one zstd frame that states its size and needs no dictionary."""
    require(data[:4] == b"\x28\xb5\x2f\xfd", rule, "not a zstd frame")
    try:
        header = zstandard.get_frame_parameters(data)
        require(header.content_size == size and header.dict_id == 0, rule, f"the frame does not hold {size} bytes")
        decoder = zstandard.ZstdDecompressor().decompressobj()
        content = decoder.decompress(data)
    except zstandard.ZstdError as error:
        raise Refused(f"{error} [{rule}]") from error
    require(decoder.eof and not decoder.unused_data and len(content) == size, rule, "the frame ends elsewhere")
    return content


def read_blob(cursor, element_size, size):
    method, found_element_size, found_size, stored_size = cursor.fields("IIQQ")
    require(method <= 1 and found_element_size == element_size, "B1", "method and element size of a blob")
    require(found_size == size, cursor.rule, f"a blob of {found_size} bytes, not {size}")
    require(size <= 2**32 and size <= 32768 * stored_size if method else size == stored_size, "B2", "size of a blob")
    data = cursor.bytes(stored_size)
    require(not any(cursor.bytes(-stored_size % 8)), "B3", "the padding of a blob is not zero")
    if method == 0:
        return data
    planes = np.frombuffer(zstd_frame(data, size, "B4"), np.uint8).reshape(element_size, -1)
    return planes.T.tobytes()


@dataclass
class Plane:
    layer: int
    kind: int
    dtype: int
    heads: int
    head_dim: int
    rope: int

    @property
    def width(self):
        return self.heads * self.head_dim

    @property
    def element_size(self):
        return ELEMENT_SIZE[self.dtype]

    @property
    def columns(self):
        """What a stored row has of element_size bytes each."""
        return self.width // BLOCK * BLOCK_SIZE[self.dtype] if self.dtype in BLOCK_SIZE else self.width


@dataclass
class Rope:
    first_dim: int
    style: int
    scale: float
    inv_freq: np.ndarray


@dataclass
class Segment:
    size: int
    first_plane: int
    plane_count: int
    layout: int


@dataclass
class Framing:
    source_hash: bytes
    segments: list
    literals: bytes
    rows: np.ndarray  # token i is row rows[i]


@dataclass
class Part:
    offset: int
    size: int
    checksum: int
    method: int


@dataclass
class Group:
    codec: int
    rank: int
    planes: list  # indices
    parts: list


@dataclass
class Container:
    content_id: bytes
    required_features: int = 0
    token_count: int = 0
    chunk_tokens: int = 0
    sinks: int = 0
    window: int = 0
    planes: list = field(default_factory=list)
    ropes: list = field(default_factory=list)
    token_ids: np.ndarray = None
    positions: np.ndarray = None
    framing: Framing = None
    metadata: dict = field(default_factory=dict)
    groups: list = field(default_factory=list)
    payload: bytes = b""

    @property
    def chunk_count(self):
        return -(-self.token_count // self.chunk_tokens)

    def part_bytes(self, part):
        """The stored bytes of a part, checked [P3]."""
        data = self.payload[part.offset : part.offset + part.size]
        require(part.checksum == (xxh64(data) if part.size else 0), "P3", "checksum of a part")
        return data


def read_container(data, kind):
    """Reads an entry or a dictionary and checks all rules but the deep ones."""
    sections, content_id, required = read_header(data, kind)
    box = Container(content_id, required)
    read_geometry(box, Cursor(sections["GEOM"], "G12"), kind)
    read_tokens(box, Cursor(sections["TOKN"], "T4"))
    if "FRAM" in sections:
        read_framing(box, Cursor(sections["FRAM"], "F9"))
    if "META" in sections:
        read_metadata(box, Cursor(sections["META"], "M5"))
    box.payload = sections["PAYL"]
    read_groups(box, Cursor(sections["GRPS"], "R7"), kind)
    check_part_table(box)
    return box


def read_header(data, kind):
    require(data[:8] == b"\x89XKV\r\n\x1a\n"[: len(data)], "H1", "magic")
    require(len(data) >= 64, "H9", "the file is shorter than its header")
    require(xxh64(data[:56]) == struct.unpack_from("<Q", data, 56)[0], "H2", "checksum of the header")
    write_version, read_version, found_kind, file_size = struct.unpack_from("<HHIQ", data, 8)
    required, _optional, section_count, reserved = struct.unpack_from("<IIII", data, 24)
    require(read_version == 1, "H4", f"read_version {read_version}")
    require(write_version >= read_version, "H5", f"write_version {write_version}")
    require(found_kind == kind, "H6", f"kind {found_kind}, not {kind}")
    require(file_size == len(data), "H3", f"file_size {file_size} of {len(data)}")
    require(required in (0, BLOCKS_FEATURE), "H7", f"required features {required:#x}")
    require(reserved == 0, "H8", "reserved field of the header")
    require(1 <= section_count <= 256 and 64 + 32 * section_count <= len(data), "S1", "section_count")
    table = data[64 : 64 + 32 * section_count]
    require(xxh128(table) == data[40:56], "S2", "checksum of the section table")
    return read_sections(data, table, kind), data[40:56], required


def read_sections(data, table, kind):
    sections, end = {}, 64 + len(table)
    for at in range(0, len(table), 32):
        type_bytes, flags, offset, size, checksum = struct.unpack_from("<4sIQQQ", table, at)
        require(type_bytes.isalpha(), "S3", f"section type {type_bytes}")
        name = type_bytes.decode("ascii")
        require(name not in sections, "S3", f"{name} occurs twice")
        known = name in ("GEOM", "TOKN", "FRAM", "META", "GRPS", "PAYL")
        require(known or not flags & 1, "S4", f"unknown section {name} is required")
        require(flags < 4 and bool(flags & 2) == (name == "PAYL"), "S5", f"flags of {name}")
        require(not known or bool(flags & 1) == (name != "META"), "S8", f"required flag of {name}")
        require(offset == round_up(end, 64) and size <= len(data) - offset, "S6", f"offset and size of {name}")
        require(not any(data[end:offset]), "S6", f"the gap before {name} is not zero")
        require(name not in ("GEOM", "TOKN", "META", "GRPS") or size <= 2**28, "S9", f"size of {name}")
        end = offset + size
        sections[name] = data[offset:end]
        expected = 0 if flags & 2 else xxh64(sections[name])
        require(checksum == expected, "S5" if flags & 2 else "S7", f"checksum of {name}")
    require(end == len(data), "S6", "the last section does not end with the file")
    order = [name for name in sections if name in ("GEOM", "TOKN", "GRPS", "PAYL")]
    require(order == ["GEOM", "TOKN", "GRPS", "PAYL"] and list(sections)[-1] == "PAYL", "S8", "sections")
    require(kind == KIND_ENTRY or "FRAM" not in sections, "Y1", "a dictionary has no framing")
    return sections


def read_geometry(box, cursor, kind):
    layers, planes, ropes, box.token_count = cursor.fields("IIII")
    box.chunk_tokens, box.sinks, box.window, reserved = cursor.fields("IIII")
    require(layers <= 4096 and planes <= 16384 and ropes <= 4096 and box.token_count <= INT32_MAX, "G1", "counts")
    require(box.chunk_tokens in [2**i for i in range(5, 17)], "G2", f"chunk_tokens {box.chunk_tokens}")
    require(box.sinks + box.window <= box.token_count, "G3", "sinks and window")
    require(reserved == 0, "G4", "reserved field of GEOM")
    box.planes = [read_plane(cursor, layers, ropes) for _ in range(planes)]
    box.ropes = [read_rope(cursor) for _ in range(ropes)]
    cursor.finish()
    keys = [(plane.layer, plane.kind) for plane in box.planes]
    require(keys == sorted(set(keys)), "G9", "order of the planes")
    blocks = any(plane.dtype in BLOCK_SIZE for plane in box.planes)
    require(box.required_features == (BLOCKS_FEATURE if blocks else 0), "G13", "required features and dtypes")
    for plane in box.planes:
        require(plane.dtype not in BLOCK_SIZE or plane.width % BLOCK == 0, "G13", "rows that are no whole blocks")
        if plane.rope != NO_ROPE:
            rope = box.ropes[plane.rope]
            require(rope.first_dim + 2 * len(rope.inv_freq) <= plane.head_dim, "G11", "rotated dims of a plane")
    if kind == KIND_DICTIONARY:
        require(box.token_count == 0, "Y1", "a dictionary has no tokens")
    else:
        require((box.token_count == 0) == (planes == 0), "G10", "token_count and plane_count")


def read_plane(cursor, layers, ropes):
    layer, kind, dtype, reserved, heads, head_dim, rope, row_set = cursor.fields("IBBHIIII")
    require(layer < layers, "G5", f"layer {layer}")
    require(kind <= K_ROPE and dtype in ELEMENT_SIZE, "G6", f"kind {kind}, dtype {dtype}")
    require(reserved == 0 and row_set == 0, "G4", "reserved field of a plane")
    require(heads >= 1 and head_dim >= 1 and heads * head_dim <= 262144, "G7", f"heads {heads}, head_dim {head_dim}")
    require(rope == NO_ROPE or (rope < ropes and kind == K), "G8", f"rope {rope} of kind {kind}")
    return Plane(layer, kind, dtype, heads, head_dim, rope)


def read_rope(cursor):
    n_rot, first_dim, style, reserved, scale, reserved_2 = cursor.fields("IIIIdQ")
    require(n_rot % 2 == 0 and 2 <= n_rot <= 1024 and style <= 1, "G11", f"n_rot {n_rot}, style {style}")
    require(np.isfinite(scale) and scale > 0, "G11", f"scale {scale}")
    require(reserved == 0 and reserved_2 == 0, "G4", "reserved field of a RoPE record")
    inv_freq = cursor.array("<f8", n_rot // 2)
    require(np.all(np.abs(inv_freq) <= 64), "G11", "inv_freq")
    return Rope(first_dim, style, scale, inv_freq)


def read_tokens(box, cursor):
    id_count, mode, first, reserved = cursor.fields("IIiI")
    require(id_count <= INT32_MAX and mode <= 1 and reserved == 0 and (mode == 0 or first == 0), "T1", "TOKN")
    cursor.rule = "T2"
    box.token_ids = np.frombuffer(read_blob(cursor, 4, 4 * id_count), "<i4")
    cursor.rule = "T3"
    if mode == 1:
        positions = np.frombuffer(read_blob(cursor, 4, 4 * box.token_count), "<i4")
        box.positions = positions.astype(np.int64)
    else:
        box.positions = first + np.arange(box.token_count)
        require(first + box.token_count - 1 <= INT32_MAX, "T3", "the last position")
    require(np.all(np.diff(box.positions) >= 0), "T3", "positions descend")
    cursor.rule = "T4"
    cursor.finish()


def read_framing(box, cursor):
    _engine, count, source_size, source_hash, literal_hash, row_mode, reserved = cursor.fields("IIQ16s16sII")
    require(1 <= count <= 65536, "F1", f"segment_count {count}")
    require(row_mode <= 1 and reserved == 0, "F3", "row_mode")
    segments = [read_segment(box, cursor) for _ in range(count)]
    require(source_size == sum(segment.size for segment in segments), "F2", "source_size")
    cursor.rule = "F4"
    literals = read_blob(cursor, 1, sum(segment.size for segment in segments if not segment.plane_count))
    require(xxh128(literals) == literal_hash, "F6", "checksum of the literals")
    rows = np.arange(box.token_count)
    if row_mode == 1:
        cursor.rule = "F5"
        rows = np.frombuffer(read_blob(cursor, 4, 4 * box.token_count), "<u4")
        require(np.array_equal(np.sort(rows), np.arange(box.token_count)), "F5", "rows are no permutation")
    cursor.rule = "F9"
    cursor.finish()
    used = [p for s in segments for p in range(s.first_plane, s.first_plane + s.plane_count)]
    require(sorted(used) == list(range(len(box.planes))), "F8", "planes of the segments")
    box.framing = Framing(source_hash, segments, literals, rows)


def read_segment(box, cursor):
    size, first, count, layout, reserved = cursor.fields("QIIII")
    require(size > 0 and reserved == 0 and layout <= 3, "F2", "a segment")
    if count == 0:
        require(first == 0 and layout == 0, "F2", "a literal segment")
    else:
        require(first + count <= len(box.planes) and (layout in (0, 3) or count == 1), "F2", "planes of a segment")
        planes = box.planes[first : first + count]
        row = sum(plane.columns * plane.element_size for plane in planes)
        split = planes[0].dtype in BLOCK_SIZE and (layout == 1 or layout == 2 and planes[0].head_dim % BLOCK != 0)
        require(not split, "F10", f"layout {layout} of blocks")
        require(size == box.token_count * row, "F2", f"size {size} of a segment")
    return Segment(size, first, count, layout)


def read_metadata(box, cursor):
    count, reserved = cursor.fields("II")
    require(count <= 4096 and reserved == 0, "M1", f"{count} keys")
    last = b""
    for _ in range(count):
        key_size, kind, value_size = cursor.fields("HHI")
        require(1 <= key_size <= 255 and 1 <= kind <= 4, "M2", "key_size and type")
        require(value_size == 8 if kind in (2, 3) else value_size <= 2**20, "M2", "value_size")
        key, value = bytes(cursor.bytes(key_size)), cursor.bytes(value_size)
        require(all(c in b"abcdefghijklmnopqrstuvwxyz0123456789._" for c in key) and key > last, "M3", f"key {key}")
        require(not any(cursor.bytes(-(8 + key_size + value_size) % 8)), "M4", "padding of a value")
        last = key
        box.metadata[key.decode("ascii")] = metadata_value(kind, value)
    cursor.finish()


def metadata_value(kind, value):
    if kind == 4:
        return bytes(value)
    if kind in (2, 3):
        return struct.unpack("<Q" if kind == 2 else "<d", value)[0]
    try:
        text = value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Refused(f"{error} [M6]") from error
    require("\0" not in text, "M6", "U+0000 in a string")
    return text


def read_groups(box, cursor, kind):
    count, reserved = cursor.fields("II")
    require(reserved == 0, "R1", "reserved field")
    box.groups = [read_group(box, cursor, kind) for _ in range(count)]
    cursor.finish()
    stages = [i for i, group in enumerate(box.groups) if not group.planes]
    require(count <= len(box.planes) + len(stages), "R1", f"{count} groups")
    place = count - 1 if kind == KIND_DICTIONARY else 0
    require(stages in ([], [place]), "R3", "place of a cross stage")
    first = [group.planes[0] for group in box.groups if group.planes]
    require(first == sorted(first), "R3", "order of the groups")
    used = sorted(plane for group in box.groups for plane in group.planes)
    require(used == list(range(len(box.planes))), "R3", "planes of the groups")


def read_group(box, cursor, kind):
    codec, reason, planes, rank, parts, reserved, energy, error, reserved_2 = cursor.fields("IIIIIIddQ")
    stage = codec in (CROSS, CROSS_BASIS)
    known = codec in (BASIS, CROSS_BASIS) if kind == KIND_DICTIONARY else codec < BASIS or codec == CROSS
    require(known, "R2", f"codec {codec} in a file of kind {kind}")
    require(reason <= 5 if codec == LOSSLESS else reason == 0, "R2", f"reason {reason}")
    require(planes == 0 if stage else 1 <= planes <= len(box.planes), "R3", f"{planes} planes in a group")
    require(parts == box.chunk_count + 2, "R5", f"{parts} parts")
    require(reserved == 0 and reserved_2 == 0, "R1", "reserved field of a group")
    figures, indices = [energy, error], []
    for _ in range(planes):
        index, reserved, plane_error = cursor.fields("IId")
        require(reserved == 0, "R6", "reserved field of a group's plane")
        require(index < len(box.planes), "R3", f"plane {index}")
        indices.append(index)
        figures.append(plane_error)
    require(all(a < b for a, b in zip(indices, indices[1:])), "R3", "order of the planes in a group")
    require(all(np.isfinite(x) and x >= 0 for x in figures), "R6", "energy and errors")
    require(codec in (SVD, DICT, SCALAR, SVDQ) or not any(figures), "R6", "energy and errors of an exact group")
    width = 262144 if stage else sum(box.planes[index].width for index in indices)
    require(rank == 0 if codec == LOSSLESS else 1 <= rank <= width <= 262144, "R4", f"rank {rank}")
    require(codec != SCALAR or rank == width, "Q1", f"rank {rank} of {width} elements")
    kinds = {box.planes[index].kind for index in indices}
    require(codec == LOSSLESS or K_ROPE not in kinds, "D1", "K-rope in a group that is not lossless")
    require(len({box.planes[index].dtype for index in indices}) <= 1, "D1", "dtypes in a group")
    return Group(codec, rank, indices, [read_part(cursor) for _ in range(parts)])


def read_part(cursor):
    offset, size, checksum, method, reserved = cursor.fields("QQQII")
    require(reserved == 0, "R1", "reserved field of a part")
    require(size or (offset == 0 and method == 0 and checksum == 0), "P1", "fields of an empty part")
    return Part(offset, size, checksum, method)


def check_part_table(box):
    end = 0
    for part in (part for group in box.groups for part in group.parts if part.size):
        require(part.offset == round_up(end, 64), "P1", f"offset {part.offset} of a part")
        require(part.size <= len(box.payload) - part.offset, "P1", f"size {part.size} of a part")
        require(not any(box.payload[end : part.offset]), "P1", "the gap before a part is not zero")
        end = part.offset + part.size
    require(end == len(box.payload), "P1", "the last part does not end with PAYL")
