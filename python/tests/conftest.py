"""What the tests share: a genuine cache (tests/data), its model, an entry, a small dictionary."""
from __future__ import annotations

import pathlib
import signal
import sys
from typing import Any, Iterator

import numpy as np
import pytest

import xkv

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
DATA = REPOSITORY / "tests" / "data"
ENGINE_FILE = DATA / "smollm2-135m-jargon.ggsq"
GGUF = DATA / "smollm2-135m.gguf"

sys.path.insert(0, str(REPOSITORY / "tests" / "engine"))  # a reader of engine files that is independent of the library


@pytest.fixture(scope="session", autouse=True)
def interrupts() -> Iterator[None]:
    """Ctrl-C is a KeyboardInterrupt, here and in children, also where the tests were started with SIGINT ignored (by a
    shell's `&`, by nohup)."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def model() -> xkv.Model:
    return xkv.Model.from_gguf(GGUF)


@pytest.fixture(scope="session")
def cache(model: xkv.Model) -> xkv.Cache:
    return xkv.Cache.open(ENGINE_FILE, model)


@pytest.fixture(scope="session")
def raw() -> Any:
    """The same cache, read by the other reader: .K and .V are [tokens, width] planes."""
    from sequence_file import SequenceFile
    return SequenceFile(ENGINE_FILE)


@pytest.fixture(scope="session")
def tokens(raw: Any) -> Any:
    return np.array(raw.tokens, np.int32)


@pytest.fixture(scope="session")
def lossless(cache: xkv.Cache) -> xkv.Packed:
    return xkv.pack(cache, profile="lossless")


@pytest.fixture(scope="session")
def dictionary_bytes(cache: xkv.Cache) -> bytes:
    return xkv.train([cache], group_layers=1, cross=8, zstd_level=1)


@pytest.fixture(scope="session")
def dictionary(dictionary_bytes: bytes) -> xkv.Dictionary:
    return xkv.Dictionary.open(dictionary_bytes)


@pytest.fixture
def store(tmp_path: pathlib.Path) -> Iterator[xkv.Store]:
    with xkv.Store.init(tmp_path / "store") as opened:
        yield opened


@pytest.fixture(scope="session")
def namespace(model: xkv.Model) -> xkv.Namespace:
    return xkv.Namespace(model, settings="test")


def layers(rng: np.random.Generator, count: int, tokens: int, heads: int, dim: int, dtype: Any = np.float16) -> Any:
    """Random (K, V) of `count` layers."""
    return [tuple(rng.standard_normal((tokens, heads, dim)).astype(dtype) for _ in "KV") for _ in range(count)]
