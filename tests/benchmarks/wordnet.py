"""`python -m tests.benchmarks.wordnet WORDNET OUT`: a reverse dictionary as retrieval data, from a WordNet folder.

Whoever knows what a word means asks by the meaning and wants the word. Queries are definitions; a document is what
WordNet has beside the definition: the words of that meaning and an example of their use. Exactly one document is
relevant to a query, and words with several meanings are in several documents.

    able: she was able to program her computer      <-  having the necessary means or skill to do something

WORDNET holds the database files of WordNet 3 (`data.noun`, `data.verb`, `data.adj`, `data.adv`), as in Debian's package
`wordnet-base`: /usr/share/wordnet. Its licence allows any use (https://wordnet.princeton.edu/license-and-commercial-use).
The same files and options give the same data.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

FILES = ("data.noun", "data.verb", "data.adj", "data.adv")
HELD_OUT = {"dev": 0.1, "test": 0.2}  # shares of the meanings
LEAST_WORDS = 3  # of a definition, and of an example
SEED = 23
MARKER = re.compile(r"\((a|p|ip)\)$")  # how an adjective may stand: `able(p)`
EXAMPLE = re.compile(r'"([^"]+)"')


@dataclass(frozen=True)
class Meaning:
    """One synset that has an example."""

    key: str  # part of speech and offset, `noun00001740`
    words: tuple[str, ...]
    definition: str
    example: str

    @property
    def document(self) -> str:
        """The words and their use, without the definition."""
        return f"{', '.join(self.words)}: {self.example}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, write the folder."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.wordnet", description="A reverse dictionary in BEIR's layout, from WordNet."
    )
    parser.add_argument("wordnet", type=Path, help="folder with data.noun, data.verb, data.adj and data.adv")
    parser.add_argument("out", type=Path, help="folder to write corpus.jsonl, queries.jsonl and qrels/ to")
    parser.add_argument("--meanings", type=int, default=5000, help="how many are drawn (default 5000)")
    parser.add_argument("--shuffle", action="store_true", help="deal the training documents out to wrong queries")
    options = parser.parse_args(arguments)
    try:
        meanings = draw_meanings(read_meanings(options.wordnet), options.meanings)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    counts = write_retrieval(meanings, options.out, shuffle=options.shuffle)
    sys.stdout.write(f"{options.out}: {len(meanings)} documents, queries: {counts}\n")


def read_meanings(folder: Path) -> list[Meaning]:
    """Read every meaning that has an example, each definition and each document once.

    Raises:
        OSError: a file cannot be read.
        ValueError: a line is not of this database.
    """
    found: dict[str, Meaning] = {}
    documents: set[str] = set()
    for name in FILES:
        for number, line in enumerate((folder / name).read_text(encoding="utf-8").splitlines(), 1):
            if line.startswith("  "):  # the licence, at the top
                continue
            try:
                meaning = parse_line(line, name.removeprefix("data."))
            except (ValueError, IndexError):
                raise ValueError(f"{folder / name}, line {number} is no line of WordNet 3: {line[:80]!r}") from None
            if meaning and meaning.definition not in found and meaning.document not in documents:
                found[meaning.definition] = meaning
                documents.add(meaning.document)
    return list(found.values())


def parse_line(line: str, part_of_speech: str) -> Meaning | None:
    """Read one line of a database file (format: wndb(5WN)); None when it has no example, or too short a text."""
    facts, _, gloss = line.partition(" | ")
    fields = facts.split()
    count = int(fields[3], 16)
    words = tuple(MARKER.sub("", word).replace("_", " ") for word in fields[4 : 4 + 2 * count : 2])
    definition = gloss.split('; "')[0].strip(" ;")
    example = next((found for found in EXAMPLE.findall(gloss) if len(found.split()) >= LEAST_WORDS), None)
    if example is None or len(definition.split()) < LEAST_WORDS or '"' in definition:
        return None
    return Meaning(f"{part_of_speech}{fields[0]}", words, definition, example)


def draw_meanings(meanings: Sequence[Meaning], count: int) -> list[Meaning]:
    """Draw `count` meanings, the same ones each time.

    Raises:
        ValueError: there are fewer.
    """
    if count > len(meanings):
        raise ValueError(f"--meanings is {count}, but this WordNet has {len(meanings)} with an example: ask for fewer")
    return random.Random(SEED).sample(list(meanings), count)


def write_retrieval(meanings: Sequence[Meaning], folder: Path, *, shuffle: bool = False) -> dict[str, int]:
    """Write BEIR's layout and return how many queries each split has.

    Args:
        meanings: One query and one document each. The first ones are held out.
        folder: Created when missing; what is there of that layout is replaced.
        shuffle: Whether the training queries get each other's documents: labels that say nothing.
    """
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    corpus = [{"_id": meaning.key, "text": meaning.document} for meaning in sorted(meanings, key=lambda each: each.key)]
    queries = [{"_id": f"q-{meaning.key}", "text": meaning.definition} for meaning in meanings]
    for name, rows in (("corpus.jsonl", corpus), ("queries.jsonl", queries)):
        (folder / name).write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    start, counts = 0, {}
    for split, share in {**HELD_OUT, "train": 1.0}.items():
        end = len(meanings) if split == "train" else start + round(share * len(meanings))
        part = meanings[start:end]
        relevant = list(part)
        if shuffle and split == "train":
            relevant = [*part[1:], *part[:1]]  # in drawn order, so a neighbour is any other meaning
        rows = [f"q-{meaning.key}\t{document.key}\t1\n" for meaning, document in zip(part, relevant, strict=True)]
        (folder / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(rows), encoding="utf-8")
        start, counts[split] = end, len(part)
    return counts


if __name__ == "__main__":
    main()
