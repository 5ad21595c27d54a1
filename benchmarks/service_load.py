"""Load the example of a service on loopback: many clients that behave, and beside them slow ones and bad ones.

    python benchmarks/service_load.py --clients 64 --requests 256

Starts ``python -m examples.service`` with the embedded model, its enhancer off; ``--url`` loads one that runs already.
Clients that behave ask for pictures one after the other, each with a seed of its own, and come again after the time
that a 429 names. Beside them, until they are done:

bad    broken JSON, forms without end, requests cut off in the middle, connections dropped while their picture waits
slow   a byte of a request each half second; an answer that is never read
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

import httpx

PATH = "/v1/images/generations"
PROMPTS = ("a large red circle", "a small blue square on a grey background", "a green triangle", "two yellow circles")


class Load:
    """The clients, and what they see."""

    def __init__(self, host: str, port: int, size: str, steps: int) -> None:
        self.host, self.port, self.size, self.steps = host, port, size, steps
        self.latencies_s: list[float] = []
        self.batch_sizes: list[int] = []
        self.statuses: collections.Counter[str] = collections.Counter()
        self.bad: collections.Counter[str] = collections.Counter()
        self.left = 0
        self.over = asyncio.Event()

    async def run(self, clients: int, requests: int, bad: int, slow: int) -> float:
        """Return the seconds until all requests of clients that behave are answered."""
        self.left = requests
        limits = httpx.Limits(max_connections=clients + 8)
        base = f"http://{self.host}:{self.port}"
        async with httpx.AsyncClient(base_url=base, timeout=600, limits=limits, trust_env=False) as http:
            others = [asyncio.create_task(self._bad(number)) for number in range(bad)]
            others += [asyncio.create_task(self._slow(number)) for number in range(slow)]
            start = time.perf_counter()
            await asyncio.gather(*(self._client(http, number) for number in range(clients)))
            seconds = time.perf_counter() - start
            self.over.set()
            await asyncio.gather(*others)
        return seconds

    async def _client(self, http: httpx.AsyncClient, number: int) -> None:
        while self.left > 0:
            self.left -= 1
            seed = self.left
            body = {"prompt": PROMPTS[seed % 4], "size": self.size, "seed": seed, "num_inference_steps": self.steps}
            streams = number % 8 == 0  # these see how many pictures are rendered together
            start = time.perf_counter()
            while True:
                answer = await http.post(PATH, json=body | {"stream": streams})
                self.statuses[str(answer.status_code)] += 1
                if answer.status_code != 429:
                    break
                await asyncio.sleep(float(answer.headers["retry-after"]) * random.uniform(0.5, 1.0))
            self.latencies_s.append(time.perf_counter() - start)
            if streams:
                events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: ")]
                self.batch_sizes += [event["batch_size"] for event in events if event.get("step") == 0]

    async def _bad(self, number: int) -> None:
        """Send what no service can answer with a picture, again and again."""
        deeds = ("broken json", "no length", "cut off", "left")
        while not self.over.is_set():
            deed = deeds[number % 4]
            number += 1
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                reader, writer = await asyncio.open_connection(self.host, self.port)
                body = json.dumps({"prompt": "nobody waits", "size": self.size}).encode()
                length = {"cut off": len(body) + 9}.get(deed, len(body))
                framing = "Transfer-Encoding: chunked" if deed == "no length" else f"Content-Length: {length}"
                head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n{framing}\r\n\r\n"
                body = b"{" * len(body) if deed == "broken json" else b"zz\r\n" if deed == "no length" else body
                writer.write(head.encode() + body)
                await writer.drain()
                if deed in ("broken json", "no length"):
                    self.bad[
                        f"{deed}: {(await reader.readuntil(b' '))[:8].decode()}{(await reader.read(3)).decode()}"
                    ] += 1
                else:
                    self.bad[deed] += 1
                    await asyncio.sleep(0.05)
                writer.close()
            await asyncio.sleep(0.05)

    async def _slow(self, number: int) -> None:
        """Hold connections open: half of these send their request byte by byte, half never read their answer."""
        body = json.dumps({"prompt": "slow", "size": self.size, "num_inference_steps": self.steps}).encode()
        head = (
            f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        while not self.over.is_set():
            with contextlib.suppress(OSError):
                _, writer = await asyncio.open_connection(self.host, self.port, limit=64)
                message = head.encode() + body
                self.bad["sends slowly" if number % 2 else "never reads"] += 1
                if number % 2:
                    for byte in message:
                        if self.over.is_set():
                            break
                        writer.write(bytes([byte]))
                        await writer.drain()
                        await asyncio.sleep(0.5)
                else:
                    writer.write(message)
                    with contextlib.suppress(asyncio.TimeoutError):
                        await asyncio.wait_for(self.over.wait(), 20)
                writer.close()


@contextlib.contextmanager
def own_service(max_queue: int):
    """Start a service on a free port; yield the port."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    root = Path(__file__).resolve().parents[1]
    paths = os.pathsep.join([str(root), str(root / "src"), os.environ.get("PYTHONPATH", "")])
    settings = {"SERVICE_PORT": str(port), "SERVICE_ENHANCER": "0", "SERVICE_MAX_QUEUE": str(max_queue)}
    environment = os.environ | settings | {"PYTHONPATH": paths, "SERVICE_TIMEOUT_S": "600"}
    log = subprocess.DEVNULL
    process = subprocess.Popen([sys.executable, "-m", "examples.service"], env=environment, stderr=log)
    try:
        ends = time.monotonic() + 300
        while True:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False).status_code == 200:
                    break
            if process.poll() is not None or time.monotonic() > ends:
                sys.exit("the service did not start; run python -m examples.service to see why")
            time.sleep(0.2)
        yield port
        process.terminate()
        print(f"exit status after SIGTERM: {process.wait(60)}")
    finally:
        process.kill()


def main() -> None:
    """Run the load, and print what was seen."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--url", help="host:port of a service that runs; default: one of its own")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--bad", type=int, default=8)
    parser.add_argument("--slow", type=int, default=8)
    parser.add_argument("--max-queue", type=int, default=64, help="of the own service")
    parser.add_argument("--size", default="128x128")
    parser.add_argument("--steps", type=int, default=8)
    given = parser.parse_args()
    with contextlib.ExitStack() as stack:
        if given.url is None:
            host, port = "127.0.0.1", stack.enter_context(own_service(given.max_queue))
        else:
            host, _, port = given.url.rpartition(":")
        load = Load(host, int(port), given.size, given.steps)
        seconds = asyncio.run(load.run(given.clients, given.requests, given.bad, given.slow))
        health = httpx.get(f"http://{host}:{port}/health", trust_env=False).json()
        ordered = sorted(load.latencies_s)
        p95 = ordered[max(0, round(0.95 * len(ordered)) - 1)]
        rate = f"{len(ordered) / seconds:.2f} a second"
        print(f"{given.clients} clients: {len(ordered)} pictures in {seconds:.1f} s, {rate}")
        print(f"latency p50 {statistics.median(ordered):.2f} s, p95 {p95:.2f} s")
        print(f"answers: {dict(load.statuses)}")
        sizes = load.batch_sizes or [0]
        print(f"batch size: mean {statistics.mean(sizes):.1f}, largest {max(sizes)}, of {len(sizes)} looked at")
        print(f"beside them: {dict(load.bad)}")
        print(f"afterwards: {health}")


if __name__ == "__main__":
    main()
