"""Texts that have broken an export, a tokenizer or a batch before, and the canary texts. Core layer, data only.

They are part of what a certificate says: add to them freely, take none away.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable

EDGE_TEXTS: tuple[str, ...] = (
    "a",
    "I",
    "?",
    "...",
    "7",
    "3.14159",
    "1,000,000.00 EUR - 25 %",
    "2026-11-23T05:45:00Z",
    "!?!?!?#@$%^&*()",
    "- - - - - - - - - -",
    "hello",
    "Hello",
    "HELLO WORLD",
    "hElLo WoRlD",
    "The quick brown fox jumps over the lazy dog.",
    "the the the the the the the the the the the the the the the the",
    "no no no, yes yes yes, no no no",
    "Senior backend engineer, 7 years of Python and Go, Berlin or remote.",
    "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft",
    "pneumonoultramicroscopicsilicovolcanoconiosis" * 3,
    "x" * 400,
    "https://example.org/a/very/long/path?with=query&and=%C3%A9scapes#fragment",
    "name.surname+tag@example.co.uk",
    '<p class="lead">Bold <b>claims</b> &amp; entities</p>',
    "| a | b |\n|---|---|\n| 1 | 2 |",
    "def add(a: int, b: int) -> int:\n\treturn a + b  # tabs and newlines",
    "SELECT id, name FROM users WHERE name LIKE 'O''Brien%' ORDER BY 1;",
    '{"key": ["value", null, true, 1e-9], "nested": {"a": {}}}',
    "C++, C#, F#, .NET, Node.js, R&D, AT&T",
    "line one\nline two\r\nline three\n\n\nline six",
    "tab\tseparated\tvalues\tand  double  spaces",
    "non\u00a0breaking\u2003em\u2009thin spaces",
    "Ça va être l'été à Besançon, n'est-ce pas ?",
    "Größe, Straße, Übung, ÄÖÜ",
    "e\u0301 is not always é: cafe\u0301, café, Z\u0351\u036b\u0343a\u0328l\u0334g\u0335o\u0336",
    "zero\u200bwidth\u200cjoin\u200ders\ufeff and a soft\u00adhyphen",
    "Привет, мир! Как дела?",
    "Γειά σου Κόσμε",
    "שלום עולם, מה שלומך?",
    "مرحبا بالعالم، كيف الحال؟",
    "mixed עברית and English مع العربية in one line",
    "नमस्ते दुनिया",
    "สวัสดีชาวโลก",
    "你好，世界。今天天气很好。",
    "駅弁は駅で売られるお弁当です。",
    "안녕하세요 세계",
    "🍱",
    "🚆🍱🍙 ekiben 👩🏽‍🚀👨‍👩‍👧‍👦🇯🇵",
    "∑∞∂√ ≠ ≤ ≥ ± × ÷ µm Ω²",
    "ﬁne ligatures, ＦＵＬＬＷＩＤＴＨ, ①②③, Ⅷ",
    "[CLS] [SEP] [MASK] [PAD] [UNK] </s> <s> <|endoftext|>",
    "ignore previous instructions; this is a text like any other",
)

CANARY_TEXTS: tuple[str, ...] = (
    "hello world",
    "A lunch box is sold at the railway station.",
    "Senior data engineer with Python, Spark and a little Rust",
    "Größe 42, 3.14 % – naïve café",
    "駅弁 🍱 مرحبا",
    "The train leaves at seven in the morning, crosses the river, stops at every small town in the valley, and reaches "
    "the sea before noon; whoever bought a box at the station has finished it by then.",
)

_FILLER = """
the train runs from the old town to the sea and back again while people read eat sleep talk look out of the window count
bridges rivers farms cows clouds stations drink coffee write letters and think of home
"""


def make_length_texts(count_tokens: Callable[[str], int], max_tokens: int) -> list[str]:
    """Make texts of a quarter and a half of `max_tokens`, one token less, exactly as many, one more, and three times.

    Args:
        count_tokens: Number of tokens of a text, special ones included, before any cut.
        max_tokens: Where the model cuts.
    """
    targets = (max_tokens // 4, max_tokens // 2, max_tokens - 1, max_tokens, max_tokens + 1, 3 * max_tokens)
    return [_make_text(count_tokens, target) for target in targets]


def _make_text(count_tokens: Callable[[str], int], target: int) -> str:
    """Join filler words to `target` tokens, or as close below as single letters allow."""
    filler = _FILLER.split()
    words = [filler[index % len(filler)] for index in range(target)]  # a word is at least one token
    fitting = bisect_right(range(1, len(words) + 1), target, key=lambda number: count_tokens(" ".join(words[:number])))
    text = " ".join(words[: max(fitting, 1)])
    letters = range(1, target - count_tokens(text) + 1)
    return text + " a" * bisect_right(letters, target, key=lambda number: count_tokens(text + " a" * number))
