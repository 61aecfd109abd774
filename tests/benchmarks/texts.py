"""The texts of the workloads: phrases of the sample data, put together anew until a text has the length it should have.

No text is written twice, so no server gains from a cache; the same calls give the same texts everywhere.
"""

from __future__ import annotations

import csv
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from tokenizers import Tokenizer

SAMPLE = Path(__file__).parents[2] / "data" / "sample"
SPECIAL_TOKENS = 2  # [CLS] and [SEP]
TRIES = 200  # phrases looked at before a text is taken as it is
SLACK_TOKENS = 2  # a text may miss its length by so much
SHORT_TOKENS, PROFILE_TOKENS = 15, 125  # mean length of a text, special tokens included
MIXED_TOKENS = (8, 240)  # shortest and longest, evenly spread on a logarithmic scale
MIXED_MEAN_TOKENS = 69  # what follows from that
BULK_TEXTS = 64


def read_phrases(folder: Path = SAMPLE) -> list[str]:
    """List the distinct phrases of the sample's profiles and briefs, sorted."""
    phrases: set[str] = set()
    with (folder / "profiles.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            phrases.update((row["title"], row["skills"], *re.split(r"[.;]", row["summary"])))
    with (folder / "judgements.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            phrases.update(re.split(r"[.;:]", row["query"]))
    return sorted({phrase.strip() for phrase in phrases} - {""})


class Writer:
    """Writes texts of given lengths in tokens, each one once."""

    def __init__(self, tokenizer: Path, phrases: list[str] | None = None) -> None:
        self._tokenizer = Tokenizer.from_file(str(tokenizer))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._phrases = read_phrases() if phrases is None else phrases
        lengths = self._tokenizer.encode_batch_fast(self._phrases, add_special_tokens=False)
        self._written: set[str] = set()
        self._tokens = [len(encoding.ids) for encoding in lengths]

    def count_tokens(self, texts: list[str]) -> list[int]:
        """Tokens of each text, special ones included."""
        return [len(encoding.ids) for encoding in self._tokenizer.encode_batch_fast(texts)]

    def write_short(self, seed: str, count: int) -> list[str]:
        """Write search-like texts of about 15 tokens."""
        return self._write(seed, count, lambda chance: min(max(chance.gauss(SHORT_TOKENS, 3), 8), 24))

    def write_profiles(self, seed: str, count: int) -> list[str]:
        """Write texts as long as a person's profile, about 125 tokens."""
        return self._write(seed, count, lambda chance: min(max(chance.gauss(PROFILE_TOKENS, 20), 70), 200))

    def write_mixed(self, seed: str, count: int) -> list[str]:
        """Write texts of 8 to 240 tokens; every 64 in a row hold the same lengths in another order."""
        return self._write(seed, count, _MixedLengths().draw)

    def _write(self, seed: str, count: int, draw_tokens: Callable[[random.Random], float]) -> list[str]:
        chance = random.Random(seed)
        texts: list[str] = []
        while len(texts) < count:
            wanted = draw_tokens(chance)
            while (text := self._compose(chance, wanted)) in self._written:
                pass
            self._written.add(text)
            texts.append(text)
        return texts

    def _compose(self, chance: random.Random, wanted: float) -> str:
        chosen: list[str] = []
        tokens = SPECIAL_TOKENS
        for _ in range(TRIES):
            row = int(chance.random() * len(self._phrases))
            added = self._tokens[row] + 1  # the full stop
            if tokens + added <= wanted + SLACK_TOKENS:
                chosen.append(self._phrases[row])
                tokens += added
            if tokens >= wanted - SLACK_TOKENS:
                break
        return " ".join(f"{phrase}." for phrase in chosen)


class _MixedLengths:
    """The lengths of one bulk request after another, each a shuffled copy of the same 64."""

    def __init__(self) -> None:
        shortest, longest = MIXED_TOKENS
        steps = range(BULK_TEXTS)
        self._lengths = [shortest * (longest / shortest) ** (step / (BULK_TEXTS - 1)) for step in steps]
        self._left: Iterator[float] = iter(())

    def draw(self, chance: random.Random) -> float:
        if (length := next(self._left, None)) is None:
            self._left = iter(chance.sample(self._lengths, BULK_TEXTS))
            length = next(self._left)
        return length
