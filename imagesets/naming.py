"""Name what exists, and what a misspelt name may have meant, in messages to the user."""

import difflib
from collections.abc import Sequence

_LISTED = 40  # a message stays one readable line


def listed(names: Sequence[str]) -> str:
    """Return the names with commas between them, the first 40 of a longer list."""
    rest = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f", ... ({rest} more)" if rest > 0 else "")


def suggestion(name: str, names: Sequence[str]) -> str:
    """Return " (did you mean mel?)", or "" when no name is near; upper and lower case count as the same."""
    by_lower = {known.lower(): known for known in reversed(names)}
    near = difflib.get_close_matches(name.lower(), list(by_lower), n=1)
    return f" (did you mean {by_lower[near[0]]}?)" if near else ""
