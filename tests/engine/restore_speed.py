"""Restoring a packed prompt against the engine's prefill of it, turn about in one process: the library restores the
engine's file in memory, with dictionary and entry already opened, as an engine that links it would. Run through run.sh:
run.sh speed MODEL --dict FILE [--tokens N...] [--json FILE]."""
import argparse
import ctypes
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import tempfile
import time

import engine
import models
from sequence_file import SequenceFile
from test_engine import raw16_bytes
from texts import default_texts
from tools import tool


class Input(ctypes.Structure):
    """xkv_input of <xkv/format.h>."""
    _fields_ = [("user", ctypes.c_void_p), ("size", ctypes.c_uint64), ("read", ctypes.c_void_p),
                ("name", ctypes.c_char_p), ("prefetch", ctypes.c_void_p), ("file", ctypes.c_void_p)]


class Library:
    """As much of libxkv as it takes to restore an entry into memory."""

    def __init__(self):
        folder = pathlib.Path(os.environ["XKV_BIN"]).parent
        self.lib = ctypes.CDLL(str(folder / "libxkv.so"))
        self.lib.xkv_ctx_error.restype = ctypes.c_char_p
        self.ctx = self.made("xkv_ctx_create", None)

    def call(self, name, *arguments):
        status = getattr(self.lib, name)(*arguments)
        if status != 0:
            raise RuntimeError(f"{name}: status {status}: {self.lib.xkv_ctx_error(self.ctx).decode()}")

    def made(self, name, *arguments):
        made = ctypes.c_void_p()
        self.call(name, *arguments, ctypes.byref(made))
        return made

    def opened(self, path):
        file = Input()
        self.call("xkv_input_open", self.ctx, str(path).encode(), ctypes.byref(file))
        return file

    def open_entry(self, path, dictionary):
        self.inputs = self.opened(dictionary), self.opened(path)
        dictionary = self.made("xkv_dict_open", self.ctx, ctypes.byref(self.inputs[0]), 0)
        self.entry = self.made("xkv_entry_open", self.ctx, ctypes.byref(self.inputs[1]))
        self.call("xkv_entry_attach", self.ctx, self.entry, dictionary)
        size = ctypes.c_uint64()
        self.call("xkv_entry_restored_size", self.ctx, self.entry, 0, ctypes.byref(size))
        self.image = ctypes.create_string_buffer(size.value)

    def restore(self):
        self.call("xkv_entry_restore", self.ctx, self.entry, 0, None, None, self.image,
                  ctypes.c_uint64(len(self.image)))


def seconds_of(action):
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def measure(args, model, model_file, text, length):
    """A row of JSON: medians over all rounds."""
    tokens = model.tokenize(text[:12 * length])[:length]
    context = engine.Context(model, length + 8, engine.F16, True)
    with tempfile.TemporaryDirectory(prefix="xkv-speed-") as work:
        raw, entry = pathlib.Path(work, "raw.ggsq"), pathlib.Path(work, "entry.xkv")
        context.prefill(tokens)
        context.save(raw, tokens)
        tool("xkv-pack", "-o", entry, "-D", args.dict, "--model", model_file, "--ratio", args.ratio, raw)
        library = Library()
        library.open_entry(entry, args.dict)
        library.restore()
        prefill, restore = [], []
        for _ in range(args.rounds):
            context.clear()
            prefill.append(seconds_of(lambda: context.prefill(tokens)))
            restore.append(seconds_of(library.restore))
        ratio = raw16_bytes(SequenceFile(raw)) / entry.stat().st_size
    context.close()
    row = dict(tokens=length, ratio=ratio, prefill_seconds=statistics.median(prefill),
               restore_seconds=statistics.median(restore), rounds=args.rounds)
    print("{model}, {tokens} tokens at {ratio:.2f}x: prefill {prefill_seconds:.3f} s, restore {restore_seconds:.3f} s, "
          "{times:.1f} times faster (medians of {rounds})".format(
              model=args.model, times=row["prefill_seconds"] / row["restore_seconds"], **row), flush=True)
    return row


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model", choices=models.SOURCES)
    parser.add_argument("--cache", type=pathlib.Path, required=True, help="folder for converted models and texts")
    parser.add_argument("--dict", type=pathlib.Path, required=True, help="dictionary (.xkvd)")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024], help="lengths of the prompt")
    parser.add_argument("--ratio", type=float, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=pathlib.Path, help="write the results here, for python -m xkv.fidelity --from")
    args = parser.parse_args()

    model_file = models.joined_model(args.model, args.cache)
    model = engine.Model(str(model_file))  # as it is used: with quantized weights
    text = default_texts(args.cache)["shrew"]
    speeds = [measure(args, model, model_file, text, length) for length in args.tokens]
    if args.json:
        results = dict(model=args.model, engine="llama-cpp-python " + importlib.metadata.version("llama-cpp-python"),
                       machine=f"{platform.machine()}, {os.cpu_count()} cores", speeds=speeds)
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
