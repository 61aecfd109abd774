"""What the routes take: models of requests. OpenAI's is in openai.py, what comes back in answers.py; parsing.py reads.

A field's description is all that callers learn about it from the OpenAPI page. Keys that begin with `x-` in a field's
schema are for apidoc.py, which puts there what depends on settings and model, and for no one else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic.config import JsonDict

from bentos.errors import InvalidRequestError

Text = Annotated[str, Field(json_schema_extra={"x-limit": "text"})]
Texts = Annotated[list[Text], Field(min_length=1, json_schema_extra={"x-limit": "texts"})]
PROMPT: JsonDict = {"x-limit": "prompt"}
PROMPT_TEXT: JsonDict = {"x-limit": "prompt_text"}
MODEL: JsonDict = {"x-limit": "model"}


def _read_whole(value: Any) -> Any:
    """To JSON Schema `8.0` is an integer."""
    return int(value) if type(value) is float and value.is_integer() else value


Count = Annotated[int, Field(ge=1), BeforeValidator(_read_whole)]
Dimensions = Annotated[
    Count | None,
    Field(
        description="Keep the first dimensions only; refused unless the model was trained for it.",
        json_schema_extra={"x-limit": "dimensions"},
    ),
]
Space = Annotated[
    str | None,
    Field(
        description="Answer in this older space, by the model's own map into it, for an index that is not rebuilt yet: "
        "unit vectors of that space's dimensions, named in `X-Ekiben-Space`. Default: the model's own space.",
        json_schema_extra={"x-limit": "space"},
    ),
]


@dataclass(frozen=True, slots=True)
class TextField:
    """The texts of one field of a request, or lists of token ids in their place."""

    name: str
    texts: Sequence[str | Sequence[int]]
    is_list: bool = True

    def label(self, row: int) -> str:
        """How messages name one of the texts: `texts[3]`, or `query` for a field that holds a single one."""
        return f"{self.name}[{row}]" if self.is_list else self.name


class PromptChoice(NamedTuple):
    """Which prompt a field's texts shall have: a text itself, else a name, else the model's usual one."""

    name: str | None = None
    literal: str | None = None
    field: str = "prompt"  # of the name, for messages
    usual: str | None = None  # name of the prompt that goes before the model's default, where the model has it


class DoorRequest(BaseModel):
    """What all requests have in common: unknown fields are refused, nothing is converted."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=())
    alternatives: ClassVar[tuple[tuple[str, str], ...]] = ()  # pairs of which one may be given: a name and a literal

    def text_fields(self) -> Iterator[TextField]:
        """Every field that holds texts to embed."""
        raise NotImplementedError

    @property
    def refuses_overflow(self) -> bool:
        """Whether a text longer than the model takes is an error."""
        return False

    @property
    def asked_model(self) -> tuple[str, str | None]:
        """The field that names a model, and the name that it holds."""
        return "model", None

    @property
    def asked_space(self) -> str | None:
        """The space that the vectors shall be in, when not in the model's own."""
        return None

    def prompt_choices(self) -> list[PromptChoice]:
        """The prompt of each text field, in their order."""
        return [PromptChoice() for _ in self.text_fields()]

    def literal_prompts(self) -> Iterator[tuple[str, str | None]]:
        """Every prompt that is given as a text, with its field's name."""
        for _, literal in self.alternatives:
            yield literal, getattr(self, literal)

    def find_conflict(self) -> InvalidRequestError | None:
        """Find what no single field shows: fields that contradict each other."""
        for name, literal in self.alternatives:
            if getattr(self, name) is not None and getattr(self, literal) is not None:
                return InvalidRequestError(f"`{name}` and `{literal}` are both given; give one", field=literal)
        return None


class TextsRequest(DoorRequest):
    """A request that may name its model and say what becomes of texts that are too long."""

    on_overflow: Literal["truncate", "error"] = Field(
        "truncate", description="What to do with a text longer than the model takes: cut its end off, or answer 422."
    )
    model: str | None = Field(
        None,
        description="Which of the models loaded shall answer: an alias such as `champion`, a tag, version or run; else "
        "404. Default, and what the model's bare name stands for: the live one.",
        json_schema_extra=MODEL,
    )

    @property
    def asked_model(self) -> tuple[str, str | None]:
        """The field that names a model, and the name that it holds."""
        return "model", self.model

    @property
    def refuses_overflow(self) -> bool:
        """Whether a text longer than the model takes is an error."""
        return self.on_overflow == "error"


class PromptedRequest(TextsRequest):
    """A request whose texts all get the same prompt."""

    alternatives = (("prompt", "prompt_text"),)
    prompt: str | None = Field(
        None,
        description="Name of one of the model's prompts, put before each text. Default: the model's default, if any.",
        json_schema_extra=PROMPT,
    )
    prompt_text: str | None = Field(
        None,
        description="Literal text put before each text instead; an empty one switches the default prompt off.",
        json_schema_extra=PROMPT_TEXT,
    )

    def prompt_choices(self) -> list[PromptChoice]:
        """The prompt of each text field, in their order."""
        return [PromptChoice(self.prompt, self.prompt_text) for _ in self.text_fields()]


class EncodeRequest(PromptedRequest):
    """Texts to embed."""

    texts: Texts = Field(description="The texts, in any language the model knows.")
    normalize: bool | None = Field(
        None, description="Whether vectors have length 1. Default: as the model was trained."
    )
    dimensions: Dimensions = None
    space: Space = None
    dtype: Literal["float32", "float16", "int8"] = Field(
        "float32",
        description="Kind of numbers. `int8`: each vector is scaled so that its largest component is 127; cosines stay "
        "(within a hundredth), lengths do not.",
    )
    encoding: Literal["float", "base64"] = Field(
        "float",
        description="`float`: lists of numbers. `base64`: the little-endian bytes of the vector, less than half the "
        "size. Binary answers (`Accept: application/octet-stream`, `application/x-npy`) have no encoding.",
    )

    @property
    def asked_space(self) -> str | None:
        """The space that the vectors shall be in, when not in the model's own."""
        return self.space

    def text_fields(self) -> Iterator[TextField]:
        """Every field that holds texts to embed."""
        yield TextField("texts", self.texts)


class BatchableRequest(DoorRequest):
    """Texts to embed by BentoML's own adaptive batching."""

    texts: Texts = Field(description="The texts; the model's default prompt is put before each.")

    def text_fields(self) -> Iterator[TextField]:
        """Every field that holds texts to embed."""
        yield TextField("texts", self.texts)


class SimilarityRequest(PromptedRequest):
    """Texts to compare."""

    a: Texts = Field(description="Texts; one row of the matrix each.")
    b: Texts = Field(description="Texts; one column of the matrix each.")
    pairwise: bool = Field(False, description="Compare only a[i] with b[i]; then both lists have the same length.")

    def text_fields(self) -> Iterator[TextField]:
        """Every field that holds texts to embed."""
        yield TextField("a", self.a)
        yield TextField("b", self.b)

    def find_conflict(self) -> InvalidRequestError | None:
        """Find what no single field shows: fields that contradict each other."""
        if self.pairwise and len(self.a) != len(self.b):
            return InvalidRequestError(
                f"`a` has {len(self.a)} texts and `b` has {len(self.b)}; with `pairwise` both must have as many",
                field="b",
            )
        return super().find_conflict()


class RankRequest(TextsRequest):
    """A query, and the documents to put in order of likeness to it."""

    alternatives = (("query_prompt", "query_prompt_text"), ("document_prompt", "document_prompt_text"))
    query: Text = Field(description="What is looked for.")
    documents: Texts = Field(description="What is looked at.")
    ids: list[str | int] | None = Field(
        None, description="Your names of the documents, as many as documents; each result carries its own back."
    )
    top_k: Count | None = Field(None, description="How many results at most. Default: all documents.")
    query_prompt: str | None = Field(
        None,
        description="Name of the prompt put before the query. Default: the model's prompt `query`, else its default.",
        json_schema_extra=PROMPT,
    )
    query_prompt_text: str | None = Field(
        None, description="Literal text put before the query instead; may be empty.", json_schema_extra=PROMPT_TEXT
    )
    document_prompt: str | None = Field(
        None,
        description="Name of the prompt put before each document. Default: the model's prompt `document`, else its "
        "default.",
        json_schema_extra=PROMPT,
    )
    document_prompt_text: str | None = Field(
        None,
        description="Literal text put before each document instead; may be empty.",
        json_schema_extra=PROMPT_TEXT,
    )

    def text_fields(self) -> Iterator[TextField]:
        """Every field that holds texts to embed."""
        yield TextField("query", [self.query], is_list=False)
        yield TextField("documents", self.documents)

    def prompt_choices(self) -> list[PromptChoice]:
        """The prompt of each text field, in their order."""
        return [
            PromptChoice(self.query_prompt, self.query_prompt_text, "query_prompt", "query"),
            PromptChoice(self.document_prompt, self.document_prompt_text, "document_prompt", "document"),
        ]

    def find_conflict(self) -> InvalidRequestError | None:
        """Find what no single field shows: fields that contradict each other."""
        if self.ids is not None and len(self.ids) != len(self.documents):
            return InvalidRequestError(
                f"`ids` has {len(self.ids)} items and `documents` has {len(self.documents)}; give one id a document, "
                "or leave `ids` out",
                field="ids",
            )
        return super().find_conflict()


class VersionedRequest(DoorRequest):
    """A request that may name the version that shall answer."""

    model_version: str | None = Field(
        None,
        description="Which of the versions loaded shall answer: `3`, `v3`, its run, its tag or an alias; else 404. "
        "Default: the live one.",
        json_schema_extra=MODEL,
    )

    @property
    def asked_model(self) -> tuple[str, str | None]:
        """The field that names a model, and the name that it holds."""
        return "model_version", self.model_version


class PredictRequest(VersionedRequest):
    """One text to embed."""

    text: Text = Field(description="The text; the model's default prompt is put before it.")
    space: Space = None

    @property
    def asked_space(self) -> str | None:
        """The space that the vectors shall be in, when not in the model's own."""
        return self.space

    def text_fields(self) -> Iterator[TextField]:
        """Every field that holds texts to embed."""
        yield TextField("text", [self.text], is_list=False)


class PredictSimilarityRequest(VersionedRequest):
    """Two texts to compare."""

    text_a: Text = Field(description="One text; the model's default prompt is put before it.")
    text_b: Text = Field(description="The other, likewise.")

    def text_fields(self) -> Iterator[TextField]:
        """Every field that holds texts to embed."""
        yield TextField("text_a", [self.text_a], is_list=False)
        yield TextField("text_b", [self.text_b], is_list=False)
