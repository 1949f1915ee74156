"""Write the home-commands data set: `python data/generate.py [FOLDER]` (default: data/home).

Phrasings come from phrases.txt, slot values from values.txt, words for made-up values from words.txt. Each phrasing and
each value belongs to one of train, validation and test, so the held-out splits ask for understanding, not recall. The
seed fixes every byte.
"""

import json
import random
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

HERE = Path(__file__).resolve().parent
SEED = 2026
SYSTEM = "Reply with one JSON action."
SPLITS = ("train", "validation", "test")
ROWS = {"train": 10000, "validation": 600, "test": 1600}
UNLABELLED = 2000
NONE_SHARE = 0.15
PHRASING_SHARES = {"validation": 0.1, "test": 0.2}
VALUE_SHARES = {"validation": 0.08, "test": 0.17, "extra": 0.13}  # `extra` values occur in unlabelled prompts only
NEAR_DUPLICATE = 0.9
TYPO_RATE = 0.1
SPOKEN_RATE = 0.25
# This share of a split's word values is coined, from syllables or from any words at all. In train and in what is unlabelled:
# what could be anything must be copied, so a model learns to copy instead of learning the list of values; some words are
# one token in the request and, after a quotation mark, others in the answer: those must be spelled. In the held-out splits
# the words are of their own and can be copied, so that they ask for understanding, and no value repeats often.
COINED_RATES = {"train": 0.4, "validation": 0.6, "test": 0.6}
WORD_RATE = 0.75  # of the coined words of train these come from words.txt
WORD_SHARES = {"validation": 0.2, "test": 0.45}  # of its [copied] words; all others are train's
COINED = {
    "room": ("{} room", "{}", "{} {}", "{} wing", "{} corner", "{}'s room"),
    "door": ("{} door", "{} gate", "{}", "{} {} door", "{} box"),
    "name": ("{}", "{} {}", "doctor {}", "mrs {}"),
    "artist": ("{}", "{} {}", "the {}s", "{} and {}"),
    "genre": ("{}", "{} pop", "{} beat"),
    "place": ("{}", "{} bay", "{} falls", "port {}"),
    "food": ("{}", "{} sauce", "{} flakes", "dried {}", "{} {}"),
    "goods": ("{}", "{} spray", "{} refills", "{} pads"),
}
COINED["item"] = COINED["food"] + COINED["goods"]

# The keys of each answer, after `action`, in order. A key without a value in the phrasing is left out.
KEYS = {
    "temperature": ("room", "value"),
    "light": ("room", "state"),
    "dim": ("room", "value"),
    "timer": ("value", "unit"),
    "alarm": ("time",),
    "play": ("music", "room"),
    "lock": ("door", "state"),
    "add": ("item",),
    "call": ("name",),
    "weather": ("place", "day"),
    "blinds": ("room", "state"),
    "none": (),
}
STATES = {"light": ("on", "off"), "lock": ("locked", "unlocked"), "blinds": ("open", "closed")}
GROUP_STATES = {"on": "on", "off": "off", "locked": "locked", "unlocked": "unlocked", "open": "open", "close": "closed"}
# What a slot says, and the table its number is drawn from.
NUMBER_SLOTS = {
    "degrees": "temperature",
    "number": "temperature",
    "percent": "number",
    "duration": "number",
    "span": "number",
    "count": "number",
}
KEY_OF = {"artist": "music", "genre": "music", "food": "item"}  # else the slot's own name

VERBS = (
    "set make heat warm cool bring change adjust put turn keep hold let raise lower drop use regulate take get give "
    "switch flip flick light power illuminate kill shut cut dim brighten reduce fade soften start run begin create "
    "count tell beep buzz ping ring alert notify time wake add schedule sound move play shuffle queue throw spin "
    "stream find fill lock unlock bolt secure release engage disengage unbolt remove stick write note jot include "
    "pop append list save update call phone dial place connect try reach contact show read check look open close "
    "pull roll draw block book order send text delete invite buy translate vacuum clean mop paint tidy water feed "
    "walk record repair oil pay transfer search cancel plan restart have"
)
IMPERATIVES = frozenset(VERBS.split())
NO_IMPERATIVES = ("light on", "light off", "time to", "phone call", "wake up call")
GREETINGS = ("hey", "ok", "hi", "um", "alright", "hello", "so", "right")
ASKS = ("please", "can you", "could you", "would you", "will you", "i need you to", "kindly", "could you please")
ENDINGS = ("please", "thanks", "thank you", "if you can", "if you don't mind")
# Clauses that change nothing; often in unlabelled prompts, rarely in train, never in a held-out split.
LEADS = (
    "before i forget", "quick one", "one more thing", "listen", "me again", "i almost forgot", "you know what",
    "okay then", "now then", "excuse me", "sorry to bother you",
)  # fmt: skip
REQUEST_LEADS = (
    "when you get a chance", "i'm busy right now, so", "my hands are wet, so", "as soon as you can",
    "if it's no trouble", "last thing for today", "do me a favour and", "one small favour",
)  # fmt: skip
TAILS = (
    "right away", "when you have a moment", "and that's all", "as always", "and be quick about it", "if that's okay",
    "like last time", "would you", "and thank you", "when you can", "just this once",
)  # fmt: skip

ONSETS = [
    "b",
    "bl",
    "br",
    "c",
    "ch",
    "d",
    "dr",
    "f",
    "g",
    "gr",
    "h",
    "j",
    "k",
    "l",
    "m",
    "n",
    "p",
    "pr",
    "qu",
    "r",
    "s",
    "sh",
    "st",
    "t",
    "tr",
    "v",
    "w",
    "y",
    "z",
]
CODAS = ("", "", "", "l", "n", "r", "s", "m", "ck", "th")

SMALL = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen"
UNITS = f"{SMALL} eighteen nineteen".split()
ROUND = "twenty thirty forty fifty sixty seventy eighty ninety"
TENS = ROUND.split()


@dataclass(frozen=True)
class Filled:
    """A phrasing with its slots filled: literal and slot pieces in order, and the answer."""

    pieces: tuple[tuple[str, bool], ...]  # (text, is it a slot or a state)
    answer: str

    @property
    def text(self) -> str:
        return "".join(text for text, _ in self.pieces)


def sections(path: Path) -> dict[str, list[str]]:
    """`[head]` lines and the lines under each."""
    found: dict[str, list[str]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            lines = found.setdefault(line.strip("[]"), [])
        elif line and not line.startswith("#"):
            lines.append(line)
    return found


def shuffled(values: Iterable, *name: str) -> list:
    """A seeded order of its own for each name, so that editing one table leaves the others as they were."""
    order = sorted(values)
    random.Random("/".join((str(SEED), *name))).shuffle(order)
    return order


def phrasings() -> dict[str, dict[str, list[tuple[str, str]]]]:
    """split -> action -> [(group, template)]. Every group gives each split its share."""
    table: dict[str, dict[str, list[tuple[str, str]]]] = {split: defaultdict(list) for split in SPLITS}
    for head, templates in sections(HERE / "phrases.txt").items():
        action, group = head.split(": ")
        order = shuffled(templates, head)
        test = round(len(order) * PHRASING_SHARES["test"])
        validation = max(1, round(len(order) * PHRASING_SHARES["validation"]))
        parts = {
            "test": order[:test],
            "validation": order[test : test + validation],
            "train": order[test + validation :],
        }
        for split, part in parts.items():
            table[split][action] += [(group, template) for template in part]
    return {split: dict(actions) for split, actions in table.items()}


def slots() -> dict[str, dict[str, list]]:
    """split (with `extra`) -> slot -> values. Numbers and clock times are split like words are."""
    words = {slot: [v.strip() for v in ",".join(lines).split(",") if v.strip()]
             for slot, lines in sections(HERE / "values.txt").items()}  # fmt: skip
    literal = " " + " ".join(re.findall(r"[a-z']+", (HERE / "phrases.txt").read_text(encoding="utf-8"))) + " "
    said = [value for values in words.values() for value in values]
    # A value inside a phrasing or another value ("bedroom", "guest bedroom") would be seen in train: keep both there.
    inside = {v for v in said if f" {v} " in literal or sum(f" {v} " in f" {u} " for u in said) > 1}
    inside |= {v for v in said if any(f" {u} " in f" {v} " and u != v for u in inside)}
    table: dict[str, dict[str, list]] = {split: {} for split in (*SPLITS, "extra")}
    open_class: dict[str, list] = {**words}
    open_class["number"] = list(range(2, 101))
    open_class["half"] = [value + 0.5 for value in range(10, 30)]
    open_class["clock"] = [(hour, minute) for hour in range(1, 12) for minute in range(0, 60, 5)]
    for slot, values in open_class.items():
        order = shuffled((v for v in values if v not in inside), slot)
        at = 0
        for split, share in VALUE_SHARES.items():
            count = round(len(values) * share)
            table[split][slot], at = order[at : at + count], at + count
        table["train"][slot] = order[at:] + [v for v in values if v in inside]
    for part in table.values():
        part["item"] = part["food"] + part["goods"]
        part["temperature"] = [value for value in part["number"] if 10 <= value <= 30] + part["half"]
    return table


def spoken(number: float) -> str:
    """21 -> "twenty one", 19.5 -> "nineteen and a half"."""
    if number != int(number):
        return f"{spoken(int(number))} and a half"
    if number == 100:
        return "one hundred"
    if number < 20:
        return UNITS[int(number) - 1]
    tens, units = divmod(int(number), 10)
    return TENS[tens - 2] + (f" {UNITS[units - 1]}" if units else "")


def spoken_clock(hour: int, minute: int) -> str:
    """(7, 30) -> "half past seven", (7, 45) -> "quarter to eight", (7, 25) -> "seven twenty five"."""
    if minute == 0:
        return f"{UNITS[hour - 1]} o'clock"
    if minute == 30:
        return f"half past {UNITS[hour - 1]}"
    if minute in (5, 10, 15, 20):
        return f"{'quarter' if minute == 15 else spoken(minute)} past {UNITS[hour - 1]}"
    if minute in (40, 45, 50, 55):
        return f"{'quarter' if minute == 45 else spoken(60 - minute)} to {UNITS[hour]}"
    return f"{UNITS[hour - 1]} {spoken(minute)}"


def say_time(clock: tuple[int, int], rng: random.Random) -> tuple[str, str]:
    """A way to say a time and its HH:MM. Without "pm" or a word for it, hours up to eleven are before noon."""
    hour, minute = clock
    form = rng.choice(("digits", "digits", "24h", "am", "am", "pm", "pm", "words", "words", "words of day"))
    late = form in ("24h", "pm") or (form == "words of day" and rng.random() < 0.5)
    value = f"{hour + 12 * late:02d}:{minute:02d}"
    if form == "digits":
        return (f"{hour}:{minute:02d}", value)
    if form == "24h":
        return (value, value)
    if form in ("am", "pm"):
        return ((f"{hour}" if minute == 0 else f"{hour}:{minute:02d}") + f" {form}", value)
    words = spoken_clock(hour, minute)
    if form == "words":
        return (words, value)
    part = "in the morning" if not late else "in the afternoon" if hour < 6 else "in the evening"
    return (words.removesuffix(" o'clock") + f" {part}", value)


@cache
def words() -> dict[str, tuple[str, ...]]:
    """split -> its words of words.txt, without what occurs in a held-out value."""
    held_out = {word for split in ("validation", "test") for values in slots()[split].values() for value in values
                if isinstance(value, str) for word in value.split()}  # fmt: skip
    table = {head: [word for line in lines for word in line.split() if word not in held_out]
             for head, lines in sections(HERE / "words.txt").items()}  # fmt: skip
    order = shuffled(table["copied"], "words")
    found, at = {}, 0
    for split, share in WORD_SHARES.items():
        count = round(len(order) * share)
        found[split], at = tuple(order[at : at + count]), at + count
    return found | {"train": (*order[at:], *table["spelled"])}


def coin(rng: random.Random, known: tuple[str, ...], word_rate: float) -> str:
    """One of `known`, which has nothing to do with the slot, or two or three syllables that are no word."""
    if rng.random() < word_rate:
        return rng.choice(known)
    syllables = ("".join(map(rng.choice, (ONSETS, "aeiou", CODAS))) for _ in range(rng.choice((2, 2, 3))))
    return "".join(syllables)


class Decks:
    """Slot values dealt like cards: all of a slot's values once before any comes again; some are coined instead."""

    def __init__(self, values: dict[str, list], rng: random.Random, split: str = "train") -> None:
        self.values, self.rng, self.known = values, rng, words()[split]
        self.rate, self.word_rate = COINED_RATES[split], WORD_RATE if split == "train" else 1.0
        self.decks: dict[str, list] = defaultdict(list)

    def draw(self, slot: str):
        if slot in COINED and self.rng.random() < self.rate:
            return re.sub(r"\{\}", lambda _: coin(self.rng, self.known, self.word_rate), self.rng.choice(COINED[slot]))
        if not self.decks[slot]:
            self.decks[slot] = self.rng.sample(self.values[slot], len(self.values[slot]))
        return self.decks[slot].pop()

    def say(self, slot: str) -> tuple[str, dict]:
        """What is said for a slot, and the keys of the answer that it settles."""
        rng = self.rng
        if slot == "time":
            text, value = say_time(self.draw("clock"), rng)
            return text, {"time": value}
        if slot not in NUMBER_SLOTS:
            value = self.draw(slot)
            return value, {KEY_OF.get(slot, slot): value}
        number = self.draw(NUMBER_SLOTS[slot])
        in_words = rng.random() < SPOKEN_RATE
        text = spoken(number) if in_words else str(number)
        if slot == "degrees":
            text += " degrees"
        elif slot == "percent":
            text += " percent" if in_words or rng.random() < 0.5 else "%"
        elif slot in ("duration", "span"):
            units = ["minutes", "minutes", "seconds"] + ["hours"] * (number <= 24)
            unit = rng.choice(units)
            return f"{text} {unit if slot == 'duration' else unit[:-1]}", {"value": number, "unit": unit}
        return text, {"value": number}


def fill(action: str, group: str, template: str, decks: Decks) -> Filled:
    """A phrasing with values dealt into it."""
    found: dict = {}
    if group in GROUP_STATES:
        found["state"] = GROUP_STATES[group]
    choice = decks.rng.randrange(2)
    pieces: list[tuple[str, bool]] = []
    for part in re.split(r"(\{\w+\}|\(\w+\|\w+\))", template):
        if part.startswith("{"):
            text, keys = decks.say(part[1:-1])
            found |= keys
            if pieces and re.search(r"\ba $", pieces[-1][0]) and re.match(r"8|11\b|18|[aeio]", text):
                pieces[-1] = (pieces[-1][0][:-1] + "n ", False)
            pieces.append((text, True))
        elif part.startswith("("):
            pieces.append((part[1:-1].split("|")[choice], True))
            found["state"] = STATES[action][choice]
        elif part:
            pieces.append((part, False))
    answer = {"action": action} | {key: found[key] for key in KEYS[action] if key in found}
    return Filled(tuple(pieces), json.dumps(answer, separators=(",", ":")))


def misspell(pieces: list[tuple[str, bool]], rng: random.Random) -> list[tuple[str, bool]]:
    """One word of four or more letters with two swapped, one lost or one doubled; never a slot or a first letter."""
    words = [(i, m) for i, (text, fixed) in enumerate(pieces) if not fixed for m in re.finditer(r"[a-z]{4,}", text)]
    if not words:
        return pieces
    index, match = rng.choice(words)
    word, at = match.group(), rng.randrange(1, len(match.group()) - 1)
    kind = rng.choice(("swap", "drop", "double"))
    if kind == "swap":
        typo = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    elif kind == "drop":
        typo = word[:at] + word[at + 1 :]
    else:
        typo = word[: at + 1] + word[at:]
    text = pieces[index][0]
    return [*pieces[:index], (text[: match.start()] + typo + text[match.end() :], False), *pieces[index + 1 :]]


def utter(filled: Filled, rng: random.Random, clauses: float) -> str:
    """The phrasing as somebody says it: politeness, clauses that change nothing, typos, case and punctuation."""
    pieces = list(filled.pieces)
    question = pieces[-1][0].endswith("?")
    if question:
        pieces[-1] = (pieces[-1][0][:-1], pieces[-1][1])
    first = pieces[0][0].split()[0] if pieces[0][0].strip() else ""
    imperative = first in IMPERATIVES and not question and not filled.text.startswith(NO_IMPERATIVES)
    dice = rng.random()
    lead = rng.choice(LEADS + REQUEST_LEADS * imperative) if rng.random() < clauses else ""
    if lead:
        pieces = [(lead + (" " if lead.endswith((" so", " and")) else ", "), False), *pieces]
    elif imperative and dice < 0.22:
        ask = rng.choice(ASKS)
        question = ask.split()[0] in ("can", "could", "would", "will")
        pieces = [(ask + " ", False), *pieces]
    elif dice < 0.34:
        pieces = [(rng.choice(GREETINGS) + rng.choice((", ", " ")), False), *pieces]
    if imperative and not question and rng.random() < clauses:
        pieces.append((rng.choice((", ", " ")) + rng.choice(TAILS), False))
    elif imperative and dice > 0.34 and rng.random() < 0.12:
        pieces.append((rng.choice((", ", " ")) + rng.choice(ENDINGS), False))
    if rng.random() < TYPO_RATE:
        pieces = misspell(pieces, rng)
    if rng.random() < 0.3:  # written rather than spoken: a capital, "I", a full stop
        pieces = [(re.sub(r"\bi\b", "I", text) if not fixed else text, fixed) for text, fixed in pieces]
        if not pieces[0][1]:
            pieces[0] = (pieces[0][0][0].upper() + pieces[0][0][1:], False)
        pieces.append(("?" if question else rng.choice(".....!"), True))
    elif question and rng.random() < 0.4:
        pieces.append(("?", True))
    return "".join(text for text, _ in pieces)


def plain(text: str) -> str:
    """A message without case, punctuation and spare blanks: what makes two of them one."""
    return " ".join(re.findall(r"[a-z0-9:.%']+", text.lower().rstrip(".!?")))


def grams(text: str) -> frozenset[str]:
    """Character 5-grams."""
    return frozenset(text[i : i + 5] for i in range(max(1, len(text) - 4)))


def near(one: frozenset[str], many: list[frozenset[str]]) -> bool:
    """Whether a Jaccard similarity reaches NEAR_DUPLICATE."""
    for other in many:
        small, large = sorted((len(one), len(other)))
        if small >= NEAR_DUPLICATE * large:
            shared = len(one & other)
            if shared >= NEAR_DUPLICATE * (small + large - shared):
                return True
    return False


def quotas(rows: int) -> Iterator[tuple[str, int]]:
    """Rows for each action: `none` its share, the others equal to one row."""
    others = [action for action in KEYS if action != "none"]
    none = round(rows * NONE_SHARE)
    yield "none", none
    for index, action in enumerate(others):
        yield action, (rows - none + index) // len(others)


def prompts(split: str, table: dict, decks: Decks, rows: int, clauses: float, known: set[str], held_out: list) -> list:
    """[(message, answer)] of a split in random order; adds to `known`, keeps clear of it and of `held_out`."""
    made: list[tuple[str, str]] = []
    for action, count in quotas(rows):
        templates = shuffled(table[action], split, action)
        accepted = attempts = 0
        while accepted < count:
            group, template = templates[attempts % len(templates)]
            attempts += 1
            if attempts > 200 * count:
                raise SystemExit(f"{split}/{action}: too few phrasings for {count} distinct rows")
            filled = fill(action, group, template, decks)
            text = utter(filled, decks.rng, clauses)
            if plain(text) in known or near(grams(text.lower()), held_out):
                continue
            known.add(plain(text))
            made.append((text, filled.answer))
            accepted += 1
    decks.rng.shuffle(made)
    return made


def generate(folder: Path) -> dict[str, int]:
    """Write the four files; returns the rows of each."""
    table, values = phrasings(), slots()
    known: set[str] = set()
    held_out: list[frozenset[str]] = []
    made: dict[str, list[tuple[str, str]]] = {}
    for split in ("test", "validation", "train"):
        taught = split == "train"
        decks = Decks(values[split], random.Random(f"{SEED}/{split}"), split)
        clauses = 0.06 * taught
        made[split] = prompts(split, table[split], decks, ROWS[split], clauses, known, held_out)
        held_out += [grams(text.lower()) for text, _ in made[split]] if split != "train" else []
    both = {slot: values["train"][slot] + values["extra"][slot] * 3 for slot in values["train"]}
    decks = Decks(both, random.Random(f"{SEED}/unlabelled"))
    made["unlabelled"] = prompts("unlabelled", table["train"], decks, UNLABELLED, 0.35, known, held_out)

    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in made.items():
        with (folder / f"{split}.jsonl").open("w", encoding="utf-8", newline="\n") as file:
            for text, answer in rows:
                messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]
                if split != "unlabelled":
                    messages.append({"role": "assistant", "content": answer})
                file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    return {split: len(rows) for split, rows in made.items()}


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "home"
    for split, rows in generate(folder).items():
        print(f"{split}: {rows} rows")
    counts = {split: {action: len(part) for action, part in actions.items()} for split, actions in phrasings().items()}
    for action in KEYS:
        print(f"{action}: phrasings " + ", ".join(f"{counts[split][action]} {split}" for split in SPLITS))
    for slot in slots()["train"]:
        print(f"{slot}: values " + ", ".join(f"{len(part[slot])} {split}" for split, part in slots().items()))


if __name__ == "__main__":
    main()
