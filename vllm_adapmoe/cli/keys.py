"""Single keys after a dot, as vLLM's own command line takes them."""

import json
from collections.abc import Iterator, Sequence

OPTION = "--adapmoe-config"


def fold_keys(arguments: Sequence[str]) -> Iterator[str]:
    """Yields the arguments, with `--adapmoe-config.a.b VALUE` as `--adapmoe-config '{"a": {"b": VALUE}}'`.

    They come last, as vLLM's parser puts them: of several configurations the last one's keys win.
    """
    last: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        name, equals, value = argument.partition("=")
        option, dot, keys = name.partition(".")
        if option.replace("_", "-") != OPTION or not dot:
            yield argument
            continue
        text = value if equals else next(rest, "")
        try:
            setting = json.loads(text)
        except (ValueError, RecursionError):
            setting = text
        for key in reversed(keys.split(".")):
            setting = {key: setting}
        last += [OPTION, json.dumps(setting)]
    yield from last
