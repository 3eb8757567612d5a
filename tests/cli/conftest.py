"""The events and the summary of a run, shared with the tests of what a terminal shows."""

from __future__ import annotations

from tests.terminal.conftest import events as events
from tests.terminal.conftest import summary as summary
