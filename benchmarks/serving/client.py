"""A bounded client: each connection has one request at a time, and every answer is checked."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import aiohttp

_TIMEOUT_SECONDS = 300


@dataclass
class Load:
    """The outcome of some requests.

    Attributes:
        seconds: wall clock, from the first request to the last answer.
        client_cpu: processor seconds of the client.
        latencies: seconds of each answer, by its status.
        wrong: answers with status 200 that are not the known ones.
        lost: requests without any answer.
    """

    seconds: float = 0.0
    client_cpu: float = 0.0
    latencies: dict[int, list[float]] = field(default_factory=dict)
    wrong: int = 0
    lost: int = 0

    def add(self, more: Load) -> None:
        """Add the outcome of further requests."""
        self.seconds += more.seconds
        self.client_cpu += more.client_cpu
        self.wrong += more.wrong
        self.lost += more.lost
        for status, found in more.latencies.items():
            self.latencies.setdefault(status, []).extend(found)

    @property
    def statuses(self) -> dict[int, int]:
        """Answers by status."""
        return {status: len(found) for status, found in sorted(self.latencies.items())}

    @property
    def per_second(self) -> float:
        """Answers with status 200 a second."""
        return len(self.latencies.get(200, ())) / self.seconds

    def quantile(self, share: float, status: int = 200) -> float:
        """The least latency in ms that `share` of the answers do not exceed."""
        ordered = sorted(self.latencies[status])
        return 1000 * ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def ask(
    url: str, prompts: Sequence[str], seeds: Sequence[int], expected: Sequence[str], clients: int
) -> Load:
    """Send a request a prompt over `clients` connections.

    Args:
        url: of POST /generate.
        expected: the known answers.
    """
    bodies = [
        json.dumps({"prompts": prompt, "seed": seed}).encode()
        for prompt, seed in zip(prompts, seeds, strict=True)
    ]
    return asyncio.run(_ask(url, bodies, expected, clients))


async def _ask(url: str, bodies: Sequence[bytes], expected: Sequence[str], clients: int) -> Load:
    load, left = Load(), iter(range(len(bodies)))
    timeout = aiohttp.ClientTimeout(total=_TIMEOUT_SECONDS)
    connector = aiohttp.TCPConnector(limit=clients)
    headers = {"Content-Type": "application/json"}
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:

        async def client() -> None:
            for i in left:
                begun = time.perf_counter()
                try:
                    async with session.post(url, data=bodies[i], headers=headers) as answer:
                        said = await answer.read()
                except (aiohttp.ClientError, TimeoutError):
                    load.lost += 1
                    continue
                spent = time.perf_counter() - begun
                load.latencies.setdefault(answer.status, []).append(spent)
                if answer.status == 200 and json.loads(said) != {"texts": [expected[i]]}:
                    load.wrong += 1

        started, cpu = time.perf_counter(), time.process_time()
        await asyncio.gather(*(client() for _ in range(clients)))
        load.seconds = time.perf_counter() - started
        load.client_cpu = time.process_time() - cpu
    return load


def distinct(answers: Sequence[str]) -> float:
    """The share of answers that no other request has, which a swap would show."""
    counts = Counter(answers)
    return sum(counts[answer] == 1 for answer in answers) / len(answers)
