"""Text on its way to the tokenizer: the one place that says what a text is, for training and serving alike."""

from __future__ import annotations


def clean_text(text: str) -> str:
    """Return `text` as it goes to the tokenizer: without surrounding white space, otherwise untouched."""
    return text.strip()


def text_problem(text: str) -> str | None:
    """Say what makes `text` unusable (empty, null bytes, lone surrogates), or None when it is fine."""
    if not text.strip():
        return "is empty"
    if "\x00" in text:
        return "contains a null byte"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return "contains a lone surrogate, which is not valid Unicode text"
    return None


def apply_prompt(text: str, prompt: str | None) -> str:
    """Put `prompt` (such as `query: `) before `text`; None leaves it as it is."""
    return f"{prompt}{text}" if prompt else text
