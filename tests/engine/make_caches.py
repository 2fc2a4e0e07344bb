"""Caches of one text at several lengths, as the engine saves them: TEXT-LENGTH.ggsq. The longest prompt is evaluated
once and then cut, so that all caches share their first tokens to the last bit. Run through run.sh: run.sh caches
MODEL."""
import argparse
import pathlib

import engine
import models
from texts import default_prose

LENGTHS = (256, 512, 1024, 2048, 4096, 8192)


def make_caches(model, name, text, lengths, folder):
    longest = max(lengths)
    tokens = model.tokenize(text)[:longest]
    if len(tokens) < longest:
        raise SystemExit(f"{name}: {len(tokens)} tokens of text, {longest} needed")
    context = engine.Context(model, longest, engine.F16, True)
    context.prefill(tokens)
    for length in sorted(lengths, reverse=True):
        path = folder / f"{name}-{length}.ggsq"
        context.cut(length)
        context.save(path, tokens[:length])
        print(f"{path}: {path.stat().st_size} bytes", flush=True)
    context.close()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model", choices=models.SOURCES)
    parser.add_argument("--cache", type=pathlib.Path, required=True, help="folder for converted models and texts")
    parser.add_argument("--text", type=pathlib.Path, help="a text (default: the second half of Othello)")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--out", type=pathlib.Path, help="folder (default: lengths/MODEL in the cache folder)")
    args = parser.parse_args()

    name, text = (args.text.stem, args.text.read_text(errors="ignore")) if args.text else default_prose(args.cache)
    folder = args.out or args.cache / "lengths" / models.SOURCES[args.model].shared
    folder.mkdir(parents=True, exist_ok=True)
    make_caches(engine.Model(models.f32_model(args.model, args.cache)), name, text, args.lengths, folder)


if __name__ == "__main__":
    main()
