"""python -m xkv.slots beside a real llama-server: a slot is saved and packed by the watcher, the server is started again,
the slot is restored from the store, and the server says how much of the prompt it reuses. Prints one JSON object; fails
when something is not as it should be. Run through run.sh: run.sh server MODEL."""
import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
import time

import llama_server
import models
from live import other_model, trained
from live_checks import damage_blob
from texts import FACTS, facts_text

ANSWER, TEXT = 16, 6000  # tokens; characters


class Setting:
    """A folder of slot files, a store, and the model."""

    def __init__(self, program, model_file, folder, dictionary=None):
        self.program, self.model_file, self.dictionary = program, model_file, dictionary
        self.slots, self.store, self.log = folder / "slots", folder / "store", open(folder / "log", "ab")
        self.slots.mkdir()

    def server(self, *options, model_file=None):
        return llama_server.Running(self.program, model_file or self.model_file, self.slots, self.log, *options)

    def command(self, action, *options, model_file=None):
        return list(map(str, [sys.executable, "-m", "xkv.slots", action, "--folder", self.slots, "--store", self.store,
                              "--model", model_file or self.model_file, *options]))

    def restore(self, server, *options, name="text.bin", **how):
        """(exit code, what it says)"""
        done = subprocess.run(self.command("restore", name, "--server", server.url, *options, **how), capture_output=True,
                              text=True)
        return done.returncode, (done.stdout + done.stderr).strip().replace(str(self.slots.parent) + "/", "")

    def pack_by_watcher(self, act, name):
        """What the watcher says of the file that act() makes."""
        packing = ["--dictionary", self.dictionary, "--ratio", 16] if self.dictionary else []
        watcher = subprocess.Popen(self.command("watch", "--interval", "0.2", *packing), stdout=subprocess.PIPE, text=True)
        try:
            watcher.stdout.readline()
            act()
            said = watcher.stdout.readline().strip()
        finally:
            watcher.terminate()
            watcher.wait(60)
        if (self.slots / name).exists():
            raise RuntimeError(f"the watcher leaves {name}: {said}")
        return said


def prompts(cache):
    """A text, and the same with questions behind it."""
    text = facts_text(cache, lambda text: len(text) <= TEXT)[0].rstrip()  # so that it ends where a token does
    return text, [f"{text}\n\nQuestion: {question}\nAnswer:" for question, _ in FACTS[:2]]


def reuse(setting, text, asked):
    """What is restored serves another prompt that begins with it, after a restart."""
    with setting.server() as server:
        first = server.complete(text, 0)
        said = setting.pack_by_watcher(lambda: server.ask("/slots/0?action=save", filename="text.bin"), "text.bin")
        server.ask("/slots/0?action=save", filename="raw.bin")  # for comparison
        size = (setting.slots / "raw.bin").stat().st_size
    with setting.server() as server:
        server.ask("/slots/0?action=restore", filename="raw.bin")
        raw = server.complete(asked[0], ANSWER)
        (setting.slots / "raw.bin").unlink()
    with setting.server() as server:
        restored = setting.restore(server)
        packed = server.complete(asked[0], ANSWER)
    by_prompt = setting.slots.parent / "prompt.txt"
    by_prompt.write_text(asked[1])
    with setting.server() as server:
        found = setting.restore(server, "--prompt", by_prompt, name="found.bin")
        other = server.complete(asked[1], ANSWER)
    return dict(text_tokens=first["computed"], watcher=said, raw_bytes=size, restore=restored, raw=raw, packed=packed,
                restore_by_prompt=found, other=other,
                left=sorted(path.name for path in setting.slots.iterdir() if not path.name.endswith(".xkvslot")))


def fallbacks(setting, other_model, prompt):
    """Restores that must fail: the server goes on and computes the prompt, as one that was asked for no restore."""
    cases = [("another model", (), other_model, None), ("another model in the server alone", (), other_model, setting.model_file),
             ("keys and values in q8_0", ("-ctk", "q8_0", "-ctv", "q8_0", "-fa", "on"), None, None),
             ("without flash attention", ("-fa", "off"), None, None), ("a context that is too small", ("-c", "512"), None, None)]
    rows = [refused(setting, prompt[-400:] if "-c" in options else prompt, case, options, run, told)
            for case, options, run, told in cases]
    damage_blob(setting.store)
    return [*rows, refused(setting, prompt, "a truncated entry", (), None, None)]


def refused(setting, prompt, case, options, model_file, told):
    with setting.server(*options, model_file=model_file) as server:
        code, said = setting.restore(server, model_file=told or model_file)
        answer = server.complete(prompt, ANSWER)
        alive = server.alive()
    with setting.server(*options, model_file=model_file) as server:
        alone = server.complete(prompt, ANSWER)
    fell_back = code == 1 and alive and answer["cached"] == 0 and answer["content"] == alone["content"]
    return dict(case=case, said=said, cached=answer["cached"], fell_back=fell_back and not (setting.slots / "text.bin").exists())


def checks(results):
    lossless, coded = results["lossless"], results["coded"]
    return {"lossless: the answer of the raw slot": lossless["packed"]["content"] == lossless["raw"]["content"],
            "as much is reused as of the raw slot": all(r["packed"]["cached"] == r["raw"]["cached"] for r in (lossless, coded)),
            "all of the text is reused": all(min(r["packed"]["cached"], r["other"]["cached"]) >= r["text_tokens"] - 8
                                             for r in (lossless, coded)),
            "no slot files are left": not lossless["left"] and not coded["left"],
            "bad caches are never used": all(row["fell_back"] for row in results["fallbacks"])}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model", choices=models.SOURCES)
    parser.add_argument("--cache", type=pathlib.Path, required=True, help="folder for models, texts and the server")
    parser.add_argument("--json", type=pathlib.Path, help="write the results here too")
    args = parser.parse_args()
    try:
        program = llama_server.built(args.cache)
    except llama_server.CannotBuild as error:
        print(f"SKIP: llama-server cannot be built: {error}")
        return 77
    model_file = models.joined_model(args.model, args.cache)
    other = other_model(args.model, args.cache)
    dictionary = trained(model_file, args.model, args.cache)
    text, asked = prompts(args.cache)
    start, results = time.perf_counter(), dict(model=args.model)
    with tempfile.TemporaryDirectory(prefix="xkv-server-") as work:
        settings = []
        for name, packing in (("lossless", None), ("coded", dictionary)):
            pathlib.Path(work, name).mkdir()
            settings.append(Setting(program, model_file, pathlib.Path(work, name), packing))
            results[name] = reuse(settings[-1], text, asked)
        results["fallbacks"] = fallbacks(settings[0], other, asked[0])
    results.update(seconds=time.perf_counter() - start, checks=checks(results))
    print(json.dumps(results, indent=1))
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0 if all(results["checks"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
