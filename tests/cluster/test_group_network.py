"""The network card that a group talks over; that groups on two machines meet is shown by the storm."""

from __future__ import annotations

import os
import socket

import psutil
import pytest

from cluster.group_network import interface_of, use_network_of_the_node


def test_the_card_with_the_address() -> None:
    cards = [
        (name, a.address) for name, found in psutil.net_if_addrs().items() for a in found if a.family == socket.AF_INET
    ]
    assert cards
    for name, address in cards:
        assert interface_of(address) == name
    assert interface_of("192.0.2.1") is None


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "mine0")
    use_network_of_the_node()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "mine0"
