"""What makes caches of llama.cpp differ: model, weights, settings of the context, adapter."""
from __future__ import annotations

import itertools
import os
from typing import Any, Dict, Iterator, Tuple

import llama_cpp

from .._weights import weights_mark
from ..model import Model
from ..prompt import Namespace

_TYPES = {0: "f32", 1: "f16", 30: "bf16", 8: "q8_0", 2: "q4_0", 3: "q4_1", 6: "q5_0", 7: "q5_1", 20: "iq4_nl"}
_ROPE = ("rope_scaling_type", "rope_freq_base", "rope_freq_scale", "yarn_ext_factor", "yarn_attn_factor", "yarn_beta_fast",
         "yarn_beta_slow", "yarn_orig_ctx")

Settings = Dict[str, str]


class Identity:
    """Of a llama_cpp.Llama: its xkv.Model and, by `settings` and `adapter`, the namespace of its caches."""

    def __init__(self, llama: Any) -> None:
        self.path: str = llama.model_path
        self.model = Model.from_gguf(self.path)
        self.settings = settings_of(llama)
        self.settings["weights"] = weights_mark(self.path)
        self.adapter = adapter_of(llama)
        windows = any(layer.window for layer in self.model.layers)
        self.keeps_windows = windows and self.settings["swa"] == "full"  # also what they have left behind

    def namespace(self, salt: bytes = b"") -> Namespace:
        return self._namespace(self.settings, salt)

    def text(self) -> str:
        """The settings, as for xkv-store --settings."""
        return _text(self.settings)

    def relatives(self, salt: bytes = b"") -> Iterator[Tuple[str, Namespace]]:
        """Namespaces of the same model with other usual settings, and what differs: to explain a miss."""
        kinds = ("f16", "q8_0", "q4_0", "bf16", "f32")
        for kind, flash, swa in itertools.product(kinds, ("on", "off"), ("full", "window")):
            other = {**self.settings, "k": kind, "v": kind, "flash": flash, "swa": swa}
            changed = [f"{name} {other[name]} instead of {self.settings[name]}" for name in other
                       if other[name] != self.settings[name]]
            if changed:
                yield ", ".join(changed), self._namespace(other, salt)

    def _namespace(self, settings: Settings, salt: bytes) -> Namespace:
        return Namespace(self.model, settings=_text(settings), lora=self.adapter, salt=salt)


def settings_of(llama: Any) -> Settings:
    """All settings of a context that what it caches depends on."""
    p = llama.context_params
    settings = {"engine": "llama.cpp", "state": str(llama_cpp.LLAMA_STATE_SEQ_VERSION),
                "k": _TYPES.get(p.type_k, str(p.type_k)), "v": _TYPES.get(p.type_v, str(p.type_v)),
                "flash": {0: "off", 1: "on"}.get(p.flash_attn_type, "auto"),
                "streams": "1" if p.kv_unified else str(p.n_seq_max), "swa": "full" if p.swa_full else "window"}
    for name in _ROPE:
        settings[name] = f"{getattr(p, name):g}"
    if llama.metadata.get("general.architecture", "") + ".rope.scaling.type" in llama.metadata:
        settings["n_ctx"] = str(llama.n_ctx())  # longrope chooses its factors by it
    if os.environ.get("LLAMA_ATTN_ROT_DISABLE"):
        settings["attn_rot"] = "off"
    return settings


def adapter_of(llama: Any) -> str:
    path = getattr(llama, "lora_path", None)
    return f"{weights_mark(path)} x {llama.lora_scale:g}" if path else ""


def _text(settings: Settings) -> str:
    return " ".join(f"{name}={value}" for name, value in settings.items())
