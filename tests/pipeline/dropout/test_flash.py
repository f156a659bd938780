"""The fused attention kernel without a GPU: interpreted, cross-compiled, refused."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from pipeline.dropout.kernels import flash

needs_triton = pytest.mark.skipif(
    find_spec("triton") is None, reason="Triton is not installed: pip install -e '.[test]'"
)
INTERPRETED = Path(__file__).with_name("interpreted_flash.py")
WORDS = ("keys", "row_ids", "positions", "thresholds", "key_positions")
REALS = ("softmax", "dot", "scales")
VALUES = ("q", "k", "v", "mask", "out", "gradient", "to_q", "to_k", "to_v")
CONSTANTS = {"HAS_MASK": True, "Q": 64, "K": 64, "D": 64, "E": 64}


@needs_triton
@pytest.mark.timeout(300)
@pytest.mark.parametrize("cases", ["not drill", pytest.param("drill", marks=pytest.mark.drill)])
def test_the_interpreted_kernel_gives_plain_attention(cases):
    command = [sys.executable, "-m", "pytest", str(INTERPRETED), "-p", "no:cacheprovider"]
    command += ["-m", cases]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout


@needs_triton
@pytest.mark.parametrize(
    ("kernel", "dtype"),
    [
        ("forward", "bf16"),
        ("backward_keys", "bf16"),
        *(
            pytest.param(kernel, dtype, marks=pytest.mark.drill)
            for kernel, dtype in (
                ("forward", "fp16"),
                ("forward", "fp32"),
                ("backward_queries", "bf16"),
                ("backward_queries", "fp32"),
                ("backward_keys", "fp32"),
            )
        ),
    ],
)
def test_the_kernel_compiles_for_an_h100_and_fits_its_registers(
    kernel, dtype, tmp_path, monkeypatch
):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from pipeline.dropout.kernels import flash_triton

    function = getattr(flash_triton, kernel)
    half = 2 if dtype == "fp32" else 1
    constants = CONSTANTS | {"Q": 64 // half, "K": 64 // half}
    types = dict.fromkeys(WORDS, "*i64") | dict.fromkeys(REALS, "*fp32")
    types |= dict.fromkeys(VALUES, f"*{dtype}") | dict.fromkeys(constants, "constexpr")
    types["scaling"] = "fp32"
    signature = {name: types.get(name, "i32") for name in function.arg_names}
    compiled = triton.compile(
        ASTSource(function, signature, constants), target=GPUTarget("cuda", 90, 32)
    )
    assert compiled.asm["cubin"]
    assert "mul.hi.u32" in compiled.asm["ptx"]
    assert compiled.metadata.shared <= 227 * 1024


def test_what_the_kernel_cannot_take_is_left_to_others():
    q = torch.ones(1, 2, 3, 8)
    assert flash.serves(q, q, None)
    assert flash.serves(q, q, torch.zeros(1, 1, 3, 3))
    assert not flash.serves(q.double(), q.double(), None)
    assert not flash.serves(torch.ones(1, 2, 3, 512), q, None)
    assert not flash.serves(q, q, torch.zeros(1, 1, 3, 3, requires_grad=True))
    assert not flash.serves(q, q, torch.ones(1, 1, 3, 3, dtype=torch.bool))
