"""Ratio against fidelity of the lossy profiles, judged by a real engine. A fresh cache is packed at each ratio and
restored by the tools; the engine's next-token distributions over the following text (teacher forced) are compared with
those of the raw cache. Prints Markdown tables. Run through run.sh: run.sh fidelity MODEL ..."""
import argparse
import importlib.metadata
import json
import pathlib
import platform
import tempfile

import numpy as np

import baselines
import engine
import gguf_header
import models
import svd_reference
from sequence_file import SequenceFile
from test_engine import raw16_bytes
from texts import START, default_texts, last_part
from tools import tool, train
from xkv.fidelity import compare, log_softmax, means

XKV_GROUP = 4   # layers of the published system that is measured beside
MARGIN = 1.005  # the packer's search for a ratio ends up to 0.5 % below what was asked


# --- Baselines ---

def one_ulp_off(plane):
    plane.values.view({2: np.uint16, 4: np.uint32}[plane.values.itemsize])[...] ^= 1
    return plane.values.nbytes


def quantized(quantize):
    def apply(plane):
        rows, size = quantize(plane.get())
        plane.set(rows)
        return size
    return apply


# Each changes a plane and returns the bytes that it then takes.
BASELINES = {"one ulp off": one_ulp_off, "q8_0": quantized(baselines.q8_0), "q4_0": quantized(baselines.q4_0)}


# --- The sweep ---

class Sweep:
    """What all prompts share; `rows` collects the results."""

    def __init__(self, model, model_file, dictionary, sinks, following, work):
        self.model, self.model_file, self.dictionary, self.sinks = model, model_file, dictionary, sinks
        self.following, self.work, self.rows = following, work, []
        self.geometry = gguf_header.geometry(model_file)

    def open_prompt(self, name, text, length):
        tokens = self.model.tokenize(text[:(length + self.following) * 12])[:length + self.following]
        if len(tokens) < length + self.following:
            raise RuntimeError(f"{name}: {len(tokens)} tokens of text, {length + self.following} needed")
        return Prompt(self, name, tokens, length)


class Prompt:
    """One prompt, evaluated: its raw cache in a file, and the scores that everything is compared with."""

    def __init__(self, sweep, name, tokens, length):
        self.sweep, self.name, self.length, self.following = sweep, name, length, tokens[length:]
        self.context = engine.Context(sweep.model, len(tokens) + 8, engine.F16, True)
        self.raw, self.entry, self.restored = (sweep.work / file for file in ("raw.ggsq", "entry.xkv", "restored.ggsq"))
        self.context.prefill(tokens[:length])
        self.context.save(self.raw, tokens[:length])
        self.raw16 = raw16_bytes(SequenceFile(self.raw))
        self.reference = self.scores(self.raw)
        self.reference_nll = self.nll(self.reference)

    def scores(self, file):
        """The last token has no target and is left out."""
        self.context.load(file)
        return self.context.logits(self.following)[:-1]

    def nll(self, scores):
        return -np.mean([log_softmax(row)[token] for row, token in zip(scores, self.following[1:])])

    def judge(self, method, file, size, **more):
        scores = self.scores(file)
        fidelity = compare(self.reference, scores)
        row = dict(prompt=self.name, tokens=self.length, method=method, ratio=self.raw16 / size, kl=fidelity.kl,
                   kl_p99=fidelity.kl_p99, top1=fidelity.top1, delta_nll=self.nll(scores) - self.reference_nll,
                   entry_bytes=size, **more)
        self.sweep.rows.append(row)
        print(format_row(row), flush=True)

    def baseline(self, method):
        file = SequenceFile(self.raw)
        framing = len(file.image) - raw16_bytes(file)
        coded = sum(BASELINES[method](plane) for plane in file.K + file.V)
        self.restored.write_bytes(file.image)
        self.judge(method, self.restored, self.raw16 if method == "one ulp off" else framing + coded)

    def grouped_svd(self, ratio):
        """xKV as published, at the bytes of a ratio."""
        file, geometry = SequenceFile(self.raw), self.sweep.geometry
        framing = len(file.image) - self.raw16
        unrotated = [svd_reference.rotate(k.get(), file.positions, geometry, -1) for k in file.K]
        keys = baselines.GroupedSvd(unrotated, XKV_GROUP)
        values = baselines.GroupedSvd([v.get() for v in file.V], XKV_GROUP)
        ranks = baselines.ranks_at(keys, values, self.raw16 / ratio - framing)
        if not ranks:
            print(f"skip xKV-{XKV_GROUP} {ratio:g}x: no rank is small enough", flush=True)
            return
        (k_planes, k_bytes), (v_planes, v_bytes) = keys.at(ranks[0]), values.at(ranks[1])
        for plane, rows in zip(file.K, k_planes):
            plane.set(svd_reference.rotate(rows, file.positions, geometry, +1))
        for plane, rows in zip(file.V, v_planes):
            plane.set(rows)
        self.restored.write_bytes(file.image)
        self.judge(f"xKV-{XKV_GROUP} {ratio:g}x", self.restored, framing + k_bytes + v_bytes, ranks=ranks)

    def profile(self, name, label, *target):
        """Pack with a profile and judge what comes back."""
        dictionary = ["-D", self.sweep.dictionary] if name == "dict" else []
        try:
            how = ["svd", "--half-factors"] if name == "svd16" else [name]
            report = tool("xkv-pack", "-f", "-o", self.entry, "--profile", *how, "--sinks", self.sweep.sinks, "--model",
                          self.sweep.model_file, *dictionary, *target, self.raw)
        except RuntimeError as failure:
            print(f"skip {label}: {failure}", flush=True)
            return
        tool("xkv-unpack", "-f", "-o", self.restored, *dictionary, self.entry)
        self.judge(label, self.restored, self.entry.stat().st_size, error_metric=report.get("error_metric"),
                   step=report.get("step"), components=report.get("components"))

    def close(self):
        self.context.close()


def sweep_ratios(sweep, texts, args):
    for name, text in texts.items():
        prompt = sweep.open_prompt(name, text, args.tokens)
        for method in args.baselines:
            prompt.baseline(method)
        for profile, ratios in args.profiles:
            for ratio in ratios:
                prompt.profile(profile, f"{profile} {ratio:g}x", "--ratio", f"{ratio * MARGIN:.4f}")
        for ratio in args.grouped_svd:
            prompt.grouped_svd(ratio)
        prompt.close()


def sweep_lengths(sweep, texts, args, unit):
    """Other lengths of the first prompt, at the step that gave a ratio at --tokens."""
    name, text = next(iter(texts.items()))
    step = next(row["step"] for row in sweep.rows if row["method"] == f"dict {args.length_ratio:g}x")
    for length in args.lengths:
        prompt = sweep.open_prompt(name, text, length)
        prompt.profile("dict", f"dict, step of {args.length_ratio:g}x", "--quality", f"{quality_of(step, unit):.5f}")
        prompt.close()


def quality_of(step, unit):
    """The inverse of the specification's step(quality) = unit * 2/3 * 2^((50 - quality) / 16)."""
    return 50 - 16 * np.log2(step / (unit * 2 / 3))


# --- Report ---

HEADER = ("| prompt | tokens | method | ratio | KL | KL p99 | top-1 | ΔNLL | entry bytes | metric error |\n"
          "|---|---|---|---|---|---|---|---|---|---|")


def format_row(row):
    error = row.get("error_metric")
    return ("| {prompt} | {tokens} | {method} | {ratio:.2f} | {kl:.5f} | {kl_p99:.4f} | {top1:.3f} | {delta_nll:+.4f} "
            "| {entry_bytes:.0f} | ").format(**row) + ("" if error is None else f"{error:.4f}") + " |"


def parse_profile(text):
    name, ratios = text.split("=")
    return name, [float(ratio) for ratio in ratios.split(",")]


def parse_arguments():
    parser = argparse.ArgumentParser()
    parser.add_argument("model", choices=models.SOURCES)
    parser.add_argument("--cache", type=pathlib.Path, required=True, help="folder for converted models and texts")
    parser.add_argument("--dict", type=pathlib.Path, help="dictionary (.xkvd)")
    parser.add_argument("--train", type=pathlib.Path, nargs="+", default=[], help="caches to train one with instead")
    parser.add_argument("--metric", type=pathlib.Path, help="metric for --train")
    parser.add_argument("--text", type=pathlib.Path, help=f"text; the prompt begins at {START} of it")
    parser.add_argument("--tokens", type=int, default=1024, help="of the prompt")
    parser.add_argument("--following", type=int, default=256, help="tokens that are judged")
    parser.add_argument("--sinks", type=int, default=4)
    parser.add_argument("--profiles", type=parse_profile, nargs="*", metavar="NAME=RATIO,RATIO", help="svd16: 16-bit factors",
                        default=[("dict", [8, 12, 16, 20, 24, 31]), ("scalar", [4, 8]), ("svd", [4, 8, 16]), ("svd16", [4, 8])])
    parser.add_argument("--baselines", nargs="*", choices=BASELINES, default=list(BASELINES))
    parser.add_argument("--grouped-svd", type=float, nargs="*", default=[2, 4, 8], metavar="RATIO",
                        help=f"of xKV-{XKV_GROUP} with 16-bit factors")
    parser.add_argument("--lengths", type=int, nargs="*", default=[],
                        help="prompt lengths to pack at the step of dict at --length-ratio")
    parser.add_argument("--length-ratio", type=float, default=16)
    parser.add_argument("--json", type=pathlib.Path, help="write the results here")
    args = parser.parse_args()
    if any(name == "dict" for name, _ in args.profiles) and not (args.dict or args.train):
        parser.error("the profile dict needs --dict or --train")
    if args.lengths and args.length_ratio not in dict(args.profiles).get("dict", []):
        parser.error(f"--lengths needs dict={args.length_ratio:g} among the profiles")
    return args


def describe(args, model_file, dictionary, rows):
    return dict(model=args.model, model_sha256=models.sha256(model_file), weights="f32",
                engine="llama-cpp-python " + importlib.metadata.version("llama-cpp-python"),
                python=platform.python_version(), machine=platform.machine(), following=args.following,
                sinks=args.sinks, dictionary=dictionary, rows=rows, means=means(rows))


def main():
    args = parse_arguments()
    model_file = models.joined_model(args.model, args.cache)
    model = engine.Model(models.f32_model(args.model, args.cache))
    if args.text:
        texts = {args.text.stem: last_part(args.text.read_text(errors="ignore"))}
    else:
        texts = default_texts(args.cache)
    with tempfile.TemporaryDirectory(prefix="xkv-fidelity-") as work:
        work = pathlib.Path(work)
        path = train(args.train, args.metric, model_file, work / "trained.xkvd") if args.train else args.dict
        dictionary = tool("xkv-info", path) if path else None
        sweep = Sweep(model, model_file, path, args.sinks, args.following, work)
        print(HEADER)
        sweep_ratios(sweep, texts, args)
        if args.lengths:
            sweep_lengths(sweep, texts, args, dictionary["unit"])
    results = describe(args, model_file, dictionary, sweep.rows)
    if results["means"]:
        print("\n".join(["", HEADER, *map(format_row, results["means"])]))
    if dictionary:
        print(f"\nBeside the entries: a dictionary of {dictionary['dictionary_bytes']} bytes.")
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
