"""Minimal pairs of the house: verb forms in short sentences, made from the word lists below.

A model that knows the grammar gives the good sentence of a pair the higher probability; the two
differ in one word. As in Linzen et al. 2016 (arXiv 1611.01368) and BLiMP (arXiv 1912.00582), whose
data is not used: these words are plain enough to occur in an old text such as the Bible, which is
what the default model was trained on.

Kept out of the lists, since one of the two sentences would not be clearly good or clearly bad:
verbs whose past is their base form (put, cut, read) or another verb's (saw, found, fell, lay),
those whose participle is their base form (come, run), bases that are mass nouns ("has work", "has
rest") or adjectives ("has open"), "you", "I", "if" (subjunctive), nouns with one form for both
numbers (sheep) and collective ones (people) as subjects, and "number of" before a plural.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from qat.analysis.minimal_pairs import Pair

ONE = ("he", "the king", "the servant", "the woman", "the child")
MANY = ("they", "the kings", "the servants", "the women", "the children")
SUBJECTS = [(subject, True) for subject in ONE] + [(subject, False) for subject in MANY]
VERBS = [  # base, third person, past, participle, and what may follow any of them
    ("walk", "walks", "walked", "walked", "to the store"),
    ("go", "goes", "went", "gone", "to the city"),
    ("eat", "eats", "ate", "eaten", "bread"),
    ("drink", "drinks", "drank", "drunk", "the wine"),
    ("speak", "speaks", "spoke", "spoken", "to the people"),
    ("give", "gives", "gave", "given", "bread to the poor"),
    ("take", "takes", "took", "taken", "the sword"),
    ("make", "makes", "made", "made", "a garment"),
    ("bring", "brings", "brought", "brought", "water"),
    ("send", "sends", "sent", "sent", "a letter"),
    ("keep", "keeps", "kept", "kept", "the law"),
    ("buy", "buys", "bought", "bought", "oil"),
    ("sell", "sells", "sold", "sold", "the fish"),
    ("carry", "carries", "carried", "carried", "the wood"),
    ("wash", "washes", "washed", "washed", "the cup"),
    ("build", "builds", "built", "built", "a wall"),
    ("sing", "sings", "sang", "sung", "a song"),
    ("write", "writes", "wrote", "written", "a letter"),
    ("call", "calls", "called", "called", "the shepherd"),
    ("ask", "asks", "asked", "asked", "the prophet"),
    ("teach", "teaches", "taught", "taught", "the law"),
    ("gather", "gathers", "gathered", "gathered", "the grain"),
    ("break", "breaks", "broke", "broken", "the bread"),
    ("sit", "sits", "sat", "sat", "at the gate"),
    ("stand", "stands", "stood", "stood", "at the door"),
    ("enter", "enters", "entered", "entered", "the house"),
    ("hear", "hears", "heard", "heard", "the voice"),
]
STATES = (
    "old", "wise", "afraid", "hungry", "ready", "in the house", "at the gate", "near the river",
)  # fmt: skip
POSSESSIONS = (
    "a sword", "a field", "two sons", "ten camels", "a house in the city", "much gold", "no bread",
    "many friends",
)  # fmt: skip
HEADS = [  # one, many, what stands between them and their verb: of one, of many
    ("key", "keys", "to the box", "to the boxes"),
    ("door", "doors", "of the house", "of the houses"),
    ("wall", "walls", "of the city", "of the cities"),
    ("gate", "gates", "of the temple", "of the temples"),
    ("path", "paths", "to the village", "to the villages"),
    ("son", "sons", "of the king", "of the kings"),
    ("daughter", "daughters", "of the priest", "of the priests"),
    ("servant", "servants", "of the prophet", "of the prophets"),
    ("tree", "trees", "beside the river", "beside the rivers"),
    ("stone", "stones", "under the altar", "under the altars"),
    ("lamp", "lamps", "near the door", "near the doors"),
    ("garment", "garments", "of the woman", "of the women"),
]
HEAD_STATES = ("old", "beautiful", "not far away", "here")


def _pair(kind: str, template: str, good: str, bad: str) -> Pair:
    """``template`` with each of the two words in place of its underscore, first letter raised."""
    sentences = [template.replace("_", word) for word in (good, bad)]
    good_sentence, bad_sentence = (text[0].upper() + text[1:] for text in sentences)
    return Pair(good_sentence, bad_sentence, kind)


def _by_number(kind: str, template: str, is_one: bool, one: str, many: str) -> Pair:
    return _pair(kind, template, *((one, many) if is_one else (many, one)))


def _pairs() -> Iterator[Pair]:
    for (subject, is_one), verb in product(SUBJECTS, VERBS):
        base, third, past, participle, rest = verb
        has = "has" if is_one else "have"
        present = third if is_one else base
        yield _by_number("agreement", f"{subject} _ {rest} every day.", is_one, third, base)
        yield _by_number("do", f"{subject} _ not {base} {rest}.", is_one, "does", "do")
        yield _pair("past_tense", f"yesterday {subject} _ {rest}.", past, present)
        yield _pair("participle", f"{subject} {has} _ {rest}.", participle, base)
        yield _pair("bare_verb", f"{subject} did not _ {rest}.", base, past)
    for (subject, is_one), state in product(SUBJECTS, STATES):
        yield _by_number("be", f"{subject} _ {state}.", is_one, "is", "are")
        yield _by_number("be", f"{subject} _ {state}.", is_one, "was", "were")
    for (subject, is_one), possession in product(SUBJECTS, POSSESSIONS):
        yield _by_number("have", f"{subject} _ {possession}.", is_one, "has", "have")
    for (one, many, of_one, of_many), state in product(HEADS, HEAD_STATES):
        for subject, is_one in ((f"the {one} {of_many}", True), (f"the {many} {of_one}", False)):
            yield _by_number("attractor", f"{subject} _ {state}.", is_one, "is", "are")
            yield _by_number("attractor", f"{subject} _ {state}.", is_one, "was", "were")


def generated_pairs() -> list[Pair]:
    """All of them, always the same in the same order, none twice."""
    return list(_pairs())
