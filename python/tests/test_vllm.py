"""xkv.vllm: what vLLM's scheduler and model runner call, in their order, on paged caches."""
import importlib
import pickle
import time
import types

import fake_engines
import numpy as np
import pytest
from fake_engines import ROPE, genuine

fake_engines.install("vllm")

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole  # noqa: E402

import xkv  # noqa: E402
import xkv.vllm  # noqa: E402
from xkv.vllm.caches import Caches  # noqa: E402

BLOCK, BLOCKS = 16, 64
# Of one layer: how the tensor is made, and (blocks, slots, heads, dims) views of K and V of it.
LAYOUTS = {
    "BHNC": (lambda: np.zeros((BLOCKS, 3, BLOCK, 128), np.float16),
             lambda t: [np.moveaxis(t[..., :64], 1, 2), np.moveaxis(t[..., 64:], 1, 2)]),
    # The same view of memory in which heads follow slots: the default of vLLM since 0.26.
    "BHNC of BNHC": (lambda: np.moveaxis(np.zeros((BLOCKS, BLOCK, 3, 128), np.float16), 2, 1),
                     lambda t: [np.moveaxis(t[..., :64], 1, 2), np.moveaxis(t[..., 64:], 1, 2)]),
    "KBNHD": (lambda: np.zeros((2, BLOCKS, BLOCK, 3, 64), np.float16), lambda t: [t[0], t[1]]),
    "BKNHD": (lambda: np.zeros((BLOCKS, 2, BLOCK, 3, 64), np.float16), lambda t: [t[:, 0], t[:, 1]]),
}


def named(kind, **fields):
    return type(kind, (types.SimpleNamespace,), {})(**fields)


def cache_config(layers, kind="FullAttentionSpec", **changes):
    spec = dict(block_size=BLOCK, num_kv_heads=3, head_size=64, head_size_v=64, dtype="torch.float16")
    names = [f"model.layers.{i}.self_attn.attn" for i in reversed(range(layers))]
    group = types.SimpleNamespace(layer_names=names, kv_cache_spec=named(kind, **{**spec, **changes}))
    return types.SimpleNamespace(num_blocks=BLOCKS, kv_cache_tensors=[], kv_cache_groups=[group])


def engine_config(folder, rank=0, world=1, hf=None, **extra):
    hf_config = types.SimpleNamespace(**(hf or ROPE))
    hf_config.to_dict = lambda: vars(hf_config)
    parallel = types.SimpleNamespace(rank=rank, world_size=world, tensor_parallel_size=world, pipeline_parallel_size=1)
    transfer = types.SimpleNamespace(kv_connector_extra_config={"store": str(folder), **extra}, is_kv_producer=True)
    return types.SimpleNamespace(
        kv_transfer_config=transfer, parallel_config=parallel, cache_config=types.SimpleNamespace(block_size=BLOCK),
        model_config=types.SimpleNamespace(model="smollm2", revision=None, dtype="float16", quantization=None,
                                           hf_text_config=hf_config))


def request(name, tokens, **fields):
    return types.SimpleNamespace(**{**dict(request_id=name, prompt_token_ids=list(map(int, tokens)), prompt_embeds=None,
                                           mm_features=[], lora_request=None, cache_salt=None,
                                           skip_reading_prefix_cache=False), **fields})


class Engine:
    """One scheduler and the workers of all ranks, as far as a connector sees them."""

    def __init__(self, folder, layers=30, world=1, layout="BHNC of BNHC", **extra):
        axes = layout.partition(" ")[0]
        options = extra if axes == "BHNC" else {"layout": axes, **extra}
        self.layout = layout
        self.tensors = [{f"model.layers.{i}.self_attn.attn": LAYOUTS[layout][0]() for i in range(layers)} for _ in range(world)]
        self.scheduler = xkv.vllm.XkvConnector(engine_config(folder, 0, world, **options), KVConnectorRole.SCHEDULER,
                                               cache_config(layers))
        self.workers = []
        for rank, tensors in enumerate(self.tensors):
            worker = xkv.vllm.XkvConnector(engine_config(folder, rank, world, **options), KVConnectorRole.WORKER,
                                           cache_config(layers))
            worker.register_kv_caches({name: fake_engines.tensor(tensor) for name, tensor in tensors.items()})
            self.workers.append(worker)

    def close(self):
        for connector in [*self.workers, self.scheduler]:
            connector.shutdown()

    def flush(self):
        for worker in self.workers:
            worker._worker.hook.flush(60)

    def parts(self, rank=0):
        """K and V of each layer, [blocks, slots, heads, dims]."""
        return [LAYOUTS[self.layout][1](tensor) for tensor in self.tensors[rank].values()]

    def fill(self, cache, blocks, rank=0):
        """The forward pass: rows of a prompt."""
        for parts, pair in zip(self.parts(rank), cache):
            for part, values in zip(parts, pair):
                padded = np.zeros((len(blocks) * BLOCK, 3, 64), np.float16)
                padded[:len(values)] = values
                part[list(blocks)] = padded.reshape(-1, BLOCK, 3, 64)

    def rows(self, blocks, count, rank=0):
        return [[part[list(blocks)].reshape(-1, 3, 64)[:count] for part in parts] for parts in self.parts(rank)]

    def step(self, new=(), cached=(), scheduled=None, resumed=(), finished=()):
        """One step of the engine: the metadata of the scheduler, pickled to the workers. Their outputs."""
        output = types.SimpleNamespace(
            scheduled_new_reqs=[types.SimpleNamespace(req_id=r, block_ids=(list(b),), num_computed_tokens=n)
                                for r, b, n in new],
            scheduled_cached_reqs=types.SimpleNamespace(
                req_ids=[r for r, _, _ in cached], resumed_req_ids=set(resumed),
                new_block_ids=[None if b is None else (list(b),) for _, b, _ in cached],
                num_computed_tokens=[n for _, _, n in cached]),
            num_scheduled_tokens=scheduled or {}, finished_req_ids=set(finished))
        metadata = self.scheduler.build_connector_meta(output)
        results = []
        for worker in self.workers:
            worker.bind_connector_metadata(pickle.loads(pickle.dumps(metadata)))
            worker.start_load_kv(None)
            worker.wait_for_layer_load("model.layers.0.self_attn.attn")
            worker.save_kv_layer("model.layers.0.self_attn.attn", None, None)
            worker.wait_for_save()
            results.append((worker.get_finished(set(finished))[1], worker.get_block_ids_with_load_errors()))
            worker.clear_connector_metadata()
        return results

    def prefill(self, wanted, cache, blocks, ranks=None):
        """A request that computes its whole prompt in one step."""
        assert self.scheduler.get_num_new_matched_tokens(wanted, 0)[0] == 0
        self.allocated(wanted, blocks, 0)
        for rank in range(len(self.workers)):
            self.fill(cache if ranks is None else ranks[rank], blocks, rank)
        count = len(wanted.prompt_token_ids)
        self.step([(wanted.request_id, blocks, 0)], scheduled={wanted.request_id: count})
        self.scheduler.request_finished(wanted, list(blocks))
        self.flush()

    def allocated(self, wanted, blocks, external):
        self.scheduler.update_state_after_alloc(wanted, types.SimpleNamespace(get_block_ids=lambda: (list(blocks),)), external)

    def load(self, wanted, blocks, external):
        """Allocate, and step until all workers are done with it; blocks that failed."""
        self.allocated(wanted, blocks, external)
        invalid, waiting, end = set(), set(range(len(self.workers))), time.monotonic() + 300
        while waiting and time.monotonic() < end:
            for rank, (done, failed) in enumerate(self.step()):
                invalid |= failed
                waiting -= {rank} if done is None or wanted.request_id in done else set()
        assert not waiting
        return invalid


@pytest.fixture
def start(tmp_path):
    engines = []

    def make(**options):
        engines.append(Engine(tmp_path / "store", **options))
        return engines[-1]
    yield make
    for engine in engines:
        engine.close()


FIRST, SECOND = [9, 3, 40, 41, 8, 7, 1, 0, 33, 20], [50, 10, 12, 11, 30, 31, 2, 4, 5, 6]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("load_async", [True, False])
def test_a_prompt_comes_back(start, raw, tokens, layout, load_async):
    """Computed by one engine, restored into other blocks of another one: bit for bit."""
    cache = genuine(raw)
    engine = start(layout=layout, load_async=load_async)
    engine.prefill(request("a", tokens), cache, FIRST)
    engine.close()
    other = start(layout=layout, load_async=load_async)
    longer = request("b", [*tokens, 5, 6, 7])
    assert other.scheduler.get_num_new_matched_tokens(longer, 0) == (160, load_async)
    assert other.load(longer, [*SECOND, 21], 160) == set()
    for got, pair in zip(other.rows(SECOND, 160), cache):
        assert all(np.array_equal(a, b) for a, b in zip(got, pair))
    assert other.workers[0]._worker._layout.names == list(other.tensors[0]), "layers in order, not layer 10 behind layer 1"
    for parts in other.parts():
        assert not any(parts[0][[i for i in range(BLOCKS) if i not in SECOND]].ravel()), "other blocks were touched"
    # The very prompt: its last token is computed, so its last block is not loaded.
    assert other.scheduler.get_num_new_matched_tokens(request("c", tokens), 0) == (144, load_async)
    assert not other.scheduler.failures.counts and not other.workers[0].failures.counts


def test_what_vllm_has_itself_is_not_loaded(start, raw, tokens):
    cache = genuine(raw)
    engine = start(pack={"error": 0.05})
    engine.prefill(request("a", tokens), cache, FIRST)
    longer = request("b", [*tokens[:150], *range(20)])  # shares 150 tokens: nine whole blocks
    assert engine.scheduler.get_num_new_matched_tokens(longer, 64) == (80, True)
    engine.fill([(k * 0, v * 0) for k, v in cache], SECOND)
    assert engine.load(longer, SECOND, 80) == set()
    for got, pair in zip(engine.rows(SECOND, 160), cache):
        for a, b in zip(got, pair):
            assert not a[:64].any() and not a[144:].any(), "blocks that it had, or that it computes"
            assert 0 < np.linalg.norm(a[64:144].astype(np.float32) - b[64:144]) < 0.15 * np.linalg.norm(b[64:144].astype(float))
    assert engine.scheduler.get_num_new_matched_tokens(longer, 112) == (0, False), "too few to be worth a load"


def test_chunked_prefill_is_saved_once(start, raw, tokens):
    """Its blocks come step by step, and again after it was preempted."""
    cache = genuine(raw)
    engine = start()
    wanted = request("a", tokens)
    assert engine.scheduler.get_num_new_matched_tokens(wanted, 0) == (0, False)
    engine.allocated(wanted, FIRST[:4], 0)
    engine.step([("a", FIRST[:4], 0)], scheduled={"a": 64})
    engine.step(cached=[("a", FIRST[4:7], 64)], scheduled={"a": 48})
    assert engine.scheduler.get_num_new_matched_tokens(request("b", tokens), 0) == (0, False), "not complete, not stored"
    engine.allocated(wanted, SECOND[:5], 0)  # preempted, and begun again with other blocks
    engine.step(cached=[("a", SECOND[:5], 0)], scheduled={"a": 80}, resumed=["a"])
    engine.fill(cache, SECOND)
    engine.step(cached=[("a", SECOND[5:], 80)], scheduled={"a": 80})
    engine.flush()
    stored = engine.workers[0]._worker.hook.counters
    assert (stored.saves_queued, stored.saves_stored, stored.saved_tokens) == (1, 1, 160)
    engine.step(cached=[("a", None, 160)], scheduled={"a": 1})
    engine.step(cached=[("a", [22], 161)], scheduled={"a": 1})
    assert engine.workers[0]._worker.hook.counters.saves_queued == 1, "what is generated is not saved"
    assert engine.scheduler.get_num_new_matched_tokens(request("b", [*tokens, 1]), 0)[0] == 160
    engine.load(request("b", [*tokens, 1]), FIRST, 160)
    assert all(np.array_equal(a, b) for got, pair in zip(engine.rows(FIRST, 160), cache) for a, b in zip(got, pair))


def test_ranks(start, raw, tokens):
    """Each has its own heads; what one of them lacks is a miss for all."""
    cache = genuine(raw)
    mirrored = [(-k, -v) for k, v in cache]
    engine = start(world=2)
    engine.prefill(request("a", tokens), None, FIRST, ranks=[cache, mirrored])
    longer = request("b", [*tokens, 5])
    assert engine.scheduler.get_num_new_matched_tokens(longer, 0) == (160, True)
    assert engine.load(longer, SECOND, 160) == set()
    for rank, expected in enumerate((cache, mirrored)):
        for got, pair in zip(engine.rows(SECOND, 160, rank), expected):
            assert all(np.array_equal(a, b) for a, b in zip(got, pair))
    store, identity = engine.scheduler._shared.store, engine.scheduler._identity
    second = identity.ranks(identity.prefix_of(longer))[1]
    engine.scheduler.request_finished(longer, [])
    assert store.rm_all(second) == 1
    assert engine.scheduler.get_num_new_matched_tokens(longer, 0) == (0, False)


def test_what_differs_does_not_match(start, raw, tokens):
    engine = start()
    image = types.SimpleNamespace(mm_position=types.SimpleNamespace(offset=10), identifier="cat")
    engine.prefill(request("a", tokens, cache_salt="x", mm_features=[image]), genuine(raw), FIRST)
    found = engine.scheduler.get_num_new_matched_tokens
    assert found(request("b", tokens, cache_salt="x", mm_features=[image]), 0)[0] == 144
    dog = types.SimpleNamespace(mm_position=types.SimpleNamespace(offset=100), identifier="cat")
    assert found(request("c", tokens, cache_salt="x", mm_features=[dog]), 0)[0] == 0
    assert found(request("d", tokens, cache_salt="y", mm_features=[image]), 0)[0] == 0
    adapter = types.SimpleNamespace(lora_name="l", lora_path="/l")
    assert found(request("e", tokens, cache_salt="x", mm_features=[image], lora_request=adapter), 0)[0] == 0
    assert found(request("f", tokens, cache_salt="x", mm_features=[image], skip_reading_prefix_cache=True), 0)[0] == 0
    assert found(request("g", [], prompt_token_ids=None), 0)[0] == 0


def test_loads_that_fail_are_computed(start, raw, tokens, tmp_path, caplog):
    """The blocks are named, the request goes on, the scheduler does not find it again."""
    engine = start()
    engine.prefill(request("a", tokens), genuine(raw), FIRST)
    longer = request("b", [*tokens, 5])
    assert engine.scheduler.get_num_new_matched_tokens(longer, 32) == (128, True)
    for blob in (tmp_path / "store" / "blobs").iterdir():
        data = bytearray(blob.read_bytes())
        data[len(data) // 2] ^= 1
        blob.write_bytes(data)
    assert engine.load(longer, SECOND, 128) == set(SECOND[2:])
    assert engine.scheduler.get_num_new_matched_tokens(longer, 0) == (0, False)
    assert engine.load(longer, SECOND, 128) == set(SECOND[:8]), "gone altogether; what vLLM had itself was none now"
    assert len([message for message in caplog.messages if "xkv.vllm: load failed" in message]) == 2  # damaged; not there


def test_an_entry_is_safe_from_eviction_until_it_is_loaded(start, raw, tokens):
    engine = start()
    engine.prefill(request("a", tokens), genuine(raw), FIRST)
    longer = request("b", [*tokens, 5])
    external, _ = engine.scheduler.get_num_new_matched_tokens(longer, 0)
    engine.allocated(longer, SECOND, external)
    store = engine.scheduler._shared.store
    assert store.set_cap(1).evicted == 0
    engine.scheduler.request_finished(longer, SECOND)
    assert store.set_cap(1).evicted == 1


def test_the_scheduler_never_sees_an_error(start, tokens, monkeypatch, caplog):
    engine = start()

    def broken(*_):
        raise OSError("the disk is gone")
    monkeypatch.setattr(engine.scheduler._shared.store, "peek", broken)
    for _ in range(3):
        assert engine.scheduler.get_num_new_matched_tokens(request("a", tokens), 0) == (0, False)
    assert engine.scheduler.failures.counts == {"get_num_new_matched_tokens: OSError": 3}
    assert len([message for message in caplog.messages if "the disk is gone" in message]) == 1


def test_blocks_on_a_device_go_through_copies(start, raw, tokens, monkeypatch):
    """The same as on the host, by way of the path for GPUs. (It needs torch's tensors.)"""
    if not fake_engines.REAL:
        pytest.skip("needs torch: tests/engine/serving.sh")
    real = Caches.__init__

    def elsewhere(self, *arguments):
        real(self, *arguments)
        self.on_host = False
    monkeypatch.setattr(Caches, "__init__", elsewhere)
    cache = genuine(raw)
    for layout in ("BHNC of BNHC", "KBNHD"):
        engine = start(layout=layout)
        name = request(layout, [len(layout), *tokens[1:]])
        engine.prefill(name, cache, FIRST)
        longer = request("b", [*name.prompt_token_ids, 5])
        external, _ = engine.scheduler.get_num_new_matched_tokens(longer, 32)
        assert engine.load(longer, SECOND, external) == set()
        for got, pair in zip(engine.rows(SECOND, 160), cache):
            assert all(np.array_equal(a[32:], b[32:]) and not a[:32].any() for a, b in zip(got, pair))


@pytest.mark.parametrize("change, reason", [
    (dict(kind="SlidingWindowSpec"), "a cache of SlidingWindowSpec"),
    (dict(dtype="torch.uint8"), "fp8 and other quantized caches"),
    (dict(kv_quant_mode=1), "fp8 and other quantized caches"),
    (dict(tokens_per_state=4), "packed states"),
    (dict(block_size=32), "blocks of 32 tokens"),
])
def test_refusals(tmp_path, change, reason):
    with pytest.raises(ValueError, match=reason):
        xkv.vllm.XkvConnector(engine_config(tmp_path / "store"), KVConnectorRole.SCHEDULER, cache_config(2, **change))


def test_more_refusals(tmp_path):
    two = cache_config(2)
    two.kv_cache_groups *= 2
    with pytest.raises(ValueError, match="2 groups of layers"):
        xkv.vllm.XkvConnector(engine_config(tmp_path / "store"), KVConnectorRole.SCHEDULER, two)
    with pytest.raises(ValueError, match="ratoi: not an option"):
        xkv.vllm.XkvConnector(engine_config(tmp_path / "store", ratoi=3), KVConnectorRole.SCHEDULER, cache_config(2))
    sliced = engine_config(tmp_path / "store")
    sliced.parallel_config.decode_context_parallel_size = 2
    with pytest.raises(ValueError, match="context parallel"):
        xkv.vllm.XkvConnector(sliced, KVConnectorRole.SCHEDULER, cache_config(2))
    worker = xkv.vllm.XkvConnector(engine_config(tmp_path / "store"), KVConnectorRole.WORKER, cache_config(2))
    with pytest.raises(ValueError, match='not BHNC with .*set "layout"'):
        worker.register_kv_caches({f"model.layers.{i}.self_attn.attn": LAYOUTS["KBNHD"][0]() for i in range(2)})
    with pytest.raises(ValueError, match="no cache of layer model.layers.0"):
        worker.register_kv_caches({})
    worker.shutdown()


def test_mla(tmp_path):
    """A latent and a rotated part in one row."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((BLOCKS, 1, BLOCK, 40)).astype(np.float32)
    spec = cache_config(3, "MLAAttentionSpec", num_kv_heads=1, head_size=40, head_size_v=40, dtype="torch.float32")
    config = engine_config(tmp_path / "store", hf=dict(kv_lora_rank=32, rope_theta=10000.0))
    tensors = {f"model.layers.{i}.self_attn.attn": rows * (i + 1) for i in range(3)}
    scheduler = xkv.vllm.XkvConnector(config, KVConnectorRole.SCHEDULER, spec)
    worker = xkv.vllm.XkvConnector(config, KVConnectorRole.WORKER, spec)
    worker.register_kv_caches({name: fake_engines.tensor(tensor) for name, tensor in tensors.items()})
    engine = Engine.__new__(Engine)
    engine.scheduler, engine.workers = scheduler, [worker]
    wanted = request("a", range(96))
    engine.allocated(wanted, range(6), 0)
    engine.step([("a", range(6), 0)], scheduled={"a": 96})
    engine.flush()
    assert scheduler.get_num_new_matched_tokens(wanted, 0) == (80, True)
    assert engine.load(wanted, range(20, 26), 80) == set()
    for i in range(3):
        assert np.array_equal(tensors[f"model.layers.{i}.self_attn.attn"][20:25], rows[:5] * (i + 1))
    engine.close()


def test_rope_of_a_configuration():
    """Frequencies by their definitions, in pairs (i, i + dims / 2)."""
    from xkv._serving import rope_of_config
    plain = [10000.0 ** (-2 * i / 64) for i in range(32)]
    assert rope_of_config({"rope_theta": 10000.0}, 64).inv_freq == pytest.approx(plain)
    assert rope_of_config({"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 4}}, 64).inv_freq == pytest.approx(
        [f / 4 for f in plain])
    assert rope_of_config({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, 128).n_rot == 64
    scaling = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                   original_max_position_embeddings=8192)
    got = rope_of_config({"rope_theta": 500000.0, "rope_scaling": scaling}, 128).inv_freq
    for i, frequency in enumerate(got):
        base = 500000.0 ** (-2 * i / 128)
        wave = 2 * np.pi / base
        if wave < 8192 / 4:
            assert frequency == pytest.approx(base)
        elif wave > 8192:
            assert frequency == pytest.approx(base / 8)
        else:
            smooth = (8192 / wave - 1) / 3
            assert frequency == pytest.approx((1 - smooth) * base / 8 + smooth * base)
    for config in ({}, {"rope_theta": 1e4, "rope_scaling": {"rope_type": "yarn"}},
                   {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}},
                   {"rope_theta": 1e4, "rope_local_base_freq": 1e4}):
        assert rope_of_config(config, 64) is None


def test_readme(start, raw, tokens, tmp_path):
    """The configuration there, as written but for the folder."""
    (told,) = fake_engines.readme("--kv-transfer-config")
    assert (told["kv_connector_module_path"], told["kv_role"], told["kv_load_failure_policy"]) == (
        "xkv.vllm", "kv_both", "recompute")
    assert getattr(importlib.import_module(told["kv_connector_module_path"]), told["kv_connector"]) is xkv.vllm.XkvConnector
    extra = told["kv_connector_extra_config"]
    assert extra.pop("store") == "/var/cache/xkv"
    engine = start(**extra)
    cache = genuine(raw)
    engine.prefill(request("a", tokens), cache, FIRST)
    longer = request("b", [*tokens, 5])
    assert engine.load(longer, SECOND, engine.scheduler.get_num_new_matched_tokens(longer, 0)[0]) == set()
    errors = [[np.linalg.norm(a.astype(np.float32) - b) / np.linalg.norm(b.astype(np.float32)) for a, b in zip(got, pair)]
              for got, pair in zip(engine.rows(SECOND, 160), cache)]
    assert 0 < np.mean(errors) < 0.3
    assert engine.scheduler._shared.store.stat().bytes < sum(k.nbytes + v.nbytes for k, v in cache) / 3
