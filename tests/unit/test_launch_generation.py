"""Starts of one launcher are told apart, which torch's own rendezvous does not do."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch.distributed import PrefixStore, TCPStore
from torch.distributed.rendezvous import rendezvous

from nybble.run.launch_generation import keys_of, launch_generation


@pytest.fixture
def server() -> TCPStore:
    """A launcher's store, which outlives the starts."""
    return TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=20))


def client(server: TCPStore) -> TCPStore:
    return TCPStore("127.0.0.1", server.port, is_master=False, timeout=timedelta(seconds=20))


def start(server: TCPStore, count: int) -> list[int]:
    """The generation that each of `count` new processes finds."""
    with ThreadPoolExecutor(count) as pool:
        ranks = [pool.submit(launch_generation, client(server), rank, count, 20.0) for rank in range(count)]
        return [rank.result() for rank in ranks]


def test_torch_shows_a_new_start_the_addresses_of_the_dead(server: TCPStore, monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.port)}
    for name, value in {**variables, "TORCHELASTIC_USE_AGENT_STORE": "True"}.items():
        monkeypatch.setenv(name, value)
    stores = []
    for restarts in ("0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restarts)
        stores.append(next(rendezvous("env://"))[0])
    stores[0].set("address of 0", "dead")
    assert stores[0].get("address of 0") == b"dead"  # `set` does not wait for the server
    assert stores[1].check(["address of 0"])  # torch: the key of the first start
    assert not PrefixStore(keys_of(2), stores[1]).check(["address of 0"])


def test_all_processes_of_a_start_find_its_number(server: TCPStore) -> None:
    assert start(server, 3) == [1, 1, 1]
    assert start(server, 3) == [2, 2, 2]
    assert start(server, 1) == [3]


def test_what_a_dead_process_asked_confuses_nobody(server: TCPStore) -> None:
    server.set("nybble/call of 1", "of a process that died before it was answered")
    assert start(server, 2) == [1, 1]
    server.set("nybble/call of 1", "of another, which died after the first start")
    assert start(server, 2) == [2, 2]


def test_a_process_that_never_comes_is_an_error(server: TCPStore) -> None:
    with pytest.raises(RuntimeError, match=r"did not call within 0\.1 seconds"):
        launch_generation(client(server), 0, 2, 0.1)
