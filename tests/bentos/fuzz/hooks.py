"""What schemathesis loads: leave out what it takes for wrong, but HTTP allows."""

from __future__ import annotations

import schemathesis

UNKNOWN_HEADER = "x-schemathesis-unknown-property"  # headers that nobody knows are ignored, everywhere


@schemathesis.hook
def filter_case(context: schemathesis.HookContext, case: schemathesis.Case) -> bool:
    return UNKNOWN_HEADER not in (case.headers or {})
