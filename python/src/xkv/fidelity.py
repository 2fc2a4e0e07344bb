"""python -m xkv.fidelity MODEL.gguf --text FILE... - how faithful packed caches are, over ratio.

The model reads a prompt; its cache is packed and restored at each ratio, and the model's next-token distributions over the
text that follows (teacher forced) are compared with those it has with the raw cache. With quantized weights engines round
activations, so that two caches one ulp apart already differ by a KL of about 0.003: judge with f32 weights where you can."""
from __future__ import annotations

import argparse
import json
import pathlib
import sys
from dataclasses import asdict, dataclass
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np
import numpy.typing as npt

from .cache import Cache
from .dictionary import Dictionary
from .entry import open_entry
from .errors import TargetError
from .model import Model
from .packing import pack

Scores = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Fidelity:
    """Of next-token distributions to reference ones."""

    kl: float      # mean KL(reference || other), nats
    kl_p99: float
    top1: float    # share of positions with the same most likely token


def log_softmax(scores: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    shifted = scores.astype(np.float64) - scores.max()
    return np.asarray(shifted - np.log(np.exp(shifted).sum()))


def compare(reference: Scores, other: Scores) -> Fidelity:
    """Scores of the next token: [positions, vocabulary]."""
    kl = []
    for row, other_row in zip(reference, other):
        a, b = log_softmax(row), log_softmax(other_row)
        kl.append(np.exp(a) @ (a - b))
    top1 = np.mean(reference.argmax(axis=1) == other.argmax(axis=1))
    return Fidelity(float(np.mean(kl)), float(np.quantile(kl, 0.99)), float(top1))


class Judge:
    """One prompt, evaluated: its raw cache, and the scores that everything is compared with."""

    def __init__(self, engine_model: Any, model: Model, tokens: Sequence[int], following: Sequence[int]) -> None:
        from .llama import engine
        self.context = engine.Context(engine_model, len(tokens) + len(following) + 8)
        self.following = list(following)
        self.context.prefill(tokens)
        self.image = self.context.image(tokens)
        self.cache = Cache.open(self.image, model)
        self.reference = self.scores(self.image)

    def scores(self, image: bytearray) -> Scores:
        """The last token has no target and is left out."""
        self.context.set_image(bytearray(image))
        return self.context.logits(self.following)[:-1]

    def judge(self, dictionary: Optional[Dictionary], **options: Any) -> Dict[str, Any]:
        """Pack, restore, compare."""
        if dictionary is not None:
            options["dictionary"] = dictionary
        packed = pack(self.cache, **options)
        with open_entry(packed, dictionary) as entry:
            fidelity = compare(self.reference, self.scores(entry.restore()))
        return dict(profile=packed.report.profile, ratio=packed.report.ratio, bytes=len(packed), **asdict(fidelity))

    def close(self) -> None:
        self.cache.close()
        self.context.close()


def sweep(judge: Judge, dictionary: Optional[Dictionary], profiles: Sequence[Tuple[str, Sequence[float]]],
          **more: Any) -> List[Dict[str, Any]]:
    """A row for every profile and ratio that can be reached."""
    rows = []
    for profile, ratios in profiles:
        for ratio in ratios:
            try:
                row = judge.judge(dictionary if profile == "dict" else None, profile=profile, ratio=ratio)
            except TargetError as error:
                print(f"{profile} {ratio:g}x: {error}", file=sys.stderr)
                continue
            rows.append({**more, **row})
            print("| {text} | {profile} | {ratio:.2f} | {kl:.5f} | {kl_p99:.4f} | {top1:.3f} | {bytes} |".format(**rows[-1]),
                  flush=True)
    return rows


def parse_profile(text: str) -> Tuple[str, List[float]]:
    name, _, ratios = text.partition("=")
    return name, [float(ratio) for ratio in ratios.split(",")]


def main(arguments: Optional[List[str]] = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m xkv.fidelity", description="How faithful packed caches are, over "
                                     "ratio, judged by the model itself.")
    parser.add_argument("model", type=pathlib.Path, help="GGUF file; with f32 weights the judgement is finest")
    parser.add_argument("--text", type=pathlib.Path, nargs="+", required=True, help="texts; each is a prompt and what follows")
    parser.add_argument("--dictionary", type=pathlib.Path, help="trained on the model, not on these texts (.xkvd)")
    parser.add_argument("--tokens", type=int, default=1024, help="of each prompt [1024]")
    parser.add_argument("--following", type=int, default=256, help="tokens that are judged [256]")
    parser.add_argument("--profiles", type=parse_profile, nargs="+", metavar="NAME=RATIO,RATIO",
                        help="[svd=4,8,16 scalar=4,8; with a dictionary also dict=8,12,16,20,24]")
    parser.add_argument("--json", type=pathlib.Path, help="write the results here")
    args = parser.parse_args(arguments)
    from .llama import engine
    profiles = args.profiles or [("svd", [4.0, 8.0, 16.0]), ("scalar", [4.0, 8.0]),
                                 *([("dict", [8.0, 12.0, 16.0, 20.0, 24.0])] if args.dictionary else [])]
    engine_model, model = engine.Model(args.model), Model.from_gguf(args.model)
    dictionary = Dictionary.open(args.dictionary) if args.dictionary else None
    print("| text | profile | ratio | KL | KL p99 | top-1 | bytes |\n|---|---|---|---|---|---|---|")
    rows: List[Dict[str, Any]] = []
    for path in args.text:
        tokens = engine_model.tokenize(path.read_text(errors="replace"))[:args.tokens + args.following]
        if len(tokens) < args.tokens + args.following:
            raise SystemExit(f"{path}: {len(tokens)} tokens of text, {args.tokens + args.following} needed")
        judge = Judge(engine_model, model, tokens[:args.tokens], tokens[args.tokens:])
        rows += sweep(judge, dictionary, profiles, text=path.stem, tokens=args.tokens)
        judge.close()
    if args.json:
        args.json.write_text(json.dumps(dict(model=args.model.name, following=args.following, rows=rows), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
