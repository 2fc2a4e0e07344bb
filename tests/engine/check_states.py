"""The engine's state files: sequence files, sessions and blobs of a sequence, of a model with one cache and of one whose
layers have sliding windows. Each is packed, restored byte for byte, and cut; a cut file is what the engine saves after
its own cut. Run through run.sh."""
import argparse
import ctypes
import pathlib
import pydoc_data.topics
import sys
import tempfile

import llama_cpp as llama
import numpy as np

import engine
import models
import tiny_model
import tools

PROMPT, FOLLOWING, FIRST = 96, 16, 50
TEXT = pydoc_data.topics.topics["types"]


def save_session(context, path, tokens):
    array = (llama.llama_token * len(tokens))(*tokens)
    if not llama.llama_state_save_file(context.handle, str(path).encode(), array, len(tokens)):
        raise RuntimeError(f"the engine does not save {path}")


def load_session(context, path):
    context.clear()
    array, count = (llama.llama_token * context.capacity)(), ctypes.c_size_t()
    if not llama.llama_state_load_file(context.handle, str(path).encode(), array, context.capacity,
                                       ctypes.byref(count)):
        raise RuntimeError(f"the engine refuses {path}")
    context.used = count.value


def save_blob(context, path, _tokens):
    size = llama.llama_state_seq_get_size(context.handle, 0)
    image = (ctypes.c_uint8 * size)()
    written = llama.llama_state_seq_get_data(context.handle, image, size, 0)
    path.write_bytes(bytes(image)[:written])


def load_blob(context, path):
    context.clear()
    image = path.read_bytes()
    if llama.llama_state_seq_set_data(context.handle, (ctypes.c_uint8 * len(image)).from_buffer_copy(image), len(image),
                                      0) != len(image):
        raise RuntimeError(f"the engine refuses {path}")
    context.used = llama.llama_memory_seq_pos_max(context.memory, 0) + 1


KINDS = {
    "sequence": (engine.Context.save, engine.Context.load),
    "session": (save_session, load_session),
    "blob": (save_blob, load_blob),
}


class States:
    def __init__(self, model_file, work):
        self.model_file, self.work, self.failed = model_file, work, 0

    def check(self, what, passed):
        self.failed += not passed
        print("ok  " if passed else "FAIL", what, flush=True)

    def run(self, context, tokens, name, kind, prompt, first):
        """`first`: the prefix that is cut to; None where only the whole can be restored."""
        save, load = KINDS[kind]
        path, entry, restored = (self.work / file for file in ("state", "entry.xkv", "restored"))
        context.clear()
        context.prefill(tokens[:prompt])
        save(context, path, tokens[:prompt])
        report = tools.tool("xkv-pack", "-f", "--lossless", "--model", self.model_file, path, "-o", entry)
        tools.tool("xkv-unpack", "-f", entry, "-o", restored)
        self.check(f"{name}, {kind}: {len(path.read_bytes())} bytes restored from {report['entry_bytes']}",
                   restored.read_bytes() == path.read_bytes())
        load(context, restored)
        self.check(f"{name}, {kind}: the engine takes the restored file", context.used == prompt)
        if first:
            self.first(context, tokens, f"{name}, {kind}", entry, kind, prompt, first)
        else:
            self.refused(f"{name}, {kind}", entry)

    def first(self, context, tokens, what, entry, kind, prompt, first):
        """A cut file against the one that the engine saves after its own cut."""
        save, load = KINDS[kind]
        cut, native = self.work / "cut", self.work / "native"
        tools.tool("xkv-unpack", "-f", "--first", first, entry, "-o", cut)
        context.clear()
        context.prefill(tokens[:prompt])
        context.cut(first)
        save(context, native, tokens[:first])
        self.check(f"{what}: cut to {first} tokens, it is what the engine saves", cut.read_bytes() == native.read_bytes())
        following = tokens[first:first + FOLLOWING]
        load(context, native)
        expected = context.logits(following)
        load(context, cut)
        self.check(f"{what}: ... and continues as that", np.array_equal(expected, context.logits(following)))

    def refused(self, what, entry):
        try:
            tools.tool("xkv-unpack", "-f", "--first", 1, entry, "-o", self.work / "cut")
        except RuntimeError as refusal:
            self.check(f"{what}: whole prefix only", "whole prefix" in str(refusal))
        else:
            self.check(f"{what}: whole prefix only", False)

    def rotation(self, context, name):
        """Equal tokens have equal K and V before RoPE in every layer: rank 1, where RoPE is undone rightly."""
        tokens = [5] * (tiny_model.WINDOW - 8)
        path, entry = self.work / "state", self.work / "entry.xkv"
        context.clear()
        context.prefill(tokens)
        context.save(path, tokens)
        report = tools.tool("xkv-pack", "-f", "--profile", "svd", "--group", 1, "--rank-k", 1, "--rank-v", 1, "--sinks", 0,
                            "--model", self.model_file, path, "-o", entry)
        self.check(f"{name}: all layers are packed, K has rank 1 without its rotation: error {report['error']['K']:.4f}",
                   report["groups"] == 2 * tiny_model.LAYERS and report["error"]["K"] < 0.002)


def one_cache(cache, work):
    """SmolLM2, V in rows and transposed."""
    model_file = models.joined_model("smollm2", cache)
    model = engine.Model(model_file)
    tokens = model.tokenize(TEXT)
    states = States(model_file, work)
    for name, flash in (("f16", True), ("f16, V transposed", False)):
        context = engine.Context(model, 256, engine.F16, flash)
        for kind in KINDS:
            states.run(context, tokens, name, kind, PROMPT, FIRST)
        context.close()
    return states.failed


def tiny(work, architecture):
    """A model of random weights, and tokens."""
    model_file = work / f"{architecture}.gguf"
    tiny_model.write_model(model_file, architecture)
    tokens = [int(token) for token in np.random.default_rng(1).integers(3, tiny_model.VOCABULARY, 256)]
    return model_file, engine.Model(model_file), tokens


def several_positions(work):
    """Cells with an extension, as for images; the positions of text are equal."""
    model_file, model, tokens = tiny(work, "qwen2vl")
    states = States(model_file, work)
    context = engine.Context(model, 256, engine.F16, True)
    for kind in KINDS:
        states.run(context, tokens, "several positions", kind, PROMPT, FIRST)
    states.rotation(context, "several positions")
    context.close()
    return states.failed


def two_caches(work):
    """A prompt within the windows can be cut, a longer one is restored as a whole."""
    model_file, model, tokens = tiny(work, "gemma3")
    states = States(model_file, work)
    for name, flash in (("windows", True), ("windows, V transposed", False)):
        context = engine.Context(model, 256, engine.F16, flash)
        for kind in KINDS:
            states.run(context, tokens, name, kind, tiny_model.WINDOW - 4, tiny_model.WINDOW // 2)
            # a session also has the cells that the window has left behind
            states.run(context, tokens, f"{name}, longer prompt", kind, 3 * tiny_model.WINDOW,
                       2 * tiny_model.WINDOW if kind == "session" else None)
        if flash:
            states.rotation(context, name)
        context.close()
    return states.failed


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--cache", type=pathlib.Path, required=True, help="folder for converted models")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="xkv-states-") as folder:
        work = pathlib.Path(folder)
        failed = two_caches(work) + several_positions(work) + one_cache(args.cache, work)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
