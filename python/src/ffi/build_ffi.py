"""build_ffi.py OUTPUT.c HEADER... - make the C code of the extension module from the public headers, in the order in
which they include each other. The compiler then checks every declaration against the headers themselves."""
import pathlib
import re
import sys

import cffi

# Called from C. `void *user` is the handle of a Python object (xkv/_callbacks.py).
CALLBACKS = """
extern "Python" int xkv_py_progress(void *user, uint64_t done, uint64_t total);
extern "Python" int xkv_py_group_ready(void *user, uint32_t group);
extern "Python" int xkv_py_layers_ready(void *user, uint32_t group, uint32_t layers);
extern "Python" int xkv_py_store_item(void *user, const xkv_store_item *item);
extern "Python" void xkv_py_log(void *user, xkv_log_level level, const char *message);
"""
MACRO = re.compile(r"^[ \t]*#[ \t]*define[ \t]+(XKV_[A-Z_]+)[ \t]+(0x[0-9a-f]+|[0-9]+)u?\s*$", re.M)


def declarations(header):
    """What cffi can parse of a header: without comments, directives, attributes and bodies; and its constants."""
    text = re.sub(r"/\*.*?\*/", " ", header, flags=re.S).replace("\\\n", " ")
    constants = dict(MACRO.findall(text))
    text = re.sub(r"^[ \t]*#.*$", "", text, flags=re.M)
    text = re.sub(r'extern "C" \{', "", text)
    text = re.sub(r"\b(XKV_API|XKV_MUST_CHECK)\b", "", text)
    text = re.sub(r"static inline ([^;{}]*?)\s*\{.*?\n\}", r"\1;", text, flags=re.S)
    text = re.sub(r"^\}\s*$", "", text, flags=re.M)  # of extern "C"
    return text, constants


def main():
    output, *headers = map(pathlib.Path, sys.argv[1:])
    texts, constants = [], {}
    for header in headers:
        text, found = declarations(header.read_text())
        texts.append(text)
        constants.update(found)
    text = "\n".join(texts)
    for name in sorted(constants, key=len, reverse=True):
        text = re.sub(rf"\b{name}\b", constants[name], text)
    defines = "".join(f"#define {name} {value}\n" for name, value in constants.items())
    ffi = cffi.FFI()
    ffi.cdef(defines + text + CALLBACKS)
    ffi.set_source("xkv._native", "#include <xkv/hook.h>\n#include <xkv/kernels.h>\n#include \"support.h\"\n")
    ffi.emit_c_code(str(output))


if __name__ == "__main__":
    main()
