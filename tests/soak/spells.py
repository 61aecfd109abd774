"""Texts that break the service of the soak; a number behind them makes each one new."""

from __future__ import annotations

DIE_ONCE = "zq ends the thread once"
DIE_ALWAYS = "zq ends every thread"
HANG_ONCE = "zq hangs the thread once"
FAIL = "zq fails the batch"
TELL = "zq tells what is under way"
SPELLS = (DIE_ONCE, DIE_ALWAYS, HANG_ONCE, FAIL, TELL)
