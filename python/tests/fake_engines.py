"""As much of vLLM, LMCache and SGLang as the adapters use, without engines and without torch: the interfaces that they
document, and their call sequences. With XKV_REAL_ENGINES in the environment (tests/engine/serving.sh) nothing is replaced,
and the same tests run against the real classes, with torch tensors."""
import abc
import dataclasses
import enum
import json
import os
import re
import shlex
import sys
import types
from typing import Any, List, Optional

import numpy as np
from conftest import REPOSITORY

REAL = bool(os.environ.get("XKV_REAL_ENGINES"))


def tensor(array):
    """What the engine has in place of a numpy array, over the same memory."""
    if not REAL:
        return array
    import torch
    return torch.from_numpy(array)


def install(*names):
    if not REAL:
        for name in names:
            MODULES[name]()


def _module(name, **members):
    parts = name.split(".")
    for i in range(1, len(parts) + 1):
        sys.modules.setdefault(".".join(parts[:i]), types.ModuleType(".".join(parts[:i])))
    for key, value in members.items():
        setattr(sys.modules[name], key, value)


# --- SGLang ---

@dataclasses.dataclass
class HiCacheStorageConfig:
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    attn_cp_rank: int
    attn_cp_size: int
    is_mla_model: bool
    enable_storage_metrics: bool
    is_page_first_layout: bool
    model_name: Optional[str]
    extra_config: Optional[dict] = None


@dataclasses.dataclass
class HiCacheStorageExtraInfo:
    prefix_keys: Optional[List[str]] = None


@dataclasses.dataclass
class PoolTransferResult:
    kv_hit_pages: int
    extra_pool_hit_pages: dict

    @classmethod
    def empty(cls):
        return cls(0, {})


class HiCacheStorage(abc.ABC):
    def register_mem_pool_host(self, mem_pool_host):
        self.mem_pool_host = mem_pool_host

    @abc.abstractmethod
    def get(self, key, target_location=None, target_sizes=None):
        ...

    @abc.abstractmethod
    def batch_get(self, keys, target_locations=None, target_sizes=None):
        ...

    @abc.abstractmethod
    def set(self, key, value=None, target_location=None, target_sizes=None):
        ...

    @abc.abstractmethod
    def batch_set(self, keys, values=None, target_locations=None, target_sizes=None):
        ...

    @abc.abstractmethod
    def exists(self, key):
        ...


def _sglang():
    _module("sglang.srt.mem_cache.hicache_storage", HiCacheStorage=HiCacheStorage, PoolTransferResult=PoolTransferResult,
            HiCacheStorageConfig=HiCacheStorageConfig, HiCacheStorageExtraInfo=HiCacheStorageExtraInfo)


# --- LMCache ---

class Serializer(abc.ABC):
    @abc.abstractmethod
    def serialize(self, src, dst, key):
        ...

    @abc.abstractmethod
    def estimate_serialized_size(self, layout_desc):
        ...


class Deserializer(abc.ABC):
    @abc.abstractmethod
    def deserialize(self, src, dst, key):
        ...


class AsyncSerdeProcessor:
    def __init__(self, serializer, deserializer, max_workers=1):
        self.serializer, self.deserializer, self.max_workers = serializer, deserializer, max_workers


SERDES: dict = {}


def _lmcache():
    _module("lmcache.v1.distributed.serde", Serializer=Serializer, Deserializer=Deserializer,
            AsyncSerdeProcessor=AsyncSerdeProcessor, register_serde_factory=SERDES.__setitem__)


# --- vLLM ---

class KVConnectorRole(enum.Enum):
    SCHEDULER = 0
    WORKER = 1


class KVConnectorMetadata(abc.ABC):  # noqa: B024
    pass


class SupportsHMA(abc.ABC):
    @abc.abstractmethod
    def request_finished_all_groups(self, request, block_ids):
        ...


class KVConnectorBase_V1(abc.ABC):
    def __init__(self, vllm_config, role, kv_cache_config):
        self._connector_metadata: Any = None
        self._kv_transfer_config = vllm_config.kv_transfer_config

    def bind_connector_metadata(self, metadata):
        self._connector_metadata = metadata

    def clear_connector_metadata(self):
        self._connector_metadata = None

    def _get_connector_metadata(self):
        assert self._connector_metadata is not None
        return self._connector_metadata

    @abc.abstractmethod
    def start_load_kv(self, forward_context, **kwargs):
        ...

    @abc.abstractmethod
    def wait_for_layer_load(self, layer_name):
        ...

    @abc.abstractmethod
    def save_kv_layer(self, layer_name, kv_layer, attn_metadata, **kwargs):
        ...

    @abc.abstractmethod
    def wait_for_save(self):
        ...

    @abc.abstractmethod
    def get_num_new_matched_tokens(self, request, num_computed_tokens):
        ...

    @abc.abstractmethod
    def update_state_after_alloc(self, request, blocks, num_external_tokens):
        ...

    @abc.abstractmethod
    def build_connector_meta(self, scheduler_output):
        ...


def _vllm():
    _module("vllm.distributed.kv_transfer.kv_connector.v1.base", KVConnectorBase_V1=KVConnectorBase_V1,
            KVConnectorMetadata=KVConnectorMetadata, KVConnectorRole=KVConnectorRole, SupportsHMA=SupportsHMA)


MODULES = {"sglang": _sglang, "lmcache": _lmcache, "vllm": _vllm}


# --- What users are told ---

def readme(option):
    """The JSON behind an option in the commands of README.md, which are complete ones."""
    text = (REPOSITORY / "README.md").read_text()
    section = text[text.index("\n### vLLM\n"):text.index("\n### What these three share\n")]
    found = []
    for block in re.findall(r"```sh\n(.*?)```", section, re.S):
        words = shlex.split(block, comments=True)
        found += [json.loads(value) for name, value in zip(words, words[1:]) if name == option]
    return found


# --- Genuine rows ---

def genuine(raw):
    """(K, V) [tokens, 3, 64] f16 of each layer of SmolLM2, K with the pairs (i, i + 32) of these engines in place of
    llama.cpp's (2i, 2i + 1)."""
    def heads(plane):
        return np.ascontiguousarray(plane.values.view(np.float16).reshape(-1, 3, 64))
    return [(np.concatenate([heads(k)[..., 0::2], heads(k)[..., 1::2]], -1), heads(v)) for k, v in zip(raw.K, raw.V)]


def safetensors(arrays):
    """A file with f16 arrays, [heads, tokens, dims] each."""
    header, data = {}, b""
    for name, array in arrays.items():
        header[name] = {"dtype": "F16", "shape": list(array.shape), "data_offsets": [len(data), len(data) + array.nbytes]}
        data += array.tobytes()
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


ROPE = {"rope_theta": 100000.0}  # of SmolLM2
