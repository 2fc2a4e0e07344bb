"""xkv.lmcache: objects through the native connector's interface and through the serde."""
import importlib
import os
import select
import types

import fake_engines
import numpy as np
import pytest
from fake_engines import genuine

fake_engines.install("lmcache")

import xkv  # noqa: E402
import xkv.lmcache  # noqa: E402
from xkv.lmcache import serde  # noqa: E402

HASH = "model@01000100@0@{:064x}"


def objects(raw, chunk=64):
    """LMCache's objects [2, layers, tokens, heads * head_dim] of the chunks of a prompt, the last one not full."""
    cache = genuine(raw)
    whole = np.stack([np.stack([pair[kind].reshape(-1, 192) for pair in cache]) for kind in range(2)])
    return [np.ascontiguousarray(whole[:, :, first:first + chunk]) for first in range(0, whole.shape[2], chunk)]


def views(arrays):
    return [memoryview(array).cast("B") for array in arrays]


def finished(connector, number):
    """As LMCache's thread waits: on the descriptor, then for what is done."""
    poller = select.poll()
    poller.register(connector.event_fd(), select.POLLIN)
    assert poller.poll(180000)
    (done,) = connector.drain_completions()
    assert done[0] == number and not poller.poll(0)
    return done[1:]


@pytest.fixture
def connect(tmp_path):
    opened = []

    def make(**options):
        settings = dict(store=str(tmp_path / "store"), model="smollm2", layers=30, heads=3, head_dim=64, dtype="f16")
        opened.append(xkv.lmcache.XkvConnector(**{**settings, **options}))
        return opened[-1]
    yield make
    for connector in opened:
        connector.close()


def test_objects_come_back(connect, raw):
    connector, chunks = connect(), objects(raw)
    keys = [HASH.format(i) for i in range(3)]
    assert finished(connector, connector.submit_batch_exists(keys)) == (True, "", [False] * 3)
    assert finished(connector, connector.submit_batch_set(keys, views(chunks))) == (True, "", [True] * 3)
    assert finished(connector, connector.submit_batch_exists([*keys, HASH.format(9)]))[2] == [True] * 3 + [False]
    other = connect()  # another server in the same process, or after a restart
    restored = [np.zeros_like(chunk) for chunk in chunks]
    assert finished(other, other.submit_batch_get(keys, views(restored)))[2] == [True] * 3
    assert all(np.array_equal(a.view(np.uint16), b.view(np.uint16)) for a, b in zip(chunks, restored))
    assert chunks[2].shape[2] == 32
    assert finished(connector, connector.submit_batch_delete([keys[0], HASH.format(9)]))[2] == [True, False]
    assert finished(connector, connector.submit_batch_exists(keys))[2] == [False, True, True]
    assert not connector.failures.counts and not other.failures.counts


def test_within_the_error(connect, raw):
    connector, chunks = connect(pack={"error": 0.1}), objects(raw, 160)
    finished(connector, connector.submit_batch_set([HASH.format(0)], views(chunks)))
    restored = np.zeros_like(chunks[0])
    assert finished(connector, connector.submit_batch_get([HASH.format(0)], views([restored])))[2] == [True]
    difference = restored.astype(np.float32) - chunks[0]
    assert 0 < np.linalg.norm(difference) / np.linalg.norm(chunks[0].astype(np.float32)) < 0.12
    stat = connector._shared.store.stat()
    assert stat.bytes < chunks[0].nbytes / 3


def test_mla(connect):
    rng = np.random.default_rng(0)
    connector = connect(layers=4, heads=1, head_dim=40, mla_latent=32, dtype="f32")
    chunk = rng.standard_normal((1, 4, 50, 40)).astype(np.float32)
    finished(connector, connector.submit_batch_set(["a"], views([chunk])))
    restored = np.zeros_like(chunk)
    finished(connector, connector.submit_batch_get(["a"], views([restored])))
    assert np.array_equal(restored, chunk)


def test_failures_are_misses(connect, raw, tmp_path, caplog):
    connector, chunks = connect(), objects(raw)
    keys = [HASH.format(i) for i in range(3)]
    finished(connector, connector.submit_batch_set(keys, views(chunks)))
    ok, why, each = finished(connector, connector.submit_batch_set([HASH.format(8)], [memoryview(bytearray(1000))]))
    assert not ok and each == [False] and "bytes of a serde" in why
    for blob in (tmp_path / "store" / "blobs").iterdir():
        data = bytearray(blob.read_bytes())
        data[len(data) // 2] ^= 1
        blob.write_bytes(data)
    restored = [np.zeros_like(chunk) for chunk in chunks]
    assert finished(connector, connector.submit_batch_get(keys, views(restored)))[2] == [False] * 3
    assert finished(connector, connector.submit_batch_exists(keys))[2] == [False] * 3
    assert len([message for message in caplog.messages if "xkv.lmcache: get failed" in message]) <= 1


@pytest.mark.parametrize("options, reason", [
    (dict(dtype="fp8"), "expected one of"), (dict(layers=0), "no such cache"), (dict(mla_latent=3), "no such cache"),
    (dict(chunk=1), "not an option"),
])
def test_refusals(connect, options, reason):
    with pytest.raises(ValueError, match=reason):
        connect(**options)


# --- The serde ---

def memory(array):
    """As much of LMCache's MemoryObj as a serde uses."""
    return types.SimpleNamespace(tensor=fake_engines.tensor(array), byte_array=memoryview(array).cast("B"))


def through(processor, source, target):
    layout = types.SimpleNamespace(shapes=[source.shape], dtypes=[source.dtype])
    serializer, deserializer = (getattr(processor, name, None) or getattr(processor, f"_{name}")
                                for name in ("serializer", "deserializer"))
    buffer = np.zeros(serializer.estimate_serialized_size(layout), np.uint8)
    size = serializer.serialize(memory(source), memory(buffer), None)
    deserializer.deserialize(memory(buffer), memory(target), None)  # a buffer of the estimated size, or of what was written
    deserializer.deserialize(memory(buffer[:size].copy()), memory(target), None)
    return size, buffer[:size], deserializer


@pytest.mark.parametrize("options", [{}, {"pack": {"error": 0.1}, "heads": 3}])
def test_serde(raw, options):
    (chunk,) = objects(raw, 160)
    target = np.zeros_like(chunk)
    size, _, _ = through(serde.create({**options, "max_workers": 2}), chunk, target)
    difference = np.linalg.norm(target.astype(np.float32) - chunk) / np.linalg.norm(chunk.astype(np.float32))
    assert size < chunk.nbytes / (3 if options else 1.1)
    assert (0 < difference < 0.12) if options else difference == 0


def test_serde_with_a_dictionary(raw, tmp_path):
    """Trained on keys as the engine has them: LMCache does not tell positions."""
    (chunk,) = objects(raw, 160)
    arrays = {f"layer.{layer}.{kind}": np.moveaxis(part[layer].reshape(-1, 3, 64), 1, 0)
              for kind, part in zip(("key", "value"), chunk) for layer in range(30)}
    cache = xkv.Cache.open(fake_engines.safetensors(arrays))
    (tmp_path / "d.xkvd").write_bytes(xkv.train([cache], group_layers=1, cross=0, zstd_level=1))
    target = np.zeros_like(chunk)
    processor = serde.create({"dictionary": str(tmp_path / "d.xkvd"), "pack": {"quality": 60}, "heads": 3})
    size, data, _ = through(processor, chunk, target)
    assert size < chunk.nbytes / 3
    assert 0 < np.linalg.norm(target.astype(np.float32) - chunk) / np.linalg.norm(chunk.astype(np.float32)) < 0.2


def test_serde_refuses(raw):
    (chunk,) = objects(raw, 160)
    target = np.zeros_like(chunk)
    _, data, deserializer = through(serde.create({}), chunk, target)
    damaged = data.copy()
    damaged[len(data) // 2] ^= 1
    with pytest.raises(xkv.errors.DataError):
        deserializer.deserialize(memory(damaged), memory(target), None)
    with pytest.raises(ValueError, match="bytes in a buffer of"):
        deserializer.deserialize(memory(data[:100].copy()), memory(target), None)
    with pytest.raises(ValueError, match="160 tokens"):
        deserializer.deserialize(memory(data), memory(np.ascontiguousarray(target[:, :, :32])), None)
    with pytest.raises(ValueError, match="is not .2, layers"):
        deserializer.deserialize(memory(data), memory(target[0]), None)
    with pytest.raises(ValueError, match="a cache of uint8"):
        deserializer.deserialize(memory(data), memory(target.view(np.uint8)), None)


def test_descriptors_are_closed(connect):
    connector = connect()
    descriptor = connector.event_fd()
    connector.close()
    with pytest.raises(OSError):
        os.fstat(descriptor)
    connector.close()


def test_readme(tmp_path):
    """The two configurations there, as written but for folders: on random rows of the size they tell."""
    plugin, other = fake_engines.readme("--l2-adapter")
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((2, 32, 32, 1024)).astype(np.float32)
    chunk = (rows.view(np.uint32) >> 16).astype(np.uint16)  # bf16
    connector = getattr(importlib.import_module(plugin["module_path"]), plugin["class_name"])(
        **{**plugin["adapter_params"], "store": str(tmp_path / "store")})
    restored = np.zeros_like(chunk)
    finished(connector, connector.submit_batch_set([HASH.format(0)], views([chunk])))
    assert finished(connector, connector.submit_batch_get([HASH.format(0)], views([restored])))[2] == [True]
    connector.close()
    assert other["type"] == "fs" and other["serde"].pop("type") == "xkv"
    f16 = rows.astype(np.float16)
    unpacked = np.zeros_like(f16)
    through(serde.create(other["serde"]), f16, unpacked)
    for got, put in (((restored.astype(np.uint32) << 16).view(np.float32), rows), (unpacked.astype(np.float32), rows)):
        assert 0 < np.linalg.norm(got - put) / np.linalg.norm(put) < 0.13
