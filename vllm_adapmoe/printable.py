"""Makes untrusted text safe to print: one line, without control characters."""

MAX_CHARACTERS = 2000
"""Maximum characters of a message: text taken from a file may be megabytes."""


class OneLineError(Exception):
    """An error that ends a command with one line instead of a traceback: what is wrong, with what, and the remedy."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


def printable(text: str) -> str:
    """Returns `text` with non-printable characters escaped, and its middle omitted if it is too long.

    Line breaks would forge log lines, and terminals obey escape codes: names of files, models and keys may hold both.
    A second call changes nothing.
    """
    if not text.isprintable():
        text = "".join(
            character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
        )
    if len(text) <= MAX_CHARACTERS:
        return text
    head, tail = MAX_CHARACTERS // 2, MAX_CHARACTERS // 2 - 100
    return f"{text[:head]} .. {len(text) - head - tail} characters omitted .. {text[-tail:]}"


def reason(error: BaseException, lines: int = 1) -> str:
    """Returns the first lines of an error's message that are not blank, joined; the name of its class if all are."""
    filled = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(filled[:lines]) or type(error).__name__
