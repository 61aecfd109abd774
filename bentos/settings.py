"""How the server runs, from the environment, prefix `EKIBEN_`. The only module of `bentos` that reads it."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict


class ServeSettings(BaseSettings):
    """Settings of the server: which model, and how much one request may ask of it."""

    model_config = SettingsConfigDict(env_prefix="EKIBEN_", extra="ignore", frozen=True, protected_namespaces=())

    model_tag: str = Field(
        default="ekiben-model:latest",
        min_length=1,
        description="Model in the BentoML store. Read when a Bento is built, which pins it, and when the service is "
        "served from its source; a served Bento keeps the model that it was built with.",
    )
    threads: int = Field(
        default=0,
        ge=0,
        le=1024,
        description="Threads inside one inference; 0: one per physical core, as ONNX Runtime decides.",
    )
    batch_tokens: int = Field(
        default=512,
        ge=1,
        le=1_048_576,
        description="Tokens (padding included) computed at once; a longer text is computed alone.",
    )
    queue_texts: int = Field(
        default=2048,
        ge=1,
        le=1_000_000,
        description="Texts that may wait for the model; requests beyond are answered 429.",
    )
    max_body_bytes: int = Field(
        default=8_388_608,
        ge=1024,
        le=1_073_741_824,
        description="Bytes of a request's body; a larger one is answered 413.",
    )
    max_texts: int = Field(
        default=256,
        ge=1,
        le=100_000,
        description="Texts a request (`a` and `b` of /similarity together); more are answered 413.",
    )
    max_chars: int = Field(
        default=32_768,
        ge=1,
        le=10_000_000,
        description="Characters a text, before tokenizing; a longer one is answered 413.",
    )
    allow_truncated_dimensions: bool = Field(
        default=False,
        description="Let requests ask for fewer dimensions than the model has. Only for models that were trained for "
        "it (matryoshka): the first dimensions of others mean little by themselves.",
    )

    @model_validator(mode="after")
    def _request_fits_queue(self) -> Self:
        if self.max_texts > self.queue_texts:
            raise ValueError(
                f"EKIBEN_MAX_TEXTS ({self.max_texts}) must not exceed EKIBEN_QUEUE_TEXTS ({self.queue_texts}): "
                "a full request would never find room"
            )
        return self
