"""vLLM: a KV connector, loaded by its name.

    --kv-transfer-config '{"kv_connector": "XkvConnector", "kv_connector_module_path": "xkv.vllm", "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"store": "/var/cache/xkv", "cap": 100000000000, "pack": {"error": 0.1}}}'

The scheduler finds the longest stored prefix of a prompt, workers restore it into blocks of the paged cache and save
prompts once all of their tokens are computed, however many steps that took. With "recompute" a prefix that cannot be
restored is computed; vLLM's default is to fail the request."""
from .connector import XkvConnector

__all__ = ["XkvConnector"]
