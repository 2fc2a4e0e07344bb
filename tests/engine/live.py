"""Prefixes of a real engine reused by another process, as users run it: python -m xkv.llama. Measures what issue "real
engines" asks for and prints one JSON object; fails when a bound is broken. Run through run.sh: run.sh live MODEL."""
import argparse
import json
import pathlib
import shutil
import subprocess
import sys
import tempfile

import numpy as np

import models
import xkv
from live_checks import fallbacks
from texts import default_texts, facts_text, training_texts
from xkv.fidelity import compare
from xkv.llama import engine

PROMPT = 2000
PROMPTS, PROMPT_TOKENS, FOLLOWING = 8, 512, 64
RATIO = 16
LEAST_SPEEDUP, LEAST_AGREEMENT, MOST_DIFFERENT = 5, 0.93, 1


def answer(model_file, store, prompt_file, *options):
    """One process that answers; its report."""
    command = [sys.executable, "-m", "xkv.llama", model_file, "--store", store, "--prompt-file", prompt_file, "--json",
               *options]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(map(str, command))}: exit code {done.returncode}:\n{done.stderr}")
    return json.loads(done.stdout)


def trained(model_file, name, cache):
    """A dictionary trained by python -m xkv.calibrate on texts that are not judged; kept."""
    def make(path):
        with tempfile.TemporaryDirectory() as folder:
            files = []
            for text, words in training_texts(cache).items():
                files.append(pathlib.Path(folder, text))
                files[-1].write_text(words)
            subprocess.run([sys.executable, "-m", "xkv.calibrate", model_file, "--tokens", "512", "--dictionary", path,
                            "--text", *files], check=True)
    return models.made_once(cache / f"{name}-live.xkvd", make)


def two_processes(model_file, dictionary, work, cache):
    """The first computes and stores, the second restores and answers; a third one computes the same prompt."""
    text, questions = facts_text(cache)
    prompt, store = work / "prompt.txt", work / "store"
    prompt.write_text(first_tokens(model_file, text, PROMPT))
    first = answer(model_file, store, prompt, "--question", questions[0][0], "--dictionary", dictionary, "--ratio", RATIO,
                   "--max-tokens", 4)
    second = answer(model_file, store, prompt, "--question", questions[1][0], "--max-tokens", 24, "--no-save")
    alone = answer(model_file, work / "empty", prompt, "--question", questions[1][0], "--max-tokens", 24, "--no-save")
    return dict(prompt_tokens=first["prompt_tokens"], stored_bytes=first["stored_bytes"], reused_tokens=second["reused_tokens"],
                load_seconds=second["load_seconds"], replaced_prefill_seconds=second["replaced_prefill_seconds"],
                first_token_seconds=second["first_token_seconds"], first_token_seconds_prefill=alone["first_token_seconds"],
                speedup=alone["first_token_seconds"] / second["first_token_seconds"], question=questions[1][0],
                answer=second["answer"], answer_prefill=alone["answer"])


def first_tokens(model_file, text, count):
    """As much of the text as makes so many tokens."""
    vocabulary = engine.Model(model_file)
    low, high = 0, len(text)
    while high - low > 16:
        middle = (low + high) // 2
        low, high = (middle, high) if len(vocabulary.tokenize(text[:middle])) <= count else (low, middle)
    return text[:low]


class Judge:
    """Caches restored from entries against the raw one, in one engine."""

    def __init__(self, model_file, dictionary):
        self.engine, self.model = engine.Model(model_file), xkv.Model.from_gguf(model_file)
        self.dictionary = xkv.Dictionary.open(dictionary)
        self.context = engine.Context(self.engine, PROMPT + 512)

    def images(self, tokens):
        """(raw, restored at RATIO, restored lossless): what the engine saved, and what comes back."""
        self.context.clear()
        self.context.prefill(tokens)
        raw = self.context.image(tokens)
        with xkv.Cache.open(raw, self.model) as cache:
            packed = xkv.pack(cache, dictionary=self.dictionary, ratio=RATIO)
            lossless = xkv.pack(cache, profile="lossless")
        return raw, xkv.open(packed, self.dictionary).restore(), xkv.open(lossless).restore()

    def scores(self, image, following):
        self.context.set_image(bytearray(image))
        return self.context.logits(following)

    def greedy(self, image, tokens, count):
        """What the engine says behind `tokens`."""
        self.context.set_image(bytearray(image))
        first = int(self.context.logits(tokens)[-1].argmax())
        return [first, *self.context.greedy(first, count - 1)]


def agreement(judge, cache):
    """Over 8 prompts of three plays, 64 tokens teacher forced."""
    texts = list(default_texts(cache).values())
    kl, same, identical = [], [], True
    for i in range(PROMPTS):
        text = texts[i % len(texts)]
        tokens = judge.engine.tokenize(text[i // len(texts) * 3500:][:6000])[:PROMPT_TOKENS + FOLLOWING]
        prompt, following = tokens[:PROMPT_TOKENS], tokens[PROMPT_TOKENS:]
        raw, packed, lossless = judge.images(prompt)
        reference = judge.scores(raw, following)
        result = compare(reference, judge.scores(packed, following))
        kl.append(result.kl)
        same.append(result.top1)
        identical &= bytes(raw) == bytes(lossless) and np.array_equal(reference, judge.scores(lossless, following))
    return dict(kl=float(np.mean(kl)), kl_worst_prompt=max(kl), top1=float(np.mean(same)), lossless_identical=identical)


def questions(judge, cache):
    """Short answers that stand in the prompt: restored at RATIO against raw."""
    text, asked = facts_text(cache)
    prompt = judge.engine.tokenize(text)[:PROMPT]
    raw, packed, _ = judge.images(prompt)
    rows = []
    for question, expected in asked:
        tokens = judge.engine.tokenize(f"\n\nQuestion: {question}\nAnswer:")
        answers = [first_line(judge, judge.greedy(image, tokens, 12)) for image in (raw, packed)]
        rows.append(dict(question=question, expected=expected, raw=answers[0], packed=answers[1]))
    return dict(rows=rows, different=sum(row["raw"] != row["packed"] for row in rows),
                right_raw=sum(row["expected"] in row["raw"] for row in rows),
                right_packed=sum(row["expected"] in row["packed"] for row in rows))


def first_line(judge, tokens):
    return judge.engine.text(tokens).strip().split("\n")[0]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model", choices=models.SOURCES)
    parser.add_argument("--cache", type=pathlib.Path, required=True, help="folder for models and texts")
    parser.add_argument("--dict", type=pathlib.Path, help="dictionary (default: one is trained)")
    parser.add_argument("--json", type=pathlib.Path, help="write the results here too")
    args = parser.parse_args()
    model_file = models.joined_model(args.model, args.cache)
    dictionary = args.dict or trained(model_file, args.model, args.cache)
    other = next(name for name in models.SOURCES if name != args.model)
    work = pathlib.Path(tempfile.mkdtemp(prefix="xkv-live-"))
    try:
        results = dict(model=args.model, xkv=xkv.__version__, backends=xkv.backends(), ratio=RATIO)
        results["two_processes"] = two_processes(model_file, dictionary, work, args.cache)
        judge = Judge(model_file, dictionary)
        results["agreement"] = agreement(judge, args.cache)
        results["questions"] = questions(judge, args.cache)
        results["fallbacks"] = fallbacks(answer, model_file, models.joined_model(other, args.cache),
                                         models.f32_model(args.model, args.cache), work)
    finally:
        shutil.rmtree(work)
    checks = {"first token >= 5 times sooner": results["two_processes"]["speedup"] >= LEAST_SPEEDUP,
              "top-1 agreement >= 0.93": results["agreement"]["top1"] >= LEAST_AGREEMENT,
              "lossless: identical": bool(results["agreement"]["lossless_identical"]),
              "at most one answer differs": results["questions"]["different"] <= MOST_DIFFERENT,
              "bad caches are never used": all(row["fell_back"] for row in results["fallbacks"])}
    results["checks"] = checks
    text = json.dumps(results, indent=1)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
