"""What machine this is, found without importing torch."""

from __future__ import annotations

import ctypes
import importlib.util
import io
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path

from qat.errors import UserError

PATIENCE_SECONDS = 10.0  # of a rank that nobody joins; then it says so

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
KEPT_BYTES = 2**30
# CPU flags that make bfloat16 matrix products at least as fast as float32 ones.
FAST_BF16_FLAGS = ("avx512_bf16", "amx_bf16", "svebf16", " bf16")


# What torchrun, or another launcher of several processes, tells each of them.
OF_RANKS = ("WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Ranks started by torchrun (1 without it)."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_world_size() -> int:
    """Those of them on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_launched() -> bool:
    """Whether a launcher speaks of ranks, be it of one."""
    return "WORLD_SIZE" in os.environ


def ranks_without_torchrun() -> str | None:
    """One line where another launcher, or what one left behind, asks for other ranks."""
    if world_size() == 1 or "TORCHELASTIC_RUN_ID" in os.environ:
        return None
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    return (
        f"rank {rank()} of {world_size()}, says the environment: it will wait for the others at "
        f"{address}; if nobody starts them, `unset {' '.join(OF_RANKS)}`"
    )


def check_ranks() -> None:
    """UserError unless the environment says all about ranks or nothing: what a shell has left over
    from elsewhere makes a process wait for others that nobody starts, or be silent for them."""
    said = {name: os.environ[name] for name in OF_RANKS if name in os.environ}
    if not said:
        return
    remedy = f"without torchrun, `unset {' '.join(said)}`; with it, let it say them all"
    if missing := [name for name in OF_RANKS if name not in said]:
        line = ", ".join(f"{name}={value}" for name, value in said.items())
        raise UserError(f"{line} in the environment, but no {', '.join(missing)}: {remedy}")
    for name, value in said.items():
        if name != "MASTER_ADDR" and not re.fullmatch("[0-9]{1,9}", value):
            raise UserError(f"{name}={value} in the environment is no number of ranks: {remedy}")
    for name, least, end, told in (
        ("WORLD_SIZE", 1, 10**9, "there is one rank or more"),
        ("RANK", 0, world_size(), f"ranks end below WORLD_SIZE={world_size()}"),
        ("LOCAL_WORLD_SIZE", 1, world_size() + 1, f"of WORLD_SIZE={world_size()} ranks"),
        ("LOCAL_RANK", 0, local_world_size(), f"below LOCAL_WORLD_SIZE={local_world_size()}"),
        ("MASTER_PORT", 1, 65_536, "a port is 1 to 65535"),
    ):
        if not least <= int(said[name]) < end:
            raise UserError(f"{name}={said[name]} in the environment: {told}; {remedy}")
    if world_size() % local_world_size() or not said["MASTER_ADDR"].strip():
        line = ", ".join(f"{name}={value}" for name, value in said.items())
        raise UserError(f"{line} in the environment do not fit together: {remedy}")


def _own_address() -> str:
    """Where gloo listens unless told otherwise: on what the name of this machine means here."""
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return "127.0.0.1"


@contextmanager
def ranks_meet() -> Iterator[None]:
    """For code that connects the ranks. A line if that takes long, and UserError in one line where
    they do not find each other."""
    there = os.environ.get("MASTER_ADDR", "localhost")
    is_local = there == "localhost" or there.startswith("127.")
    is_local |= world_size() == int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    remedy = "name the network that the nodes share, GLOO_SOCKET_IFNAME=eth0"
    if not is_local and "GLOO_SOCKET_IFNAME" not in os.environ:
        address, name = _own_address(), socket.gethostname()
        if address.startswith("127."):
            raise UserError(
                f"ranks of other nodes cannot reach this one: {name} is {address} here; {remedy}"
            )
    place = f"{there}:{os.environ.get('MASTER_PORT', '')}"
    told = f"rank {rank()} waits at {place} for the others of {world_size()}"
    patience = threading.Timer(PATIENCE_SECONDS, print, [told], {"file": sys.stderr, "flush": True})
    patience.start()
    try:
        yield
    except RuntimeError as error:  # of torch and of gloo alike
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        hint = "give another MASTER_PORT" if "EADDRINUSE" in reason else remedy
        raise UserError(f"ranks do not meet at {place} ({reason}); {hint}") from None
    finally:
        patience.cancel()


def _torch_has_cuda() -> bool:
    """Whether the installed torch was built for CUDA, read off its version file."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    version = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    match = re.search(r"^cuda\b[^=]*=\s*(.+)$", version, re.MULTILINE)
    return match is not None and match[1].strip() != "None"


# Not nvidia-ml-py, which says the same two calls through ctypes and is one package more.
def _num_nvidia_devices() -> int:
    """Of the machine, those too that CUDA_VISIBLE_DEVICES hides."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return 0
    count = ctypes.c_uint(0)
    if nvml.nvmlInit_v2() != 0 or nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0:
        return 0
    return count.value


def _num_visible_devices() -> int:
    """As CUDA reads CUDA_VISIBLE_DEVICES: what comes after a device that is not there is hidden."""
    there = _num_nvidia_devices()
    said = os.environ.get("CUDA_VISIBLE_DEVICES")
    if said is None:
        return there
    visible = 0
    for name in said.split(","):
        is_number = (
            name.strip().removeprefix("-").isdigit()
        )  # else the name of a device, or of a part
        if not name.strip() or (is_number and not 0 <= int(name) < there):
            break
        visible += 1
    return min(visible, there)


@cache
def has_cuda() -> bool:
    return _num_visible_devices() > 0 and _torch_has_cuda()


def check_cuda(torch_has_it: bool) -> None:
    """UserError where torch does not use the devices that the settings were chosen for."""
    if has_cuda() and not torch_has_it:
        raise UserError(
            f"torch cannot use the {_num_visible_devices()} CUDA device(s) of this machine "
            "(its driver may be older than torch wants); to train on the CPU, set "
            "CUDA_VISIBLE_DEVICES=''"
        )


def no_compiler() -> str | None:
    """Why nothing can be compiled here, None if it can.

    torch.compile calls a C++ compiler on a CPU (CXX, else g++), Triton on CUDA a C compiler (CC,
    else gcc or clang). Both need the headers of Python, which some systems pack apart.
    """
    variable, usual = ("CC", ("gcc", "clang")) if has_cuda() else ("CXX", ("g++",))
    return _no_compiler(variable, os.environ.get(variable), usual, os.environ.get("PATH", ""))


@cache  # a sweep asks for each of its jobs
def _no_compiler(variable: str, typed: str | None, usual: tuple[str, ...], path: str) -> str | None:
    for name in filter(partial(shutil.which, path=path), (typed,) if typed else usual):
        if subprocess.run([name, "--version"], capture_output=True).returncode:
            continue
        language = "c" if variable == "CC" else "c++"
        flags = ("-x", language, "-fsyntax-only", f"-I{sysconfig.get_path('include')}", "-")
        done = subprocess.run([name, *flags], input=b"#include <Python.h>", capture_output=True)
        if not done.returncode:
            return None
        reason = next(iter(done.stderr.decode(errors="replace").splitlines()), "no reason is given")
        return f"{name} does not compile what includes Python.h ({reason})"
    return f"{variable}={typed} does not work" if typed else f"there is no {' or '.join(usual)}"


def seconds_since_start() -> float | None:
    """Age of this process, where the system says it."""
    try:
        after_name = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2]
        uptime = float(Path("/proc/uptime").read_text(encoding="utf-8").split()[0])
    except OSError:
        return None
    return uptime - int(after_name.split()[19]) / os.sysconf("SC_CLK_TCK")


def speak_utf8() -> None:
    """Start again in Python's UTF-8 mode where the locale has ASCII only, in which files with other
    letters in their names could not be opened. What a console cannot show is spelled out."""
    if sys.getfilesystemencoding() == "ascii":
        os.environ["PYTHONUTF8"] = "1"  # of processes started from here
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def keep_freed_memory() -> None:
    """Let glibc keep large blocks that are freed: torch asks for as many again in the next step.

    Given back, their pages are cleared anew each time. Measured on 2 cores, laptop model: scoring
    takes 8 to 15 % less time, training 2 to 17 %. Other C libraries do as they like.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        if mallopt(M_MMAP_THRESHOLD, KEPT_BYTES):  # old ones refuse so much
            mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)


def faster_precision() -> str:
    """bf16 where the hardware multiplies it natively, else fp32; no timing, so runs agree.

    Measured on 2 cores with avx512_bf16, 4x288 model: bf16 12,000 tokens/s, fp32 7,000. Without
    such instructions bf16 is emulated and the slower one.
    """
    if has_cuda():
        return "bf16"
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return "fp32"
    return "bf16" if any(flag in flags for flag in FAST_BF16_FLAGS) else "fp32"


def detect_profile() -> tuple[str, str]:
    """(profile, why)."""
    if has_cuda():
        return "golf", f"{_num_visible_devices()} CUDA device(s) found"
    if _num_visible_devices():
        return "laptop", "an NVIDIA device is there, but the installed torch has no CUDA"
    if there := _num_nvidia_devices():
        said = os.environ["CUDA_VISIBLE_DEVICES"]
        return "laptop", f"CUDA_VISIBLE_DEVICES={said!r} hides all of {there} CUDA device(s)"
    return "laptop", "no CUDA device found"
