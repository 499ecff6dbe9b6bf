"""What machine this is, found without importing torch."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import platform
import re
from functools import cache
from pathlib import Path

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
KEPT_BYTES = 2**30
# CPU flags that make bfloat16 matrix products at least as fast as float32 ones.
FAST_BF16_FLAGS = ("avx512_bf16", "amx_bf16", "svebf16", " bf16")


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Ranks started by torchrun (1 without it)."""
    return int(os.environ.get("WORLD_SIZE", "1"))


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
    if os.environ.get("CUDA_VISIBLE_DEVICES", "visible").strip() in ("", "-1"):
        return 0
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return 0
    count = ctypes.c_uint(0)
    if nvml.nvmlInit_v2() != 0 or nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0:
        return 0
    return count.value


@cache
def has_cuda() -> bool:
    return _num_nvidia_devices() > 0 and _torch_has_cuda()


def keep_freed_memory() -> None:
    """Let glibc keep large blocks that are freed: torch asks for as many again in the next step.

    Given back, their pages are cleared anew each time. Measured on 2 cores, laptop model: scoring
    takes 8 to 15 % less time, training 2 to 5 %. Other C libraries do as they like.
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
        return "golf", f"{_num_nvidia_devices()} CUDA device(s) found"
    if _num_nvidia_devices():
        return "laptop", "an NVIDIA device is there, but the installed torch has no CUDA"
    return "laptop", "no CUDA device found"
