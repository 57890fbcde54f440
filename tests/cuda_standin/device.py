"""The device itself: `device.cpp`, built once for a torch and loaded before torch is."""

import ctypes
import hashlib
import importlib.util
import os
import subprocess
import sys
import sysconfig
from importlib.metadata import version
from pathlib import Path

NAME = "cuda_standin_device"
SOURCE = Path(__file__).with_name("device.cpp")
LIBRARIES = ("c10", "torch", "torch_cpu", "torch_python")


def load():
    """torch looks for a device while it is imported."""
    if "torch" in sys.modules:
        raise ImportError("cuda_standin must be imported before torch")
    torch = Path(importlib.util.find_spec("torch").submodule_search_locations[0])
    if (torch / "lib" / "libtorch_cuda.so").exists():
        raise ImportError(f"{torch} is a build with CUDA; the stand-in takes the place of one without")
    built = build(torch)
    for library in (torch / "lib" / "libtorch_global_deps.so", torch / "lib" / "libtorch_python.so", built):
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    sys.path.insert(0, str(built.parent))


def module():
    return importlib.import_module(NAME)


def build(torch):
    """The shared library, half a minute the first time."""
    key = hashlib.sha256(f"{version('torch')} {sys.version}".encode() + SOURCE.read_bytes()).hexdigest()[:16]
    folder = Path(__file__).resolve().parents[2] / "outputs" / "cuda_standin" / key
    built = folder / f"{NAME}.so"
    if not built.exists():
        folder.mkdir(parents=True, exist_ok=True)
        made = folder / f"{NAME}.{os.getpid()}.tmp"
        headers = [torch / "include", torch / "include/torch/csrc/api/include", sysconfig.get_paths()["include"]]
        command = ["g++", "-O1", "-std=c++20", "-shared", "-fPIC", "-w", f"-DTORCH_EXTENSION_NAME={NAME}", str(SOURCE)]
        command += [f"-I{path}" for path in headers] + ["-o", str(made)]
        command += [f"-L{torch / 'lib'}", *(f"-l{name}" for name in LIBRARIES)]
        subprocess.run(command, check=True)
        made.rename(built)  # as a whole: test workers build side by side
    return built
