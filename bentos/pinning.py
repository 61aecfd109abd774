"""Each text of /encode_batchable carries the version that it was admitted for through BentoML's own batching.

BentoML puts the texts of several requests into one list, cuts long lists, and calls the service when it likes: by then
another version may be live than the one that the request was checked against, and that its answer names. So the key of
the request's version stands before each text, with a null byte between them, which no text may hold.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence

from bentos.encoder import Encoder

MARK = "\0"
_numbers = itertools.count()
_pinned: dict[str, Encoder] = {}  # of the requests that wait now


@contextlib.contextmanager
def pin(texts: Sequence[str], encoder: Encoder) -> Iterator[list[str]]:
    """Give the texts of one request with the key of `encoder` before each, which is known until the block ends."""
    key = str(next(_numbers))
    _pinned[key] = encoder
    try:
        yield [f"{key}{MARK}{text}" for text in texts]
    finally:
        del _pinned[key]


async def embed_pinned(texts: Sequence[str], get_live: Callable[[], Encoder]) -> list[list[float]]:
    """Embed each text by the version that it was pinned to, and those that were not by the live one.

    BentoML goes on with the texts of requests that were given up: nobody waits for their vectors, so they get none.

    Args:
        texts: as BentoML hands them over, of several requests.
        get_live: finds the live version; asked only when some text was not pinned.

    Raises:
        ServeError: as `Encoder.embed_texts`.
    """
    rows_of: dict[Encoder, list[int]] = {}
    plain: list[str] = []
    for row, text in enumerate(texts):
        key, mark, rest = text.partition(MARK)
        encoder = _pinned.get(key) if mark else get_live()
        plain.append(rest if mark else text)
        if encoder is not None:
            rows_of.setdefault(encoder, []).append(row)
    vectors: list[list[float]] = [[] for _ in texts]
    for encoder, rows in rows_of.items():
        embedded = await encoder.embed_texts([plain[row] for row in rows])
        for row, vector in zip(rows, embedded.tolist(), strict=True):
            vectors[row] = vector
    return vectors
