"""Generates the requests of a soak: many kinds, including bad ones; the same for the same seed."""

import json
import random
import re
from dataclasses import dataclass
from typing import Any, Literal

WEIGHTS = {
    "complete": 20,
    "stream": 20,
    "several": 6,
    "logprobs": 5,
    "stop": 5,
    "structured": 6,
    "chat": 4,
    "hang_up": 10,
    "hang_up_early": 6,
    "half_request": 3,
    "oversized": 4,
    "too_many_tokens": 2,
    "malformed": 4,
    "wrong_type": 4,
    "unknown_model": 2,
}
"""Kinds of requests and their weights."""
GREEDY = ("complete", "stream")
"""Kinds of requests whose tokens can be compared with a replay."""
REFUSED = ("oversized", "too_many_tokens", "malformed", "wrong_type", "unknown_model")
CHOICES = ["alpha", "beta", "gamma"]
PATTERN = "[a-z]{3}-[0-9]{2}"
WRONG = (
    {"prompt": 5},
    {"max_tokens": "many"},
    {"n": -1},
    {"temperature": "hot"},
    {"logprobs": -3},
    {"stop": 7},
    {"prompt": None, "max_tokens": -4},
)


@dataclass(frozen=True)
class Ask:
    """One request."""

    number: int
    kind: str
    path: str
    body: bytes
    expected: Literal["answered", "refused", "hung up"]
    stream: bool = False
    chunks: int = 0
    """Number of chunks after which the client hangs up."""
    patience: float = 0.0
    """Seconds after which a client that waits for a whole answer hangs up."""
    tokens: int | None = None
    """Expected number of tokens in every choice; None: fewer are valid, too."""
    choices: int = 1


@dataclass(frozen=True)
class Traffic:
    """Generates requests.

    Args:
        model: name under which the server serves the model.
        texts: token ids by domain.
        max_model_len: maximum model length of the server.
        seed: random seed for everything.
    """

    model: str
    texts: dict[str, list[int]]
    max_model_len: int
    seed: int

    def ask(self, number: int) -> Ask:
        """Returns the request of a number, independent of the other requests.

        The first requests are one of each kind: servers start threads at the first request of some kinds, which must
        not look like a leak after the warm-up.
        """
        generator = random.Random(f"{self.seed}/{number}")
        kinds = list(WEIGHTS)
        kind = kinds[number] if number < len(kinds) else generator.choices(kinds, list(WEIGHTS.values()))[0]
        tokens = generator.choice((4, 16, 32, 64, 128))
        body: dict[str, Any] = {
            "model": self.model,
            "prompt": self._prompt(generator),
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        path = "/v1/completions"
        if kind in GREEDY:
            return self._made(number, kind, path, body, stream=kind == "stream", tokens=tokens)
        if kind == "several":
            count = generator.randrange(2, 5)
            # No seed: on the CPU, vLLM 0.32 crashes on a seeded request whose prompt is computed in chunks.
            body |= {"n": count, "temperature": 0.8}
            return self._made(number, kind, path, body, tokens=tokens, choices=count)
        if kind == "logprobs":
            body |= {"logprobs": generator.randrange(1, 5)}
            body |= {"prompt_logprobs": 1} if generator.random() < 0.3 else {}
            return self._made(number, kind, path, body, tokens=tokens)
        if kind == "stop":
            return self._made(number, kind, path, body | {"stop": ["\n\n", ";", "the"]})
        if kind == "structured":
            shape = generator.choice(({"choice": CHOICES}, {"regex": PATTERN}, {"json": _schema()}))
            body |= {"structured_outputs": shape, "ignore_eos": False, "max_tokens": 48}
            return self._made(number, kind, path, body)
        if kind == "chat":
            prompt = body.pop("prompt")
            body |= {"messages": [{"role": "user", "content": f"Write {len(prompt)} words."}]}
            return self._made(number, kind, "/v1/chat/completions", body)
        if kind == "hang_up":
            body |= {"max_tokens": 256}
            return self._made(
                number, kind, path, body, expected="hung up", stream=True, chunks=generator.choice((0, 1, 3, 10, 30))
            )
        if kind == "hang_up_early":
            body |= {"max_tokens": 256, "n": generator.choice((1, 2)), "temperature": 0.8}
            return self._made(
                number, kind, path, body, expected="hung up", patience=generator.choice((0.0, 0.01, 0.1, 0.5, 1.0))
            )
        return self._bad(number, kind, path, body, generator)

    def _bad(self, number: int, kind: str, path: str, body: dict[str, Any], generator: random.Random) -> Ask:
        if kind == "half_request":
            return Ask(number, kind, path, json.dumps(body).encode(), "hung up")
        if kind == "oversized":
            length = self.max_model_len + generator.choice((1, 100, 100_000))
            body |= {"prompt": [2 + generator.randrange(100)] * length}
        elif kind == "too_many_tokens":
            body |= {"max_tokens": self.max_model_len + 1}
        elif kind == "wrong_type":
            body |= generator.choice(WRONG)
        elif kind == "unknown_model":
            body |= {"model": "no-such-model"}
        text = json.dumps(body)
        if kind == "malformed":
            text = text[: generator.randrange(1, len(text))]
        return Ask(number, kind, path, text.encode(), "refused")

    def _made(self, number: int, kind: str, path: str, body: dict[str, Any], **fields: Any) -> Ask:
        body |= {"stream": True} if fields.get("stream") else {}
        return Ask(number, kind, path, json.dumps(body).encode(), **({"expected": "answered"} | fields))

    def _prompt(self, generator: random.Random) -> list[int]:
        """Draws an excerpt; one in four begins at the start of a text, so that prefixes are shared."""
        text = self.texts[generator.choice(list(self.texts))]
        length = min(len(text), int(2 ** generator.uniform(2, 9)), self.max_model_len - 300)
        start = 0 if generator.random() < 0.25 else generator.randrange(len(text) - length + 1)
        return text[start : start + length]


def _schema() -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 8}, "size": {"type": "integer"}},
        "required": ["name", "size"],
        "additionalProperties": False,
    }


def wrong_with(ask: Ask, choices: list[dict[str, Any]]) -> str | None:
    """Describes what is wrong with an answer; None: nothing.

    Args:
        ask: the request.
        choices: choices of the answer, each with `finish_reason`, `text` and `token_ids`.
    """
    if len(choices) != ask.choices:
        return f"{len(choices)} choices, not {ask.choices}"
    for choice in choices:
        reason, ids = choice.get("finish_reason"), choice.get("token_ids") or []
        if reason not in ("stop", "length"):
            return f"finish_reason {reason!r}"
        if ask.tokens is not None and len(ids) != ask.tokens:
            return f"{len(ids)} tokens, not {ask.tokens}"
        if ask.kind == "structured" and reason == "stop" and not _fits(json.loads(ask.body), choice["text"]):
            return f"{choice['text']!r} is not what structured_outputs asks for"
    return None


def _fits(body: dict[str, Any], text: str) -> bool:
    shape = body["structured_outputs"]
    if "choice" in shape:
        return text in shape["choice"]
    if "regex" in shape:
        return re.fullmatch(shape["regex"], text) is not None
    try:
        return set(json.loads(text)) == {"name", "size"}
    except ValueError:
        return False
