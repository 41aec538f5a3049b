"""Who makes a call: peers, and the context variable."""

import asyncio

import pytest

from services.runtime.callers import Caller, calling, current_caller, peer_host


@pytest.mark.parametrize(
    ("peer", "host"),
    [
        ("ipv4:10.0.0.7:49952", "ipv4:10.0.0.7"),
        ("ipv6:%5B::1%5D:60296", "ipv6:::/64"),
        ("ipv6:%5B2001:db8:1:2:3:4:5:6%5D:60296", "ipv6:2001:db8:1:2::/64"),
        ("ipv6:%5Bfe80::1%25eth0%5D:60296", "ipv6:fe80::/64"),
        ("ipv6:%5B::ffff:10.0.0.7%5D:60296", "ipv4:10.0.0.7"),
        ("unix:", "unix"),
        ("unix:/run/milonga.sock", "unix"),
        ("unix-abstract:milonga", "unix-abstract"),
        ("ipv4:rubbish", "ipv4"),
        ("", "local"),
    ],
)
def test_a_peer_is_its_host(peer: str, host: str) -> None:
    assert peer_host(peer) == host


def test_key_is_the_name_otherwise_the_peer() -> None:
    assert Caller(name="studio", peer="ipv4:10.0.0.7").key == "studio"
    assert Caller(peer="ipv4:10.0.0.7").key == "ipv4:10.0.0.7"


async def test_tasks_and_threads_inherit_the_caller_and_others_do_not() -> None:
    async def name() -> str:
        await asyncio.sleep(0)
        return await asyncio.to_thread(lambda: current_caller().name)

    def start(caller: str) -> asyncio.Task[str]:
        with calling(Caller(name=caller)):
            return asyncio.create_task(name())

    names = list(await asyncio.gather(start("one"), start("two"), name()))
    assert names == ["one", "two", ""]
