"""Slot files in a store, with a server that behaves as llama-server's /slots do: it reads and writes files by name."""
import http.server
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading

import pytest
from conftest import ENGINE_FILE, GGUF

import xkv
from xkv import slots


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "slots").mkdir()
    return tmp_path / "slots"


@pytest.fixture
def packer(folder, store, model):
    return slots.Slots(folder, store, model, ratio=8)


class Stub(http.server.BaseHTTPRequestHandler):
    """POST /slots/0?action=save|restore. `held` is what the slot holds."""
    folder: pathlib.Path
    held = b""
    model = GGUF

    def do_GET(self):
        self.reply(*((200, dict(model_path=str(self.model))) if self.path == "/props" else (404, {})))

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        kind = type(self)
        if self.path == "/tokenize":
            return self.reply(200, dict(tokens=kind.tokens))
        path = self.folder / body["filename"]
        if self.path == "/slots/0?action=save":
            path.write_bytes(kind.held)
            return self.reply(200, dict(n_saved=160, n_written=len(kind.held)))
        if self.path == "/slots/0?action=restore" and path.exists():
            kind.held = path.read_bytes()
            return self.reply(200, dict(n_restored=160, n_read=len(kind.held)))
        self.reply(400, dict(error=dict(message="Unable to restore slot")))

    def reply(self, status, body):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def server(folder, tokens):
    handler = type("Handler", (Stub,), dict(folder=folder, held=ENGINE_FILE.read_bytes(), tokens=tokens.tolist()))
    listening = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    yield handler, f"http://127.0.0.1:{listening.server_port}"
    listening.shutdown()
    listening.server_close()


def test_only_complete_files_are_packed(packer, folder):
    whole, messages = ENGINE_FILE.read_bytes(), []
    (folder / "a.bin").write_bytes(whole[:-5])
    (folder / "notes.txt").write_text("no slot")
    for _ in range(4):
        assert packer.pack_new(messages.append) == 0
    assert len(messages) == 1 and "notes.txt" in messages[0]
    (folder / "a.bin").write_bytes(whole)
    assert packer.pack_new(messages.append) == 0, "it has just changed"
    assert packer.pack_new(messages.append) == 1
    assert not (folder / "a.bin").exists()
    assert packer.restore("a.bin") == 160
    assert (folder / "a.bin").stat().st_size == len(whole)
    assert packer.restore("b.bin", tokens=[*xkv.Cache.open(ENGINE_FILE).geometry.token_ids[:50], 1]) == 50


def test_kept_files_are_packed_once(packer, folder):
    shutil.copy(ENGINE_FILE, folder / "a.bin")
    assert [packer.pack_new(print, keep=True) for _ in range(4)] == [0, 1, 0, 0]
    assert (folder / "a.bin").read_bytes() == ENGINE_FILE.read_bytes()


def test_what_is_not_there(packer):
    with pytest.raises(slots.SlotError, match="no slot x.bin"):
        packer.restore("x.bin")
    with pytest.raises(slots.SlotError, match="none"):
        packer.restore("x.bin", tokens=[1, 2])
    for name in ("../x", "", ".hidden", "a/b"):
        with pytest.raises(slots.SlotError, match="not the name"):
            packer.restore(name)


def test_a_damaged_entry_writes_no_slot_file(packer, folder, store):
    shutil.copy(ENGINE_FILE, folder / "a.bin")
    packer.pack("a.bin")
    (blob,) = (store.path / "blobs").iterdir()
    blob.write_bytes(blob.read_bytes()[:-100])
    with pytest.raises(slots.SlotError):
        packer.restore("a.bin")
    assert not (folder / "a.bin").exists()


def test_through_the_server(folder, tmp_path, server):
    handler, url = server
    original = handler.held
    common = ["--folder", str(folder), "--store", str(tmp_path / "s"), "--model", str(GGUF), "--server", url]
    assert slots.main(["save", "a.bin", *common]) == 0
    handler.held = b""
    assert slots.main(["restore", "a.bin", *common]) == 0
    assert handler.held == original  # lossless is the default
    handler.held = b""
    (tmp_path / "prompt.txt").write_text("the stub's tokens")
    assert slots.main(["restore", "b.bin", "--prompt", str(tmp_path / "prompt.txt"), *common]) == 0
    assert handler.held == original
    assert [path.name for path in folder.iterdir()] == ["a.bin.xkvslot"]
    assert slots.main(["restore", "none.bin", *common]) == 1


def test_a_server_of_another_model(folder, tmp_path, server, capsys):
    """The file beside it has the same header before other weights."""
    handler, url = server
    other = tmp_path / "other.gguf"
    other.write_bytes(GGUF.read_bytes() + b"other weights")
    common = ["--folder", str(folder), "--store", str(tmp_path / "s"), "--server", url]
    assert slots.main(["save", "a.bin", *common, "--model", str(GGUF)]) == 0
    handler.held = b"untouched"
    handler.model = other
    assert slots.main(["restore", "a.bin", *common, "--model", str(GGUF)]) == 1
    assert "which is not" in capsys.readouterr().err
    assert slots.main(["restore", "a.bin", *common, "--model", str(other)]) == 1, "stored by other weights"
    assert handler.held == b"untouched" and not (folder / "a.bin").exists()
    handler.model = "/where/this/machine/cannot/see.gguf"
    assert slots.main(["restore", "a.bin", *common, "--model", str(GGUF)]) == 0


def test_watching(folder, tmp_path):
    """As a process: it packs what appears, and ends at Ctrl-C."""
    watcher = subprocess.Popen([sys.executable, "-m", "xkv.slots", "watch", "--folder", folder, "--store", tmp_path / "s",
                                "--model", GGUF, "--interval", "0.05"], stdout=subprocess.PIPE, text=True)
    try:
        assert watcher.stdout.readline().startswith("watching")
        shutil.copy(ENGINE_FILE, folder / "a.bin")
        assert "160 tokens stored" in watcher.stdout.readline()
    finally:
        os.kill(watcher.pid, signal.SIGINT)
        watcher.wait(30)
    assert watcher.returncode == 130 and not (folder / "a.bin").exists()


def test_a_name_may_stand_behind_the_options():
    places = ["--folder", "f", "--store", "s", "--model", "m"]
    for arguments in (["restore", "text.bin", *places], ["restore", *places, "text.bin"], [*places, "restore", "text.bin"]):
        assert slots.parse_arguments(arguments).name == "text.bin"
