"""Texts unlike those that a dictionary was trained on: the error asked for is kept, and only bytes grow. Random tokens,
German and base64, evaluated by a real engine and packed with the dictionary. Run through run.sh: run.sh domains MODEL
--dict FILE, or --train CACHE... [--metric FILE]."""
import argparse
import base64
import pathlib
import re
import sys
import tarfile
import tempfile

import numpy as np

import engine
import models
from sequence_file import SequenceFile
from test_engine import raw16_bytes
from texts import default_texts, downloaded
from tools import tool, train
from xkv.fidelity import compare

MESSAGES = "Django==5.2"  # its source archive has German messages, whole sentences among them
ERRORS = (0.15, 0.05)     # relative, in the dictionary's metric
RATIO = 16


def german(cache):
    pattern = re.compile(r'^msgstr "(.+)"$', re.M)
    with tarfile.open(downloaded(MESSAGES, cache)) as archive:
        names = [name for name in archive.getnames() if name.endswith("/locale/de/LC_MESSAGES/django.po")]
        catalogs = [archive.extractfile(name).read().decode() for name in sorted(names)]
    return "\n".join(message for catalog in catalogs for message in pattern.findall(catalog))


def prompts(model, cache, length):
    """{name: tokens}"""
    random = np.random.default_rng(7)
    text = {"prose": default_texts(cache)["shrew"], "German": german(cache),
            "base64": base64.encodebytes(random.bytes(1 << 16)).decode()}
    tokens = {name: model.tokenize(text[name])[:length] for name in text}
    tokens["random tokens"] = random.integers(0, model.vocab_size, length).tolist()
    return tokens


class Judge:
    def __init__(self, model, model_file, dictionary, following, work):
        self.model, self.model_file, self.dictionary, self.following = model, model_file, dictionary, following
        self.raw, self.entry, self.restored = (work / name for name in ("raw.ggsq", "entry.xkv", "restored.ggsq"))

    def run(self, name, tokens):
        """Rows of one prompt; the last tokens are those that are judged."""
        prompt, following = tokens[:-self.following], tokens[-self.following:]
        context = engine.Context(self.model, len(tokens) + 8, engine.F16, True)
        context.prefill(prompt)
        context.save(self.raw, prompt)
        context.load(self.raw)
        reference = context.logits(following)
        for target in [("--error", error) for error in ERRORS] + [("--ratio", RATIO)]:
            report = tool("xkv-pack", "-f", "-o", self.entry, "-D", self.dictionary, "--profile", "dict", "--model",
                          self.model_file, *target, self.raw)
            tool("xkv-unpack", "-f", "-o", self.restored, "-D", self.dictionary, self.entry)
            context.load(self.restored)
            fidelity = compare(reference, context.logits(following))
            ratio = raw16_bytes(SequenceFile(self.raw)) / self.entry.stat().st_size
            kept = target[0] == "--ratio" or report["error_metric"] <= target[1]
            print(f"| {name} | {target[0][2:]} {target[1]:g} | {ratio:.2f} | {report['error_metric']:.4f} | "
                  f"{report['lossless_groups']} | {fidelity.kl:.5f} | {fidelity.top1:.3f} | "
                  f"{'yes' if kept else 'NO'} |", flush=True)
            yield kept
        context.close()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model", choices=models.SOURCES)
    parser.add_argument("--cache", type=pathlib.Path, required=True, help="folder for converted models and texts")
    parser.add_argument("--dict", type=pathlib.Path, help="dictionary (.xkvd)")
    parser.add_argument("--train", type=pathlib.Path, nargs="+", default=[], help="caches to train one with instead")
    parser.add_argument("--metric", type=pathlib.Path, help="metric for --train")
    parser.add_argument("--tokens", type=int, default=1024, help="of the prompt")
    parser.add_argument("--following", type=int, default=256, help="tokens that are judged")
    args = parser.parse_args()
    if not args.dict and not args.train:
        parser.error("--dict or --train is needed")

    model_file = models.joined_model(args.model, args.cache)
    model = engine.Model(models.f32_model(args.model, args.cache))
    with tempfile.TemporaryDirectory(prefix="xkv-domains-") as work:
        work = pathlib.Path(work)
        dictionary = args.dict or train(args.train, args.metric, model_file, work / "trained.xkvd")
        judge = Judge(model, model_file, dictionary, args.following, work)
        print("| text | target | ratio | metric error | lossless groups | KL | top-1 | kept |\n" + "|---" * 8 + "|")
        texts = prompts(model, args.cache, args.tokens + args.following)
        kept = [result for name, tokens in texts.items() for result in judge.run(name, tokens)]
    return 0 if all(kept) else 1


if __name__ == "__main__":
    sys.exit(main())
