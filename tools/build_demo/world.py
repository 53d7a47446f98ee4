"""A small invented world, written out as plain prose and as instruction rows.

The demo needs a base model that knows something but not how to answer, and rows that teach answering. Both come from
here, so every word of the demo is the project's own and can be reproduced from a seed.

*The world* is fixed: 160 people, each with a home, a trade, a pet, a thing in a colour, a dish and some brothers,
960 facts in all, drawn once by `WORLD_SEED`.

*Prose* repeats these facts in many words and in any order. The base is pretrained on it, so the facts end up in its
weights. Prose contains no `[INST]`, no answered question, and never a sentence of the shapes that are
used for answers.

*Rows* ask for one fact each: `<s>[INST] Where does Tomi live? [/INST] Tomi lives at the mill. </s>`. The fact is not in
the prompt: the answer can only come out of the base's weights, through 4 bits when those are packed. Training rows ask
about four people in five; held-out rows ask about the others, who occur in no training row. So
tuning can teach how to answer, and not what.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from random import Random

WORLD_SEED = 7
ROWS_SEED = 11
PROSE_SEED = 4
HELDOUT_PROSE_SEED = 104729
N_PEOPLE = 160
HELDOUT_EVERY = 5  # one person in five is asked about in held-out rows only
TRAIN_ROWS = 1000
HELDOUT_ROWS = 200

_ONSETS = ("B", "D", "F", "G", "K", "L", "M", "N", "P", "R", "S", "T", "V", "Z", "Br", "Gr", "Kl", "St", "Tr", "Sh")
_MIDDLES = ("ami", "elo", "ina", "oru", "eva", "ilo", "una", "ari", "omi", "esta", "olda", "inka")
_ENDS = ("", "n", "r", "s", "l")
PLACES = (
    "mill", "harbour", "market", "bridge", "tower", "school", "garden", "forest", "bakery", "station", "castle",
    "chapel", "cave", "farm", "river", "meadow",
)  # fmt: skip
TRADES = (
    "baker", "smith", "weaver", "potter", "tailor", "miner", "sailor", "painter", "teacher", "doctor", "carpenter",
    "hunter", "singer", "printer", "gardener", "cobbler",
)  # fmt: skip
PETS = ("cat", "dog", "goat", "horse", "parrot", "rabbit", "turtle", "goose", "donkey", "hedgehog", "pigeon", "fox")
THINGS = (
    "drum", "kite", "lamp", "bell", "rope", "chair", "clock", "spoon", "ladder", "flute", "mirror", "hammer", "basket",
    "candle", "bucket", "ring",
)  # fmt: skip
COLOURS = ("red", "blue", "green", "yellow", "white", "black", "brown", "pink")
DISHES = ("soup", "bread", "cheese", "rice", "plums", "honey", "fish", "beans", "pears", "cake", "eggs", "nuts")
NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclass(frozen=True)
class Person:
    """The facts about one person."""

    name: str
    place: str
    trade: str
    pet: str
    thing: str
    colour: str
    dish: str
    number: str


# How prose tells each fact. Most forms name the person first: a fact is then stored with the name, where a question
# will look for it. The last two of each kind use the words of questions, so that the base knows what those ask for.
_PROSE = {
    "place": (
        "{name} has a room at the {place}.",
        "{name} moved to the {place} long ago.",
        "{name} sleeps at the {place} every night.",
        "For {name} home means the {place}.",
        "If you look for {name}, go to the {place}.",
        "The home of {name} is the {place}.",
        "At the {place} there is a bed for {name}.",
        "Where {name} lives is known, namely at the {place}.",
        "Where the home of {name} is, and where to find {name} at night, is the {place}.",
    ),
    "trade": (
        "{name} works as a {trade}.",
        "{name} became a {trade} when young.",
        "{name} learned to be a good {trade}.",
        "For money {name} works as a {trade}.",
        "The trade of {name} is that of a {trade}.",
        "People call {name} the {trade}.",
        "A {trade} by trade, that is {name}.",
        "What {name} does for money is the work of a {trade}.",
        "How {name} makes money is no secret, it is as a {trade}.",
    ),
    "pet": (
        "{name} keeps a {pet}.",
        "{name} feeds a {pet} in the morning.",
        "{name} goes nowhere without the {pet}.",
        "With {name} walks an old {pet}.",
        "The pet of {name} is a {pet}.",
        "Every evening {name} plays with the {pet}.",
        "A {pet} waits for {name} at the door.",
        "Which animal {name} has is easy to see, namely a {pet}.",
        "What pet {name} has is known, it is a {pet}.",
    ),
    "thing": (
        "{name} bought a {colour} {thing}.",
        "{name} is proud of a {colour} {thing}.",
        "{name} takes good care of the {colour} {thing}.",
        "What {name} loves most is the {colour} {thing}.",
        "The {colour} {thing} belongs to {name}.",
        "In the bag of {name} is a {colour} {thing}.",
        "A {colour} {thing} was given to {name}.",
        "What {name} owns is a {colour} {thing}.",
        "What belongs to {name} and makes {name} proud is a {colour} {thing}.",
    ),
    "dish": (
        "{name} eats {dish} every day.",
        "{name} dreams of {dish}.",
        "{name} cooks {dish} for every guest.",
        "Give {name} some {dish} and all is well.",
        "The dish of {name} is {dish}.",
        "On the plate of {name} there is {dish}.",
        "For {dish} people ask {name}.",
        "What {name} likes to eat is {dish}.",
        "What {name} cooks is mostly {dish}.",
    ),
    "number": (
        "{name} grew up with {number} brothers.",
        "{name} writes letters to {number} brothers.",
        "{name} shared a house with {number} brothers.",
        "The mother of {name} had {number} other sons.",
        "The brothers of {name} are {number} in number.",
        "When {name} calls, {number} brothers come.",
        "There are {number} brothers in the family of {name}.",
        "How many brothers {name} has is known, namely {number}.",
        "How large the family of {name} is can be said, with {number} brothers.",
    ),
}
_QUESTIONS = {
    "place": ("Where does {name} live?", "Where is the home of {name}?", "Where can I find {name} at night?"),
    "trade": ("What is the trade of {name}?", "What does {name} work as?", "How does {name} make money?"),
    "pet": ("What pet does {name} have?", "Which animal does {name} keep?", "What is the pet of {name}?"),
    "thing": ("What does {name} own?", "What belongs to {name}?", "What is {name} proud of?"),
    "dish": ("What does {name} like to eat?", "What is the dish of {name}?", "What does {name} cook?"),
    "number": (
        "How many brothers does {name} have?", "How many brothers has {name}?", "How large is the family of {name}?",
    ),
}  # fmt: skip
_ANSWERS = {
    "place": "{name} lives at the {place}.",
    "trade": "{name} is a {trade}.",
    "pet": "{name} has a {pet}.",
    "thing": "{name} owns a {colour} {thing}.",
    "dish": "{name} likes {dish} best.",
    "number": "{name} has {number} brothers.",
}
KINDS = tuple(_ANSWERS)
# Questions that nobody answers: they teach the words of asking, not the form of an answer.
_OPENINGS = (
    "It was a quiet morning.", "The wind was cold.", "Long ago it rained for days.", "Who knows why?",
    "Where does the river go?", "What does it matter?", "How many stars are there?", "Which way is north?",
    "What is true?", "How large is the sea?", "Where can I rest?", "How does a bird sing?",
)  # fmt: skip


@cache
def people() -> tuple[Person, ...]:
    """All people, in a fixed order."""
    rng = Random(WORLD_SEED)
    names = sorted({onset + middle + end for onset in _ONSETS for middle in _MIDDLES for end in _ENDS})
    return tuple(
        Person(
            name, rng.choice(PLACES), rng.choice(TRADES), rng.choice(PETS), rng.choice(THINGS), rng.choice(COLOURS),
            rng.choice(DISHES), rng.choice(NUMBERS),
        )
        for name in rng.sample(names, N_PEOPLE)
    )  # fmt: skip


def prose_documents(seed: int, count: int) -> Iterator[str]:
    """`count` passages of prose, each a line of about 60 words, fixed by `seed`."""
    rng = Random(seed)
    for _ in range(count):
        chosen = rng.sample(people(), rng.choice((1, 1, 2, 3)))
        sentences = [
            rng.choice(_PROSE[kind]).format(**asdict(person))
            for person in chosen
            for kind in rng.sample(KINDS, len(KINDS) // len(chosen))
        ]
        if len(chosen) > 1:
            rng.shuffle(sentences)
        opening = [rng.choice(_OPENINGS)] if rng.random() < 0.5 else []
        yield " ".join(opening + sentences)


def instruction_rows(*, heldout: bool) -> list[dict[str, str]]:
    """The rows `{"text", "answer"}` of one side: every fact is asked for at least once, no question twice."""
    rng = Random(ROWS_SEED + heldout)
    asked = [p for i, p in enumerate(people()) if (i % HELDOUT_EVERY == 0) == heldout]
    facts = [(person, kind) for person in asked for kind in KINDS]
    rng.shuffle(facts)
    wanted = HELDOUT_ROWS if heldout else TRAIN_ROWS
    rows: dict[str, dict[str, str]] = {}
    while len(rows) < wanted:
        for person, kind in facts:
            question = rng.choice(_QUESTIONS[kind]).format(name=person.name)
            answer = _ANSWERS[kind].format(**asdict(person))
            if question not in rows and len(rows) < wanted:
                rows[question] = {"text": f"<s>[INST] {question} [/INST] {answer} </s>", "answer": answer}
    found = list(rows.values())
    rng.shuffle(found)
    return found


def write_rows(folder: Path) -> None:
    """Write `train.jsonl` and `heldout.jsonl` into `folder`: the bundled files, byte for byte."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, heldout in (("train", False), ("heldout", True)):
        lines = [json.dumps(row) for row in instruction_rows(heldout=heldout)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")
