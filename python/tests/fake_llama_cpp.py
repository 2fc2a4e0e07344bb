"""As much of llama-cpp-python as xkv.llama uses, without an engine: a context is the bytes of a memory state. The real one
is tested by tests/engine/live.py."""
import ctypes
import struct
import sys
import types

import numpy as np

PREFIX = 0xAF143CD8


class Context:
    """One sequence. `with_prefix`: as engines since build 9049."""

    def __init__(self, state=b"\x01\0\0\0\0\0\0\0", with_prefix=True):
        self.state, self.with_prefix, self.refuse = state, with_prefix, False
        self.whole, self.cut, self.cuts = b"", None, True  # whole: with what windows have left behind

    def data(self, sequence):
        return (struct.pack("<Ii", PREFIX, sequence) if self.with_prefix else b"") + self.state


class Params(types.SimpleNamespace):
    pass


class Llama:
    """What a user has."""

    def __init__(self, path, state=None, n_ctx=512, **settings):
        self.model_path, self.ctx, self._n_ctx = str(path), Context(*([] if state is None else [state])), n_ctx
        values = dict(type_k=1, type_v=1, flash_attn_type=1, kv_unified=False, n_seq_max=1, swa_full=False,
                      rope_scaling_type=-1, rope_freq_base=0.0, rope_freq_scale=0.0, yarn_ext_factor=-1.0,
                      yarn_attn_factor=1.0, yarn_beta_fast=32.0, yarn_beta_slow=1.0, yarn_orig_ctx=0)
        self.context_params = Params(**{**values, **settings})
        self.metadata = {"general.architecture": "llama"}
        self.input_ids, self.n_tokens, self.lora_path, self.lora_scale = np.zeros(n_ctx, np.intc), 0, None, 1.0

    def n_ctx(self):
        return self._n_ctx

    def n_vocab(self):
        return 100


class LlamaState:
    def __init__(self, input_ids, scores, n_tokens, llama_state, llama_state_size, seed):
        self.input_ids, self.scores, self.n_tokens = input_ids, scores, n_tokens
        self.llama_state, self.llama_state_size, self.seed = llama_state, llama_state_size, seed


def get_size(ctx, sequence):
    return len(ctx.data(sequence))


def get_data(ctx, target, size, sequence):
    data = ctx.data(sequence)
    ctypes.memmove(target, data, min(len(data), size))
    return len(data)


def set_data(ctx, source, size, sequence):
    data = bytes(source)[:size]
    if ctx.refuse:
        ctx.state = b"half a sequence"
        return 0
    if ctx.with_prefix:
        assert struct.unpack_from("<Ii", data) == (PREFIX, sequence)
        data = data[8:]
    ctx.state = data
    return size


def remove(ctx, sequence, first, last):
    """ctx.cut: behind which token; 0 or less forgets all. An engine that does not cut still forgets all."""
    ctx.cut = first
    if first <= 0:
        ctx.state = b"\x01\0\0\0\0\0\0\0"
    return ctx.cuts or first <= 0


def get_context_size(ctx):
    return 4 + 5 + len(ctx.whole or ctx.state)


def get_context_data(ctx, target, size):
    data = struct.pack("<I", 5) + b"llama" + (ctx.whole or ctx.state)
    ctypes.memmove(target, data, min(len(data), size))
    return len(data)


def module():
    fake = types.ModuleType("llama_cpp")
    fake.is_fake = True
    fake.LLAMA_STATE_SEQ_MAGIC, fake.LLAMA_STATE_SEQ_VERSION, fake.LLAMA_DEFAULT_SEED = 0x67677371, 3, 0xFFFFFFFF
    fake.llama_state_seq_get_size, fake.llama_state_seq_get_data, fake.llama_state_seq_set_data = get_size, get_data, set_data
    fake.llama_get_memory, fake.llama_memory_seq_rm = lambda ctx: ctx, remove
    fake.llama_state_get_size, fake.llama_state_get_data = get_context_size, get_context_data
    fake.LlamaState = LlamaState
    cache = types.ModuleType("llama_cpp.llama_cache")
    cache.BaseLlamaCache = type("BaseLlamaCache", (), {"__init__": lambda self: None})
    return {"llama_cpp": fake, "llama_cpp.llama_cache": cache}


def install():
    """In place of the real package, if there is one; once for all tests."""
    if hasattr(sys.modules.get("llama_cpp"), "is_fake"):
        return
    for name in [name for name in sys.modules if name.partition(".")[0] == "llama_cpp" or name.startswith("xkv.llama")]:
        del sys.modules[name]
    sys.modules.update(module())
