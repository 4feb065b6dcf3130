"""Text that came from elsewhere, as one line that a terminal or a log shows as it is."""

LONGEST = 2000
"""Characters of a message: what a file says of itself may be megabytes."""


class OneLineError(Exception):
    """What ends a command with one line instead of a traceback: what is wrong, with what, and the remedy."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


def printable(text: str) -> str:
    """Returns `text` with every character that is not printable escaped, and its middle left out where it is too long.

    Line breaks would forge lines of a log, and terminals obey escape codes: names of files, models and keys may hold
    both. The result is unchanged by a second call.
    """
    if not text.isprintable():
        text = "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)
    if len(text) <= LONGEST:
        return text
    head, tail = LONGEST // 2, LONGEST // 2 - 100
    return f"{text[:head]} .. {len(text) - head - tail} characters left out .. {text[-tail:]}"
