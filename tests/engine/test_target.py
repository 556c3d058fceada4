"""Targets: the shipped files, what `auto` becomes, and detection on machines that are not here."""

from __future__ import annotations

import ctypes
import math
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

import engine.target
from engine.errors import RecipeError
from engine.target import GIB, Target, detect, resolve

TARGETS = Path(__file__).parents[2] / "recipes" / "target"
FILES = sorted(TARGETS.glob("*.yaml"))
NAMES = [path.stem for path in FILES]


def load(name: str) -> Target:
    values = OmegaConf.load(TARGETS / f"{name}.yaml")
    merged = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Target), values))
    assert isinstance(merged, Target)
    return merged


def test_all_targets_are_there() -> None:
    assert set(NAMES) == {
        *("auto", "cpu", "t4", "l4", "a10", "a10g", "l40s", "rtx3090", "rtx4090", "rtx5090"),
        *("a100-40gb", "a100-80gb", "h100", "h100-pcie", "h200", "b200"),
        *("apple-m1", "apple-m1-max", "apple-m2-ultra", "apple-m3-max", "apple-m4-max"),
    }


@pytest.mark.parametrize("name", NAMES)
def test_file_merges_into_a_target_and_says_what_it_is(name: str) -> None:
    assert (TARGETS / f"{name}.yaml").read_text("utf-8").startswith("# ")
    assert load(name).name == name


@pytest.mark.parametrize("name", [name for name in NAMES if name != "auto"])
def test_figures_have_a_source_and_a_date(name: str) -> None:
    target = load(name)
    assert target.source
    assert target.checked == "2026-11-22"
    assert resolve(target).name == name


@pytest.mark.parametrize("name", [name for name in NAMES if load(name).kind == "cuda"])
def test_gpu_figures_are_dense_and_plausible(name: str) -> None:
    target = load(name)
    assert target.usable_gib is not None
    assert target.label_gb is not None
    assert 0.85 < target.usable_gib * GIB / (target.label_gb * 1e9) < 1.08
    # GeForce halves 16-bit products summed in float32; sparse figures would double the ratio again.
    ratio = 4 if name.startswith("rtx") else 2
    wide = target.tflops.get("bfloat16", target.tflops["float16"])
    assert math.isclose(target.tflops["int8"], ratio * wide, rel_tol=0.05)
    assert ("bfloat16" in target.tflops) == ("target.bfloat16" in target.traits)


def test_traits_follow_kind_and_capability() -> None:
    assert load("t4").traits == {"target.cuda"}
    assert load("a10").traits == {"target.cuda", "target.bfloat16"}
    assert load("b200").traits == {"target.cuda", "target.bfloat16", "target.fp8"}
    assert load("l4").traits == load("h100").traits == load("b200").traits
    assert load("cpu").traits == {"target.cpu", "target.bfloat16"}
    assert load("apple-m1").traits == {"target.mps", "target.bfloat16"}


def test_usable_bytes() -> None:
    assert load("a10").usable_bytes == int(22.6 * GIB)
    assert Target().usable_bytes is None


def test_a_named_target_is_taken_as_written() -> None:
    target = load("h100")
    resolved = resolve(target)
    assert resolved == target
    resolved.tflops["int8"] = 1
    assert target.tflops["int8"] == 1979


def test_auto_is_this_machine_with_overrides_on_top(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.target, "detect", lambda: Target(name="x", kind="cpu", label_gb=8))
    assert resolve(load("auto")) == Target(name="x", kind="cpu", label_gb=8)
    assert resolve(Target(usable_gib=10)).usable_gib == 10


def test_cpu_gets_the_memory_of_this_machine() -> None:
    resolved = resolve(load("cpu"))
    assert (resolved.kind, resolved.bandwidth_gbs) == ("cpu", 90)
    assert resolved.usable_gib is not None
    assert resolve(Target(kind="cpu", usable_gib=3)).usable_gib == 3


def test_all_impossible_fields_are_named_together() -> None:
    bad = Target(kind="cud", usable_gib=-1, bandwidth_gbs=0, capability="9", tflops={"int8": -2})
    with pytest.raises(RecipeError) as refusal:
        resolve(bad)
    text = str(refusal.value)
    assert len(refusal.value.problems) == 5
    assert "target.kind is 'cud'" in text
    assert "did you mean target.kind=cuda?" in text
    assert "target.usable_gib must be above 0, not -1" in text
    assert "target.tflops.int8 must be above 0, not -2" in text
    assert "target.capability must look like 8.9, not '9'" in text


def test_figures_of_no_machine_and_names_that_mean_nothing_are_refused() -> None:
    made = Target(
        kind="cuda", usable_gib=float("inf"), launch_us=1e-320, tflops={"fp4": 1.0},
        efficiency={"bandwith": 0.5},
    )  # fmt: skip
    with pytest.raises(RecipeError) as caught:
        resolve(made)
    text = str(caught.value)
    assert "target.usable_gib is inf, as of no machine" in text
    assert "target.launch_us is 9.99989e-321, as of no machine" in text
    assert "target.tflops.fp4: rates are told of float32" in text
    assert "did you mean target.efficiency.bandwidth" in text


def test_this_machine_is_described() -> None:
    found = detect()
    assert found.kind in ("cuda", "cpu", "mps")
    assert found.source == "detected on this machine"
    assert found.usable_gib is not None
    assert found.usable_gib > 0
    assert resolve(found) == found


def test_detecting_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from engine.target import detect; detect();"
        "print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


class FakeNvml:
    """Two GPUs, as NVML would tell; `broken` functions answer with an error code."""

    names = ("NVIDIA A100", "NVIDIA T4")

    def __init__(self, *broken: str) -> None:
        self.broken = broken
        self.closed = False

    def __getattr__(self, function: str) -> Callable[..., int]:
        def call(*arguments: Any) -> int:
            if function in self.broken:
                return 999
            return int(getattr(self, f"fake_{function}")(*arguments) or 0)

        return call

    def fake_nvmlInit_v2(self) -> None: ...

    def fake_nvmlShutdown(self) -> None:
        self.closed = True

    def fake_nvmlDeviceGetCount_v2(self, count: Any) -> None:
        count._obj.value = len(self.names)

    def fake_nvmlDeviceGetHandleByIndex_v2(self, index: Any, device: Any) -> None:
        device._obj.value = 100 + index.value

    def fake_nvmlDeviceGetHandleByUUID(self, uuid: Any, device: Any) -> int:
        device._obj.value = 101
        return 0 if uuid.value == b"GPU-cafe" else 6

    def fake_nvmlDeviceGetName(self, device: Any, name: Any, length: Any) -> None:
        name.value = self.names[device.value - 100].encode()

    def fake_nvmlDeviceGetMemoryInfo_v2(self, device: Any, memory: Any) -> int:
        memory._obj.total = 42 * 10**9
        memory._obj.free = 39 * GIB
        return 0 if memory._obj.version == 0x02000028 else 25

    def fake_nvmlDeviceGetCudaComputeCapability(self, device: Any, major: Any, minor: Any) -> None:
        major._obj.value, minor._obj.value = (8, 0) if device.value == 100 else (7, 5)

    def fake_nvmlDeviceGetMemoryBusWidth(self, device: Any, width: Any) -> None:
        width._obj.value = 5120

    def fake_nvmlDeviceGetMaxClockInfo(self, device: Any, kind: Any, megahertz: Any) -> int:
        megahertz._obj.value = 1215
        return 0 if kind.value == 2 else 2


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeNvml]:
    def install(*broken: str, visible: str | None = None) -> FakeNvml:
        nvml = FakeNvml(*broken)
        monkeypatch.setattr(engine.target, "_load_nvml", lambda: nvml)
        if visible is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        return nvml

    return install


def test_first_gpu_is_described(gpus: Callable[..., FakeNvml]) -> None:
    nvml = gpus()
    found = detect()
    assert (found.name, found.kind, found.capability) == ("NVIDIA A100", "cuda", "8.0")
    assert (found.label_gb, found.usable_gib, found.bandwidth_gbs) == (42.0, 39.0, 1555)
    assert nvml.closed


@pytest.mark.parametrize(
    ("visible", "name"),
    [
        ("0", "NVIDIA A100"),
        ("1", "NVIDIA T4"),
        (" 1,0", "NVIDIA T4"),
        ("GPU-cafe", "NVIDIA T4"),
        ("", "cpu"),
        ("-1", "cpu"),
        ("2", "cpu"),
        ("NoDevFiles", "cpu"),
        ("GPU-gone", "cpu"),
    ],
)
def test_hidden_gpus_are_not_used(
    gpus: Callable[..., FakeNvml], monkeypatch: pytest.MonkeyPatch, visible: str, name: str
) -> None:
    gpus(visible=visible)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    assert detect().name == name


@pytest.mark.parametrize(
    "function",
    ["nvmlInit_v2", "nvmlDeviceGetCount_v2", "nvmlDeviceGetName", "nvmlDeviceGetMemoryInfo_v2"],
)
def test_a_broken_driver_counts_as_no_gpu(
    gpus: Callable[..., FakeNvml], monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    gpus(function)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    assert detect().kind == "cpu"


def test_unknown_bandwidth_is_no_failure(gpus: Callable[..., FakeNvml]) -> None:
    gpus("nvmlDeviceGetMemoryBusWidth")
    found = detect()
    assert (found.kind, found.bandwidth_gbs) == ("cuda", None)


def test_an_absent_or_older_driver_counts_as_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> None:
        raise OSError("libnvidia-ml.so.1: cannot open shared object file")

    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    for driver in (absent, lambda: ctypes.pythonapi):
        monkeypatch.setattr(engine.target, "_load_nvml", driver)
        assert detect().kind == "cpu"


def test_apple_silicon_shares_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    pages = {"SC_PHYS_PAGES": 2**20, "SC_PAGE_SIZE": 2**14}
    monkeypatch.setattr(engine.target, "_nvidia", lambda: None)
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    monkeypatch.setattr(os, "sysconf", lambda name: pages[name])
    found = detect()
    assert (found.name, found.kind, found.usable_gib) == ("apple", "mps", 11.2)


def write(root: Path, **files: str) -> Path:
    for name, text in files.items():
        path = root / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of 64 GiB, 60 of them free."""
    monkeypatch.setattr(engine.target, "_physical_bytes", lambda: 64 * GIB)
    return write(tmp_path, proc__meminfo=f"MemTotal: 1 kB\nMemAvailable:   {60 * 2**20} kB\n")


def test_free_memory_without_control_groups(machine: Path) -> None:
    found = engine.target._cpu(machine)
    assert (found.usable_gib, found.label_gb) == (60, 68.7)


def test_limit_of_a_control_group_version_2(machine: Path) -> None:
    write(
        machine,
        proc__self__cgroup="0::/jobs/mine\n",
        sys__fs__cgroup__jobs__memory_dot_max=f"{8 * GIB}\n",
        sys__fs__cgroup__jobs__memory_dot_current=f"{3 * GIB}\n",
        sys__fs__cgroup__jobs__memory_dot_stat=f"anon 5\ninactive_file {GIB}\n",
        sys__fs__cgroup__jobs__mine__memory_dot_max="max\n",
        sys__fs__cgroup__jobs__mine__memory_dot_current=f"{2 * GIB}\n",
        sys__fs__cgroup__jobs__mine__memory_dot_stat="inactive_file 0\n",
    )
    found = engine.target._cpu(machine)
    assert (found.usable_gib, found.label_gb) == (6, 8.6)


def test_limit_of_a_control_group_version_1(machine: Path) -> None:
    write(
        machine,
        proc__self__cgroup="5:devices:/\n4:memory:/pod\n0::/\n",
        sys__fs__cgroup__memory__memory_dot_limit_in_bytes="9223372036854771712\n",
        sys__fs__cgroup__memory__memory_dot_usage_in_bytes="5\n",
        sys__fs__cgroup__memory__memory_dot_stat="total_inactive_file 0\n",
        sys__fs__cgroup__memory__pod__memory_dot_limit_in_bytes=f"{4 * GIB}\n",
        sys__fs__cgroup__memory__pod__memory_dot_usage_in_bytes=f"{3 * GIB}\n",
        sys__fs__cgroup__memory__pod__memory_dot_stat=f"total_inactive_file {GIB}\n",
    )
    assert engine.target._cpu(machine).usable_gib == 2


def test_own_group_of_a_container_is_the_top_one(machine: Path) -> None:
    write(
        machine,
        proc__self__cgroup="0::/docker/not-here\n",
        sys__fs__cgroup__memory_dot_max=f"{4 * GIB}\n",
        sys__fs__cgroup__memory_dot_current="0\n",
        sys__fs__cgroup__memory_dot_stat="inactive_file 0\n",
    )
    assert engine.target._cpu(machine).usable_gib == 4


def test_unreadable_limits_are_ignored(machine: Path) -> None:
    write(machine, proc__self__cgroup="nonsense\n0::/\n", sys__fs__cgroup__memory_dot_max="?")
    assert engine.target._cpu(machine).usable_gib == 60


def test_a_machine_that_tells_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.target, "_physical_bytes", lambda: None)
    found = engine.target._cpu(tmp_path)
    assert (found.kind, found.usable_gib, found.label_gb) == ("cpu", None, None)
