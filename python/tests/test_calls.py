"""Errors, callbacks, Ctrl-C, threads, the GIL, closing."""
import os
import signal
import threading

import numpy as np
import pytest
from conftest import ENGINE_FILE, layers

import xkv
from xkv import _call
from xkv._native import ffi, lib

# --- Errors ---

def test_every_status_has_a_class():
    statuses = [value for name, value in ((n, getattr(lib, n)) for n in dir(lib) if n.startswith("XKV_ERROR_"))]
    assert len(statuses) >= 20
    for status in statuses:
        error = xkv.errors.error_of(status, "text", "detail")
        assert type(error) is not xkv.XkvError and error.status == status and error.detail == "detail"
        assert str(error) == "text: detail"


def test_errors_are_what_python_expects(tmp_path, lossless):
    with pytest.raises(FileNotFoundError) as caught:
        xkv.open(tmp_path / "none.xkv")
    assert isinstance(caught.value, xkv.XkvError) and caught.value.status == 70
    with pytest.raises(xkv.errors.FormatError, match=r"\[H1\]"):
        xkv.open(b"x" * 100)
    with pytest.raises(xkv.errors.TruncatedError):
        xkv.open(lossless.data[:-1])
    with pytest.raises(ValueError, match="ratio"):
        xkv.pack_file(ENGINE_FILE, tmp_path / "a.xkv", ratio=0.5)
    with pytest.raises(ValueError, match="profile"):
        xkv.pack_file(ENGINE_FILE, tmp_path / "a.xkv", profile="zip")
    with pytest.raises(TypeError, match="'rato'"):
        xkv.pack_file(ENGINE_FILE, tmp_path / "a.xkv", rato=8)
    with pytest.raises(OverflowError):
        xkv.pack_file(ENGINE_FILE, tmp_path / "a.xkv", sinks=-1)
    with pytest.raises(ValueError, match="null"):
        xkv.open("a\0b")
    assert not list(tmp_path.iterdir())


def test_damage_is_found(lossless):
    damaged = bytearray(lossless.data)
    damaged[len(damaged) // 2] ^= 1
    with xkv.open(damaged) as entry, pytest.raises(xkv.errors.DataError):
        entry.read()


def test_memory_limit(cache):
    xkv.set_memory_limit(1 << 20)
    try:
        with pytest.raises(xkv.errors.LimitError):
            xkv.pack(cache, ratio=8)
    finally:
        xkv.set_memory_limit(0)
    with pytest.raises(ValueError):
        xkv.set_threads(5000)


# --- Callbacks ---

def test_progress(cache):
    seen = []
    xkv.pack(cache, ratio=8, progress=lambda done, total: seen.append((done, total)))
    assert seen and seen[-1][0] == seen[-1][1] and all(a[0] <= b[0] for a, b in zip(seen, seen[1:]))


def test_an_exception_in_a_callback_stops_the_call(cache, lossless):
    def fail(*_):
        raise ZeroDivisionError("in the callback")
    entry = xkv.open(lossless)
    for action in (lambda: xkv.pack(cache, ratio=8, progress=fail), lambda: entry.read(progress=fail),
                   lambda: entry.read(on_group=fail), lambda: entry.verify(fail), lambda: entry.restore(progress=fail),
                   lambda: xkv.train([cache], progress=fail)):
        with pytest.raises(ZeroDivisionError, match="in the callback"):
            action()
    assert bytes(entry.restore()) == ENGINE_FILE.read_bytes()


def test_calls_inside_callbacks(cache, lossless):
    """A context runs one call at a time: another call from its callback gets another one."""
    sizes = []
    xkv.pack(cache, ratio=8, progress=lambda *_: sizes.append(len(xkv.open(lossless).read(tokens=1, groups=1))))
    assert set(sizes) == {60}


def test_groups_are_announced_in_order_and_whole(lossless, raw):
    entry = xkv.open(lossless)
    out = [np.zeros((160, 3, 64), np.float16) for _ in range(60)]
    announced = []

    def ready(group):
        announced.append(group)
        for i in entry.groups[group].planes:
            assert np.array_equal(out[i].reshape(160, 192), (raw.V if i % 2 else raw.K)[i // 2].values)
    entry.read(out=out, on_group=ready)
    assert announced == list(range(len(entry.groups)))


# --- Ctrl-C ---

def test_interrupt_stops_a_call_without_callbacks():
    """Uninterrupted, this packs for most of a minute. The context tells that the call itself was stopped."""
    big = layers(np.random.default_rng(1), 4, 16384, 8, 128)
    source = xkv.Planes.of_layers(big)
    xkv.set_threads(1)
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    before = signal.getsignal(signal.SIGINT)
    try:
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            xkv.pack(source, profile="svd", energy=0.99, iterations=8)
    finally:
        timer.join()
        stopped = ffi.string(lib.xkv_ctx_error(_call._contexts.free[-1].pointer))
        xkv.set_threads(0)
    assert b"cancelled" in stopped
    assert signal.getsignal(signal.SIGINT) is before
    assert len(xkv.pack(xkv.Planes.of_layers(layers(np.random.default_rng(1), 1, 8, 1, 8)))) > 0


def test_interrupt_inside_a_callback(cache):
    def press(*_):
        signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        xkv.pack(cache, ratio=8, progress=press)


def test_ignored_interrupts_stay_ignored(cache):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert len(xkv.pack(cache, ratio=8, progress=lambda *_: signal.raise_signal(signal.SIGINT))) > 0
    finally:
        signal.signal(signal.SIGINT, before)


# --- Threads ---

def test_python_runs_while_the_library_does(cache):
    thread = threading.Thread(target=lambda: [xkv.pack(cache, ratio=8) for _ in range(2)])
    steps = 0
    thread.start()
    while thread.is_alive():
        steps += 1
    assert steps > 10000  # with the GIL held: one a call


def test_one_entry_many_threads(lossless, raw):
    entry, wrong = xkv.open(lossless), []

    def read(first):
        for i in range(first, 60, 4):
            got = entry.read(tokens=slice(first, 100 + first))[i].reshape(100, 192)
            if not np.array_equal(got, (raw.V if i % 2 else raw.K)[i // 2].values[first:100 + first]):
                wrong.append(i)
    threads = [threading.Thread(target=read, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_closed_objects_say_so(lossless, dictionary_bytes):
    entry = xkv.open(lossless)
    entry.close()
    entry.close()
    assert entry.closed
    dictionary = xkv.Dictionary.open(dictionary_bytes)
    dictionary.close()
    for action in (entry.read, lambda: entry.info, lambda: dictionary.info):
        with pytest.raises(ValueError, match="closed"):
            action()


def test_log_goes_to_logging(caplog, tmp_path):
    (tmp_path / "odd.ggsq").write_bytes(b"qsgg" + b"\x63\0\0\0" * 8)
    with caplog.at_level("DEBUG", "xkv"):
        assert xkv.Cache.open(tmp_path / "odd.ggsq").engine == "opaque"
    assert any("odd.ggsq" in record.getMessage() for record in caplog.records)
