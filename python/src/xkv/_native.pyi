"""The extension module that cffi makes: see src/ffi/build_ffi.py."""
from typing import Any

ffi: Any
lib: Any
