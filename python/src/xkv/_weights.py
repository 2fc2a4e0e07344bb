"""What tells the weights of models apart: samples of their files."""
from __future__ import annotations

import hashlib
import os
import pathlib

from ._files import Path

_SAMPLES, _SAMPLE = 64, 1 << 16  # of each file: 4 MiB


def weights_mark(path: Path) -> str:
    """Hash of samples all over a file: fingerprints of headers do not tell fine-tunes apart."""
    size = os.path.getsize(path)
    digest = hashlib.blake2b(str(size).encode(), digest_size=8)
    with open(path, "rb") as file:
        for i in range(_SAMPLES):
            file.seek(max(size - _SAMPLE, 0) * i // (_SAMPLES - 1))
            digest.update(file.read(_SAMPLE))
    return digest.hexdigest()


def model_fingerprint(name: str, revision: str = "") -> bytes:
    """16 bytes for a model that an engine knows by a name: of a local folder its config.json and samples of its weights,
    wherever it lies; of anything else the name and revision, behind which weights must not change."""
    folder = pathlib.Path(name)
    if not folder.is_dir():
        return hashlib.blake2b(f"name {name}\0{revision}".encode(), digest_size=16).digest()
    digest = hashlib.blake2b(b"folder", digest_size=16)
    for path in sorted(folder.iterdir()):
        if path.name == "config.json":
            digest.update(path.read_bytes())
        elif path.suffix in (".safetensors", ".bin", ".pt", ".gguf"):
            digest.update(f"{path.name} {weights_mark(path)}\0".encode())
    return digest.digest()
