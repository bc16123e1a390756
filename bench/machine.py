"""What a result depends on besides the flags: versions, and the class of machine. No host names, no paths."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
from pathlib import Path

import torch

from bench.torch_internals import multiplies_bf16_pairs

PACKAGES = ("torch", "triton", "transformers", "peft", "accelerate", "numpy")


def versions() -> dict[str, str]:
    """Installed versions of the packages that take part, "absent" where there is none."""
    found = {"python": platform.python_version(), "adaptc": _adaptc_version()}
    for name in PACKAGES:
        found[name] = _installed(name)
    found["torch"] = torch.__version__
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def _installed(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def _adaptc_version() -> str:
    try:
        import adaptc
    except ImportError:
        return "absent"
    return str(getattr(adaptc, "__version__", None) or _installed("adaptc"))


def results_folder(device: torch.device) -> Path:
    """Where results go by default: a folder for each kind of GPU, and for each family of CPUs with the instructions
    that torch uses of it. Two families with the same instructions may differ by a factor of two."""
    results = Path(__file__).parent / "results"
    if device.type != "cpu":
        kind = torch.get_device_module(device).get_device_name(device)
        return results / _folder_name(kind)
    capability = torch.backends.cpu.get_cpu_capability()
    parts = ["cpu", *_cpu_family(), capability, *(["bf16"] if multiplies_bf16_pairs() else [])]
    return results / _folder_name(" ".join(parts))


def _folder_name(text: str) -> str:
    return text.lower().replace(" ", "-")


def _cpu_family() -> list[str]:
    """Vendor and family, where the system tells them."""
    fields = _cpu_fields()
    if "cpu family" not in fields:
        return []
    vendor = fields.get("vendor_id", "")
    return [VENDORS.get(vendor, vendor), f"family {fields['cpu family']}"]


#: What processors call their vendors.
VENDORS = {"AuthenticAMD": "AMD", "GenuineIntel": "Intel"}


ALLOCATOR_METHOD = (
    "glibc's malloc keeps what is freed, for every contender (other allocators as they are): by default it gives the "
    "top of its memory back to the system whenever enough of it is free, and who has to fault it in again depends on "
    "the order of the contenders"
)


def keep_freed_memory() -> None:
    """Have malloc give nothing back to the system from now on: ``ALLOCATOR_METHOD``."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_MMAP_THRESHOLD, _MOST_IN_HEAP)


#: Parameters of glibc's ``mallopt``, and the largest block that it can be told not to take from the system by itself.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MOST_IN_HEAP = -1, -3, 32 << 20


def machine_class(device: torch.device) -> dict[str, object]:
    """Processor family, cores and memory that this process may use, and the GPU when it computes on one."""
    found: dict[str, object] = {
        "system": platform.system(),
        "architecture": platform.machine(),
        "cpu": _cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(_memory_bytes() / 2**30),
        "threads": torch.get_num_threads(),
        "mkl": bool(torch.backends.mkl.is_available()),  # type: ignore[no-untyped-call]
        "onednn": bool(torch.backends.mkldnn.is_available()),  # type: ignore[no-untyped-call]
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        found["gpu"] = gpu.name
        found["gpu_memory_gib"] = round(gpu.total_memory / 2**30)
    return found


def _cpu_model() -> str:
    """Vendor, family and model as the kernel tells them; on systems without /proc, what Python knows."""
    fields = _cpu_fields()
    parts = [fields.get("vendor_id", ""), fields.get("model name", "")]
    if "cpu family" in fields:
        parts.append(f"family {fields['cpu family']} model {fields.get('model', '?')}")
    return ", ".join(part for part in parts if part) or platform.processor() or platform.machine()


def _cpu_fields() -> dict[str, str]:
    """What the kernel tells of the first processor; nothing on systems without /proc."""
    listing = Path("/proc/cpuinfo")
    fields: dict[str, str] = {}
    for line in listing.read_text().splitlines() if listing.exists() else []:
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    return fields


def _memory_bytes() -> int:
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return 0
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
