"""Targets: what a machine has, as plain data with its source, and what this machine has.

Finding out uses the driver's own library and the kernel's files, never torch: `engine check`
answers in a second. An unreadable driver counts as no GPU.
"""

from __future__ import annotations

import copy
import ctypes
import os
import platform
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, fields
from datetime import date
from pathlib import Path
from typing import Any

from engine.errors import Problem, RecipeError, choices_hint

KINDS = ("auto", "cuda", "cpu", "mps")
HERE = "this machine"
"""Name of a target that stands for the machine at hand whatever that is called."""
FORMATS = ("float32", "float16", "bfloat16", "int8")
"""Number formats whose rates a target tells."""
LEAST, MOST = 1e-6, 1e9
"""Between these are all figures of machines, whatever their unit."""
GIB = 2**30
UNIFIED_MEMORY_SHARE = 0.7
"""Of Apple's shared memory: the least that Metal was reported to grant."""


@dataclass
class Target:
    """A machine to run on. `auto` is the one at hand; every field can be overridden."""

    name: str = "auto"
    kind: str = "auto"
    """'cuda', 'cpu', 'mps', or 'auto' for whatever is here."""
    devices: list[str] = field(default_factory=list)
    """What drivers call it, so that it is recognized where it is detected."""
    label_gb: float | None = None
    """Memory as sold, in 10^9 bytes."""
    usable_gib: float | None = None
    """Memory that a program can really get, in 2^30 bytes."""
    bandwidth_gbs: float | None = None
    """Memory bandwidth by specification, in 10^9 bytes per second."""
    tflops: dict[str, float] = field(default_factory=dict)
    """Dense 10^12 operations per second, by dtype: float32, float16, bfloat16, int8."""
    capability: str | None = None
    """CUDA compute capability, such as '8.9'."""
    launch_us: float | None = None
    """Microseconds in which its computer starts an operator of transformers."""
    efficiency: dict[str, float] = field(default_factory=dict)
    """Share of the specification that is reached: of `bandwidth`, of `tflops`, or of one dtype."""
    source: str = ""
    """Where the figures are from."""
    checked: str = ""
    """Day on which somebody looked at the source: year-month-day."""

    @property
    def traits(self) -> frozenset[str]:
        """Return what plugins may need or exclude."""
        return frozenset(self._traits())

    @property
    def usable_bytes(self) -> int | None:
        """Return the usable memory in bytes, or None when unknown."""
        return None if self.usable_gib is None else int(self.usable_gib * GIB)

    def _traits(self) -> Iterator[str]:
        yield f"target.{self.kind}"
        capability = tuple(map(int, self.capability.split("."))) if self.capability else (0, 0)
        # Metal computes in bfloat16 since macOS 14, which torch 2.6 and newer require anyway. A GPU
        # of which nothing is said is taken for one of today's.
        if self.kind in ("cpu", "mps") or not self.capability or capability >= (8, 0):
            yield "target.bfloat16"
        if capability >= (8, 9):
            yield "target.fp8"


def resolve(target: Target) -> Target:
    """Return a copy with `auto` replaced by what this machine has; overridden fields stay.

    A CPU without a figure for its memory gets this machine's.

    Raises RecipeError, with every field that has an impossible value.
    """
    problems = list(problems_of(target))
    if problems:
        raise RecipeError(problems)
    if target.kind == "cpu" and target.usable_gib is None:
        found = _cpu()
    elif target.kind != "auto":
        return copy.deepcopy(target)
    else:
        found = detect()
    blank = Target()
    for each in fields(Target):
        value = getattr(target, each.name)
        if value != getattr(blank, each.name):
            setattr(found, each.name, copy.deepcopy(value))
    return found


def detect() -> Target:
    """Describe the accelerator that a program started now would use, or else the CPU."""
    found = _nvidia() or _apple() or _cpu()
    found.source = "detected on this machine"
    found.checked = date.today().isoformat()
    return found


def is_here(target: Target) -> bool:
    """Tell whether a target is the machine at hand."""
    here = detect()
    return target.kind == here.kind and target.name in (here.name, "auto", HERE)


def _between(value: float) -> str:
    return f"must be above 0, not {value:g}" if value <= 0 else f"is {value:g}, as of no machine"


def problems_of(target: Target) -> Iterator[Problem]:
    """Yield what is wrong with a target's values."""

    def problem(message: str, hint: str) -> Problem:
        return Problem(message=message, hint=hint, code="target", where="target")

    if target.kind not in KINDS:
        yield problem(
            f"target.kind is '{target.kind}'",
            choices_hint(target.kind, KINDS, prefix="target.kind="),
        )
    for name in ("label_gb", "usable_gib", "bandwidth_gbs", "launch_us"):
        value = getattr(target, name)
        if value is not None and not LEAST <= value <= MOST:
            yield problem(f"target.{name} {_between(value)}", f"target.{name}=16")
    for dtype, value in target.tflops.items():
        if dtype not in FORMATS:
            yield problem(
                f"target.tflops.{dtype}: rates are told of {', '.join(FORMATS)}",
                choices_hint(dtype, FORMATS, prefix="target.tflops."),
            )
        if not LEAST <= value <= MOST:
            yield problem(f"target.tflops.{dtype} {_between(value)}", f"target.tflops.{dtype}=100")
    shares = ("bandwidth", "tflops", *FORMATS)
    for name, share in target.efficiency.items():
        if name not in shares:
            yield problem(
                f"target.efficiency.{name}: shares are told of {', '.join(shares)}",
                choices_hint(name, shares, prefix="target.efficiency."),
            )
        if not 0 < share <= 1:
            yield problem(
                f"target.efficiency.{name} must be above 0 and at most 1, not {share}",
                f"target.efficiency.{name}=0.7",
            )
    if target.capability is not None and not re.fullmatch(r"\d+\.\d+", target.capability):
        yield problem(
            f"target.capability must look like 8.9, not '{target.capability}'",
            "target.capability=8.9",
        )


# NVIDIA: through NVML, the library that nvidia-smi uses. It comes with the driver.


class _Memory(ctypes.Structure):
    """`nvmlMemory_v2_t`: unlike the first version, it tells what the driver keeps for itself."""

    _fields_ = [
        ("version", ctypes.c_uint),
        ("total", ctypes.c_ulonglong),
        ("reserved", ctypes.c_ulonglong),
        ("free", ctypes.c_ulonglong),
        ("used", ctypes.c_ulonglong),
    ]


class _NvmlError(Exception):
    """NVML answered with an error code."""


def _load_nvml() -> Any:
    return ctypes.CDLL("nvml.dll" if sys.platform == "win32" else "libnvidia-ml.so.1")


def _nvidia() -> Target | None:
    """Describe the GPU that CUDA would use first; None without one."""
    try:
        nvml = _load_nvml()
        _call(nvml, "nvmlInit_v2")
    except (OSError, AttributeError, _NvmlError):
        return None
    try:
        return _describe(nvml)
    except (AttributeError, ValueError, _NvmlError):
        return None
    finally:
        with suppress(AttributeError, _NvmlError):
            _call(nvml, "nvmlShutdown")


def _call(nvml: Any, function: str, *arguments: Any) -> None:
    code = getattr(nvml, function)(*arguments)
    if code != 0:
        raise _NvmlError(f"{function} answers {code}")


def _describe(nvml: Any) -> Target | None:
    device = _first_visible(nvml)
    if device is None:
        return None
    name = ctypes.create_string_buffer(96)
    _call(nvml, "nvmlDeviceGetName", device, name, ctypes.c_uint(len(name)))
    memory = _Memory(version=ctypes.sizeof(_Memory) | 2 << 24)
    _call(nvml, "nvmlDeviceGetMemoryInfo_v2", device, ctypes.byref(memory))
    major, minor = ctypes.c_int(), ctypes.c_int()
    _call(
        nvml,
        "nvmlDeviceGetCudaComputeCapability",
        device,
        ctypes.byref(major),
        ctypes.byref(minor),
    )
    return Target(
        name=name.value.decode("utf-8", "replace"),
        kind="cuda",
        label_gb=round(memory.total / 1e9, 1),
        usable_gib=round(memory.free / GIB, 2),
        bandwidth_gbs=_bandwidth(nvml, device),
        capability=f"{major.value}.{minor.value}",
    )


def _first_visible(nvml: Any) -> ctypes.c_void_p | None:
    """Return the first GPU that CUDA_VISIBLE_DEVICES leaves; None where it leaves none."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    device = ctypes.c_void_p()
    if chosen.startswith(("GPU-", "MIG-")):
        uuid = ctypes.c_char_p(chosen.encode())
        _call(nvml, "nvmlDeviceGetHandleByUUID", uuid, ctypes.byref(device))
        return device
    count = ctypes.c_uint()
    _call(nvml, "nvmlDeviceGetCount_v2", ctypes.byref(count))
    if not chosen.isdigit() or int(chosen) >= count.value:
        return None
    index = ctypes.c_uint(int(chosen))
    _call(nvml, "nvmlDeviceGetHandleByIndex_v2", index, ctypes.byref(device))
    return device


def _bandwidth(nvml: Any, device: ctypes.c_void_p) -> float | None:
    """Return the memory's peak in 10^9 bytes per second, from its clock and width."""
    width, megahertz = ctypes.c_uint(), ctypes.c_uint()
    memory_clock = ctypes.c_int(2)
    try:
        _call(nvml, "nvmlDeviceGetMemoryBusWidth", device, ctypes.byref(width))
        _call(nvml, "nvmlDeviceGetMaxClockInfo", device, memory_clock, ctypes.byref(megahertz))
    except (AttributeError, _NvmlError):
        return None
    # Two transfers per clock: GDDR and HBM alike, at the clock that the driver reports.
    return round(2 * megahertz.value * 1e6 * width.value / 8 / 1e9) or None


# Apple and plain CPUs.


def _apple() -> Target | None:
    if (sys.platform, platform.machine()) != ("darwin", "arm64"):
        return None
    memory = _physical_bytes()
    return Target(
        name="apple",
        kind="mps",
        label_gb=round(memory / 1e9, 1) if memory else None,
        usable_gib=round(memory * UNIFIED_MEMORY_SHARE / GIB, 2) if memory else None,
    )


def _cpu(root: Path = Path("/")) -> Target:
    """Describe the CPU with the memory that this process may still take; `root` is for tests."""
    physical = _physical_bytes()
    groups = list(_control_groups(root))
    totals = [physical, *(limit for limit, _ in groups)]
    available = [_available_bytes(root) or physical, *(left for _, left in groups)]
    total = min((value for value in totals if value), default=None)
    usable = min((value for value in available if value), default=None)
    return Target(
        name="cpu",
        kind="cpu",
        label_gb=round(total / 1e9, 1) if total else None,
        usable_gib=round(usable / GIB, 2) if usable else None,
    )


def _control_groups(root: Path) -> Iterator[tuple[int, int]]:
    """Yield limit and what is left of it, in bytes, for each control group around this process."""
    with suppress(OSError, ValueError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "":
                base, names = root / "sys/fs/cgroup", ("memory.max", "memory.current")
            elif "memory" in controllers.split(","):
                base = root / "sys/fs/cgroup/memory"
                names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
            else:
                continue
            folder = base / path.lstrip("/")
            # Inside a container the path may not exist; its own group is then the top one.
            for group in (folder, *folder.parents):
                if group.is_relative_to(base):
                    yield from _limit(group, *names)


def _limit(group: Path, limit_file: str, used_file: str) -> Iterator[tuple[int, int]]:
    with suppress(OSError, ValueError):
        limit = int((group / limit_file).read_text())
        used = int((group / used_file).read_text())
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        # Cached files count as used, but are given back under pressure.
        cached = statistics.get("total_inactive_file", statistics.get("inactive_file", 0))
        yield limit, max(limit - used + int(cached), 1)


def _available_bytes(root: Path) -> int | None:
    """Return what the kernel could give to a new program; None where it does not say."""
    with suppress(OSError):
        text = (root / "proc/meminfo").read_text()
        if found := re.search(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE):
            return int(found[1]) * 1024
    return None


def _physical_bytes() -> int | None:
    with suppress(AttributeError, OSError, ValueError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(KeyError, OSError):
        return _windows_bytes()
    return None


def _windows_bytes() -> int | None:
    kilobytes = ctypes.c_ulonglong()
    windows: Any = vars(ctypes)["windll"]
    if not windows.kernel32.GetPhysicallyInstalledSystemMemory(ctypes.byref(kilobytes)):
        return None
    return kilobytes.value * 1024
