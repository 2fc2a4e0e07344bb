#!/usr/bin/env python3
"""Documents how the files of this folder were made. They are not made again: what was packed once must be decodable
for ever, so a change of the codec adds files under new names.

    make.py TOOLS NEW_FOLDER        TOOLS holds xkv-pack and xkv-train; Python has numpy, zstandard and xxhash

Inputs are caches of an invented model: hidden states of a few smooth, strong directions and noise, from which K and V
of all layers are linear images. Lossless entries get their input as the expected file, lossy ones what the reference
decoder makes of them, and never what xkv-unpack does.
"""

import json
import shutil
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).parents[1] / "data"))
from make_blocks import q4_0, q8_0

DECODER = Path(__file__).parents[1] / "reference_decoder" / "decode.py"
LAYERS, HEADS, HEAD_DIM = 2, 2, 16
WIDTH = HEADS * HEAD_DIM
FULL_BASE = 1e6  # gemma3: the second layer has no window
GGML_TYPE = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 8, "bf16": 30}
BLOCKS = {"q8_0": (q8_0, 34), "q4_0": (q4_0, 18)}


# --- An invented model and its caches ---


def write_gguf(path, architecture, n_rot, base=10000.0, **more):
    """The header of a model file; `llama` rotates interleaved pairs, the others half-split ones."""
    def string(text):
        return struct.pack("<Q", len(text)) + text.encode()
    numbers = {"block_count": LAYERS, "context_length": 4096, "embedding_length": WIDTH, "attention.head_count": HEADS,
               "attention.head_count_kv": HEADS, "rope.dimension_count": n_rot, "attention.key_length": HEAD_DIM,
               "attention.value_length": HEAD_DIM, **more}
    fields = [string("general.architecture") + struct.pack("<I", 8) + string(architecture)]
    fields += [string(f"{architecture}.{key}") + struct.pack("<II", 4, value) for key, value in numbers.items()]
    fields += [string(f"{architecture}.rope.freq_base") + struct.pack("<If", 6, base)]
    data = b"GGUF" + struct.pack("<IQQ", 3, 0, len(fields)) + b"".join(fields)
    path.write_bytes(data + bytes(-len(data) % 32))


def rotate(rows, positions, style, n_rot, base=10000.0):
    x = rows.reshape(len(rows), HEADS, HEAD_DIM)
    t = (positions[:, None] * base ** (-np.arange(0, n_rot, 2) / n_rot))[:, None, :]
    half = n_rot // 2
    a, b = (slice(0, n_rot, 2), slice(1, n_rot, 2)) if style == "llama" else (slice(0, half), slice(half, n_rot))
    out = x.copy()
    out[..., a] = x[..., a] * np.cos(t) - x[..., b] * np.sin(t)
    out[..., b] = x[..., a] * np.sin(t) + x[..., b] * np.cos(t)
    return out.reshape(rows.shape)


def planes(positions, style, n_rot, seed, rank=10):
    """[(K, V)] of each layer. The model's matrices are the same for every seed, its hidden states are not."""
    model, text = np.random.default_rng(1), np.random.default_rng([2, seed])
    hidden = text.normal(size=(len(positions), rank)) * 0.7 ** np.arange(rank)
    for t in range(1, len(hidden)):
        hidden[t] += 0.8 * hidden[t - 1]
    hidden[len(hidden) // 2] *= 30  # an outlier, as attention sinks have them

    def image():
        noise = 0.01 * text.normal(size=(len(positions), WIDTH))
        return hidden @ model.normal(size=(rank, WIDTH)) + model.normal(size=WIDTH) + noise
    layers = [(image(), image()) for _ in range(LAYERS)]
    if style == "deepseek2":  # the older form: K is rotated part and latent, V is the latent again
        return [(np.hstack([k[:, :n_rot], v]), v) for k, v in layers]
    bases = [10000.0, FULL_BASE] if style == "gemma3" else [10000.0] * LAYERS
    return [(rotate(k, positions, style, n_rot, base), v) for (k, v), base in zip(layers, bases)]


def row_bytes(width, dtype):
    return width // 32 * BLOCKS[dtype][1] if dtype in BLOCKS else width * (4 if dtype == "f32" else 2)


def element_bytes(rows, dtype):
    if dtype in BLOCKS:
        return b"".join(map(BLOCKS[dtype][0], rows.astype(np.float32).reshape(-1, 32)))
    if dtype == "bf16":
        bits = np.ascontiguousarray(rows, "<f4").view("<u4")
        return (bits + 0x8000 >> 16).astype("<u2").tobytes()
    return rows.astype("<f4" if dtype == "f32" else "<f2").tobytes()


def memory_bytes(positions, layers, version=3, dtype="f16", v_dtype=None, transposed=False, cells=None, extension=None):
    """A llama.cpp KV cache (spec/engines.md, section 1); cell i holds token cells[i]."""
    v_dtype = v_dtype or dtype
    cells = np.arange(len(positions)) if cells is None else cells
    data = struct.pack("<II", 1, len(cells))
    for token in cells:
        data += struct.pack("<iI", positions[token], 1) + (extension or b"") + struct.pack("<i", 0)
    data += struct.pack("<II", transposed, len(layers)) + (bytes(8) if version == 4 else b"")
    for rows, kind, by_dim in [(k, dtype, False) for k, _ in layers] + [(v, v_dtype, transposed) for _, v in layers]:
        width, rows = rows.shape[1], rows[cells]
        if by_dim:
            data += struct.pack("<iII", GGML_TYPE[kind], row_bytes(1, kind), width) + element_bytes(rows.T, kind)
        else:
            data += struct.pack("<iQ", GGML_TYPE[kind], row_bytes(width, kind)) + element_bytes(rows, kind)
    return data


def session_bytes(architecture, outputs):
    """What a session has behind its token ids; outputs None: as engines from February 2026 on."""
    data = struct.pack("<I", len(architecture)) + architecture.encode()
    if outputs is None:
        return data
    logits = np.random.default_rng(5).normal(size=(outputs, 50))
    data += struct.pack("<I", outputs) + np.arange(outputs, dtype="<i4").tobytes()
    return data + struct.pack("<Q", logits.size) + logits.astype("<f4").tobytes() + struct.pack("<Q", 0)


def write_state(path, positions, layers, session=None, outputs=None, windows=None, served=False, **how):
    """A llama.cpp state file. session: the architecture, if it is one; windows: tokens that the cache of the first
    layer holds, behind that of the others; served: token ids as a server saves them."""
    version = how.get("version", 3)
    data = struct.pack("<II", 0x6767736e, version + 7) if session else struct.pack("<II", 0x67677371, version)
    ids = (np.arange(len(positions)) * 37 % 1000).astype("<i4")
    if served:
        ids = np.concatenate([[-1, 1, len(ids)], ids, [0]]).astype("<i4")
    data += struct.pack("<I", len(ids)) + ids.tobytes()
    data += session_bytes(session, outputs) if session else b""
    data += memory_bytes(positions, layers[1:] if windows else layers, **how)
    if windows:
        how["cells"] = how.get("cells", np.arange(len(positions)))[-windows:]
        data += memory_bytes(positions, layers[:1], **how)
    path.write_bytes(data)


def write_safetensors(path, tensors, **metadata):
    header, data = {"__metadata__": metadata} if metadata else {}, b""
    for name, (array, dtype) in tensors.items():
        end = len(data) + array.size * (4 if dtype == "f32" else 2)
        header[name] = {"dtype": dtype.upper(), "shape": array.shape, "data_offsets": [len(data), end]}
        data += element_bytes(array, dtype)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def write_heads(path, layers):
    """A cache as safetensors, layers as [heads, tokens, dim]."""
    tensors = {}
    for i, pair in enumerate(layers):
        for name, rows in zip(("key", "value"), pair):
            heads = rows.reshape(len(rows), HEADS, HEAD_DIM).transpose(1, 0, 2)
            tensors[f"layer.{i}.{name}"] = heads, "f16"
    write_safetensors(path, tensors, **{"xkv.layout": "heads_tokens_dim"})


def write_metric(path):
    """What errors cost: positive definite blocks for each layer and head."""
    random, tensors = np.random.default_rng(4), {}
    for name in ("k_metric", "v_metric"):
        root = random.normal(size=(LAYERS, HEADS, HEAD_DIM, HEAD_DIM)) * 0.8 ** np.arange(HEAD_DIM)
        m = (root @ root.transpose(0, 1, 3, 2) + 0.5 * np.eye(HEAD_DIM)).astype(np.float32)
        tensors[name] = (m + m.transpose(0, 1, 3, 2)) / 2, "f32"
    write_safetensors(path, tensors)


# --- Entries ---


class Maker:
    def __init__(self, tools, folder, scratch):
        self.tools, self.folder, self.scratch = tools, folder, scratch
        self.n_rot = {"llama": HEAD_DIM, "qwen2": HEAD_DIM // 2, "deepseek2": 8, "gemma3": HEAD_DIM}
        self.models = {style: scratch / f"{style}.gguf" for style in self.n_rot}
        latent = {"attention.head_count_kv": 1, "attention.key_length": 8 + WIDTH, "attention.value_length": WIDTH,
                  "attention.kv_lora_rank": WIDTH, "attention.key_length_mla": 24, "attention.value_length_mla": 16}
        window = {"attention.sliding_window": 64, "attention.sliding_window_pattern": 2, "base": FULL_BASE}
        more = {"deepseek2": latent, "gemma3": window}
        for style, path in self.models.items():
            write_gguf(path, style, self.n_rot[style], **more.get(style, {}))

    def run(self, tool, *arguments):
        subprocess.run([self.tools / tool, "-q", "-f", *map(str, arguments)], check=True)

    def sequence(self, name, tokens, style="llama", seed=0, first=0, gap=0, **how):
        """A cache of `tokens` tokens, whose second half is `gap` positions later."""
        positions = first + np.arange(tokens) + gap * (np.arange(tokens) >= tokens // 2)
        path = self.scratch / f"{name}.{'ggsn' if how.get('session') else 'ggsq'}"
        write_state(path, positions, planes(positions, style, self.n_rot[style], seed), **how)
        return path

    def pack(self, source, *options, style="llama", dictionary=None):
        entry = self.folder / source.with_suffix(".xkv").name
        expected = self.folder / source.name
        given = ["-D", dictionary] if dictionary else []
        self.run("xkv-pack", *given, "--model", self.models[style], *options, source, "-o", entry)
        if "--lossless" in options:
            shutil.copyfile(source, expected)
        else:
            subprocess.run([sys.executable, DECODER, entry, *given, "-o", expected], check=True)

    def lossless(self):
        shuffled = np.random.default_rng(3).permutation(40)
        self.pack(self.sequence("lossless-f16", 40, cells=shuffled, transposed=True), "--lossless")
        self.pack(self.sequence("lossless-f32", 24, dtype="f32", version=4), "--lossless")
        self.pack(self.sequence("lossless-chunks", 260, first=1000, dtype="bf16"), "--lossless")
        heads, opaque = self.scratch / "lossless-heads.safetensors", self.scratch / "opaque.bin"
        write_heads(heads, planes(np.arange(30), "llama", HEAD_DIM, 0))
        opaque.write_bytes(b"no engine's file " * 9)
        for path in (heads, opaque):
            self.pack(path, "--lossless")

    def svd(self):
        svd = ("--profile", "svd", "--group", 2)
        ranks = ("--rank-k", 12, "--rank-v", 14)
        self.pack(self.sequence("svd-stored", 260, gap=50), *svd, *ranks)
        self.pack(self.sequence("svd-latent", 50, "deepseek2"), *svd, *ranks, style="deepseek2")
        self.pack(self.sequence("svd-zstd", 90, "qwen2", dtype="bf16"), *svd, *ranks, "--zstd-factors", style="qwen2")
        self.pack(self.sequence("svd-window", 60, dtype="f32", transposed=True, cells=np.arange(60)[::-1]), *svd,
                  "--half-factors", "--error", 0.05, "--sinks", 5, "--window", 7)
        self.pack(self.sequence("svdq-fine", 260, seed=7, gap=50), *svd, "--error", 0.004)
        self.pack(self.sequence("svdq-window", 70, "qwen2", seed=8, dtype="bf16", cells=np.arange(70)[::-1]), *svd,
                  "--error", 0.1, "--sinks", 3, "--window", 9, style="qwen2")

    def coded(self):
        dictionary = self.folder / "dictionary.xkvd"
        caches = [self.sequence(f"train{i}", 600, seed=10 + i) for i in range(3)]
        metric = self.scratch / "metric.safetensors"
        write_metric(metric)
        how = ("--model", self.models["llama"], "--metric", metric, "--group", 2, "--cross", 0)
        self.run("xkv-train", "-o", dictionary, *how, *caches)
        self.pack(self.sequence("dict-fine", 260, seed=5), "--quality", 70, dictionary=dictionary)
        self.pack(self.sequence("dict-window", 70, seed=6, first=300, cells=np.arange(70)[::-1]), "--quality", 40,
                  "--sinks", 3, "--window", 9, dictionary=dictionary)
        crossed = self.folder / "dictionary-cross.xkvd"
        apart = ("--model", self.models["llama"], "--group", 1, "--apart", "--cross", 12)
        self.run("xkv-train", "-o", crossed, *apart, *caches)
        self.pack(self.sequence("dict-cross", 260, seed=7), "--quality", 60, dictionary=crossed)
        scalar = ("--profile", "scalar", "--group", 2, "--error")
        self.pack(self.sequence("scalar", 100, "qwen2", gap=9), *scalar, 0.02, style="qwen2")
        self.pack(self.sequence("scalar-coarse", 40, dtype="f32"), *scalar, 0.3, "--sinks", 0)

    def blocks(self):
        shuffled = np.random.default_rng(9).permutation(40)
        self.pack(self.sequence("lossless-blocks", 40, dtype="q8_0", v_dtype="q4_0", cells=shuffled), "--lossless")
        # head_dim 16: no Hadamard rotation, so that RoPE is undone
        self.pack(self.sequence("scalar-blocks", 100, seed=11, gap=9, dtype="q8_0"), "--profile", "scalar", "--group", 2,
                  "--error", 0.02)
        dictionary = self.folder / "dictionary.xkvd"
        self.pack(self.sequence("dict-blocks", 70, seed=12, dtype="q4_0", version=4), "--quality", 60,
                  dictionary=dictionary)


    def states(self):
        old = self.sequence("lossless-session", 30, version=2, session="llama", outputs=2)
        self.pack(old, "--lossless")
        rotated = self.sequence("scalar-session", 40, version=4, session="llama")
        self.pack(rotated, "--profile", "scalar", "--error", 0.05)
        shuffled = np.random.default_rng(13).permutation(50)
        within = self.sequence("svdq-windows", 50, "gemma3", windows=50, cells=shuffled)
        self.pack(within, "--profile", "svd", "--group", 2, "--error", 0.02, style="gemma3")
        longer = self.sequence("scalar-windows", 100, "gemma3", windows=64, transposed=True)
        self.pack(longer, "--profile", "scalar", "--error", 0.05, style="gemma3")
        text = self.sequence("scalar-positions", 40, "qwen2", extension=bytes(12))
        self.pack(text, "--profile", "scalar", "--error", 0.05, style="qwen2")
        self.pack(self.sequence("scalar-slot", 40, served=True), "--profile", "scalar", "--error", 0.05)


def main():
    tools, folder = Path(sys.argv[1]).resolve(), Path(sys.argv[2])
    folder.mkdir()
    with tempfile.TemporaryDirectory() as scratch:
        maker = Maker(tools, folder, Path(scratch))
        maker.lossless()
        maker.svd()
        maker.coded()
        maker.blocks()
        maker.states()


if __name__ == "__main__":
    main()
