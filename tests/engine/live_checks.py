"""Stores that do not fit or are damaged: the command computes the prompt, says why, and answers as without a store."""
import pathlib
import re
import shutil
import subprocess
import sys

import xkv

TEXT = "The harbour of Ostrava lies on the river Ebbe. In winter the ferries stop, and letters come by sledge. " * 4
LENGTH = 8


def damage_blob(store):
    (blob,) = (store / "blobs").iterdir()
    data = blob.read_bytes()
    blob.write_bytes(data[:len(data) // 2])


def flip_bit(store):
    (blob,) = (store / "blobs").iterdir()
    data = bytearray(blob.read_bytes())
    data[len(data) * 3 // 4] ^= 16
    blob.write_bytes(data)


def damage_index(store):
    index = store / "index" / "data.mdb"
    index.write_bytes(index.read_bytes()[:5000])


def remove_blob(store):
    (blob,) = (store / "blobs").iterdir()
    blob.unlink()


def tuned(model_file, path):
    """The same model with other weights behind the same header, as after fine-tuning."""
    data = bytearray(pathlib.Path(model_file).read_bytes())
    for at in range(len(data) // 2, len(data), 4096):
        data[at] ^= 1
    path.write_bytes(data)
    return path


def fallbacks(answer, model_file, other_model, same_model_f32, work):
    """[{case, reason, fell_back}]"""
    prompt, good = work / "short.txt", work / "good"
    prompt.write_text(TEXT)

    def ask(model, store, *options):
        return answer(model, store, prompt, "--max-tokens", LENGTH, *options)
    ask(model_file, good)
    if ask(model_file, good, "--no-save")["reused_tokens"] == 0:
        raise SystemExit("the good store is not used")
    cases = [("another model", other_model, None, ()), ("the same model, other quantization", same_model_f32, None, ()),
             ("the same header, other weights", tuned(model_file, work / "tuned.gguf"), None, ()),
             ("without flash attention", model_file, None, ("--no-flash-attn",)),
             ("keys and values in q8_0", model_file, None, ("--type-k", "q8_0", "--type-v", "q8_0")),
             ("keys in bf16", model_file, None, ("--type-k", "bf16")),
             ("windows only", model_file, None, ("--no-swa-full",)),
             ("another RoPE base", model_file, None, ("--rope-freq-base", "20000")),
             ("a truncated entry", model_file, damage_blob, ()), ("a flipped bit", model_file, flip_bit, ()),
             ("a missing entry", model_file, remove_blob, ()), ("a truncated index", model_file, damage_index, ())]
    rows = []
    for case, model, damage, options in cases:
        store, empty = work / "bad", work / "none"
        for folder in (store, empty):
            shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(good, store)
        if damage:
            damage(store)
        report, alone = ask(model, store, "--no-save", *options), ask(model, empty, "--no-save", *options)
        fell_back = report["reused_tokens"] == 0 and report["answer"] == alone["answer"] and report["reason"] != "found"
        rows.append(dict(case=case, reason=report["reason"], fell_back=fell_back))
    return rows


def other_contexts(answer, model_file, work):
    """A longer context fits, one that is too short for the prompt is refused before anything is computed. Answers are those
    behind what is reused: an engine that computes the last token alone rounds otherwise than with the whole prompt."""
    prompt, store = work / "short.txt", work / "contexts"
    prompt.write_text(TEXT)
    first = answer(model_file, store, prompt, "--max-tokens", LENGTH)
    same = answer(model_file, store, prompt, "--max-tokens", LENGTH, "--no-save")
    longer = answer(model_file, store, prompt, "--max-tokens", LENGTH, "--n-ctx", 1024, "--no-save")
    try:
        answer(model_file, store, prompt, "--max-tokens", LENGTH, "--n-ctx", 64)
    except SystemExit as error:
        refused = str(error).strip().split("\n")[-1]
    else:
        refused = ""
    return dict(reused_tokens=longer["reused_tokens"], prompt_tokens=first["prompt_tokens"],
                same_answer=longer["answer"] == same["answer"], refused=refused)


def windows(answer, model_file, text, questions, work):
    """A prompt longer than the windows, in contexts that keep no more than these reach. What is stored can be restored as
    a whole, for the same prompt; for another question the prompt is computed."""
    prompt, store = work / "long.txt", work / "windows"
    prompt.write_text(text)

    def ask(question, *options):
        return answer(model_file, store, prompt, "--question", question, "--max-tokens", LENGTH, "--no-swa-full", *options)
    first, same, other = ask(questions[0]), ask(questions[0], "--no-save"), ask(questions[1], "--no-save")
    return dict(prompt_tokens=first["prompt_tokens"], stored_bytes=first["stored_bytes"], reused_tokens=same["reused_tokens"],
                same_answer=same["answer"] == first["answer"], raw_bytes=same["raw_bytes"], other_reused=other["reused_tokens"],
                other_reason=other["reason"])


def readme(model_file, dictionary, work):
    """The snippet of README.md for llama.cpp, as written; twice, so that the second one finds what the first one stored."""
    text = (pathlib.Path(__file__).parents[2] / "README.md").read_text()
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", text, re.S) if "llama_cpp" in block]
    folder = work / "readme"
    folder.mkdir()
    (folder / "model.gguf").symlink_to(model_file)
    (folder / "model.xkvd").symlink_to(dictionary)
    (folder / "handbook.txt").write_text(TEXT)
    xkv.Store.init(folder / "prefixes").close()
    answers = [subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, capture_output=True, text=True).stdout
               for _ in range(2)]
    with xkv.Store.open(folder / "prefixes") as store:
        stats = store.stat()
    return dict(answers=answers, entries=stats.entries, hits=stats.hits)
