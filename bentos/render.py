"""The content of an answer becomes bytes: JSON, or for vectors also their bare rows and NumPy's file format.

Contents hold NumPy arrays as they are; nothing is turned into Python lists on the way.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import orjson

from bentos.errors import InvalidRequestError, NotAcceptableError
from bentos.vectors import FloatArray

JSON, OCTETS, NPY = "application/json", "application/octet-stream", "application/x-npy"
VECTOR_TYPES = (JSON, OCTETS, NPY)  # the first one answers `*/*`
SHAPE_HEADER, DTYPE_HEADER = "X-Ekiben-Shape", "X-Ekiben-Dtype"
TOTAL_TOKENS_HEADER, TRUNCATED_HEADER = "X-Ekiben-Total-Tokens", "X-Ekiben-Truncated"
MAX_LISTED_ROWS = 500  # in a header: clients and proxies refuse headers of more than some kilobytes
INT8_PEAK = 127

DType = Literal["float32", "float16", "int8"]
Rows = npt.NDArray[Any]  # (texts, dim), of one of the dtypes, little endian, contiguous


class Rendered(NamedTuple):
    """An answer as it goes out."""

    body: bytes
    media_type: str
    headers: dict[str, str]


class Base64Rows:
    """Vectors that JSON shall hold as base64, one string a row."""

    def __init__(self, rows: Rows) -> None:  # no dataclass: orjson would write its fields
        self.rows = rows


def render(content: Mapping[str, Any], accept: str = JSON) -> Rendered:
    """Write `content` in the media type that `accept`, the request's header, prefers.

    Raises:
        NotAcceptableError: when it can be written in none that is accepted.
    """
    if accept != JSON:
        media_type = negotiate(accept, VECTOR_TYPES if "embeddings" in content else (JSON,))
        if media_type != JSON:
            return _render_rows(content, media_type)
    return Rendered(orjson.dumps(content, default=_write_unknown, option=orjson.OPT_SERIALIZE_NUMPY), JSON, {})


def negotiate(accept: str, offered: Sequence[str]) -> str:
    """Choose the media type of an answer; a type in `offered` answers for itself, and an empty `accept` for all.

    Raises:
        NotAcceptableError: when none of `offered` is accepted.
    """
    if accept in ("", "*/*"):
        return offered[0]
    if accept in offered:
        return accept
    ranges = [_read_range(position, part) for position, part in enumerate(accept.lower().split(","))]
    rank = {media_type: _rank(media_type, ranges) for media_type in offered}
    chosen = max(offered, key=lambda media_type: rank[media_type])
    if not rank[chosen].quality > 0:
        raise NotAcceptableError(
            f"`Accept` is {accept[:200]!r}; this route answers {', '.join(offered)}. Ask for one of them, or send no "
            "`Accept`",
            offered=list(offered),
        )
    return chosen


class _Range(NamedTuple):
    """One part of an `Accept` header; the greater, the more it is wanted."""

    quality: float
    specificity: int  # 0: fits nothing, 1: `*/*`, 2: `application/*`, 3: `application/json`
    earliness: int
    pattern: str


def _read_range(position: int, part: str) -> _Range:
    pattern, *parameters = (piece.strip() for piece in part.split(";"))
    quality = 1.0
    for parameter in parameters:
        if parameter.startswith("q="):
            try:
                quality = float(parameter[2:])
            except ValueError:
                quality = 0.0
    return _Range(quality, 1 if pattern == "*/*" else 2 if pattern.endswith("/*") else 3, -position, pattern)


def _rank(media_type: str, ranges: Sequence[_Range]) -> _Range:
    """The part that says how much `media_type` is wanted: of those that fit it, the most specific one."""
    patterns = (media_type, media_type.split("/")[0] + "/*", "*/*")
    fitting = [each for each in ranges if each.pattern in patterns]
    return max(fitting, key=lambda each: each.specificity, default=_Range(0.0, 0, 0, ""))


def convert_rows(vectors: FloatArray, dtype: DType) -> Rows:
    """Give float32 `vectors` (n, dim) as contiguous little-endian rows of `dtype`.

    For int8 each row is scaled so that its largest component is 127 in size: cosines stay, lengths do not.

    Raises:
        InvalidRequestError: when a component is beyond what float16 can hold.
    """
    if dtype == "float32":
        return np.ascontiguousarray(vectors, dtype="<f4")
    if dtype == "int8":
        peaks = np.abs(vectors).max(axis=1, keepdims=True)
        return np.rint(vectors / np.where(peaks == 0, 1, peaks) * INT8_PEAK).astype(np.int8)
    with np.errstate(over="ignore"):
        rows = vectors.astype("<f2")
    if not np.isfinite(rows).all():
        raise InvalidRequestError(
            f"`dtype` is 'float16', which ends at 65504, and a vector reaches {np.abs(vectors).max():.0f}; "
            "ask for 'float32', or set `normalize` to true",
            field="dtype",
        )
    return np.ascontiguousarray(rows)


def encode_base64(rows: Rows) -> list[str]:
    """Write each row's bytes in base64."""
    return [base64.b64encode(row).decode("ascii") for row in rows]


def _write_unknown(value: Any) -> Any:
    if isinstance(value, Base64Rows):
        return encode_base64(value.rows)
    raise TypeError(f"{type(value).__name__} is no part of an answer")


def _render_rows(content: Mapping[str, Any], media_type: str) -> Rendered:
    """Write the vectors alone; what JSON would say beside them goes into headers."""
    embeddings, usage = content["embeddings"], content["usage"]
    rows: Rows = embeddings.rows if isinstance(embeddings, Base64Rows) else embeddings
    headers = {
        SHAPE_HEADER: ",".join(map(str, rows.shape)),
        DTYPE_HEADER: rows.dtype.name,
        TOTAL_TOKENS_HEADER: str(usage["total_tokens"]),
    }
    if truncated := usage["truncated"]:
        more = ["..."] if len(truncated) > MAX_LISTED_ROWS else []
        headers[TRUNCATED_HEADER] = ",".join([*map(str, truncated[:MAX_LISTED_ROWS]), *more])
    if media_type == OCTETS:
        return Rendered(rows.tobytes(), OCTETS, headers)
    file = io.BytesIO()
    np.lib.format.write_array(file, rows, version=(1, 0), allow_pickle=False)
    return Rendered(file.getvalue(), NPY, headers)
