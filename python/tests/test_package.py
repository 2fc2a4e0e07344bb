"""The package as such: types, what an sdist holds, the snippets of the README."""
import importlib.util
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile

import pytest
from conftest import ENGINE_FILE, GGUF, REPOSITORY

import xkv

PACKAGE = REPOSITORY / "python"


def test_types():
    """mypy --strict over the package, as pyproject.toml says."""
    if importlib.util.find_spec("mypy") is None:
        pytest.skip("mypy is not installed")
    done = subprocess.run([sys.executable, "-m", "mypy", "--no-incremental", "src/xkv"], cwd=PACKAGE, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (pathlib.Path(xkv.__file__).parent / "py.typed").exists()


def test_all_names_exist():
    assert sorted(xkv.__all__) == sorted(set(xkv.__all__))
    for name in xkv.__all__:
        assert hasattr(xkv, name)


# Public functions of the C library that the package does not call, and why.
NOT_FROM_PYTHON = {
    "xkv_ctx_memory_used": "contexts are the package's own; set_memory_limit() bounds them",
    "xkv_ctx_memory_peak": "likewise",
    "xkv_ctx_trim": "likewise",
    **dict.fromkeys((
        "xkv_device_open", "xkv_device_close", "xkv_device_get_info", "xkv_device_options_default",
        "xkv_device_target_default", "xkv_device_dict_create", "xkv_device_dict_free", "xkv_device_read",
        "xkv_device_read_size", "xkv_device_replay_create", "xkv_device_replay_run", "xkv_device_replay_free",
        "xkv_device_replay_bytes", "xkv_device_pack", "xkv_device_pack_size", "xkv_device_attention_create",
        "xkv_device_attention_free", "xkv_device_attention_get_info", "xkv_device_attention_merge",
        "xkv_device_attention_restore", "xkv_device_attend",
    ), "what is in a device's memory waits for an engine that asks for it from Python"),
    "xkv_backend_get_info": "what the command line shows",
    "xkv_entry_find_value": "Entry.values is a dict",
    "xkv_dtype_name": "the package's types are named by the same words",
    "xkv_dtype_size": "numpy knows",
    "xkv_dtype_bytes": "numpy knows",
    "xkv_dtype_block": "Plane.dtype says it",
    "xkv_plane_kind_name": "Plane.kind is one",
    "xkv_geometry_raw_bytes": "EntryInfo.raw_bytes",
    "xkv_framing_first": "Entry.restore(tokens)",
    "xkv_framing_views": "likewise",
    "xkv_framing_free": "framings stay inside entries and caches",
    "xkv_framing_safetensors": "numpy's own packages write safetensors",
    "xkv_unpack_file": "unpack_file() is the same from open(), so that progress and Ctrl-C work alike",
    "xkv_file_input": "files are read back by open()",
    "xkv_file_copy_to_fd": "for tools that write to standard output",
}


def test_every_public_function_can_be_reached():
    """Of the installed headers: called somewhere in the package, or on the list above."""
    declared = set()
    for header in REPOSITORY.glob("*/xkv/*.h"):
        text = re.sub(r"/\*.*?\*/", " ", header.read_text(), flags=re.S)
        for declaration in re.findall(r"XKV_API[^;]*;", text):
            declared.update(re.findall(r"\b(xkv_\w+)\s*\(", declaration))
        declared.update(re.findall(r"static inline [\w ]*\*?(xkv_\w+)\(", text))
    package = "".join(path.read_text() for path in (PACKAGE / "src" / "xkv").rglob("*.py"))
    called = set(re.findall(r"\b_?lib\.(xkv_\w+)", package))
    called.update(re.findall(r"\b(xkv_\w+)\(", (PACKAGE / "src" / "ffi" / "support.c").read_text()))
    assert len(declared) > 150
    assert declared - called == set(NOT_FROM_PYTHON)


def test_a_source_distribution_is_complete(tmp_path, monkeypatch):
    """It holds the C sources as files, so that it builds without the repository."""
    build = pytest.importorskip("scikit_build_core.build")
    monkeypatch.chdir(PACKAGE)
    with tarfile.open(tmp_path / build.build_sdist(str(tmp_path))) as archive:
        files = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    needed = {"LICENSE", "pyproject.toml", "CMakeLists.txt", "native/CMakeLists.txt", "src/ffi/build_ffi.py"}
    for folder in ("format", "kernels", "codec", "store", "cmake"):
        for path in (REPOSITORY / folder).rglob("*"):
            if path.is_file():
                needed.add(f"native/{path.relative_to(REPOSITORY)}")
    assert not needed - files


def snippets():
    text = (REPOSITORY / "README.md").read_text()
    section = text[text.index("\n## Use it from Python\n"):]
    return re.findall(r"```python\n(.*?)```", section[:section.index("\n## ", 5)], re.S)


def test_readme(tmp_path, monkeypatch):
    """The snippets of the section, one after the other, as written. tests/engine/live.py has those with llama_cpp,
    test_transformers.py those with transformers; test_vllm.py, test_lmcache.py and test_sglang.py have the commands."""
    shutil.copy(ENGINE_FILE, tmp_path / "chat.ggsq")
    (tmp_path / "caches").mkdir()
    shutil.copy(ENGINE_FILE, tmp_path / "caches")
    shutil.copy(GGUF, tmp_path / "model.gguf")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    run = [code for code in snippets() if "llama_cpp" not in code and "transformers" not in code]
    assert len(run) >= 3
    for code in run:
        exec(compile(code, "README.md", "exec"), names)
    assert (tmp_path / "restored.ggsq").stat().st_size < ENGINE_FILE.stat().st_size
