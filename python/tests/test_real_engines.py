"""The adapters between real classes of vLLM, LMCache and SGLang: their factories, keys, pools, schedulers. Opt-in:
tests/engine/serving.sh installs what they need without GPUs."""
import json

import fake_engines
import numpy as np
import pytest
from fake_engines import genuine

if not fake_engines.REAL:
    pytest.skip("XKV_REAL_ENGINES is not set: tests/engine/serving.sh", allow_module_level=True)

torch = pytest.importorskip("torch")


def both(cache):
    """[2, layers, tokens, heads, dims] of K and V."""
    return torch.from_numpy(np.stack([np.stack([pair[kind] for pair in cache]) for kind in range(2)]))


# --- SGLang ---

@pytest.fixture
def sglang_pool(raw):
    """A function that makes a MHATokenToKVPoolHost with room for more pages of 32 tokens than layers, which it needs."""
    from sglang.srt.mem_cache import device_pool_info as info
    from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost

    def make(layout):
        device = [torch.zeros((64, 3, 64), dtype=torch.float16) for _ in range(60)]
        pointers = torch.zeros(30, dtype=torch.uint64)
        buffers = info.KVBuffers(k=tuple(device[:30]), v=tuple(device[30:]), k_data_ptrs=pointers, v_data_ptrs=pointers,
                                 layout=info.KVBufferLayout.NHD)
        described = info.MHABufferInfo(buffers=buffers, page_size=32, head_num=3, head_dim=64, v_head_dim=64,
                                       dtype=torch.float16, device=torch.device("cpu"))
        return MHATokenToKVPoolHost(described, 2.0, 0, 32, layout, pin_memory=False, device_capacity_tokens=640, start_layer=0,
                                    end_layer=30)
    return make


@pytest.mark.parametrize("layout", ["layer_first", "page_first", "page_first_direct", "page_head"])
def test_sglang(tmp_path, raw, tokens, sglang_pool, layout):
    """Created by SGLang's factory, keys by its own hashes; pages put and read back by its pool's own functions."""
    from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig, HiCacheStorageExtraInfo
    from sglang.srt.mem_cache.storage.backend_factory import StorageBackendFactory
    from sglang.srt.mem_cache.utils import get_storage_hash_str

    pool, values = sglang_pool(layout), both(genuine(raw))
    options = {"backend_name": "xkv", "module_path": "xkv.sglang", "class_name": "XkvStorage", "interface_v1": 1,
               "store": str(tmp_path / "store")}
    config = HiCacheStorageConfig(0, 1, 0, 1, 0, 1, False, False, True, "smollm2", extra_config=options)
    backend = StorageBackendFactory.create_backend("dynamic", config, pool)
    backend.register_mem_pool_host(pool)
    backend.on_host_pools_registered()
    order = {"layer_first": (0, 1, 2, 3, 4), "page_first": (0, 2, 1, 3, 4), "page_first_direct": (0, 1, 2, 3, 4),
             "page_head": (0, 3, 2, 1, 4)}[layout]

    def page(i):
        return values[:, :, 32 * i:32 * i + 32].permute(order).contiguous().flatten()
    keys = get_storage_hash_str(tokens.tolist(), None, page_size=32)
    taken = pool.alloc(5 * 32)
    for i in range(5):
        pool.set_from_flat_data_page(int(taken[32 * i]), page(i))
    assert backend.batch_set_v1(keys, taken, HiCacheStorageExtraInfo(prefix_keys=[])) == [True] * 5
    assert backend.batch_exists(keys, HiCacheStorageExtraInfo(prefix_keys=[])) == 5
    others = pool.alloc(5 * 32)
    assert backend.batch_get_v1(keys, others, HiCacheStorageExtraInfo(prefix_keys=[])) == [True] * 5
    assert all(torch.equal(pool.get_data_page(int(others[32 * i])), page(i)) for i in range(5))
    target = backend.get(keys[2], pool.get_dummy_flat_data_page())
    assert torch.equal(target, page(2))
    backend.close()


def test_sglang_salts_are_apart(tokens):
    """Its keys begin with the salt."""
    from sglang.srt.mem_cache.utils import get_storage_hash_str

    import xkv
    assert get_storage_hash_str(tokens.tolist(), None, page_size=32) == [k.key.hex() for k in xkv.sglang_chain(tokens, 32)]


# --- LMCache ---

def lmcache_object(array):
    from lmcache.v1.memory_management import MemoryFormat, MemoryObjMetadata, TensorMemoryObj
    shape = torch.Size(array.shape)
    raw = array.contiguous().view(torch.uint8).flatten().clone()
    return TensorMemoryObj(raw, MemoryObjMetadata(shape, array.dtype, 0, raw.numel(), 1, fmt=MemoryFormat.KV_2LTD,
                                                  shapes=[shape], dtypes=[array.dtype]), None)


def lmcache_wait(descriptor):
    import select

    from lmcache.v1.platform import consume_fd
    poller = select.poll()
    poller.register(descriptor, select.POLLIN)
    assert poller.poll(180000)
    consume_fd(descriptor)


def lmcache_adapter(tmp_path, **options):
    from lmcache.v1.distributed.l2_adapters.factory import create_l2_adapter_from_registry
    from lmcache.v1.distributed.l2_adapters.native_plugin_l2_adapter import NativePluginL2AdapterConfig
    parameters = dict(store=str(tmp_path / "store"), layers=30, heads=3, head_dim=64, dtype="f16", **options)
    config = NativePluginL2AdapterConfig.from_dict({"module_path": "xkv.lmcache", "class_name": "XkvConnector",
                                                    "adapter_params": parameters})
    return create_l2_adapter_from_registry(config)


def test_lmcache_adapter(tmp_path, raw):
    """Created by LMCache's factory, with its keys, objects, bitmaps and descriptors."""
    from lmcache.v1.distributed.api import ObjectKey
    values = both(genuine(raw)).reshape(2, 30, 160, 192)
    chunks = [values[:, :, :64].contiguous(), values[:, :, 64:128].contiguous(), values[:, :, 128:].contiguous()]
    keys = [ObjectKey(bytes([i]) * 32, "smollm2", ObjectKey.ComputeKVRank(1, 0, 1, 0)) for i in range(3)]
    salted = ObjectKey(bytes(32), "smollm2", keys[0].kv_rank, cache_salt="tenant")
    adapter = lmcache_adapter(tmp_path)
    sources = [lmcache_object(chunk) for chunk in chunks]  # alive until they are stored, as LMCache's locks keep them
    task = adapter.submit_store_task(keys, sources)
    lmcache_wait(adapter.get_store_event_fd())
    assert adapter.pop_completed_store_tasks()[task].is_successful()
    task = adapter.submit_lookup_and_lock_task([*keys, salted], {})
    lmcache_wait(adapter.get_lookup_and_lock_event_fd())
    found = adapter.query_lookup_and_lock_result(task)
    assert [found.test(i) for i in range(4)] == [True, True, True, False]
    targets = [lmcache_object(torch.zeros_like(chunk)) for chunk in chunks]
    task = adapter.submit_load_task(keys, targets)
    lmcache_wait(adapter.get_load_event_fd())
    loaded = adapter.query_load_result(task)
    assert [loaded.test(i) for i in range(3)] == [True] * 3
    assert all(torch.equal(target.tensor, chunk) for target, chunk in zip(targets, chunks))
    adapter.submit_unlock(keys)
    adapter.delete(keys[:1])
    task = adapter.submit_lookup_and_lock_task(keys, {})
    lmcache_wait(adapter.get_lookup_and_lock_event_fd())
    found = adapter.query_lookup_and_lock_result(task)
    assert [found.test(i) for i in range(3)] == [False, True, True]
    adapter.close()


@pytest.mark.parametrize("options, bound", [({}, 0.0), ({"pack": {"error": 0.1}, "heads": 3}, 0.12)])
def test_lmcache_serde(raw, options, bound):
    """Made from LMCache's configuration, run by its processor's threads."""
    from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey
    from lmcache.v1.distributed.serde import SerdeConfig, create_serde_processor

    import xkv.lmcache.serde  # noqa: F401
    chunk = both(genuine(raw)).reshape(2, 30, 160, 192).contiguous()
    processor = create_serde_processor(SerdeConfig("xkv", {"max_workers": 2, **options}))
    size = processor.estimate_serialized_size(MemoryLayoutDesc([chunk.shape], [chunk.dtype]))
    packed, target = lmcache_object(torch.zeros(size, dtype=torch.uint8)), lmcache_object(torch.zeros_like(chunk))
    key = [ObjectKey(bytes(32), "smollm2", 0)]
    task = processor.submit_serialize([lmcache_object(chunk)], [packed], key)
    lmcache_wait(processor.get_serialize_event_fd())
    assert processor.query_serialize_result(task) is True
    assert packed.get_size() < (chunk.nbytes / 3 if options else chunk.nbytes / 1.1), "what LMCache stores"
    task = processor.submit_deserialize([packed], [target], key)
    lmcache_wait(processor.get_deserialize_event_fd())
    assert processor.query_deserialize_result(task) is True
    error = (target.tensor.float() - chunk.float()).norm() / chunk.float().norm()
    assert error <= bound and (error > 0) == bool(options)
    processor.close()


# --- vLLM ---

CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 192, "intermediate_size": 256,
          "num_hidden_layers": 30, "num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49152,
          "max_position_embeddings": 2048, "rope_theta": 100000.0, "torch_dtype": "float16", "rms_norm_eps": 1e-5}
BLOCKS, BLOCK = 64, 16


class VllmEngine:
    """vLLM's own scheduler, block pool and connector factory; in place of a model, rows that are put into the blocks."""

    def __init__(self, folder, model, **transfer):
        from vllm.config import CacheConfig, DeviceConfig, KVTransferConfig, ModelConfig, SchedulerConfig, VllmConfig
        from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
        from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
        from vllm.v1.core.sched.scheduler import Scheduler
        from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
        from vllm.v1.structured_output import StructuredOutputManager

        settings = {"kv_connector": "XkvConnector", "kv_connector_module_path": "xkv.vllm", "kv_role": "kv_both",
                    "kv_load_failure_policy": "recompute", **transfer}
        extra = {"store": str(folder), **settings.pop("kv_connector_extra_config", {})}
        scheduler = SchedulerConfig(max_num_batched_tokens=64, max_num_seqs=4, max_model_len=2048, is_encoder_decoder=False,
                                    enable_chunked_prefill=True)
        self.config = VllmConfig(
            device_config=DeviceConfig(device="cpu"),
            scheduler_config=scheduler, model_config=ModelConfig(model=str(model), tokenizer=str(model), dtype="float16",
                                                                 skip_tokenizer_init=True),
            cache_config=CacheConfig(block_size=BLOCK, enable_prefix_caching=True),
            kv_transfer_config=KVTransferConfig(kv_connector_extra_config=extra, **settings))
        self.config.cache_config.num_gpu_blocks = BLOCKS
        names = [f"model.layers.{i}.self_attn.attn" for i in range(30)]
        spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=3, head_size=64, dtype=torch.float16)
        kv = KVCacheConfig(num_blocks=BLOCKS, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(names, spec)])
        self.scheduler = Scheduler(self.config, kv, StructuredOutputManager(self.config), block_size=BLOCK)
        init_none_hash(sha256)
        self.hasher = get_request_block_hasher(BLOCK, sha256)
        self.worker = KVConnectorFactory.create_connector(self.config, KVConnectorRole.WORKER, kv)
        # The logical view [B, H, N, C] of memory in the order of vLLM's layout LBNHC.
        self.caches = {name: torch.zeros((BLOCKS, BLOCK, 3, 128), dtype=torch.float16).permute(0, 2, 1, 3) for name in names}
        self.worker.register_kv_caches(self.caches)
        self.computed = {}

    def add(self, name, tokens, max_tokens=2):
        from vllm.sampling_params import SamplingParams
        from vllm.v1.request import Request
        request = Request(name, list(map(int, tokens)), SamplingParams(max_tokens=max_tokens, ignore_eos=True), None,
                          block_hasher=self.hasher)
        self.scheduler.add_request(request)
        return request

    def blocks(self, request):
        return self.scheduler.kv_cache_manager.get_block_ids(request.request_id)[0]

    def step(self, rows):
        """Schedule, run "the model" (which puts rows[request] into their slots), and give the outputs back."""
        from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
        output = self.scheduler.schedule()
        self.worker.bind_connector_metadata(output.kv_connector_metadata)
        self.worker.start_load_kv(None)
        names = list(output.num_scheduled_tokens)
        for name in names:
            self.forward(name, output, rows)
        self.worker.wait_for_save()
        results = self.worker.get_transfer_results(output.finished_req_ids)
        transfer = KVConnectorOutput(finished_sending=results.finished_sending, finished_recving=results.finished_recving,
                                     invalid_block_ids=self.worker.get_block_ids_with_load_errors())
        self.worker.clear_connector_metadata()
        done = ModelRunnerOutput(req_ids=names, req_id_to_index={name: i for i, name in enumerate(names)},
                                 sampled_token_ids=[self.sampled(name) for name in names], logprobs=None,
                                 prompt_logprobs_dict={}, pooler_output=[], kv_connector_output=transfer)
        self.scheduler.update_from_output(output, done)

    def forward(self, name, output, rows):
        request = self.scheduler.requests[name]
        count = output.num_scheduled_tokens[name]
        first = request.num_computed_tokens - count  # schedule() counts them already
        blocks = self.blocks(request)
        for token in range(first, min(first + count, rows[name].shape[2])):
            for layer, cache in enumerate(self.caches.values()):
                cache[blocks[token // BLOCK], :, token % BLOCK] = torch.cat(list(rows[name][:, layer, token]), -1)
        self.computed.setdefault(name, []).append((first, count))

    def sampled(self, name):
        request = self.scheduler.requests[name]
        return [7] if request.num_computed_tokens >= request.num_tokens else []

    def run(self, rows):
        while self.scheduler.has_unfinished_requests():
            self.step(rows)

    def held(self, blocks, tokens):
        parts = [cache[list(blocks)].permute(0, 2, 1, 3).reshape(-1, 3, 128)[:tokens] for cache in self.caches.values()]
        return torch.stack([torch.stack([part[..., :64] for part in parts]), torch.stack([part[..., 64:] for part in parts])])

    def close(self):
        self.worker.shutdown()
        self.scheduler.shutdown()


@pytest.fixture
def vllm_engine(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(CONFIG))
    engines = []

    def make(**transfer):
        engines.append(VllmEngine(tmp_path / "store", model, **transfer))
        return engines[-1]
    yield make
    for engine in engines:
        engine.close()


@pytest.mark.parametrize("load_async", [True, False])
def test_vllm(vllm_engine, raw, tokens, load_async):
    """Two engines, one after the other: prefill in chunks of 64 tokens, then a load into the blocks that vLLM chose."""
    rows = both(genuine(raw))
    extra = {"kv_connector_extra_config": {"load_async": load_async}}
    first = vllm_engine(**extra)
    first.add("a", tokens)
    first.run({"a": rows})
    assert first.computed["a"][:3] == [(0, 64), (64, 64), (128, 32)]
    first.close()
    second = vllm_engine(**extra)
    assert second.worker._identity.rope is not None
    other = second.add("other", range(1000, 1100))
    longer = second.add("b", [*tokens, 5, 6, 7])
    seen = {}
    while second.scheduler.has_unfinished_requests():
        second.step({"b": torch.zeros((2, 30, 163, 3, 64), dtype=torch.float16), "other": rows[:, :, :100]})
        if longer.request_id not in seen and "b" in second.computed:
            seen["b"] = second.held(second.blocks(longer), 160)
    assert second.computed["b"][0] == (160, 3), "the first 160 tokens were loaded, not computed"
    assert torch.equal(seen["b"], rows)
    assert other.num_output_tokens == 2 and longer.num_output_tokens == 2
    assert not second.worker.failures.counts and not second.scheduler.connector.failures.counts


@pytest.mark.parametrize("load_async", [True, False])
def test_vllm_recomputes_what_fails(vllm_engine, tmp_path, raw, tokens, load_async):
    rows = both(genuine(raw))
    first = vllm_engine()
    first.add("a", tokens)
    first.run({"a": rows})
    first.close()
    for blob in (tmp_path / "store" / "blobs").iterdir():
        data = bytearray(blob.read_bytes())
        data[len(data) // 2] ^= 1
        blob.write_bytes(data)
    second = vllm_engine(kv_connector_extra_config={"load_async": load_async})
    longer = second.add("b", [*tokens, 5, 6, 7])
    second.run({"b": torch.cat([rows, rows[:, :, :3]], 2)})
    assert longer.num_output_tokens == 2
    assert {first for first, _ in second.computed["b"]} >= {0, 64, 128}, "all of it is computed"
    assert second.worker.failures.counts["load: ChecksumError"] == 1


def test_vllm_rope_is_that_of_transformers():
    """Frequencies against those that transformers computes for a model."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    from xkv._serving import rope_of_config
    scaling = dict(rope_type="llama3", factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0,
                   original_max_position_embeddings=8192, rope_theta=500000.0)
    config = LlamaConfig(hidden_size=2048, num_attention_heads=32, head_dim=64, rope_theta=500000.0, rope_scaling=scaling,
                         rope_parameters=scaling)
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    assert np.allclose(rope_of_config(config.to_dict(), 64).inv_freq, expected.numpy(), rtol=1e-6)


def test_vllm_refuses_hybrids(vllm_engine):
    """Of its real specifications of caches."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, SlidingWindowSpec

    from xkv.vllm.caches import Layout
    common = dict(block_size=BLOCK, num_kv_heads=3, head_size=64, dtype=torch.float16)
    groups = [KVCacheGroupSpec(["a.0"], FullAttentionSpec(**common)),
              KVCacheGroupSpec(["a.1"], SlidingWindowSpec(**common, sliding_window=64))]
    for chosen, reason in ((groups, "2 groups"), (groups[1:], "SlidingWindowSpec")):
        with pytest.raises(ValueError, match=reason):
            Layout(KVCacheConfig(num_blocks=4, kv_cache_tensors=[], kv_cache_groups=chosen), None, "BHNC", BLOCK)
    fp8 = KVCacheGroupSpec(["a.0"], FullAttentionSpec(**{**common, "dtype": torch.uint8}))
    with pytest.raises(ValueError, match="fp8"):
        Layout(KVCacheConfig(num_blocks=4, kv_cache_tensors=[], kv_cache_groups=[fp8]), None, "BHNC", BLOCK)
