"""llama-server, built from the sources inside the source distribution of llama-cpp-python, so that both are the same
llama.cpp; kept in the cache folder. And one that runs."""
import contextlib
import importlib.metadata
import json
import os
import shutil
import socket
import subprocess
import tarfile
import time
import urllib.error
import urllib.request

import models
from texts import downloaded

PACKAGE = "llama_cpp_python"
OPTIONS = ("-DCMAKE_BUILD_TYPE=Release", "-DBUILD_SHARED_LIBS=OFF", "-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF",
           "-DLLAMA_BUILD_APP=OFF", "-DLLAMA_USE_PREBUILT_UI=OFF", "-DLLAMA_OPENSSL=OFF")


class CannotBuild(RuntimeError):
    pass


def built(cache):
    """The program; the first call builds it, for some minutes."""
    version = importlib.metadata.version(PACKAGE)
    return models.made_once(cache / f"llama-server-{version}", lambda path: build(version, cache, path))


def build(version, cache, path):
    if not shutil.which("cmake"):
        raise CannotBuild("cmake is not installed")
    folder = cache / "llama-server-build"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        with tarfile.open(downloaded(f"{PACKAGE}=={version}", cache)) as archive:
            archive.extractall(folder, filter="data")
        source = folder / f"{PACKAGE}-{version}" / "vendor" / "llama.cpp"
        jobs = str(min(os.cpu_count() or 1, 2))
        for command in (["cmake", "-S", source, "-B", folder / "build", *OPTIONS],
                        ["cmake", "--build", folder / "build", "--target", "llama-server", "--parallel", jobs]):
            with open(folder / "log", "ab") as log:
                subprocess.run(command, check=True, stdout=log, stderr=log)
        shutil.copy(folder / "build" / "bin" / "llama-server", path)
    except (OSError, subprocess.CalledProcessError) as error:
        raise CannotBuild(f"{error}; see {folder / 'log'}") from error
    shutil.rmtree(folder)


class Running:
    """A server of one slot, with no other memory of prompts than that slot. All rows are kept, not only windows: of a slot of
    windows, raw ones too, it reuses nothing."""

    def __init__(self, program, model_file, slots, log, *options):
        with contextlib.closing(socket.socket()) as chosen:
            chosen.bind(("127.0.0.1", 0))
            port = chosen.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.process = subprocess.Popen(
            list(map(str, [program, "--model", model_file, "--port", port, "--slot-save-path", f"{slots}/", "--parallel", 1,
                           "--ctx-size", 4096, "--cache-ram", 0, "--swa-full", *options])), stdout=log, stderr=log)

    def __enter__(self):
        for _ in range(600):
            if self.process.poll() is not None:
                raise RuntimeError(f"llama-server ended: exit code {self.process.returncode}")
            with contextlib.suppress(OSError):
                if self.ask("/health")["status"] == "ok":
                    return self
            time.sleep(0.2)
        raise RuntimeError("llama-server does not get ready")

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait(60)

    def ask(self, path, **body):
        data = json.dumps(body).encode() if body else None
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=900) as reply:
            return json.load(reply)

    def complete(self, prompt, count):
        """Greedy; {content, cached: tokens of the prompt that were in the slot, computed: those that were not}."""
        reply = self.ask("/completion", prompt=prompt, n_predict=count, temperature=0, id_slot=0, cache_prompt=True)
        return dict(content=reply["content"], cached=reply["timings"]["cache_n"], computed=reply["timings"]["prompt_n"],
                    prompt_seconds=reply["timings"]["prompt_ms"] / 1000)

    def alive(self):
        return self.process.poll() is None
