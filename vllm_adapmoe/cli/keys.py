"""Dotted options `--adapmoe-config.KEY VALUE`, as vLLM's own command line accepts them."""

import json
from collections.abc import Iterator, Sequence

OPTION = "--adapmoe-config"


def fold_keys(arguments: Sequence[str]) -> Iterator[str]:
    """Yields the arguments, with `--adapmoe-config.a.b VALUE` as `--adapmoe-config '{"a": {"b": VALUE}}'`.

    They are moved to the end, as in vLLM's parser: when configurations are merged, later keys win.
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
