"""xkv packs the KV caches of language models, restores them whole or in part, and finds them by their prompts.

    model = xkv.Model.from_gguf("model.gguf")
    report = xkv.pack_file("chat.ggsq", "chat.xkv", model=model, ratio=8)
    with xkv.open("chat.xkv") as entry:
        planes = entry.read(tokens=1000)       # [tokens, heads, head_dim] for K and V of each layer

Functions of the library run without the GIL; Ctrl-C stops them. Exceptions are subclasses of XkvError (xkv.errors).
"""
from . import errors
from ._call import set_memory_limit, set_threads, text
from ._native import lib as _lib
from .append import append
from .attention import Attention, AttentionInfo, merge
from .cache import Cache, Planes
from .dictionary import Dictionary, DictionaryInfo, train, train_file
from .entry import Entry, EntryInfo, GroupCoding, unpack_file
from .entry import open_entry as open  # noqa: A001
from .errors import XkvError
from .geometry import Geometry, Plane, Rope
from .groups import GroupInfo
from .hook import Hook, HookCounters, HookMatch, Saved
from .model import Metric, Model, ModelLayer
from .packing import Packed, PackReport, ProfileEstimate, pack, pack_file
from .pages import Pages
from .prompt import Media, Namespace, PageKey, Prompt, native_chain, sglang_chain, vllm_chain
from .store import Match, Store
from .store_types import CollectReport, PushReport, PutReport, RemoteStats, RepairReport, StoreItem, StoreStats, VerifyReport

__version__ = text(_lib.xkv_version())

__all__ = [
    "Attention", "AttentionInfo", "Cache", "CollectReport", "Dictionary", "DictionaryInfo", "Entry", "EntryInfo",
    "Geometry", "GroupCoding", "GroupInfo", "Hook", "HookCounters", "HookMatch", "Match", "Media", "Metric",
    "Model", "ModelLayer", "Namespace", "PackReport", "Packed", "PageKey", "Pages", "Plane", "Planes",
    "ProfileEstimate", "Prompt", "PushReport", "PutReport", "RemoteStats", "RepairReport", "Rope", "Saved", "Store",
    "StoreItem", "StoreStats", "VerifyReport", "XkvError", "append", "backends", "errors", "merge", "native_chain",
    "open", "pack", "pack_file", "set_memory_limit", "set_threads", "sglang_chain", "train", "train_file",
    "unpack_file", "vllm_chain",
]


def backends() -> str:
    """The code in use: "avx2, OpenBLAS ..."."""
    return f"{text(_lib.xkv_kernels_cpu_name())}, {text(_lib.xkv_kernels_blas_name())}"
