"""python -m xkv.llama MODEL.gguf --store DIR --prompt-file FILE - answer a prompt from a stored prefix, or compute it and
store it."""
from __future__ import annotations

import argparse
import json
import pathlib
import sys
import time
from typing import Any, Dict, List, Optional

import llama_cpp

from ..errors import XkvError
from ..store import Store
from .engine import silence
from .prefixes import Prefixes, Restored

CACHE_TYPES = {"f32": 0, "f16": 1, "bf16": 30, "q8_0": 8, "q4_0": 2}


def parse_arguments(arguments: Optional[List[str]]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m xkv.llama", description="Answer a prompt from a stored prefix; what "
                                     "is not stored is computed, packed and stored.")
    parser.add_argument("model", type=pathlib.Path, help="GGUF file")
    parser.add_argument("--store", type=pathlib.Path, required=True, help="folder of the store; made when it is not there")
    parser.add_argument("--prompt-file", type=pathlib.Path, required=True, help="text")
    parser.add_argument("--question", help="asked about the text, in the model's chat format")
    parser.add_argument("--max-tokens", type=int, default=128, help="of the answer [128]")
    packing = parser.add_argument_group("packing (default: lossless; with a dictionary: 16 times smaller)")
    packing.add_argument("--dictionary", type=pathlib.Path, help="trained on the model (.xkvd)")
    packing.add_argument("--ratio", type=float, help="so many times smaller")
    packing.add_argument("--error", type=float, help="at most this relative error")
    packing.add_argument("--quality", type=float, help="with a dictionary: 1 to 100")
    packing.add_argument("--save-min", type=int, default=64, metavar="N", help="store when at least N new tokens were "
                         "computed [64]")
    packing.add_argument("--no-save", action="store_true", help="only look")
    engine = parser.add_argument_group("engine")
    engine.add_argument("--n-ctx", type=int, default=0, help="context length [as long as the prompt and the answer]")
    engine.add_argument("--type-k", choices=CACHE_TYPES, default="f16", help="type of cached keys [f16]")
    engine.add_argument("--type-v", choices=CACHE_TYPES, default="f16", help="type of cached values [f16]")
    engine.add_argument("--no-flash-attn", action="store_true", help="without flash attention")
    engine.add_argument("--no-swa-full", action="store_true", help="keep no more than sliding windows reach: takes less "
                        "memory, but what is stored can only be reused as a whole")
    engine.add_argument("--rope-freq-base", type=float, default=0.0, help="[as the model says]")
    engine.add_argument("--threads", type=int, help="[all]")
    parser.add_argument("--cap", type=int, default=0, help="a new store evicts above so many bytes [never]")
    parser.add_argument("--salt-file", type=pathlib.Path, help="the tenant's secret")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output, the answer in it")
    return parser.parse_args(arguments)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Run:
    """One prompt, from text to answer; `report` collects what is printed."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.report = args, {}  # type: argparse.Namespace, Dict[str, Any]

    def load_model(self) -> None:
        """Tokenize first: the context is as long as the prompt needs."""
        args = self.args
        vocabulary = llama_cpp.Llama(str(args.model), vocab_only=True, verbose=False)
        self.tokens = prompt_tokens(vocabulary, args.prompt_file.read_text(errors="replace"), args.question)
        vocabulary.close()
        needed = len(self.tokens) + args.max_tokens
        if args.n_ctx and args.n_ctx < needed:
            raise SystemExit(f"--n-ctx {args.n_ctx}: the prompt has {len(self.tokens)} tokens, the answer up to "
                             f"{args.max_tokens}")
        self.llama = llama_cpp.Llama(
            str(args.model), n_ctx=args.n_ctx or -(-needed // 256) * 256, type_k=CACHE_TYPES[args.type_k],
            type_v=CACHE_TYPES[args.type_v], flash_attn=not args.no_flash_attn, swa_full=not args.no_swa_full,
            rope_freq_base=args.rope_freq_base, n_threads=args.threads, n_threads_batch=args.threads, verbose=False)

    def open_store(self) -> Optional[Prefixes]:
        """None: the store cannot be used; the prompt is computed without it."""
        args = self.args
        try:
            made = (args.store / "store").exists()
            store = Store.open(args.store, access="auto") if made else Store.init(args.store, cap=args.cap)
            options: Dict[str, Any] = {name: getattr(args, name) for name in ("ratio", "error", "quality")
                                       if getattr(args, name) is not None}
            if args.dictionary and not options:
                options["ratio"] = 16.0
            salt = args.salt_file.read_bytes() if args.salt_file else b""
            return Prefixes(self.llama, store, dictionary=args.dictionary, salt=salt, **options)
        except XkvError as error:
            say(f"the store is not used: {error}")
            self.report["reason"] = f"the store is not used: {error}"
            return None

    def answer(self, prefixes: Optional[Prefixes]) -> None:
        start = time.perf_counter()
        restored = prefixes.restore(self.tokens) if prefixes else Restored(reason=self.report["reason"])
        computed = len(self.tokens) - restored.tokens
        generator = self.llama.generate(self.tokens, temp=0.0)
        first = next(generator)
        seconds = time.perf_counter() - start
        self.report.update(prompt_tokens=len(self.tokens), reused_tokens=restored.tokens, computed_tokens=computed,
                           reason=restored.reason, first_token_seconds=seconds, load_seconds=restored.seconds,
                           replaced_prefill_seconds=restored.replaced_seconds, entry_bytes=restored.bytes,
                           raw_bytes=restored.raw_bytes)
        self._say_restored(restored, computed, seconds)
        if prefixes and not self.args.no_save and computed >= self.args.save_min:
            self._save(prefixes, seconds if not restored else None)
        self.report["answer"] = self._finish(generator, first)

    def _say_restored(self, restored: Restored, computed: int, seconds: float) -> None:
        if restored:
            replaced = restored.replaced_seconds
            against = f" instead of {replaced:.2f} s of prefill" if replaced else ""
            say(f"reused {restored.tokens} of {len(self.tokens)} tokens: loaded in {restored.seconds:.3f} s{against}, from "
                f"{restored.bytes} bytes for {restored.raw_bytes} of cache")
        else:
            say(f"nothing reused: {restored.reason}")
        say(f"{computed} tokens computed; first token after {seconds:.3f} s")

    def _save(self, prefixes: Prefixes, prefill_seconds: Optional[float]) -> None:
        start = time.perf_counter()
        try:
            put = prefixes.save(self.tokens, prefill_seconds)
        except (XkvError, RuntimeError) as error:
            say(f"not stored: {error}")
            return
        ratio = f", {put.pack.ratio:.1f} times smaller ({put.pack.profile})" if put.pack else ""
        say(f"stored {put.tokens} tokens in {put.bytes} bytes{ratio}, in {time.perf_counter() - start:.2f} s")
        self.report.update(stored_tokens=put.tokens, stored_bytes=put.bytes, base_tokens=put.base_tokens,
                           save_seconds=time.perf_counter() - start)

    def _finish(self, generator: Any, token: int) -> str:
        """The answer, printed as it comes."""
        out: List[int] = []
        shown = 0
        vocabulary = llama_cpp.llama_model_get_vocab(self.llama.model)
        while not llama_cpp.llama_vocab_is_eog(vocabulary, token):
            out.append(token)
            text = self.llama.detokenize(out).decode(errors="ignore")
            if not self.args.json:
                print(text[shown:], end="", flush=True)
                shown = len(text)
            if len(out) >= self.args.max_tokens:
                break
            token = next(generator)
        if not self.args.json:
            print()
        return str(self.llama.detokenize(out).decode(errors="ignore"))


def prompt_tokens(llama: Any, text: str, question: Optional[str]) -> List[int]:
    """With a question: a user's turn in the model's chat format, the text first; for models without one, a text to go on."""
    if question is None:
        return list(llama.tokenize(text.encode(), add_bos=True, special=False))
    template = llama.metadata.get("tokenizer.chat_template")
    if not template:
        content = f"{text.rstrip()}\n\nQuestion: {question}\nAnswer:"
        return list(llama.tokenize(content.encode(), add_bos=True, special=False))
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter
    vocabulary = llama_cpp.llama_model_get_vocab(llama.model)
    names = [llama_cpp.llama_vocab_get_text(vocabulary, token).decode() if token >= 0 else ""
             for token in (llama.token_eos(), llama.token_bos())]
    made = Jinja2ChatFormatter(template, *names)(messages=[{"role": "user", "content": f"{text.rstrip()}\n\n{question}"}])
    return list(llama.tokenize(made.prompt.encode(), add_bos=not made.added_special, special=True))


def main(arguments: Optional[List[str]] = None) -> int:
    silence()
    run = Run(parse_arguments(arguments))
    run.load_model()
    prefixes = run.open_store()
    run.answer(prefixes)
    if prefixes:
        prefixes.store.close()
    if run.args.json:
        print(json.dumps(run.report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
