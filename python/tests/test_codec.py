"""Caches, packing, entries, dictionaries, on a genuine cache that another reader reads too."""
import sys
import types

import numpy as np
import pytest
from conftest import DATA, ENGINE_FILE, REPOSITORY

import xkv


def plane_of(raw, index):
    return (raw.K if index % 2 == 0 else raw.V)[index // 2].values


def test_cache_is_what_another_reader_reads(cache, raw):
    geometry = cache.geometry
    assert cache.engine == "llama.cpp sequence"
    assert (geometry.layers, geometry.tokens, len(geometry.planes)) == (30, 160, 60)
    assert geometry.token_ids.tolist() == raw.tokens
    assert geometry.positions.tolist() == raw.positions.tolist()
    assert geometry.planes[3] == xkv.Plane(1, "V", 3, 64, "f16", None)
    for i in range(60):
        assert np.array_equal(cache.plane(i).reshape(160, 192), plane_of(raw, i))
    assert bytes(cache.data) == ENGINE_FILE.read_bytes()


def test_model_facts(model):
    assert (model.architecture, len(model.layers), model.latent_dim) == ("llama", 30, 0)
    assert model.layers[0] == xkv.ModelLayer(3, 64, 64, 0, 0)
    expected = xkv.Rope.of(100000.0, 64, "interleaved")
    assert model.ropes[0].style == "interleaved"
    assert np.allclose(model.ropes[0].inv_freq, expected.inv_freq, rtol=1e-6)


def test_lossless_gives_back_the_file(lossless, raw, tmp_path):
    with xkv.open(lossless) as entry:
        entry.verify()
        assert entry.info.lossless and entry.info.file_size == len(lossless)
        assert bytes(entry.restore()) == ENGINE_FILE.read_bytes()
        for i, plane in enumerate(entry.read()):
            assert np.array_equal(plane.reshape(160, 192), plane_of(raw, i))
        entry.restore_file(tmp_path / "back.ggsq", tokens=100)
    part = xkv.Cache.open(tmp_path / "back.ggsq")
    assert part.geometry.token_ids.tolist() == raw.tokens[:100]
    assert np.array_equal(part.plane(5)[:, 0], plane_of(raw, 5)[:100])  # without a model: one head


def test_file_to_file(model, raw, tmp_path):
    entry_file, back = tmp_path / "a.xkv", tmp_path / "b.ggsq"
    report = xkv.pack_file(ENGINE_FILE, entry_file, model=model, ratio=6)
    assert report.entry_bytes == entry_file.stat().st_size
    assert report.ratio == report.raw16_bytes / report.entry_bytes and 5.9 < report.ratio < 6.2
    assert report.profile in ("svd", "scalar")
    with pytest.raises(FileExistsError):
        xkv.pack_file(ENGINE_FILE, entry_file)
    xkv.pack_file(ENGINE_FILE, entry_file, overwrite=True, model=model, ratio=6)
    xkv.unpack_file(entry_file, back)
    assert back.stat().st_size == ENGINE_FILE.stat().st_size
    restored = xkv.Cache.open(back)
    error = np.linalg.norm(restored.plane(1).astype(np.float64).ravel() - plane_of(raw, 1).astype(np.float64).ravel())
    assert 0 < error / np.linalg.norm(plane_of(raw, 1).astype(np.float64)) < 0.5
    assert not list(tmp_path.glob(".*")), "temporary files are left"


def test_measured_errors_are_what_numpy_measures(cache, raw):
    entry = xkv.open(xkv.pack(cache, error=0.2))
    planes = entry.read(dtype="f32")
    for group in entry.groups:
        for plane, error in zip(group.planes, group.errors):
            if plane % 2 == 0:
                continue  # K is measured before RoPE
            a = plane_of(raw, plane).astype(np.float64)
            b = planes[plane].reshape(160, 192).astype(np.float64)
            assert error == pytest.approx(np.linalg.norm(a - b) / np.linalg.norm(a), rel=0.02, abs=1e-6)


def test_parts(lossless, raw):
    entry = xkv.open(lossless)
    some = entry.groups[3]
    planes = entry.read(tokens=slice(20, 90), groups=range(3, 4))
    assert [i for i, plane in enumerate(planes) if plane is not None] == list(some.planes)
    for i in some.planes:
        assert np.array_equal(planes[i].reshape(70, 192), plane_of(raw, i)[20:90])
    assert entry.read(tokens=7, groups=1)[entry.groups[0].planes[0]].shape == (7, 3, 64)
    for wrong in (161, 0, slice(5, 5), slice(0, 10, 2), range(150, 170)):
        with pytest.raises(ValueError):
            entry.read(tokens=wrong)
    with pytest.raises(ValueError, match="groups"):
        entry.read(groups=99)


def rotate(rows, positions, rope):
    """Interleaved RoPE by numpy: pairs (2i, 2i+1)."""
    angle = positions[:, None] * np.array(rope.inv_freq)[None]
    c, s = np.cos(angle)[:, None], np.sin(angle)[:, None]
    out = np.array(rows, np.float64)
    a, b = out[..., 0::2].copy(), out[..., 1::2].copy()
    out[..., 0::2], out[..., 1::2] = a * c - b * s, a * s + b * c
    return out


def test_other_positions(lossless, model, raw):
    """Keys move as rotating them by numpy says; values stay."""
    entry = xkv.open(lossless)
    moved = entry.read(tokens=40, dtype="f32", positions=np.arange(40) + 1000)
    keys = raw.K[2].get().reshape(160, 3, 64)[:40]
    assert np.allclose(moved[4], rotate(keys, np.full(40, 1000.0), model.ropes[0]), atol=2e-2)
    assert np.array_equal(moved[5], raw.V[2].get().reshape(160, 3, 64)[:40])
    with pytest.raises(ValueError, match="positions"):
        entry.read(tokens=40, positions=[1, 2, 3])


def test_some_heads(lossless, raw):
    """A rank's share: the middle one of three KV heads."""
    entry = xkv.open(lossless)
    whole, part = entry.read(tokens=40), entry.read(tokens=40, heads=range(1, 2))
    assert all(np.array_equal(a[:, 1:2], b) for a, b in zip(whole, part))
    assert np.array_equal(part[5][:, 0], raw.V[2].get().reshape(160, 3, 64)[:40, 1])
    with pytest.raises(ValueError, match="heads"):
        entry.read(heads=4)


def test_values_and_groups(lossless):
    entry = xkv.open(lossless)
    assert entry.values["model.architecture"] == "llama"
    assert len(entry.values["model.fingerprint"]) == 16
    assert entry.values["engine.version"] == 3
    assert sorted(i for group in entry.groups for i in group.planes) == list(range(60))
    assert {(group.codec, group.reason) for group in entry.groups} == {("lossless", "asked")}
    assert entry.coding(0) == xkv.GroupCoding(0.0, 0)
    with pytest.raises(IndexError):
        entry.coding(len(entry.groups))


def test_dictionary(cache, dictionary, dictionary_bytes, raw, tmp_path):
    info = dictionary.info
    assert (info.layer_count, info.cross_components > 0, info.tokens) == (30, True, 156)
    assert xkv.Dictionary.read_info(dictionary_bytes) == info
    sigma = dictionary.sigma(0)
    assert sigma.dtype == np.float32 and np.all(np.diff(sigma) <= 0)
    assert dictionary.step(50) == pytest.approx(info.unit * 2 / 3)
    assert dictionary.quality(dictionary.step(33)) == pytest.approx(33)

    packed = xkv.pack(cache, profile="dict", dictionary=dictionary, ratio=10)
    assert packed.report.profile == "dict" and packed.report.ratio > 9.5
    entry = xkv.open(packed)
    assert entry.info.needs_dict and entry.info.dictionary_id == info.id
    with pytest.raises(xkv.XkvError):
        entry.read()
    entry.attach(dictionary)
    entry.verify()
    (tmp_path / "d.xkvd").write_bytes(dictionary_bytes)
    (tmp_path / "e.xkv").write_bytes(packed.data)
    xkv.unpack_file(tmp_path / "e.xkv", tmp_path / "back.ggsq", dictionary=tmp_path / "d.xkvd")
    a, b = raw.V[7].get(), xkv.Cache.open(tmp_path / "back.ggsq").plane(15).astype(np.float32).reshape(160, 192)
    assert np.linalg.norm(a - b) / np.linalg.norm(a - a.mean(0)) < 0.5


def test_wrong_dictionary(cache, dictionary):
    other = xkv.Dictionary.open(xkv.train([cache], group_layers=2, cross=0, zstd_level=1), for_packing=False)
    packed = xkv.pack(cache, profile="dict", dictionary=dictionary, quality=40)
    with pytest.raises(xkv.errors.MismatchError) as caught:
        xkv.open(packed, other)
    assert other.info.id.hex() in str(caught.value) and caught.value.status == 40


def test_append(cache, lossless, dictionary, raw, tmp_path):
    """The first 100 tokens packed, then the rest behind them: as if packed at once, and the first chunk as it was."""
    first = xkv.Cache.open(xkv.open(lossless).restore(100), cache.model)
    grown = xkv.append(xkv.open(xkv.pack(first, profile="lossless", chunk_tokens=32)), cache)
    assert bytes(xkv.open(grown).restore()) == ENGINE_FILE.read_bytes()
    base = xkv.open(xkv.pack(first, profile="dict", dictionary=dictionary, quality=45, chunk_tokens=32), dictionary)
    longer = xkv.append(base, cache)
    assert longer.report.profile == "dict" and longer.report.raw_bytes == 30 * 2 * 192 * 2 * 160
    both = xkv.open(longer, dictionary).read(tokens=96), base.read(tokens=96)
    assert all(np.array_equal(a, b) for a, b in zip(*both))
    with pytest.raises(xkv.errors.MismatchError):
        zeros = np.zeros((160, 3, 64), np.float16)
        xkv.append(base, xkv.Planes.of_layers([(zeros, zeros)] * 30, model=cache.model, token_ids=range(160)))


def test_metric(cache, tmp_path):
    blocks = np.tile(np.eye(64, dtype=np.float32), (30, 3, 1, 1))
    metric = xkv.Metric(blocks, 4 * blocks)
    assert len(xkv.train([cache], metric=metric, group_layers=1, cross=0, zstd_level=1)) > 1000
    with pytest.raises(ValueError):
        xkv.Metric(blocks[0], blocks[0])
    with pytest.raises(xkv.errors.MismatchError):
        xkv.train([cache], metric=xkv.Metric(blocks[:3], blocks[:3]), group_layers=1)


def test_train_file(cache, tmp_path):
    path = tmp_path / "new.xkvd"
    xkv.train_file([cache], path, group_layers=1, cross=0, zstd_level=1)
    with pytest.raises(FileExistsError):
        xkv.train_file([cache], path, group_layers=1, cross=0, zstd_level=1)
    with xkv.Dictionary.open(path) as dictionary:
        assert dictionary.info.cross_components == 0


def test_opaque(tmp_path):
    (tmp_path / "notes.txt").write_text("not a cache")
    cache = xkv.Cache.open(tmp_path / "notes.txt")
    assert cache.geometry.tokens == 0 and cache.geometry.planes == ()
    assert bytes(xkv.open(xkv.pack(cache)).restore()) == b"not a cache"


def test_version_is_the_headers():
    header = (DATA.parents[1] / "format" / "xkv" / "common.h").read_text()
    for part, name in zip(xkv.__version__.split("."), ("MAJOR", "MINOR", "PATCH")):
        assert f"#define XKV_VERSION_{name} {part}\n" in header


# --- Groups, against a decoder that was written from the specification alone ---

@pytest.fixture(scope="module")
def second():
    pytest.importorskip("zstandard")
    pytest.importorskip("xxhash")
    sys.path.insert(0, str(REPOSITORY / "tests" / "reference_decoder"))
    import codec
    import container
    return types.SimpleNamespace(codec=codec, read=lambda packed: container.read_container(packed.data, container.KIND_ENTRY))


@pytest.mark.parametrize("options", [dict(profile="svd", error=0.2), dict(profile="scalar", error=0.2)])
def test_components_are_those_of_another_decoder(cache, second, options):
    packed = xkv.pack(cache, **options)
    box = second.read(packed)
    decode = {second.codec.SCALAR: second.codec.scalar, second.codec.SVDQ: second.codec.svdq}
    with xkv.open(packed) as entry:
        rows = entry.read(dtype="f32")
        for number, (group, info) in enumerate(zip(box.groups, entry.groups)):
            planes = [box.planes[index] for index in group.planes]
            coefficients, basis, mean = decode[group.codec](box, group, planes, None)
            components = entry.components(number)
            assert np.allclose(components["deviation"], np.sqrt(np.mean(coefficients ** 2, axis=0)), rtol=1e-5)
            assert entry.coding(number).coded == np.count_nonzero(components["table"])
            assert np.array_equal(components["table"] > 0, components["bits"] > 0)
            parts = entry.part_sizes(number)
            assert [part.size for part in group.parts] == list(parts) and sum(parts) == info.packed_bytes
            assert 0 <= sum(parts[2:]) - components["bits"].sum() / 8 <= 0.01 * sum(parts[2:]) + 160 * len(parts[2:])
            # Coefficients times components are the rows that are restored: V, which is not rotated.
            restored = mean + (coefficients * basis if basis.ndim == 1 else coefficients @ basis)
            first = 0
            for index, plane in zip(group.planes, planes):
                if plane.kind == 1:
                    got = rows[index].reshape(-1, plane.width)[box.sinks:]
                    assert np.allclose(got, restored[:, first:first + plane.width], atol=2e-3 * np.abs(got).max())
                first += plane.width
        with pytest.raises(IndexError, match="group 99"):
            entry.part_sizes(99)


def test_lossless_groups_have_no_components(lossless):
    with xkv.open(lossless) as entry, pytest.raises(ValueError, match="no quantized components"):
        entry.components(0)


def test_a_dictionary_describes_itself(cache, dictionary, second, dictionary_bytes):
    box = second.codec.Dictionary(dictionary_bytes)
    assert [plane.kind for plane in dictionary.geometry.planes] == ["K", "V"] * 30
    groups = dictionary.groups
    assert [group.codec for group in groups] == ["dict"] * 30 + ["cross"] and dictionary.info.cross_components == 240
    assert [len(basis.synthesis) for basis in box.bases] == [group.rank for group in groups[:-1]]
    assert [box.cross.part(group).shape[1] for group in range(30)] == [dictionary.leading(group) for group in range(30)]
    assert dictionary.values["model.name"] == cache.model.name
    with pytest.raises(IndexError):
        dictionary.leading(31)


def test_what_a_slid_window_allows(tmp_path):
    """tests/golden: a cache whose windows have slid, and one that holds all."""
    golden = REPOSITORY / "tests" / "golden"
    with xkv.open(golden / "scalar-windows.xkv") as entry, xkv.open(golden / "scalar.xkv") as plain:
        assert (entry.whole_only, plain.whole_only) == (True, False)
        assert len(plain.restore(5)) < len(plain.restore())
    assert xkv.open(xkv.pack(xkv.Planes.of_layers([(np.ones((9, 1, 8), np.float16),) * 2]))).whole_only is False
