"""Which machine this is: torch, the driver and CUDA_VISIBLE_DEVICES may say different things."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable, Iterator

import pytest

from qat.errors import UserError
from qat.settings import machine
from tests.conftest import Done


@pytest.fixture(autouse=True)
def _asked_anew() -> Iterator[None]:
    machine.has_cuda.cache_clear()
    yield
    machine.has_cuda.cache_clear()


@pytest.fixture
def two_devices(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine of two devices, with a torch for them."""
    monkeypatch.setattr(machine, "_num_nvidia_devices", lambda: 2)
    monkeypatch.setattr(machine, "_torch_has_cuda", lambda: True)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    ("said", "count"),
    [("0", 1), ("1,0", 2), ("7", 0), ("0,7,1", 1), ("", 0), (" ", 0), ("-1", 0), ("0,-1", 1),
     ("GPU-8932f937-d72c", 1), (None, 2)],
)  # fmt: skip
def test_hidden_devices_do_not_count(
    said: str | None, count: int, two_devices: pytest.MonkeyPatch
) -> None:
    if said is not None:
        two_devices.setenv("CUDA_VISIBLE_DEVICES", said)
    profile, reason = machine.detect_profile()
    assert machine.has_cuda() == (count > 0)
    if count:
        assert (profile, reason) == ("golf", f"{count} CUDA device(s) found")
    else:
        hidden = f"CUDA_VISIBLE_DEVICES={said!r} hides all of 2 CUDA device(s)"
        assert (profile, reason) == ("laptop", hidden)


def test_a_torch_that_cannot_use_them_is_refused(two_devices: pytest.MonkeyPatch) -> None:
    machine.check_cuda(True)
    with pytest.raises(UserError, match=r"^torch cannot use the 2 CUDA .*CUDA_VISIBLE_DEVICES=''$"):
        machine.check_cuda(False)
    two_devices.setenv("CUDA_VISIBLE_DEVICES", "")
    machine.has_cuda.cache_clear()
    machine.check_cuda(False)


def test_a_run_ends_in_that_line(
    two_devices: pytest.MonkeyPatch, train: Callable[..., Done]
) -> None:
    two_devices.setattr("torch.cuda.is_available", lambda: False)
    done = train("compile=false")
    assert (done.code, done.err.count("error: torch cannot use the 2 CUDA device(s)")) == (2, 1)


def test_without_a_compiler_nothing_is_compiled(
    monkeypatch: pytest.MonkeyPatch, train: Callable[..., Done]
) -> None:
    monkeypatch.setattr(machine, "has_cuda", lambda: False)
    monkeypatch.setenv("CXX", "/bin/false")
    done = train("compile=true", "run_name=r")
    assert done.code == 2
    assert "compile = true: CXX=/bin/false does not work; install a compiler" in done.err
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "/nowhere")
    assert machine.no_compiler() == "there is no g++"
    monkeypatch.setattr(machine, "has_cuda", lambda: True)
    assert machine.no_compiler() == "there is no gcc or clang"
    monkeypatch.setenv("CC", "/bin/true")
    assert machine.no_compiler() is None


def test_the_age_of_this_process() -> None:
    first = machine.seconds_since_start()
    if first is None:
        pytest.skip("no /proc here")
    assert 0 < first < 24 * 3600
    second = machine.seconds_since_start()
    assert second is not None
    assert second >= first


@pytest.mark.parametrize(
    ("reason", "message"),
    [
        ("... code: -98, name: EADDRINUSE, message: address already in use", "another MASTER_PORT"),
        ("[../gloo/transport/tcp/pair.cc] Connection refused\nframe 1", "GLOO_SOCKET_IFNAME=eth0"),
    ],
)
def test_ranks_that_do_not_meet(reason: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    line = re.escape(f"ranks do not meet at 127.0.0.1:29500 ({reason.splitlines()[0]}); ")
    with pytest.raises(UserError, match=f"{line}.*{message}"), machine.ranks_meet():
        raise RuntimeError(reason)


def test_a_node_whose_name_is_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Debian's /etc/hosts has it: gloo would listen there."""
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "127.0.1.1")
    for name, value in {"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8", "MASTER_ADDR": "a"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    named = r"is 127.0.1.1 here; name .* GLOO_SOCKET_IFNAME=eth0"
    with pytest.raises(UserError, match=named), machine.ranks_meet():
        pass
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    with machine.ranks_meet():
        pass
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    with machine.ranks_meet():
        pass
