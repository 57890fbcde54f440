"""Kernels of decode steps as a compiler for GPUs takes them: no GPU is needed for that."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed: it comes with torch for CUDA, or by make test-kernels")

SHARED_BYTES = {80: 166_912, 90: 232_448}  # of a block, at most: A100, H100 and H200
SPILT_BYTES = 256  # of a thread, at most: a loop that does not fit spills thousands
QWEN3 = [(16, 8, 128), (32, 8, 128), (64, 8, 128)]  # 1.7B, 8B and 32B: heads of queries, of keys, their size

COMPILE = """
import json, re, subprocess, sys, tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from parsedec.static import fused, kernels

ALIGNED = {"row_stride", "value_stride", "head_stride", "mask_stride", "columns", "width"}


def compiled(kernel, capability, kinds, constants, **options):
    names = kernel.arg_names
    signature = {name: kinds.get(name, "constexpr") for name in names}
    aligned = [i for i, name in enumerate(names) if signature[name].startswith("*") or name in ALIGNED]
    source = ASTSource(
        fn=kernel, signature=signature, constexprs={(names.index(k),): v for k, v in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned})
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def local(made):
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return sum(int(n) for n in re.findall(r"(?:STACK|LOCAL):([0-9]+)", said))


found = []
heads, shared, size = json.loads(sys.argv[1])
for capability in (80, 90):
    for kind, tiles in (("bf16", (16, 32, 64)), ("fp16", (64,)), ("fp32", (16,))):
        states = dict(q="*" + kind, states="*" + kind, value_stride="i32", head_stride="i32")
        made = {"placed": compiled(
            kernels.placed, capability,
            states | dict(product="*" + kind, slots="*i64", cos="*" + kind, sin="*" + kind, row_stride="i32",
                          q_weight="*" + kind, k_weight="*" + kind),
            dict(EPSILON=1e-6, HEADS=heads, SHARED=shared, SIZE=size, NORMED=True, SLOTS=True), num_warps=1),
            "normed": compiled(
                kernels.normed, capability,
                dict(x="*" + kind, more="*" + kind, weight="*" + kind, whole="*" + kind, y="*" + kind),
                dict(EPSILON=1e-6, SIZE=5120, WIDTH=8192, ADDS=True), num_warps=8),
            "gated": compiled(
                kernels.gated, capability, dict(product="*" + kind, y="*" + kind),
                dict(SIZE=25_600, WIDTH=fused.WIDTH))}
        for tile in tiles:
            made[f"seen {tile}"] = compiled(
                kernels.seen, capability,
                states | dict(mask="*" + kind, out="*fp32", weight="*fp32", rows="i32", columns="i32", width="i32",
                              mask_stride="i32"),
                dict(SCALE=0.1, HEADS=heads, GROUP=heads // shared, SIZE=size, TILE=tile, COLUMNS=fused.COLUMNS,
                     EXACT=kind == "fp32"), num_stages=2)
        made["together"] = compiled(
            kernels.together, capability,
            dict(out="*fp32", weight="*fp32", whole="*" + kind, pieces="i32", heads="i32"), dict(SIZE=size, PIECES=16))
        made["probed"] = compiled(
            kernels.probed, capability,
            dict(q="*" + kind, k="*" + kind, v="*" + kind, text="*" + kind, text_weight="*fp32", out="*" + kind,
                 row_stride="i32", head_stride="i32", weight_row_stride="i32", weight_head_stride="i32"),
            dict(SCALE=0.1, HEADS=heads, GROUP=heads // shared, SIZE=size, SUFFIX=24, TILE=tiles[-1], COLUMNS=32,
                 EXACT=kind == "fp32"))
        found += [(capability, kind, name, one.metadata.shared, local(one)) for name, one in made.items()]
print(json.dumps(found))
"""


@pytest.mark.parametrize("heads", QWEN3, ids=str)
def test_they_compile_for_gpus_and_fit(heads):
    """Registers that do not suffice end up in memory, which is what the kernels are there to spare."""
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, json.dumps(heads)],
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2] / "parse"), os.environ.get("PYTHONPATH", "")])},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    assert len(found) == 2 * (8 + 6 + 6)
    for capability, kind, name, shared, spilt in found:
        assert shared <= SHARED_BYTES[capability], (capability, kind, name, shared)
        assert spilt <= SPILT_BYTES, (capability, kind, name, spilt)
