"""What the tests of the flows make and look at."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pandas as pd

from flows.settings import load_settings

TOPICS = {
    "kitchen": ["chef", "cook", "dinner", "cake", "coffee", "cup", "glass", "food", "fruit", "lunch", "rice"],
    "town": ["street", "bridge", "train", "station", "road", "bus", "town", "building", "car", "walk"],
    "music": ["guitar", "piano", "violin", "flute", "song", "jazz", "sing", "play", "sound", "listen"],
    "code": ["software", "engineer", "computer", "code", "developer", "program", "data", "server", "design", "test"],
}


def write_pairs(path: Path, rows: int = 160, seed: int = 5) -> Path:
    """Write pairs about four topics: high scores within a topic, low ones across; every text is its own."""
    rng = random.Random(seed)
    names = list(TOPICS)
    table = []
    for number in range(rows):
        first = names[number % 4]
        second = first if number % 2 else rng.choice([name for name in names if name != first])
        score = rng.uniform(0.7, 1.0) if first == second else rng.uniform(0.0, 0.3)
        text_a = f"{' '.join(rng.sample(TOPICS[first], 4))} a{number}"
        text_b = f"{' '.join(rng.sample(TOPICS[second], 4))} b{number}"
        table.append((text_a, text_b, round(score, 3)))
    pd.DataFrame(table, columns=["text_a", "text_b", "score"]).to_csv(path, index=False)
    return path


def write_profiles(folder: Path) -> tuple[Path, Path]:
    """Write 40 profiles in 10 groups, and two briefs a group that are judged against its profiles."""
    rng = random.Random(3)
    profiles, judgements = [], []
    for group in range(10):
        members = [rng.choice(list(TOPICS)) for _ in range(4)]
        for number, topic in enumerate(members):
            skills = ", ".join(rng.sample(TOPICS[topic], 3))
            profiles.append((f"{group}-{number}", f"{topic} person {group}{number}", skills))
        for brief in rng.sample(list(TOPICS), 2):
            query = f"{' '.join(rng.sample(TOPICS[brief], 4))} g{group}"
            judgements += [(query, f"{group}-{n}", 0.9 if topic == brief else 0.1) for n, topic in enumerate(members)]
    files = folder / "profiles.csv", folder / "judgements.csv"
    pd.DataFrame(profiles, columns=["id", "title", "skills"]).to_csv(files[0], index=False)
    pd.DataFrame(judgements, columns=["query", "profile_id", "relevance"]).to_csv(files[1], index=False)
    return files


def write_retrieval(folder: Path) -> Path:
    """Write a BEIR folder: 60 documents and 60 queries about four topics; dev and test are split off."""
    rng = random.Random(4)
    (folder / "qrels").mkdir(parents=True)
    corpus, queries, qrels = [], [], ["query-id\tcorpus-id\tscore"]
    for number in range(60):
        topic = TOPICS[list(TOPICS)[number % 4]]
        corpus.append({"_id": f"d{number}", "text": f"{' '.join(rng.sample(topic, 5))} d{number}"})
        queries.append({"_id": f"q{number}", "text": f"{' '.join(rng.sample(topic, 3))} q{number}"})
        qrels.append(f"q{number}\td{number}\t1")
    (folder / "corpus.jsonl").write_text("\n".join(map(json.dumps, corpus)))
    (folder / "queries.jsonl").write_text("\n".join(map(json.dumps, queries)))
    (folder / "qrels" / "train.tsv").write_text("\n".join(qrels))
    return folder


def mlflow_runs() -> list[Any]:
    """Every run of the test's own MLflow, read without any code of ours."""
    from mlflow import MlflowClient

    client = MlflowClient(load_settings().mlflow_uri)
    return list(client.search_runs([experiment.experiment_id for experiment in client.search_experiments()]))
