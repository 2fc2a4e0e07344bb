"""Reuse of stored prefixes in llama.cpp, through llama-cpp-python.

    llama = llama_cpp.Llama("model.gguf", n_ctx=4096)
    store = xkv.Store.open("prefixes")
    llama.set_cache(xkv.llama.LlamaCache(llama, store, ratio=16, dictionary="model.xkvd"))

or by hand: Prefixes(llama, store).restore(tokens) before a prompt is evaluated, and .save() after. From the command line:
python -m xkv.llama MODEL.gguf --store DIR --prompt-file FILE.

A cache is only found by the model, the cache settings and the adapter that made it, and only handed to the engine after
all checks. Whatever fails is a miss: the prompt is computed.
"""
from .cache import LlamaCache
from .identity import Identity
from .prefixes import Prefixes, Restored
from .state import EngineError, load_sequence, save_sequence

__all__ = ["EngineError", "Identity", "LlamaCache", "Prefixes", "Restored", "load_sequence", "save_sequence"]
