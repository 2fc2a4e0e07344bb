"""python -m xkv.fidelity MODEL.gguf --text FILE... [--report PAGE.html] - how faithful packed caches are, over ratio.

The model reads a prompt; its cache is packed and restored at each ratio, and the model's next-token distributions over the
text that follows (teacher forced) are compared with those it has with the raw cache. With quantized weights engines round
activations, so that two caches one ulp apart already differ by a KL of about 0.003: judge with f32 weights where you can.

--report draws the results; with --from also recorded ones, for which no model is needed."""
from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import sys
import tempfile
import time
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
from .report import NotResults, layers_of, parts_of, write

Scores = npt.NDArray[np.float32]
Row = Dict[str, Any]
RESTORES = 3  # of which the median counts


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


def means(rows: Sequence[Row]) -> List[Row]:
    """One row a method over all prompts of the same length, where there is more than one."""
    out: List[Row] = []
    for method, tokens in dict.fromkeys((row["method"], row["tokens"]) for row in rows):
        same = [row for row in rows if (row["method"], row["tokens"]) == (method, tokens)]
        if len(same) > 1:
            mean: Row = dict(prompt=f"mean of {len(same)}", tokens=tokens, method=method)
            for name in ("ratio", "kl", "kl_p99", "top1", "delta_nll", "entry_bytes", "error_metric"):
                values = [row[name] for row in same if row.get(name) is not None]
                mean[name] = float(np.mean(values)) if values else None
            out.append(mean)
    return out


class Judge:
    """One prompt, evaluated: its raw cache, and the scores that everything is compared with."""

    def __init__(self, engine_model: Any, model: Model, tokens: Sequence[int], following: Sequence[int]) -> None:
        from .llama import engine
        self.context = engine.Context(engine_model, len(tokens) + len(following) + 8)
        self.tokens, self.following = len(tokens), list(following)
        start = time.perf_counter()
        self.context.prefill(tokens)
        self.prefill_seconds = time.perf_counter() - start
        self.image = self.context.image(tokens)
        self.cache = Cache.open(self.image, model)
        self.reference = self.scores(self.image)

    def scores(self, image: bytearray) -> Scores:
        """The last token has no target and is left out."""
        self.context.set_image(bytearray(image))
        return self.context.logits(self.following)[:-1]

    def judge(self, dictionary: Optional[Dictionary], **options: Any) -> Row:
        """Pack, restore, compare."""
        if dictionary is not None:
            options["dictionary"] = dictionary
        packed = pack(self.cache, **options)
        with open_entry(packed, dictionary) as entry:
            seconds = []
            for _ in range(RESTORES):
                start = time.perf_counter()
                image = entry.restore()
                seconds.append(time.perf_counter() - start)
            fidelity = compare(self.reference, self.scores(image))
            return dict(tokens=self.tokens, profile=packed.report.profile, ratio=packed.report.ratio, entry_bytes=len(packed),
                        **asdict(fidelity), restore_seconds=statistics.median(seconds), parts=parts_of(entry),
                        layers=layers_of(entry))

    def close(self) -> None:
        self.cache.close()
        self.context.close()


def sweep(judge: Judge, dictionary: Optional[Dictionary], profiles: Sequence[Tuple[str, Sequence[float]]],
          **more: Any) -> List[Row]:
    """A row for every profile and ratio that can be reached."""
    rows = []
    for profile, ratios in profiles:
        for ratio in ratios:
            try:
                row = judge.judge(dictionary if profile == "dict" else None, profile=profile, ratio=ratio)
            except TargetError as error:
                print(f"{profile} {ratio:g}x: {error}", file=sys.stderr)
                continue
            rows.append({**more, "method": f"{profile} {ratio:g}x", **row})
            print("| {prompt} | {method} | {ratio:.2f} | {kl:.5f} | {kl_p99:.4f} | {top1:.3f} | {entry_bytes} |"
                  .format(**rows[-1]), flush=True)
    return rows


def speed_of(judge: Judge, rows: Sequence[Row]) -> Row:
    """What the restore of the smallest entry replaces."""
    row = max(rows, key=lambda row: float(row["ratio"]))
    return dict(tokens=judge.tokens, ratio=row["ratio"], prefill_seconds=judge.prefill_seconds,
                restore_seconds=row["restore_seconds"])


def parse_profile(text: str) -> Tuple[str, List[float]]:
    name, _, ratios = text.partition("=")
    return name, [float(ratio) for ratio in ratios.split(",")]


def parse(arguments: Optional[List[str]]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m xkv.fidelity", description="How faithful packed caches are, over "
                                     "ratio, judged by the model itself.")
    parser.add_argument("model", type=pathlib.Path, nargs="?", help="GGUF file; with f32 weights the judgement is finest")
    parser.add_argument("--text", type=pathlib.Path, nargs="+", help="texts; each is a prompt and what follows")
    parser.add_argument("--dictionary", type=pathlib.Path, help="trained on the model, not on these texts (.xkvd)")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024],
                        help="of each prompt [1024]; of several lengths the first is drawn over ratio, all over time")
    parser.add_argument("--following", type=int, default=256, help="tokens that are judged [256]")
    parser.add_argument("--profiles", type=parse_profile, nargs="+", metavar="NAME=RATIO,RATIO",
                        help="[svd=4,8,16 scalar=4,8; with a dictionary also dict=8,12,16,20,24]")
    parser.add_argument("--json", type=pathlib.Path, help="write the results here")
    parser.add_argument("--report", type=pathlib.Path, metavar="PAGE.html", help="draw them on a page, one file")
    parser.add_argument("--from", type=pathlib.Path, nargs="+", default=[], dest="recorded", metavar="FILE.json",
                        help="draw these results as well: of --json, tests/engine, xkv_bench --restore")
    args = parser.parse_args(arguments)
    if (args.model is None) != (args.text is None):
        parser.error("MODEL and --text go together")
    if args.model is None and not (args.recorded and args.report):
        parser.error("MODEL and --text, or --from and --report, are needed")
    if args.recorded and not args.report:
        parser.error("--from goes with --report")
    return args


def measure(args: argparse.Namespace) -> Row:
    """Everything that was asked for, as JSON."""
    from .llama import engine
    profiles = args.profiles or [("svd", [4.0, 8.0, 16.0]), ("scalar", [4.0, 8.0]),
                                 *([("dict", [8.0, 12.0, 16.0, 20.0, 24.0])] if args.dictionary else [])]
    engine_model, model = engine.Model(args.model), Model.from_gguf(args.model)
    dictionary = Dictionary.open(args.dictionary) if args.dictionary else None
    print("| text | method | ratio | KL | KL p99 | top-1 | bytes |\n|---|---|---|---|---|---|---|")
    rows: List[Row] = []
    speeds: List[Row] = []
    for length in args.tokens:
        for path in args.text:
            tokens = engine_model.tokenize(path.read_text(errors="replace"))[:length + args.following]
            if len(tokens) < length + args.following:
                raise SystemExit(f"{path}: {len(tokens)} tokens of text, {length + args.following} needed")
            judge = Judge(engine_model, model, tokens[:length], tokens[length:])
            found = sweep(judge, dictionary, profiles, prompt=path.stem)
            if found and path == args.text[0]:
                speeds.append(speed_of(judge, found))
            rows += found
            judge.close()
    return dict(model=args.model.name, following=args.following, rows=rows, means=means(rows), speeds=speeds)


def main(arguments: Optional[List[str]] = None) -> int:
    args = parse(arguments)
    with tempfile.TemporaryDirectory(prefix="xkv-fidelity-") as work:
        sources = list(args.recorded)
        if args.model is not None:
            results = args.json or pathlib.Path(work, "results.json")
            results.write_text(json.dumps(measure(args), indent=1) + "\n")
            sources.insert(0, results)
        try:
            if args.report:
                write(sources, args.report)
        except (OSError, NotResults) as error:
            print(f"python -m xkv.fidelity: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
