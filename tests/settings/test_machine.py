"""Which machine this is: torch, the driver and CUDA_VISIBLE_DEVICES may say different things."""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

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


def test_a_compiler_without_headers_is_found_before_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = tmp_path / "g++"
    compiler.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && exit\n'
        'echo "<stdin>:1:10: fatal error: Python.h: No such file" >&2\nexit 1\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setattr(machine, "has_cuda", lambda: False)
    monkeypatch.setenv("CXX", str(compiler))
    assert machine.no_compiler() == (
        f"{compiler} does not compile what includes Python.h "
        "(<stdin>:1:10: fatal error: Python.h: No such file)"
    )


def test_the_age_of_this_process() -> None:
    first = machine.seconds_since_start()
    if first is None:
        pytest.skip("no /proc here")
    assert 0 < first < 24 * 3600
    second = machine.seconds_since_start()
    assert second is not None
    assert second >= first


ALL = {
    "WORLD_SIZE": "4", "RANK": "3", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "1",
    "MASTER_ADDR": "node0", "MASTER_PORT": "29500",
}  # fmt: skip


def _say(monkeypatch: pytest.MonkeyPatch, said: dict[str, str]) -> None:
    for name in machine.OF_RANKS:
        monkeypatch.delenv(name, raising=False)
    for name, value in said.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    "said",
    [{}, ALL, dict.fromkeys(ALL, "1") | {"RANK": "0", "LOCAL_RANK": "0"}, ALL | {"RANK": "0"}],
)
def test_ranks_that_a_launcher_speaks_of(
    said: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _say(monkeypatch, said)
    machine.check_ranks()
    assert machine.is_launched() == bool(said)


@pytest.mark.parametrize(
    "said",
    [
        *({name: value} for name, value in ALL.items()),  # each alone
        *({n: v for n, v in ALL.items() if n != name} for name in ALL),  # each missing
        *(ALL | {name: "x"} for name in ALL if name != "MASTER_ADDR"),
        *(ALL | {name: ""} for name in ALL),
        *(ALL | {name: "-1"} for name in ALL if name != "MASTER_ADDR"),
        ALL | {"RANK": "4"}, ALL | {"LOCAL_RANK": "2"}, ALL | {"LOCAL_WORLD_SIZE": "0"},
        ALL | {"LOCAL_WORLD_SIZE": "3"}, ALL | {"LOCAL_WORLD_SIZE": "8"},
        ALL | {"WORLD_SIZE": "0"}, ALL | {"MASTER_PORT": "70000"}, ALL | {"MASTER_PORT": "0"},
    ],
    ids=str,
)  # fmt: skip
def test_ranks_left_over_are_one_line(
    said: dict[str, str], program: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    _say(monkeypatch, said)
    for script in ("train.py", "eval.py"):
        done = program(script, "artifact=x")
        assert (done.code, len(done.err.splitlines())) == (2, 1), done.err
        assert f"`unset {' '.join(n for n in machine.OF_RANKS if n in said)}`" in done.err


def test_a_mistake_that_rank_0_did_not_meet_is_said_after_all(
    train: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qat.settings.command_line.SECONDS_TO_SPEAK", 0.0)
    _say(monkeypatch, ALL)
    for asked, line in (
        ("seed=-1", "error: rank 3: seed = -1: give 0 to 2^63 - 1"),  # of the settings
        ("data.files=[no.txt]", "error: rank 3: data.files=no.txt: no such file"),  # of a run
    ):
        done = train(asked)
        waits, said = done.err.splitlines()
        assert "rank 3 of 4, says the environment: it will wait" in waits
        assert (done.code, said) == (2, line)


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


def test_a_rank_that_waits_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setattr(machine, "PATIENCE_SECONDS", 0.01)
    with machine.ranks_meet():
        time.sleep(0.2)
    assert capsys.readouterr().err == "rank 1 waits at 127.0.0.1:29500 for the others of 2\n"
    monkeypatch.setattr(machine, "PATIENCE_SECONDS", 0.2)
    with machine.ranks_meet():
        pass
    time.sleep(0.4)
    assert not capsys.readouterr().err


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
