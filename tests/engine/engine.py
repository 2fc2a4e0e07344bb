"""llama.cpp through its C API, as the Python package drives it."""
from xkv.llama.engine import BATCH, BF16, F16, F32, Q4_0, Q8_0, Context, Model

__all__ = ["BATCH", "BF16", "F16", "F32", "Q4_0", "Q8_0", "Context", "Model"]
