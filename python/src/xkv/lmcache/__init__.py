"""LMCache (`lmcache server`): a storage for its second level, and a serde for any other one.

The storage is a `native_plugin`; each object, the KV of a chunk of tokens in all layers, becomes an entry:

    {"type": "native_plugin", "module_path": "xkv.lmcache", "class_name": "XkvConnector",
     "adapter_params": {"store": "/var/cache/xkv", "cap": 100000000000, "layers": 32, "heads": 8, "head_dim": 128,
                        "dtype": "bf16", "model": "/models/llama", "pack": {"error": 0.1}}}

The serde packs the same objects for another storage (fs, s3, ...); see xkv.lmcache.serde."""
from .connector import XkvConnector

__all__ = ["XkvConnector"]
