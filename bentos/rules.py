"""What may be asked of one model: its prompts, dimensions, token ids and lengths of text.

Every check raises the error that says what was found, what is allowed and what to do.
"""

from __future__ import annotations

from collections.abc import Sequence

from bentos.adapter import Adapter
from bentos.engine import Engine, TokenCount
from bentos.errors import InvalidRequestError, TextTooLongError, TooLargeError
from bentos.inflight import Inspect
from bentos.manifest import Manifest
from bentos.schemas import DoorRequest, TextField
from bentos.settings import ServeSettings


class ModelRules:
    """The rules of one model on one server."""

    def __init__(self, manifest: Manifest, engine: Engine, settings: ServeSettings) -> None:
        self._manifest = manifest
        self._settings = settings
        self._vocabulary_size = engine.vocabulary_size
        self._frame = find_frame(engine)

    @property
    def allows_truncated_dimensions(self) -> bool:
        """Whether requests may ask for fewer dimensions than the model has."""
        return self._settings.allow_truncated_dimensions

    def check_dimensions(self, dimensions: int | None, adapter: Adapter | None = None) -> int:
        """How many dimensions a vector shall have, in the model's own space or in the one that `adapter` leads to.

        Raises:
            InvalidRequestError: when there are not so many, or the model was not trained for fewer.
        """
        full = self._manifest.dim if adapter is None else adapter.dim
        if dimensions is None or dimensions == full:
            return full
        if adapter is not None:
            raise InvalidRequestError(
                f"`dimensions` is {dimensions}, and vectors of the space {adapter.space_id!r} have {full}; mapped "
                "vectors are not cut. Leave `dimensions` or `space` out",
                field="dimensions",
            )
        nested = self._manifest.nested_dims
        if dimensions in nested:
            return dimensions
        if not self.allows_truncated_dimensions:
            trained = f"was trained for {_join(sorted(nested))} besides" if nested else "was not trained for fewer"
            raise InvalidRequestError(
                f"`dimensions` is {dimensions}; this model has {full} and {trained}. Leave `dimensions` out, "
                f"{'name one of those, ' if nested else ''}or set EKIBEN_ALLOW_TRUNCATED_DIMENSIONS=true on the server "
                "if its first dimensions mean something by themselves",
                field="dimensions",
            )
        if dimensions > full:
            raise InvalidRequestError(f"`dimensions` is {dimensions}; 1 to {full} are allowed", field="dimensions")
        return dimensions

    def check_normalize(self, normalize: bool | None, adapter: Adapter | None = None) -> bool:
        """Whether vectors shall have length 1.

        Raises:
            InvalidRequestError: when they shall not, and are mapped: the map knows directions only.
        """
        if adapter is None:
            return self._manifest.normalize if normalize is None else normalize
        if normalize is False:
            raise InvalidRequestError(
                f"`normalize` is false, and vectors that are mapped into the space {adapter.space_id!r} have length 1: "
                "the map knows directions, not lengths. Leave `normalize` or `space` out",
                field="normalize",
            )
        return True

    def choose_prompts(self, request: DoorRequest) -> list[str | None]:
        """The text that is put before the texts of each text field of a request; None: none.

        Raises:
            InvalidRequestError: when the model has no prompt of a name.
        """
        return [
            self.choose_prompt(choice.name, choice.literal, field=choice.field, usual=choice.usual)
            for choice in request.prompt_choices()
        ]

    def choose_prompt(
        self, name: str | None = None, literal: str | None = None, *, field: str = "prompt", usual: str | None = None
    ) -> str | None:
        """The literal prompt, else the named one, else the model's prompt named `usual`, else its default.

        Raises:
            InvalidRequestError: when the model has no prompt of that name.
        """
        if literal is not None:
            return literal
        prompts = self._manifest.prompts
        if name is None:
            name = usual if usual in prompts else self._manifest.default_prompt
        if name is None:
            return None
        if name not in prompts:
            raise InvalidRequestError(
                f"`{field}` is {name[:200]!r}; the model's prompts are: {', '.join(map(repr, prompts)) or 'none'}. "
                f"Name one of them, or give the text itself as `{field}_text`",
                field=field,
            )
        return prompts[name]

    def check_ids(self, field: TextField) -> None:
        """Let token ids pass that this model's own tokenizer could have made; texts pass as well.

        Raises:
            InvalidRequestError: when an id is not in the vocabulary, or the special tokens are missing.
            TextTooLongError: when there are more than the model takes; token ids are never cut.
        """
        for row, ids in enumerate(field.texts):
            if isinstance(ids, str):
                return  # a field holds either texts or token ids
            name = field.label(row)
            odd = next((token for token in (min(ids), max(ids)) if not 0 <= token < self._vocabulary_size), None)
            if odd is not None:
                raise InvalidRequestError(
                    f"`{name}` has the token id {odd}; those of this model are 0 to {self._vocabulary_size - 1}. "
                    f"{OTHER_TOKENIZER}",
                    field=name,
                )
            first, last = self._frame
            if list(ids[: len(first)]) != first or (last and list(ids[-len(last) :]) != last):
                raise InvalidRequestError(
                    f"`{name}` does not begin with {first} and end with {last}, the special tokens that this model's "
                    f"tokenizer puts around every text. {OTHER_TOKENIZER}",
                    field=name,
                )
            if len(ids) > self._manifest.max_tokens:
                raise self._too_long(name, len(ids), "Token ids are never cut: shorten them, or send the text")

    def make_inspection(self, fields: Sequence[TextField], *, refuse_overflow: bool) -> Inspect | None:
        """A check of the lengths of all texts of `fields`, one after the other; None when any length will do.

        It says nothing while the length of some text is not known.
        """
        limit = self._settings.max_text_tokens
        if not limit and not refuse_overflow:
            return None

        def inspect(tokens: Sequence[TokenCount]) -> None:
            names = [field.label(row) for field in fields for row in range(len(field.texts))]
            if len(tokens) < len(names):
                return
            for name, text in zip(names, tokens, strict=True):
                if limit and text.tokens_total > limit:
                    raise TooLargeError(
                        f"`{name}` has {text.tokens_total} tokens; at most {limit} are allowed. "
                        "Split the text, or raise EKIBEN_MAX_TEXT_TOKENS on the server",
                        field=name,
                        found=text.tokens_total,
                        limit=limit,
                    )
                if refuse_overflow and text.truncated:
                    raise self._too_long(
                        name, text.tokens_total, "Shorten or split it, or set `on_overflow` to `truncate`"
                    )

        return inspect

    def _too_long(self, name: str, found: int, cure: str) -> TextTooLongError:
        limit = self._manifest.max_tokens
        return TextTooLongError(
            f"`{name}` has {found} tokens; the model takes {limit}. {cure}", field=name, found=found, limit=limit
        )


OTHER_TOKENIZER = (
    "Ids of another tokenizer would give a meaningless vector: send the text itself "
    "(LangChain's OpenAIEmbeddings: check_embedding_ctx_length=False)"
)


def _join(numbers: Sequence[int]) -> str:
    return " and ".join(map(str, numbers))


def list_names(manifest: Manifest) -> list[str]:
    """The names under which a request may ask for the model."""
    version = manifest.version
    return [manifest.name, manifest.tag, manifest.bento_version, version, f"v{version}", manifest.run_id]


def find_frame(engine: Engine) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer puts before and behind every text."""
    empty, short = (list(text.ids) for text in engine.tokenize(["", "a"]))
    before = 0
    while before < len(empty) and empty[before] == short[before]:
        before += 1
    return empty[:before], empty[before:]
