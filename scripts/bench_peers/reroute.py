"""Gloo's connections through a relay: a process sees the others at a relay's ports instead of their own.

Runs in CrypTen's environment. Gloo takes any free port and tells the others through the store of torch.distributed, so
that is where ports are exchanged. Of two processes the one with the larger address connects, the other waits: a relay's
port has to compare with this process's as the other's own port does, in either byte order.
"""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

_ADDRESS = re.compile(rb"\x02\x00(..)\x7f\x00\x00\x01", re.DOTALL)  # IPv4 on the loopback device
_ATTEMPTS = 400
_kept: list[Any] = []  # torch uses a store without holding on to it


class Relayed(dist.Store):
    """A store through which the others seem to listen at ports of a relay of this process."""

    def __init__(self, store: Any, rate: str, delay: str) -> None:
        super().__init__()
        self.store = store
        relay = Path(__file__).parents[1] / "bench_relay.py"
        self.relay = subprocess.Popen(
            [sys.executable, str(relay), rate, delay], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.own: set[bytes] = set()
        self.routes: dict[tuple[bytes, bytes], bytes] = {}

    def set(self, key: str, value: bytes) -> None:
        """What this process says of itself is true."""
        self.own.update(_ADDRESS.findall(value))
        self.mine = _ADDRESS.findall(value)[-1:] or getattr(self, "mine", [])
        self.store.set(key, value)

    def get(self, key: str) -> bytes:
        """What others say, with a relay's ports for theirs."""
        value: bytes = self.store.get(key)
        return _ADDRESS.sub(self._elsewhere, value)

    def _elsewhere(self, found: re.Match[bytes]) -> bytes:
        port = found[1]
        if port in self.own or not self.mine:
            return found[0]
        (own,) = self.mine
        if (own, port) not in self.routes:
            self.routes[own, port] = self._route(own, port)
        return found[0].replace(port, self.routes[own, port], 1)

    def _route(self, own: bytes, port: bytes) -> bytes:
        for _ in range(_ATTEMPTS):
            listen = random.randrange(1024, 65536).to_bytes(2, "big")
            if (listen < own) == (port < own) and (listen[::-1] < own[::-1]) == (port[::-1] < own[::-1]):
                request = {
                    "link": "peers",
                    "port": int.from_bytes(port, "big"),
                    "listen": int.from_bytes(listen, "big"),
                }
                assert self.relay.stdin is not None and self.relay.stdout is not None
                self.relay.stdin.write(json.dumps(request).encode() + b"\n")
                self.relay.stdin.flush()
                if json.loads(self.relay.stdout.readline()):
                    return listen
        raise RuntimeError("found no port for the relay")

    def add(self, key: str, amount: int) -> int:
        """As the store's."""
        return int(self.store.add(key, amount))

    def wait(self, keys: list[str], *timeout: Any) -> None:
        """As the store's."""
        self.store.wait(keys, *timeout)

    def check(self, keys: list[str]) -> bool:
        """As the store's."""
        return bool(self.store.check(keys))

    def delete_key(self, key: str) -> bool:
        """As the store's."""
        return bool(self.store.delete_key(key))

    def has_extended_api(self) -> bool:
        """What would go past `get` and `set`."""
        return False


def reroute(rate: str, delay: str) -> None:
    """From now on torch.distributed joins processes through relays of bits per second and seconds."""
    join = dist.init_process_group

    def joined(backend: str, init_method: str, world_size: int, rank: int) -> None:
        store = Relayed(dist.FileStore(init_method.removeprefix("file://"), world_size), rate, delay)
        _kept.append(store)
        join(backend, store=store, world_size=world_size, rank=rank)

    dist.init_process_group = joined
