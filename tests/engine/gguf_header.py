"""Geometry and RoPE of a model from the header of its GGUF file, whose tensor data need not be there."""
import struct
from dataclasses import dataclass

# Rotated pairs by architecture: (2i, 2i+1), or (i, i + n_rot/2).
INTERLEAVED = {"llama": True, "qwen2": False}

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9


@dataclass(frozen=True)
class Geometry:
    layers: int
    kv_heads: int
    head_dim: int
    n_rot: int
    rope_base: float
    interleaved: bool


def geometry(path):
    keys = read_keys(path)
    arch = keys["general.architecture"]

    def field(name, default=None):
        return keys.get(f"{arch}.{name}", default)

    heads = field("attention.head_count")
    head_dim = field("attention.key_length", field("embedding_length") // heads)
    return Geometry(layers=field("block_count"), kv_heads=field("attention.head_count_kv", heads), head_dim=head_dim,
                    n_rot=field("rope.dimension_count", head_dim), rope_base=field("rope.freq_base", 10000.0),
                    interleaved=INTERLEAVED[arch])


def read_keys(path):
    """{key: value}; arrays are passed over."""
    with open(path, "rb") as file:
        def take(layout):
            return struct.unpack("<" + layout, file.read(struct.calcsize("<" + layout)))

        def string():
            return file.read(take("Q")[0]).decode()

        def value(kind):
            if kind == STRING:
                return string()
            if kind == ARRAY:
                kind, count = take("IQ")
                if kind in SCALARS:
                    file.seek(count * struct.calcsize("<" + SCALARS[kind]), 1)
                else:
                    for _ in range(count):
                        value(kind)
                return None
            return take(SCALARS[kind])[0]

        magic, version, _, count = take("4sIQQ")
        assert magic == b"GGUF" and version >= 2, (magic, version)
        keys = {}
        for _ in range(count):
            key = string()
            keys[key] = value(take("I")[0])
        return keys
