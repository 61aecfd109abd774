"""How the server runs, from the environment, prefix `EKIBEN_`. The only module of `bentos` that reads it."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Literal

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

# Tokenizing has a thread of its own; more of them would take the cores from the model.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


class ServeSettings(BaseSettings):
    """Settings of the server: which model, and how much one request may ask of it."""

    model_config = SettingsConfigDict(
        env_prefix="EKIBEN_",
        extra="ignore",
        frozen=True,
        protected_namespaces=(),
        populate_by_name=True,
        hide_input_in_errors=True,  # it may hold keys
    )

    model_tag: str = Field(
        default="ekiben-model:latest",
        min_length=1,
        description="Model in the BentoML store. Read when a Bento is built, which pins it, and when the service is "
        "served from its source; a served Bento keeps the model that it was built with.",
    )
    precision: Literal["default", "fp32", "int8"] = Field(
        default="default",
        description="Which of the model's precisions computes; `default`: the one that its release certified.",
    )
    device: Literal["cpu", "cuda"] = Field(
        default="cpu",
        description="Where the model computes. `cuda` needs the package onnxruntime-gpu in place of onnxruntime.",
    )
    threads: int = Field(
        default=0,
        ge=0,
        le=1024,
        description="Texts are computed by so many threads side by side, one batch each; 0: one per core that the "
        "process may use.",
    )
    batch_tokens: int = Field(
        default=256,
        ge=1,
        le=1_048_576,
        description="Tokens (padding included) of a batch; a longer text is computed alone.",
    )
    batch_texts: int = Field(
        default=8,
        ge=1,
        le=65_536,
        description="Texts of a batch. On a CPU more bring nothing and make the first ones wait; a GPU wants 64.",
    )
    interactive_texts: int = Field(
        default=4,
        ge=0,
        le=1024,
        description="Requests of at most so many texts go by the interactive lane; longer ones go by the bulk lane, "
        "which stands back for it.",
    )
    interactive_wait_s: float = Field(
        default=1.0,
        gt=0,
        le=86_400,
        description="Seconds that a request may have to wait in the interactive lane, by the speed measured; "
        "beyond, it is answered 429. Some texts may always wait.",
    )
    queue_tokens_interactive: int = Field(
        default=16_384,
        ge=1,
        le=1_000_000_000,
        description="Tokens that may wait in the interactive lane; requests beyond are answered 429.",
    )
    queue_tokens_bulk: int = Field(
        default=131_072,
        ge=1,
        le=1_000_000_000,
        description="Tokens that may wait in the bulk lane; requests beyond are answered 429. One request always fits.",
    )
    max_requests: int = Field(
        default=1024,
        ge=1,
        le=1_000_000,
        description="Requests in flight at once, waiting ones included; more are answered 429.",
    )
    timeout_s: float = Field(
        default=60.0,
        gt=0,
        le=86_400,
        description="Seconds that a request may take; it is answered 504 then. A request may ask for less by the "
        "header X-Ekiben-Timeout-Ms.",
    )
    cache_mb: int = Field(
        default=0,
        ge=0,
        le=1_000_000,
        description="MiB of vectors that are kept for texts that come again; 0: none.",
    )
    stall_s: float = Field(
        default=60.0,
        gt=0,
        le=86_400,
        description="Seconds after which a batch is taken to hang: its thread is given up and replaced.",
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
        description="Texts a request (`a` and `b` of /similarity, query and documents of /rank together); more are "
        "answered 413.",
    )
    max_chars: int = Field(
        default=32_768,
        ge=1,
        le=10_000_000,
        description="Characters a text, before tokenizing; a longer one is answered 413.",
    )
    max_prompt_chars: int = Field(
        default=1000,
        ge=0,
        le=10_000_000,
        description="Characters of a literal prompt, which is put before every text; a longer one is answered 413.",
    )
    max_text_tokens: int = Field(
        default=0,
        ge=0,
        le=10_000_000,
        description="Tokens a text, special tokens and prompt included; a longer one is answered 413. 0: no limit, a "
        "text longer than the model takes is cut, unless the request asks for an error.",
    )
    allow_truncated_dimensions: bool = Field(
        default=False,
        description="Let requests ask for fewer dimensions than the model has. Only for models that were trained for "
        "it (matryoshka): the first dimensions of others mean little by themselves.",
    )

    # --- which versions: shelf.py, follow.py
    follow: str = Field(
        default="",
        pattern=r"^[A-Za-z0-9_.-]*$",
        description="Alias to follow, such as `champion`: when it comes to name another version, the server fetches, "
        "checks and warms it, and serves it without a restart. Empty: the version of the Bento, always.",
    )
    follow_every_s: float = Field(default=5.0, gt=0, le=86_400, description="Seconds between two looks at the alias.")
    registry_uri: str = Field(
        default="",
        validation_alias="MLFLOW_TRACKING_URI",
        description="MLflow server (`http://...`) that holds aliases and models; anything else means the local store, "
        "to which releases on this machine write.",
    )
    registry_username: str = Field(
        default="",
        validation_alias="MLFLOW_TRACKING_USERNAME",
        description="User at that server, when it asks for one; or `user:password@` in its address.",
    )
    registry_password: SecretStr | None = Field(
        default=None, validation_alias="MLFLOW_TRACKING_PASSWORD", description="The user's password."
    )
    registry_token: SecretStr | None = Field(
        default=None, validation_alias="MLFLOW_TRACKING_TOKEN", description="Token to show there, in place of both."
    )
    model_name: str = Field(
        default="ekiben", pattern=r"^[a-z0-9][a-z0-9_.-]*$", description="Name in the model registry."
    )
    shelf_mb: int = Field(
        default=2048,
        ge=0,
        le=1_000_000,
        description="MiB that versions beside the live one may take together, in each worker; the least recently used "
        "leave first.",
    )
    shelf_folder: Path | None = Field(
        default=None, description="Where fetched models are kept. Default: `ekiben` in BentoML's home."
    )
    bentoml_home: Path = Field(
        default=Path("~/bentoml"),
        validation_alias="BENTOML_HOME",
        description="BentoML's home: its model store, and the file of aliases that releases on this machine write.",
    )
    shadow: str = Field(
        default="",
        pattern=r"^[A-Za-z0-9_.-]*$",
        description="Alias or version, such as `challenger`, that a share of the texts is also given to, to see how "
        "its vectors differ; nobody waits for it. Empty: none.",
    )
    shadow_share: float = Field(default=0.05, ge=0, le=1, description="Share of the requests that are shadowed.")

    # --- who may ask: access.py
    admin_keys: SecretStr | None = Field(
        default=None,
        description="Keys for POST /models/load, like EKIBEN_API_KEYS. Without this and EKIBEN_ADMIN_KEYS_FILE nobody "
        "may.",
    )
    admin_keys_file: Path | None = Field(default=None, description="File with such keys, like EKIBEN_API_KEYS_FILE.")
    api_keys: SecretStr | None = Field(
        default=None,
        description="Keys that callers must show, separated by commas or line ends, each of 16 or more characters. "
        "Without this and EKIBEN_API_KEYS_FILE everybody may ask.",
    )
    api_keys_file: Path | None = Field(
        default=None,
        description="File with keys, one a line; what follows `#` is a comment. Read again when it changes.",
    )
    protect_metrics: bool = Field(default=False, description="Ask for a key at /metrics too.")
    cors_origins: str = Field(
        default="",
        description="Origins whose web pages may call the server from a browser, separated by commas, such as "
        "`https://app.example.com`; `*`: all; empty: none.",
    )

    # --- what is told: logs.py, tracing.py, metrics.py
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="Least severe messages that are logged; `debug` also shows those of the libraries."
    )
    log_format: Literal["json", "text"] = Field(
        default="json", description="Each message as one JSON object, or as one line of text."
    )
    access_log: bool = Field(default=False, description="Log every request, without its texts.")
    tracing: Literal["off", "otlp"] = Field(
        default="off",
        description="`otlp`: one OpenTelemetry span a request, sent over OTLP/HTTP as the OTEL_* variables say "
        "(OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_TRACES_SAMPLER, ...). Needs opentelemetry-exporter-otlp-proto-http.",
    )
    prometheus_folder: Path | None = Field(
        default=None,
        validation_alias="PROMETHEUS_MULTIPROC_DIR",
        description="Where the metrics of all workers come together. `bentoml serve` sets it: leave it alone.",
    )

    # --- connections that may be open, and for how long: connections.py
    max_connections: int = Field(
        default=4096,
        ge=1,
        le=1_000_000,
        description="Open connections of a worker. When there are more, the one that has waited longest for its next "
        "request is closed, and when none waits, the new one is answered 503.",
    )
    max_header_bytes: int = Field(
        default=32_768,
        ge=1024,
        le=1_048_576,
        description="Bytes of a request's line and headers; larger ones are answered 431.",
    )
    header_timeout_s: float = Field(
        default=10.0,
        gt=0,
        le=3600,
        description="Seconds from a request's first byte (or from the connection, for the first request) to the end "
        "of its headers; later ones are answered 408.",
    )
    body_timeout_s: float = Field(
        default=60.0,
        gt=0,
        le=3600,
        description="Seconds from the end of the headers to the end of the body; a later body is answered 408.",
    )
    send_timeout_s: float = Field(
        default=60.0,
        gt=0,
        le=3600,
        description="Seconds that a client may leave an answer unread before its connection is cut.",
    )
    keep_alive_s: float = Field(
        default=75.0,
        gt=0,
        le=86_400,
        description="Seconds that a connection may rest between two requests.",
    )

    @property
    def fetched_folder(self) -> Path:
        """Where fetched models are kept."""
        return (self.shelf_folder or self.home / "ekiben").expanduser()

    @property
    def home(self) -> Path:
        """BentoML's home, as BentoML itself understands it."""
        return Path(os.path.expandvars(self.bentoml_home)).expanduser()

    @field_validator("cors_origins")
    @classmethod
    def _origins_are_origins(cls, origins: str) -> str:
        for origin in (part.strip() for part in origins.split(",")):
            if origin and origin != "*" and not re.fullmatch(r"https?://[^/\s?#@]+", origin):
                raise ValueError(
                    f"{origin!r} is not an origin; give scheme and host, and a port when it is not the usual one, "
                    "without a path, such as 'https://app.example.com' (or '*' for all)"
                )
        return origins


def use_prometheus_folder(folder: Path) -> None:
    """Make prometheus_client, in BentoML's hands too, keep its files in `folder`; before the first metric is made."""
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(folder)
