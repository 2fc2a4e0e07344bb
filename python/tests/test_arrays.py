"""Arrays of the caller: shapes, strides, types, devices, ownership."""
import gc
import sys

import numpy as np
import pytest
from conftest import layers

import xkv


@pytest.fixture(scope="module")
def rng():
    return np.random.default_rng(5)


def lossless(source, **more):
    return xkv.open(xkv.pack(source, profile="lossless", **more))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.uint16])
def test_planes_round_trip(rng, dtype):
    """uint16 are the bits of bf16."""
    source = layers(rng, 3, 50, 2, 16, np.float32)
    if dtype == np.uint16:
        source = [tuple((a.view(np.uint32) >> 16).astype(np.uint16) for a in pair) for pair in source]
    else:
        source = [tuple(a.astype(dtype) for a in pair) for pair in source]
    planes = xkv.Planes.of_layers(source, ropes=[xkv.Rope.of(10000, 16)], token_ids=range(50))
    entry = lossless(planes)
    assert entry.geometry.planes[0].dtype == {"float32": "f32", "float16": "f16", "uint16": "bf16"}[np.dtype(dtype).name]
    out = entry.read()
    for i, pair in enumerate(source):
        assert np.array_equal(out[2 * i], pair[0]) and np.array_equal(out[2 * i + 1], pair[1])
    assert entry.geometry.token_ids.tolist() == list(range(50))
    with pytest.raises(xkv.errors.UnsupportedError):
        entry.restore()  # there is no engine's file


def test_bf16_comes_back_as_float(rng):
    bits = (rng.standard_normal((20, 1, 8)).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    entry = lossless(xkv.Planes.of_layers([(bits, bits)]))
    assert np.array_equal(entry.read(dtype="f32")[0], (bits.astype(np.uint32) << 16).view(np.float32))


def test_strides(rng):
    """Head-major tensors, slices of wider rows, every second row, reversed dims: read where they lie."""
    head_major = rng.standard_normal((2, 40, 8)).astype(np.float16)
    wide = rng.standard_normal((40, 100)).astype(np.float16)
    key, value = head_major.transpose(1, 0, 2), wide[:, 7:23].reshape(40, 2, 8)
    assert not key.flags.c_contiguous
    out = lossless(xkv.Planes.of_layers([(key, value)])).read()
    assert np.array_equal(out[0], key) and np.array_equal(out[1], value)
    odd = rng.standard_normal((80, 2, 8)).astype(np.float16)[::-2, :, ::-1]
    assert np.array_equal(lossless(xkv.Planes.of_layers([(odd, odd)])).read()[0], odd)


def test_two_dimensional_planes(rng):
    flat = rng.standard_normal((30, 48)).astype(np.float16)[:, ::2]
    plane = xkv.Plane(0, "V", 3, 8)
    geometry = xkv.Geometry((plane,), (), np.arange(30, dtype=np.int32))
    assert np.array_equal(lossless(xkv.Planes(geometry, [flat])).read()[0].reshape(30, 24), flat)


def test_read_only_sources_and_destinations(rng):
    source = rng.standard_normal((10, 1, 8)).astype(np.float32)
    source.flags.writeable = False
    entry = lossless(xkv.Planes.of_layers([(source, memoryview(source.copy()))]))
    with pytest.raises(ValueError, match="read-only"):
        entry.read(out=[source, source])


def test_read_into(rng):
    """Only the asked elements are written, in the type of the destination."""
    source = layers(rng, 1, 20, 2, 8)
    entry = lossless(xkv.Planes.of_layers(source))
    big = np.full((2, 2, 30, 16), 9, np.float32)  # K and V, head-major, wider and longer
    views = [big[i].transpose(1, 0, 2)[5:, :, 4:12] for i in range(2)]
    got = entry.read(tokens=slice(3, 13), out=views)
    assert got[0] is views[0]
    for i in range(2):
        assert np.array_equal(big[i, :, 5:15, 4:12].transpose(1, 0, 2), source[0][i][3:13].astype(np.float32))
    big[:, :, 5:15, 4:12] = 9
    assert np.all(big == 9), "something else was written"


def test_pages(rng):
    """rows: a paged cache, from where it is read and where it is put back."""
    source = layers(rng, 2, 24, 1, 8)
    rows = rng.permutation(64)[:24]
    pool = [[np.zeros((64, 1, 8), np.float16) for _ in "KV"] for _ in range(2)]
    for pair, pages in zip(source, pool):
        for a, page in zip(pair, pages):
            page[rows] = a
    entry = lossless(xkv.Planes.of_layers(pool, positions=np.arange(24), rows=rows))
    assert np.array_equal(entry.read()[3], source[1][1])
    back = [np.zeros((64, 1, 8), np.float16) for _ in range(4)]
    entry.read(out=back, rows=rows[::-1].copy())
    assert np.array_equal(back[2][rows[::-1]], source[1][0])
    for wrong in (rows[:5], rows - 64, rows + 64, rows + 0.5):
        with pytest.raises(ValueError, match="rows"):
            entry.read(out=back, rows=wrong)


@pytest.mark.parametrize("axes", ["KBNHD", "BKNHD", "KBHND", "LKBNHD", "BNLHC"])
def test_paged_tensors(rng, axes):
    """Two layers in blocks of 4 tokens, placed by numpy; read from there and put back elsewhere."""
    sizes, table = dict(L=2, K=2, B=16, N=4, H=2, D=8, C=16), rng.permutation(16)[:6]
    source, per_layer = layers(rng, 2, 22, 2, 8), "L" not in axes

    def tensors():
        return [np.zeros([sizes[axis] for axis in axes], np.float16) for _ in range(2 if per_layer else 1)]

    def place(pool, layer, kind, token):
        """[heads, dims] of a token: a view into the pool."""
        at = dict(L=layer, K=kind, B=table[token // 4], N=token % 4, C=slice(8 * kind, 8 * kind + 8))
        return pool[layer if per_layer else 0][tuple(at.get(axis, slice(None)) for axis in axes)]

    def pages(pool):
        return [xkv.Pages(tensor, axes, table, first_layer=i) for i, tensor in enumerate(pool)]
    pool = tensors()
    for layer in range(2):
        for kind in range(2):
            for token in range(22):
                place(pool, layer, kind, token)[...] = source[layer][kind][token]
    plain = xkv.Planes.of_layers(source).geometry
    entry = lossless(xkv.Planes(plain, pages(pool)))
    assert all(np.array_equal(a, source[i // 2][i % 2]) for i, a in enumerate(entry.read()))
    back = tensors()
    entry.read(tokens=slice(6, 22), out=pages(back))
    for token in range(22):
        expected = source[1][1][token] if token >= 6 else np.zeros((2, 8))
        assert np.array_equal(place(back, 1, 1, token), expected)
    with pytest.raises(ValueError):
        entry.read(out=[xkv.Pages(tensor, axes, table[:5], first_layer=i) for i, tensor in enumerate(back)])
    with pytest.raises(ValueError, match="axes"):
        entry.read(out=[xkv.Pages(back[0], axes[1:], table)])
    with pytest.raises(ValueError):  # a block outside of the pool
        entry.read(out=[xkv.Pages(tensor, axes, table + 16, first_layer=i) for i, tensor in enumerate(back)])


@pytest.mark.parametrize("shape", [(9, 2, 8), (10, 3, 8), (10, 2, 7), (10, 15), (10,), (10, 2, 8, 1)])
def test_destinations_that_do_not_fit(rng, shape):
    entry = lossless(xkv.Planes.of_layers(layers(rng, 1, 10, 2, 8)))
    good = np.zeros((10, 2, 8), np.float32)
    with pytest.raises(ValueError):
        entry.read(out=[np.zeros(shape, np.float32), good])
    with pytest.raises(ValueError):
        entry.read(out=[good])
    with pytest.raises(ValueError):
        entry.read(out=[good, None])


@pytest.mark.parametrize("dtype", ["int32", "float64", "int16", ">f4", "complex64"])
def test_types_that_are_no_cache(dtype):
    with pytest.raises(TypeError, match="float32, float16"):
        xkv.Planes.of_layers([(np.zeros((4, 1, 8), dtype),) * 2])


class OnDevice:
    """What a CUDA tensor looks like."""
    device = "cuda:0"

    def __dlpack_device__(self):
        return (2, 0)


class OnlyDlpack:
    """A tensor of a library that knows DLPack only."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


def test_device_tensors_are_refused():
    with pytest.raises(TypeError, match=r"cuda:0.*\.cpu\(\)"):
        xkv.Planes.of_layers([(OnDevice(), OnDevice())])


def test_dlpack(rng):
    a = rng.standard_normal((10, 2, 8)).astype(np.float32)
    entry = lossless(xkv.Planes.of_layers([(OnlyDlpack(a), OnlyDlpack(a))]))
    assert np.array_equal(entry.read()[1], a)


def test_ml_dtypes(rng):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    a = rng.standard_normal((10, 2, 8)).astype(ml_dtypes.bfloat16)
    assert np.array_equal(lossless(xkv.Planes.of_layers([(a, a)])).read()[0], a.view(np.uint16))


def test_torch(rng):
    torch = pytest.importorskip("torch")
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        key = torch.randn(2, 30, 8).to(dtype).transpose(0, 1)
        value = torch.randn(30, 2, 8).to(dtype).requires_grad_()
        entry = lossless(xkv.Planes.of_layers([(key, value)]))
        out = [torch.zeros(30, 2, 8, dtype=dtype), torch.zeros(2, 30, 8, dtype=dtype).transpose(0, 1)]
        entry.read(out=out)
        assert torch.equal(out[0], key) and torch.equal(out[1], value.detach())


def test_everything_lives_as_long_as_it_is_needed(rng):
    """The caller's references go; what the library points to must not."""
    expected = layers(rng, 2, 60, 2, 16)
    planes = xkv.Planes.of_layers([tuple(a.copy() for a in pair) for pair in expected], positions=list(range(60)))
    gc.collect()
    np.ones(1 << 20)  # would take the place of what was freed
    data = bytearray(xkv.pack(planes).data)
    entry = xkv.open(data)
    del planes, data
    gc.collect()
    assert np.array_equal(entry.read()[2], expected[1][0])


def test_references_do_not_pile_up(rng):
    source = layers(rng, 1, 10, 1, 8)[0]
    before = sys.getrefcount(source[0])
    for _ in range(20):
        lossless(xkv.Planes.of_layers([source])).read()
    gc.collect()
    after = sys.getrefcount(source[0])
    assert after == before


def test_geometry_is_checked(rng):
    source = layers(rng, 2, 10, 1, 8)
    with pytest.raises(ValueError, match="ropes"):
        xkv.Planes.of_layers(source, ropes=[xkv.Rope.of(1e4, 8)] * 3)
    with pytest.raises(ValueError, match="style"):
        xkv.pack(xkv.Planes.of_layers(source, ropes=[xkv.Rope((1.0,), style="other")]))
    with pytest.raises(ValueError):  # more rotated dims than a head has
        xkv.pack(xkv.Planes.of_layers(source, ropes=[xkv.Rope.of(1e4, 16)]))
    with pytest.raises(ValueError, match="rows, 20 needed"):
        xkv.Planes.of_layers(source, positions=range(20))
    with pytest.raises(ValueError, match="32 bits"):
        xkv.Planes.of_layers(source, positions=[1 << 40] * 10)
