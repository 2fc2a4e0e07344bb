"""The engine's state files other than sequence files: sessions, and blobs of a sequence. Each is packed, restored byte
for byte, and cut; the engine loads what was cut and continues as after its own cut. Run through run.sh."""
import argparse
import ctypes
import os
import pathlib
import pydoc_data.topics
import sys
import tempfile

import llama_cpp as llama
import numpy as np

import engine
import models
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

    def run(self, context, tokens, name, kind, cuttable):
        save, load = KINDS[kind]
        path, entry, restored = (self.work / name for name in ("state", "entry.xkv", "restored"))
        context.clear()
        context.prefill(tokens[:PROMPT])
        save(context, path, tokens[:PROMPT])
        report = tools.tool("xkv-pack", "-f", "--lossless", "--model", self.model_file, path, "-o", entry)
        tools.tool("xkv-unpack", "-f", entry, "-o", restored)
        self.check(f"{name}, {kind}: {len(path.read_bytes())} bytes restored, {report['ratio']:.2f} times smaller",
                   restored.read_bytes() == path.read_bytes())
        load(context, restored)
        self.check(f"{name}, {kind}: the engine takes the restored file", context.used == PROMPT)
        self.first(context, tokens, f"{name}, {kind}", entry, load, cuttable)

    def first(self, context, tokens, what, entry, load, cuttable):
        """A cut file against the engine's own cut of its whole cache."""
        cut = self.work / "cut"
        if not cuttable:
            try:
                tools.tool("xkv-unpack", "-f", "--first", FIRST, entry, "-o", cut)
            except RuntimeError as refusal:
                self.check(f"{what}: whole prefix only", "whole prefix" in str(refusal))
            else:
                self.check(f"{what}: whole prefix only", False)
            return
        tools.tool("xkv-unpack", "-f", "--first", FIRST, entry, "-o", cut)
        following = tokens[FIRST:FIRST + FOLLOWING]
        context.clear()
        context.prefill(tokens[:PROMPT])
        context.cut(FIRST)
        expected = context.logits(following)
        load(context, cut)
        self.check(f"{what}: cut to {FIRST} tokens, it continues like the engine's cut",
                   context.used == FIRST and np.array_equal(expected, context.logits(following)))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--cache", type=pathlib.Path, required=True, help="folder for converted models")
    args = parser.parse_args()
    failed = 0
    model_file = models.joined_model("smollm2", args.cache)
    model = engine.Model(model_file)
    tokens = model.tokenize(TEXT)
    with tempfile.TemporaryDirectory(prefix="xkv-states-") as work:
        states = States(model_file, pathlib.Path(work))
        for name, kv_type, flash in (("f16", engine.F16, True), ("f16, V transposed", engine.F16, False)):
            context = engine.Context(model, 256, kv_type, flash)
            for kind in KINDS:
                states.run(context, tokens, name, kind, True)
            context.close()
        failed = states.failed
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
