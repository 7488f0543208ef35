"""Data of the demo's two tasks, drawn with a seed from hand-written sentences.

    ticket    a customer's message        -> a support ticket in JSON
    calendar  a request for a meeting     -> a line of a calendar

What a test row asks for, train rows never combine: no test row of `ticket` has a sentence and a
product that stand together in a train row, no test row of `calendar` a person and a topic.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path

Row = dict[str, str]  # {"prompt": ..., "completion": ...}

PRODUCTS = (
    "kettle", "toaster", "blender", "coffee machine", "vacuum cleaner", "desk lamp", "headset",
    "keyboard", "router", "tablet", "printer", "smart watch", "speaker", "camera", "fan", "heater",
)  # fmt: skip
PROBLEMS = {
    "delivery": (
        "My {} was supposed to arrive last week and there is still no sign of it.",
        "The tracking page for the {} has not moved for five days.",
        "Where is my {}? The parcel never came.",
        "The courier says the {} was handed over, but nobody rang at my door.",
        "I ordered a {} ten days ago and have not received anything.",
        "The parcel with the {} went to my old address.",
    ),
    "defect": (
        "The {} stopped working after two days.",
        "My {} makes a strange noise and then switches itself off.",
        "The {} came out of the box with a crack in it.",
        "My new {} does not turn on at all.",
        "The {} gets so hot that it smells of burnt plastic.",
        "Since yesterday the {} only blinks red.",
    ),
    "refund": (
        "I sent the {} back three weeks ago and still have not got my money.",
        "Please take the {} back, I would like my money returned.",
        "I cancelled the {} but the amount was not paid back to my card.",
        "The {} is not what I expected, how do I get my money back?",
        "You promised to repay the {} and nothing has happened.",
        "I want to return the {} and be reimbursed.",
    ),
    "invoice": (
        "You charged me twice for the {}.",
        "The bill for the {} shows the wrong company name.",
        "I need a receipt with VAT for the {}.",
        "The price on the bill for the {} is higher than in the shop.",
        "My card was debited for a {} that I never bought.",
        "Can you send me the bill for the {} once more?",
    ),
    "howto": (
        "How do I reset the {} to factory settings?",
        "Which cleaning product is safe for the {}?",
        "The manual of the {} is only in Spanish, where do I find it in English?",
        "Can I use the {} in the United States as well?",
        "Does the {} have a timer, and how do I set it?",
        "What is the small button on the back of the {} for?",
    ),
}
GREETINGS = ("", "Hi, ", "Hello, ", "Good morning. ", "Dear support, ", "Hey there, ")
URGENCY = {
    "high": (
        "I need an answer today.",
        "This is urgent.",
        "Please call me back right away.",
        "If this is not solved by tonight I will go to a lawyer.",
        "I cannot work without it, so please hurry!",
    ),
    "normal": ("", "Thank you.", "Best regards, Sam.", "Thanks in advance.", "Kind regards."),
    "low": (
        "There is no hurry.",
        "Answer whenever you find the time.",
        "It can wait until next week.",
        "This is not important, I was just wondering.",
        "Take your time.",
    ),
}

PEOPLE = (
    "Anna", "Bruno", "Chen", "Dalia", "Emeka", "Farah", "Goran", "Hana", "Ines", "Jonas", "Kofi",
    "Lucia", "Mateo", "Nadia", "Oskar", "Priya", "Quentin", "Rosa", "Samir", "Tessa",
)  # fmt: skip
TOPICS = (
    "the budget", "the new website", "hiring", "the trade fair", "the rent", "the summer party",
    "the audit", "the price list", "the leaking roof", "the school trip", "the contract",
    "the warehouse", "the survey", "the printer lease", "the newsletter", "the road map",
)  # fmt: skip
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday")
HOURS = ("twelve", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
         "eleven")  # fmt: skip
LENGTHS = {
    30: ("half an hour", "30 minutes"),
    45: ("45 minutes", "three quarters of an hour"),
    60: ("an hour", "60 minutes", "one hour"),
    90: ("an hour and a half", "90 minutes"),
    120: ("two hours", "120 minutes"),
}
REQUESTS = (
    "Can you set up a meeting with {person} about {topic} on {day} at {time}? It takes {length}.",
    "{person} wants to talk about {topic}, {day} at {time}, for {length}.",
    "Please block {length} on {day} from {time}, {person} and I have to discuss {topic}.",
    "Let's sit down with {person} for {length} this {day} at {time}. It is about {topic}.",
    "Meeting on {topic} next {day}: {person} comes at {time} and has {length}.",
    "I promised {person} {length} on {day}, starting at {time}, to go through {topic}.",
)


@dataclass(frozen=True)
class Task:
    """A task of the demo.

    Attributes:
        name: what its adapter is called on the server.
        title: what it turns into what.
        pairs: the combinations that are dealt out to train and test.
        row: draws a row around one of them.
    """

    name: str
    title: str
    pairs: tuple[tuple[str, str], ...]
    row: Callable[[random.Random, tuple[str, str]], Row]

    def split(self, train: int, test: int, seed: int) -> tuple[list[Row], list[Row]]:
        """Train and test rows, all different; the same seed gives the same rows."""
        rng = random.Random(f"{self.name} {seed}")
        pairs = list(self.pairs)
        rng.shuffle(pairs)
        held_out = len(pairs) // 5
        return (
            self._draw(rng, pairs[held_out:], train),
            self._draw(rng, pairs[:held_out], test),
        )

    def _draw(self, rng: random.Random, pairs: list[tuple[str, str]], count: int) -> list[Row]:
        """Goes round the pairs until `count` different prompts are there."""
        rows: dict[str, Row] = {}
        while len(rows) < count:
            for pair in rng.sample(pairs, min(len(pairs), count - len(rows))):
                row = self.row(rng, pair)
                rows[row["prompt"]] = row
        return list(rows.values())


def _ticket(rng: random.Random, pair: tuple[str, str]) -> Row:
    sentence, item = pair
    category = next(name for name, sentences in PROBLEMS.items() if sentence in sentences)
    priority = rng.choice(list(URGENCY))
    parts = [rng.choice(GREETINGS) + sentence.format(item), rng.choice(URGENCY[priority])]
    ticket = {"category": category, "product": item, "priority": priority}
    return {
        "prompt": "Message to JSON ticket (category, product, priority):\n"
        + " ".join(part for part in parts if part),
        "completion": json.dumps(ticket),
    }


def _calendar(rng: random.Random, pair: tuple[str, str]) -> Row:
    person, topic = pair
    day = rng.choice(DAYS)
    # Office hours, so that "half past two" has one meaning.
    hour, minute = rng.randrange(8, 18), rng.choice((0, 15, 30, 45))
    minutes = rng.choice(list(LENGTHS))
    length = rng.choice(LENGTHS[minutes])
    request = rng.choice(REQUESTS).format(
        person=person, topic=topic, day=day, time=_spoken_time(rng, hour, minute), length=length
    )
    return {
        "prompt": f"Request to calendar line (day | time | minutes | who | what):\n{request}",
        "completion": f"{day[:3]} | {hour:02}:{minute:02} | {minutes} | {person} | {topic}",
    }


def _spoken_time(rng: random.Random, hour: int, minute: int) -> str:
    half_day = "am" if hour < 12 else "pm"
    twelve = (hour - 1) % 12 + 1
    word, next_word = HOURS[hour % 12], HOURS[(hour + 1) % 12]
    in_words = {
        0: f"{word} o'clock",
        15: f"quarter past {word}",
        30: f"half past {word}",
        45: f"quarter to {next_word}",
    }[minute]
    with_half_day = f"{twelve} {half_day}" if minute == 0 else f"{twelve}:{minute:02} {half_day}"
    return rng.choice((f"{hour}:{minute:02}", with_half_day, in_words))


TASKS = (
    Task(
        name="ticket",
        title="a customer's message to a JSON ticket",
        pairs=tuple(product((s for of in PROBLEMS.values() for s in of), PRODUCTS)),
        row=_ticket,
    ),
    Task(
        name="calendar",
        title="a request for a meeting to a calendar line",
        pairs=tuple(product(PEOPLE, TOPICS)),
        row=_calendar,
    ),
)


def write_rows(rows: Iterable[Mapping[str, object]], path: Path) -> None:
    """Writes rows as JSONL."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
