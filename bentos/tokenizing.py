"""The thread that tokenizes: short requests first, long ones in turns of bounded size."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence

from bentos.engine import TokenCount, TokenizedText
from bentos.errors import NotReadyError
from bentos.inflight import LaneName, Request, Text
from bentos.observer import Observer

TURN_CHARS = 65_536  # tokenized at a stretch, tens of milliseconds; a single longer text is not divided
Tokenize = Callable[[Sequence[str]], Sequence[TokenizedText]]
logger = logging.getLogger("bentos")


class TokenizingThread:
    """Gives the texts of requests their token ids, and hands each request on when all of its texts have them."""

    def __init__(
        self,
        tokenize: Tokenize,
        observer: Observer,
        put_tokenized: Callable[[Request], None],
        put_refused: Callable[[Request, Exception], None],
    ) -> None:
        """Prepare the thread.

        Args:
            tokenize: turns texts into token ids.
            observer: hears how long it took.
            put_tokenized: takes a request whose texts have their ids; called in the thread.
            put_refused: takes a request that failed, and why.
        """
        self._tokenize_texts = tokenize
        self._observer = observer
        self._put_tokenized = put_tokenized
        self._put_refused = put_refused
        self._waiting: dict[LaneName, deque[tuple[Request, Iterator[list[Text]]]]] = {
            "interactive": deque(),
            "bulk": deque(),
        }
        self._changed = threading.Condition(threading.Lock())
        self._stopping = False
        self._at: Request | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the thread."""
        self._thread = threading.Thread(target=self._run, name="ekiben-tokenize", daemon=True)
        self._thread.start()

    def stop(self) -> list[Request]:
        """End the thread after what it is at; return the requests that nobody will tokenize any more."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(10)
        return [request for queue in self._waiting.values() for request, _ in queue]

    def find_problem(self) -> str | None:
        """Say whether the thread is dead, or that all is well (None)."""
        alive = self._thread is not None and self._thread.is_alive()
        return None if alive else "the tokenizing thread is dead"

    def supervise(self) -> None:
        """Replace the thread when it died; the request that it was at fails."""
        if self._thread is None or self._thread.is_alive() or self._stopping:
            return
        logger.error("the tokenizing thread died; it is replaced")
        self._observer.record_lane_restart("tokenize")
        if (request := self._at) is not None:
            self._at = None
            self._put_refused(request, NotReadyError("the tokenizer ended at this request"))
        self.start()

    def put(self, request: Request) -> None:
        """Queue a request. To be inspected it needs the lengths of texts that others brought, too."""
        texts = request.new if request.inspect is None else [text for text in request.texts if text is not None]
        with self._changed:
            self._waiting[request.lane].append((request, _take_turns(texts)))
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._stopping and not (self._waiting["interactive"] or self._waiting["bulk"]):
                    self._changed.wait()
                if self._stopping:
                    return
                queue = self._waiting["interactive"] or self._waiting["bulk"]
                request, turns = queue.popleft()
            self._at = request
            try:
                texts = next(turns, None)
                if texts is None:
                    request.be_inspected()
                else:
                    self._tokenize(texts)
            except Exception as error:
                self._put_refused(request, error)
            else:
                if texts is None:
                    self._put_tokenized(request)
                else:
                    with self._changed:
                        self._waiting[request.lane].appendleft((request, turns))
            self._at = None  # not when the thread dies: then it is asked for

    def _tokenize(self, texts: Sequence[Text]) -> None:
        """Give ids to the texts that have none; when that fails, one by one, so that only the guilty ones go without.

        Raises:
            Exception: what the tokenizer raised for the last guilty one.
        """
        started = time.perf_counter()
        # What nobody waits for any more is done already, and costs nothing.
        if not (texts := [text for text in texts if text.count is None and not text.done]):
            return
        plain = [(text, text.key) for text in texts if isinstance(text.key, str)]
        try:
            for (text, _), tokenized in zip(plain, self._tokenize_texts([key for _, key in plain]), strict=True):
                text.ids, text.count = tokenized.ids, tokenized.count
        except Exception:
            if len(texts) == 1:
                raise
            guilty: list[Exception] = []
            for text in texts:
                try:
                    self._tokenize([text])
                except Exception as error:
                    guilty.append(error)
            if guilty:
                raise guilty[-1] from None
            return
        for text in texts:
            if isinstance(text.key, tuple):
                text.ids, text.count = text.key, TokenCount(len(text.key), truncated=False)
        self._observer.record_stage("tokenize", time.perf_counter() - started)


def _take_turns(texts: Sequence[Text]) -> Iterator[list[Text]]:
    turn: list[Text] = []
    chars = 0
    for text in texts:
        length = len(text.key) if isinstance(text.key, str) else 0
        if turn and chars + length > TURN_CHARS:
            yield turn
            turn, chars = [], 0
        turn.append(text)
        chars += length
    if turn:
        yield turn
