"""A made-up help desk whose true answer probabilities are known, so that calibration can be seen to be true or not.

A ticket holds one or two complaints. What a complaint is about is a vote for one of four teams, strong or weak. The
votes give the probability of each team, and the recorded team is *drawn* from those probabilities:

    Since Monday my router is slow, and the order bothers me.
      router -> 2.5 votes for network        order -> 1 vote for billing
      softmax(billing 1, network 2.5, hardware 0, account 0) = 0.16, 0.72, 0.06, 0.06

No reader can be right more often than those probabilities allow. A model that learns the recorded teams, with weekdays
and wording memorised, becomes surer than it should be: that is what the demo shows, and no benchmark of anything else.
"""

import json
import math
import random
from collections.abc import Iterator
from pathlib import Path

TEAMS = ("billing", "network", "hardware", "account")
STRONG_VOTE, WEAK_VOTE = 2.5, 1.0

# What a complaint is about: team -> (things that clearly belong to it, things that only lean towards it).
THINGS = {
    "billing": (("invoice", "refund", "payment", "receipt"), ("discount", "contract", "order", "quote")),
    "network": (("router", "wifi", "connection", "vpn"), ("signal", "download", "website", "call")),
    "hardware": (("screen", "keyboard", "printer", "battery"), ("laptop", "camera", "cable", "speaker")),
    "account": (("password", "login", "profile", "username"), ("mailbox", "licence", "calendar", "access")),
}

# The rest of a ticket tells nothing about the team. It is what a model can over-fit on.
PROBLEMS = (
    *("is broken", "stopped working", "is gone", "failed again", "is dead", "is blocked"),
    *("looks a bit off", "seems strange", "is slow", "acts up", "is not what I expected", "bothers me"),
)
TIMES = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "yesterday", "last week", "this morning", "lunch")
OWNERS = ("my", "the", "our", "her", "his", "their")
HESITATIONS = ("well", "um", "you know", "honestly", "so", "I mean", "let me think", "hang on")
NAMES = (
    *("Ada", "Ben", "Carla", "Dana", "Emil", "Fay", "Gus", "Hana", "Ivo", "Jun", "Kira", "Leo", "Mara", "Nils"),
    *("Omar", "Pia", "Quin", "Rosa", "Sam", "Tove", "Uma", "Vik", "Wen", "Xena", "Yuri", "Zoe", "Abel", "Bea"),
    *("Cora", "Dirk", "Elsa", "Finn", "Greta", "Hugo", "Inga", "Joel", "Kurt", "Lina", "Max", "Nora"),
)

# split -> (rows, style). `transfer` is for distillation: rows that the teacher has not memorised.
SPLITS = {
    "train": (600, "written"),
    "transfer": (4000, "written"),
    "validation": (1000, "written"),
    "test": (2000, "written"),
    "test_phone_calls": (2000, "phoned"),
}


def team_probabilities(complaints: list[tuple[str, bool]]) -> list[float]:
    """The true probability of each team, in the order of `TEAMS`; `complaints`: (team voted for, strong vote) each."""
    votes = dict.fromkeys(TEAMS, 0.0)
    for team, strong in complaints:
        votes[team] += STRONG_VOTE if strong else WEAK_VOTE
    total = sum(map(math.exp, votes.values()))
    return [math.exp(vote) / total for vote in votes.values()]


def _complaints(rng: random.Random, count: int, strong_share: float) -> tuple[list[str], list[float]]:
    """`count` complaints, half of them about one topic as in real tickets, and the probabilities of the teams."""
    topic, phrases, complaints = rng.choice(TEAMS), [], []
    for _ in range(count):
        team = topic if rng.random() < 0.5 else rng.choice(TEAMS)
        strong = rng.random() < strong_share
        thing = rng.choice(THINGS[team][0 if strong else 1])
        phrases.append(f"{rng.choice(OWNERS)} {thing} {rng.choice(PROBLEMS)}")
        complaints.append((team, strong))
    return phrases, team_probabilities(complaints)


def _written(rng: random.Random) -> tuple[str, list[float]]:
    phrases, probabilities = _complaints(rng, rng.choice((1, 2, 2)), strong_share=0.5)
    return f"Since {rng.choice(TIMES)} {', and '.join(phrases)}.", probabilities


def _phoned(rng: random.Random) -> tuple[str, list[float]]:
    """Out of domain: a call typed as it was spoken, hesitating, the name first, and vaguer about what is wrong."""
    phrases, probabilities = _complaints(rng, 2, strong_share=0.2)
    spoken = ", ".join(f"{rng.choice(HESITATIONS)}, {phrase}" for phrase in phrases)
    return f"Hello, this is {rng.choice(NAMES)}, {spoken}.", probabilities


STYLES = {"written": _written, "phoned": _phoned}


def tickets(rng: random.Random, count: int, style: str, seen: set[str]) -> Iterator[dict]:
    """Yields `count` labelled tickets whose texts are not in `seen`, and adds their texts to it.

    `label` is drawn from `true_probabilities`, in the order of `TEAMS`; `true_probability`, the largest of them, is
    how often the best possible answer is right: the confidence that a perfect model would state.
    """
    while count > 0:
        text, probabilities = STYLES[style](rng)
        label = rng.choices(TEAMS, probabilities)[0]
        if text not in seen:
            seen.add(text)
            count -= 1
            truth = {"true_probability": max(probabilities), "true_probabilities": probabilities}
            yield {"text": text, "label": label, **truth}


def write_task(folder: str | Path, seed: int = 0, most: int | None = None) -> set[str]:
    """Writes `SPLITS` as one JSONL file each into `folder`; returns the texts, each of which is in one file only.

    `most`: rows of a split at most. The same arguments write the same bytes.
    """
    folder, rng, seen = Path(folder), random.Random(seed), set[str]()
    folder.mkdir(parents=True, exist_ok=True)
    for split, (count, style) in SPLITS.items():
        lines = [json.dumps(ticket) + "\n" for ticket in tickets(rng, min(count, most or count), style, seen)]
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    return seen
