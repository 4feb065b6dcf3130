"""Clients of a soak: each sends requests, waits or disconnects, and records the outcome."""

import asyncio
import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from benchmarks.soak_traffic import GREEDY, Ask, Traffic, wrong_with


@dataclass(frozen=True)
class Outcome:
    """Outcome of a request: as expected (`answered`, `refused`, `hung up`), or `failed`, `wrong` or `timeout`."""

    number: int
    kind: str
    ended: str
    seconds: float
    detail: str = ""


@dataclass
class Ended:
    """Outcomes of all requests, and the tokens of those that can be replayed by request number."""

    outcomes: list[Outcome] = field(default_factory=list)
    tokens: dict[int, list[int]] = field(default_factory=dict)


class Clients:
    """Concurrent clients, each of which sends its next request as soon as the previous one has ended.

    Args:
        url: URL of the server.
        traffic: source of requests.
        count: number of clients.
        timeout: time limit per request, seconds.
        alive: returns whether the server's process is running.
    """

    def __init__(self, url: str, traffic: Traffic, count: int, timeout: float, alive: Callable[[], bool]) -> None:
        self.url = url
        self.traffic = traffic
        self.count = count
        self.timeout = timeout
        self.alive = alive
        self.next = 0
        self.ended = Ended()

    async def run(self, seconds: float) -> None:
        """Sends requests for `seconds`, then waits for those in flight and closes all connections."""
        import aiohttp

        until = time.monotonic() + seconds
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(self.url, connector=connector) as session:
            await asyncio.gather(*(self._client(session, until) for _ in range(self.count)))

    async def _client(self, session: Any, until: float) -> None:
        while time.monotonic() < until and self.alive():
            ask = self.traffic.ask(self.next)
            self.next += 1
            started = time.monotonic()
            try:
                async with asyncio.timeout(self.timeout):
                    ended, detail = await self._send(session, ask)
            except TimeoutError:
                ended, detail = "timeout", f"no end after {self.timeout:.0f} s"
            except Exception as error:  # failed connection or unreadable answer: a lost request
                ended, detail = "failed", f"{type(error).__name__}: {error}"
            seconds = time.monotonic() - started
            self.ended.outcomes.append(Outcome(ask.number, ask.kind, ended, seconds, detail))
            if ended == "failed":
                await asyncio.sleep(0.1)

    async def _send(self, session: Any, ask: Ask) -> tuple[str, str]:
        if ask.kind == "half_request":
            return await self._half(ask)
        request = session.post(ask.path, data=ask.body, headers={"Content-Type": "application/json"})
        if ask.kind == "hang_up_early":
            try:
                async with asyncio.timeout(ask.patience), request as answer:
                    await answer.read()
            except TimeoutError:
                return "hung up", ""
            return ("hung up", "") if answer.status == 200 else ("failed", f"status {answer.status}")
        async with request as answer:
            if answer.status != 200:
                if ask.expected == "refused" and 400 <= answer.status < 500:
                    return "refused", ""
                return "failed", f"status {answer.status}: {(await answer.text())[:300]}"
            if not ask.stream:
                choices = (await answer.json())["choices"]
            elif (choices := await _streamed(answer, ask)) is None:
                answer.close()
                return "hung up", ""
        if ask.expected == "refused":
            return "wrong", "answered, and should have been refused"
        why = wrong_with(ask, choices)
        if why is not None:
            return "wrong", why
        if ask.kind in GREEDY:
            self.ended.tokens[ask.number] = choices[0]["token_ids"]
        return ask.expected, ""  # the whole answer may arrive before a client hangs up

    async def _half(self, ask: Ask) -> tuple[str, str]:
        """Announces a body, sends only part of it and disconnects."""
        place = urlsplit(self.url)
        _, writer = await asyncio.open_connection(place.hostname, place.port)
        head = (
            f"POST {ask.path} HTTP/1.1\r\nHost: {place.netloc}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(ask.body)}\r\n\r\n"
        )
        part = random.Random(ask.number).randrange(len(ask.body))
        writer.write(head.encode() + ask.body[:part])
        await writer.drain()
        writer.close()
        await writer.wait_closed()
        return "hung up", ""


async def _streamed(answer: Any, ask: Ask) -> list[dict[str, Any]] | None:
    """Joins a stream's chunks into one choice; returns None when the client should hang up.

    Raises:
        ValueError: the stream ended without [DONE], or contained an error.
    """
    whole: dict[str, Any] = {"text": "", "token_ids": [], "finish_reason": None}
    chunks = 0
    if ask.expected == "hung up" and not ask.chunks:
        return None
    async for line in answer.content:
        if not line.startswith(b"data:"):
            continue
        data = line[5:].strip()
        if data == b"[DONE]":
            return [whole]
        chunk = json.loads(data)
        if "error" in chunk:
            raise ValueError(f"error in the stream: {chunk['error']}")
        for choice in chunk["choices"]:
            whole["text"] += choice["text"]
            whole["token_ids"] += choice.get("token_ids") or []
            whole["finish_reason"] = choice["finish_reason"] or whole["finish_reason"]
        chunks += 1
        if ask.expected == "hung up" and chunks >= ask.chunks:
            return None
    raise ValueError("the stream ended without [DONE]")
