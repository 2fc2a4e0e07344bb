#!/usr/bin/env python3
"""What the store costs over plain packing: `xkv-store put` and `get` beside `xkv-pack` and `xkv-unpack`.

Prints JSON. Each pair runs the plain tool and the store's one after the other, in an order that alternates, on outputs
that do not exist yet; a store is made anew for each put, outside the measured time. Both sides sync what they write.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path


class Tools:
    """The programs of a build, run in a scratch folder."""

    def __init__(self, folder: Path, scratch: Path) -> None:
        self.folder = folder
        self.scratch = scratch

    def run(self, name: str, *arguments: str | Path) -> float:
        """Seconds that it took; an error when it fails."""
        command = [str(self.folder / name), "-q", *map(str, arguments)]
        start = time.monotonic()
        subprocess.run(command, check=True)
        return time.monotonic() - start


def new_store(tools: Tools, dictionary: Path | None) -> Path:
    store = tools.scratch / "store"
    shutil.rmtree(store, ignore_errors=True)
    tools.run("xkv-store", "init", store)
    if dictionary is not None:
        tools.run("xkv-store", "put", store, dictionary)
    return store


def pack(tools: Tools, cache: Path, options: list[str]) -> float:
    entry = tools.scratch / "entry.xkv"
    entry.unlink(missing_ok=True)
    return tools.run("xkv-pack", *options, "-o", entry, cache)


def put(tools: Tools, cache: Path, options: list[str], dictionary: Path | None) -> float:
    store = new_store(tools, dictionary)
    return tools.run("xkv-store", "put", *options, store, cache)


def unpack(tools: Tools, options: list[str]) -> float:
    restored = tools.scratch / "restored"
    restored.unlink(missing_ok=True)
    return tools.run("xkv-unpack", *options, "-o", restored, tools.scratch / "entry.xkv")


def get(tools: Tools, cache: Path, model: list[str]) -> float:
    restored = tools.scratch / "restored"
    restored.unlink(missing_ok=True)
    return tools.run("xkv-store", "get", *model, "-o", restored, tools.scratch / "store", cache)


def compare(pairs: int, plain: Callable[[], float], stored: Callable[[], float]) -> dict[str, object]:
    """Alternating pairs; the first one, which warms caches, does not count."""
    times: tuple[list[float], list[float]] = ([], [])
    for i in range(pairs + 1):
        order = ((0, plain), (1, stored)) if i % 2 else ((1, stored), (0, plain))
        for side, measure in order:
            os.sync()  # what the last one left to be written is not this one's
            seconds = measure()
            if i > 0:
                times[side].append(seconds)
    medians = [statistics.median(side) for side in times]
    return {
        "plain_ms": round(1e3 * medians[0], 3),
        "store_ms": round(1e3 * medians[1], 3),
        "cost_percent": round(100 * (medians[1] / medians[0] - 1), 2),
        "plain_ms_all": [round(1e3 * t, 2) for t in times[0]],
        "store_ms_all": [round(1e3 * t, 2) for t in times[1]],
    }


PROFILES = {
    "lossless": ["--profile", "lossless"],
    "scalar": ["--profile", "scalar", "--error", "0.05"],
    "dict": ["--quality", "50"],
}


def measure(tools: Tools, cache: Path, profile: str, o: argparse.Namespace) -> dict[str, object]:
    model = ["--model", str(o.model)] if o.model else []
    dictionary = o.dictionary if profile == "dict" else None
    given = ["-D", str(dictionary)] if dictionary else []
    options = PROFILES[profile] + model + given
    result: dict[str, object] = {"cache": cache.name, "cache_bytes": cache.stat().st_size, "profile": profile}
    result["put"] = compare(
        o.pairs, lambda: pack(tools, cache, options), lambda: put(tools, cache, options, dictionary)
    )
    result["entry_bytes"] = (tools.scratch / "entry.xkv").stat().st_size
    result["get"] = compare(o.pairs, lambda: unpack(tools, given + model), lambda: get(tools, cache, model))
    return result


def sha256_rate() -> float:
    """GB/s of the hash that names blobs, in this process: the ceiling of any put that hashes what it wrote."""
    block = os.urandom(1 << 24)
    best = min(timed(lambda: hashlib.sha256(block)) for _ in range(5))
    return round(len(block) / best / 1e9, 2)


def timed(work: Callable[[], object]) -> float:
    start = time.monotonic()
    work()
    return time.monotonic() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("caches", nargs="+", type=Path, help="engine files to pack")
    parser.add_argument("--bin", type=Path, default=Path("build/cli"), help="folder of the tools [build/cli]")
    parser.add_argument("--folder", action="append", type=Path, help="where to write; repeatable [/dev/shm and here]")
    parser.add_argument("--profile", action="append", choices=["lossless", "scalar", "dict"], help="[all of them]")
    parser.add_argument("--model", type=Path, help="GGUF file of the model")
    parser.add_argument("--dictionary", type=Path, help="for dict")
    parser.add_argument("--pairs", type=int, default=15)
    o = parser.parse_args()
    profiles = o.profile or ["lossless", "scalar"] + (["dict"] if o.dictionary else [])
    if "dict" in profiles and o.dictionary is None:
        parser.error("--profile dict needs --dictionary")
    report: dict[str, object] = {"cpus": os.cpu_count(), "pairs": o.pairs, "sha256_GB_per_s": sha256_rate()}
    runs: list[dict[str, object]] = []
    for folder in o.folder or [Path("/dev/shm"), Path(".")]:
        with tempfile.TemporaryDirectory(dir=folder, prefix="xkv-cost-") as scratch:
            tools = Tools(o.bin, Path(scratch))
            for cache in o.caches:
                for profile in profiles:
                    runs.append({"folder": str(folder)} | measure(tools, cache, profile, o))
    report["runs"] = runs
    json.dump(report, sys.stdout, indent=1)
    print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
