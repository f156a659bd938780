"""The kernel for GPUs, without one: interpreted, cross-compiled, chosen or refused."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from pipeline.dropout import kernels
from pipeline.dropout.kernels import gpu, reference

needs_triton = pytest.mark.skipif(
    find_spec("triton") is None, reason="Triton is not installed: pip install -e '.[test]'"
)
INTERPRETED = Path(__file__).with_name("interpreted_kernels.py")
POINTERS = ("x", "y", "keys", "row_ids", "positions", "thresholds", "scales", "key_positions")
CONSTANTS = ("LANES", "ROWS", "BLOCKS")


@needs_triton
@pytest.mark.timeout(300)
@pytest.mark.parametrize("cases", ["not drill", pytest.param("drill", marks=pytest.mark.drill)])
def test_the_interpreted_kernel_draws_the_bits_of_the_others(cases):
    command = [sys.executable, "-m", "pytest", str(INTERPRETED), "-p", "no:cacheprovider"]
    command += ["-m", cases]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout


def cross_compiled(dtype: str, lanes: str, rows: int, blocks: int) -> str:
    """PTX for an H100, as far as ptxas accepts it too."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from pipeline.dropout.kernels import masks_triton

    types = {"x": dtype, "y": dtype, "scales": "fp32"}
    names = masks_triton.masked.arg_names
    signature = dict.fromkeys(names, "i32") | dict.fromkeys(CONSTANTS, "constexpr")
    signature |= {name: f"*{types.get(name, 'i64')}" for name in POINTERS}
    constants = dict(zip(CONSTANTS, (getattr(masks_triton, lanes), rows, blocks), strict=True))
    wide = {*POINTERS, "x_0", "x_1", "x_2", "y_0", "y_1", "y_2", "columns"}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in wide}
    source = ASTSource(masks_triton.masked, signature, constants, aligned)
    options = {"num_warps": rows * blocks // 32}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert compiled.asm["cubin"]
    return compiled.asm["ptx"]


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@needs_triton
@pytest.mark.parametrize(
    ("lanes", "rows", "blocks"),
    [("FEATURES", 4, 32), ("GROUPS", 1, 128), ("KEY_POSITIONS", 8, 16)],
)
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_a_thread_draws_one_counter_and_moves_16_bytes_at_a_time(dtype, lanes, rows, blocks):
    ptx = cross_compiled(dtype, lanes, rows, blocks)
    assert len(re.findall(r"mul\.hi\.u32", ptx)) <= 20  # two a round of Philox
    assert len(re.findall(r"(ld|st)\.global\.v4\.b32", ptx)) >= 2
    assert ".ftz" not in ptx  # small numbers are no zeros
    rounding = {"bf16": "cvt.rn.bf16.f32", "fp16": "cvt.rn.f16.f32", "fp32": "mul.f32"}
    assert rounding[dtype] in ptx


@needs_triton
def test_features_in_16_bits_need_no_shared_memory():
    assert not re.findall(r"(ld|st)\.shared|bar\.sync", cross_compiled("bf16", "FEATURES", 1, 128))


@needs_triton
def test_odd_groups_compile_too():
    assert "mul.hi.u32" in cross_compiled("bf16", "ODD_GROUPS", 1, 128)


@pytest.mark.parametrize(
    ("rows", "columns", "expected"),
    [(128, 768, (4, 32)), (128, 1024, (1, 128)), (1, 8, (1, 1)), (128, 128, (8, 16)),
     (64, 30522, (4, 32)), (3, 100, (4, 16))],
)  # fmt: skip
def test_tiles_fit_the_rows(rows, columns, expected):
    in_rows, blocks = gpu.tile_shape(rows, columns)
    assert (in_rows, blocks) == expected


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_the_reference_serves_with_one_warning():
    gpu.kernel.cache_clear()
    with pytest.warns(UserWarning, match="The Triton dropout kernel is not used on cuda:0"):
        assert kernels.active("cuda:0") is reference
    assert kernels.active_kernel("cuda:0") == "numpy"


def test_a_kernel_that_draws_other_masks_is_refused(monkeypatch):
    gpu.kernel.cache_clear()
    monkeypatch.setattr(gpu, "TritonMasks", object)
    monkeypatch.setattr(gpu, "self_test", lambda kernel, device: "it draws other masks")
    with pytest.warns(UserWarning, match="it draws other masks"):
        assert gpu.kernel(torch.device("cuda:0")) is None
    gpu.kernel.cache_clear()


def test_the_reference_can_be_asked_for_on_every_device(monkeypatch):
    gpu.kernel.cache_clear()
    monkeypatch.setenv("MASKLOCK_KERNEL", "numpy")
    assert kernels.active("cuda:0") is reference
    gpu.kernel.cache_clear()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_gpu_draws_the_bits_of_the_cpu(dtype):
    x = torch.randn(3, 4, 777).to(dtype)
    row = (torch.tensor(7**20), torch.arange(3)[:, None], torch.arange(4))
    row = (*row, torch.tensor(9999), torch.tensor(1.18))
    on_gpu = kernels.rows(x.cuda(), *(t.cuda() for t in row))
    assert kernels.active_kernel("cuda:0") == "triton"
    assert torch.equal(on_gpu.cpu(), kernels.rows(x, *row))
