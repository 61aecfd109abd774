from hypothesis import given
from hypothesis import strategies as st

from bentos.text import text_problem
from flows.core.edge_texts import CANARY_TEXTS, EDGE_TEXTS, make_length_texts


def count_words(text: str) -> int:
    return 2 + len(text.split())


def count_letters(text: str) -> int:
    return 2 + len(text)


def test_every_shipped_text_is_one_that_the_service_takes_and_stands_there_once() -> None:
    texts = [*EDGE_TEXTS, *CANARY_TEXTS]
    assert [text for text in texts if text_problem(text)] == []
    assert len(set(texts)) == len(texts) >= 40


@given(max_tokens=st.integers(16, 600))
def test_length_texts_hit_the_limit_and_its_neighbours(max_tokens: int) -> None:
    lengths = [count_words(text) for text in make_length_texts(count_words, max_tokens)]
    assert lengths == [max_tokens // 4, max_tokens // 2, max_tokens - 1, max_tokens, max_tokens + 1, 3 * max_tokens]


@given(max_tokens=st.integers(24, 300))
def test_length_texts_come_as_close_as_the_tokenizer_allows(max_tokens: int) -> None:
    lengths = [count_letters(text) for text in make_length_texts(count_letters, max_tokens)]
    targets = (max_tokens // 4, max_tokens // 2, max_tokens - 1, max_tokens, max_tokens + 1, 3 * max_tokens)
    assert all(target - 1 <= length <= target for length, target in zip(lengths, targets, strict=True))
