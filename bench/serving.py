"""How much more several clients get in all than one alone, through HTTP.

    python bench/serving.py MODEL.lut -t 2 --clients 8 --pairs 5

Starts ``tmac serve`` and streams answers of a fixed length: one client, then several at once, in
turns. The clients share the cores with the server: they read in one thread, and look at what came
only at the end. Prints tokens per second of all clients, the ratio of the medians, and which share
of the time the server did not spend in passes over the weights (``Model.forward_batch``).
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import re
import selectors
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from tmac_py.lutfile import LutFile

HOST = "127.0.0.1"


@dataclass(frozen=True)
class Sample:
    """One run: tokens and seconds of all clients together, seconds in the core."""

    tokens: int
    seconds: float
    core_seconds: float

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds

    @property
    def outside(self) -> float:
        return 1 - self.core_seconds / self.seconds


@contextmanager
def running_server(model: Path, options: list[str]) -> Iterator[int]:
    """A server of its own process; gives its port."""
    command = [sys.executable, "-m", "tmac_py", "serve", str(model), "--port", "0", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            line = process.stderr.readline()
            found = re.search(r":(\d+),", line)
            if found is None:
                raise SystemExit(line + process.stderr.read())
            yield int(found[1])
        finally:
            process.terminate()


def connect(port: int, body: dict[str, object]) -> socket.socket:
    """A client that has sent its request."""
    data = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {HOST}\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    client = socket.create_connection((HOST, port))
    client.sendall(head.encode() + data)
    return client


def ask(port: int, bodies: Sequence[dict[str, object]]) -> int:
    """Stream an answer to each client, all at once; the number of tokens of all together.

    Clients read what arrives and no more, in one thread: they share the cores with the server, and
    what they take of them is missing there.
    """
    tokens = 0
    with selectors.DefaultSelector() as selector:
        for body in bodies:
            selector.register(connect(port, body), selectors.EVENT_READ, bytearray())
        while selector.get_map():
            for key, _ in selector.select():
                client, received = key.fileobj, key.data
                assert isinstance(client, socket.socket)
                if data := client.recv(1 << 16):
                    received += data
                    continue
                selector.unregister(client)
                client.close()
                found = re.search(rb'"completion_tokens":(\d+)', received)
                if found is None:
                    raise SystemExit(received.decode(errors="replace"))
                tokens += int(found[1])
    return tokens


def core_seconds(port: int) -> float:
    """Seconds that the server has spent in passes over the weights."""
    connection = http.client.HTTPConnection(HOST, port)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    found = re.findall(r"^tmac:(?:prompt|tokens_predicted)_seconds_total (\S+)$", text, re.M)
    return sum(map(float, found))


def run(port: int, clients: int, n: int, forbidden: tuple[int, ...]) -> Sample:
    """Answers of ``n`` tokens to ``clients`` at once."""
    bodies: list[dict[str, object]] = [
        {
            "prompt": f"Chapter {i + 1}. The story of the number {i + 1} begins",
            "max_tokens": n,
            "temperature": 0.8,
            "seed": i,
            "stream": True,
            "stream_options": {"include_usage": True},
            "logit_bias": {str(token): -100 for token in forbidden},
            "cache_prompt": False,
        }
        for i in range(clients)
    ]
    before = core_seconds(port)
    started = time.perf_counter()
    tokens = ask(port, bodies)
    seconds = time.perf_counter() - started
    return Sample(tokens, seconds, core_seconds(port) - before)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="a .lut file")
    parser.add_argument("-t", "--threads", type=int, default=2)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("-n", "--tokens", type=int, default=128, help="of each answer")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument(
        "--draft",
        choices=("lookup", "none"),
        default="none",
        help="guesses for the one client, which depend on how often the text repeats itself",
    )
    args = parser.parse_args()
    with LutFile.open(args.model, check=False) as file:
        forbidden = file.config.eos_token_ids
    options = ["-t", str(args.threads), "--parallel", str(args.clients), "--no-check"]
    options += ["--draft", args.draft]
    with running_server(args.model, options) as port:
        run(port, args.clients, 8, forbidden)
        pairs = []
        for _ in range(args.pairs):
            pair = [run(port, n, args.tokens, forbidden) for n in (1, args.clients)]
            pairs.append(pair)
            print("  ".join(f"{s.rate:7.1f} tok/s ({s.outside:4.0%} outside)" for s in pair))
    one, many = (median(pair[i].rate for pair in pairs) for i in (0, 1))
    outside = median(pair[1].outside for pair in pairs)
    print(
        f"{args.threads} threads, answers of {args.tokens} tokens: 1 client {one:.1f} tok/s, "
        f"{args.clients} clients {many:.1f} tok/s, ratio {many / one:.2f} (of the pairs: "
        f"{min(b.rate / a.rate for a, b in pairs):.2f} to "
        f"{max(b.rate / a.rate for a, b in pairs):.2f}); outside of passes {outside:.0%}; "
        f"load {os.getloadavg()[0]:.1f}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
