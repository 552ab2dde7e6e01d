"""What is counted in a program for a GPU, by its text, and that a step's program gets so far without one."""

import jax
import jax.numpy as jnp
import pytest

from experiments.benchmarks import gpu_programs, h100, kernels
from experiments.benchmarks.workloads import PLAIN, RULES, Workload
from experiments.models.networks import MLP

# As XLA writes it: fused computations, a loop of known length, a branch, a convolution's three calls, a cuBLAS call.
TEXT = """HloModule jit_step, is_scheduled=true

%fused_dot (a: f32[4,8], b: f32[8,2]) -> f32[4,2] {
  %a = f32[4,8]{1,0} parameter(0)
  %b = f32[8,2]{1,0} parameter(1)
  ROOT %dot.1 = f32[4,2]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%body (s: (s32[], f32[4])) -> (s32[], f32[4]) {
  %s = (s32[], f32[4]{0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %x = f32[4]{0} get-tuple-element(%s), index=1
  %y = f32[4]{0} fusion(%x), kind=kLoop, calls=%fused_add
  ROOT %t = (s32[], f32[4]{0}) tuple(%i, %y)
}

%fused_add (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  ROOT %add.1 = f32[4]{0} add(%p, %p)
}

ENTRY %main (x: f32[4,8], w: f32[8,2], h: f32[2,6,6,3], k: f32[5,3,3,3], v: f32[4]) -> (f32[4,2], f32[4]) {
  %x = f32[4,8]{1,0} parameter(0), metadata={op_name="a(b)"}
  %w = f32[8,2]{1,0} parameter(1)
  %h = f32[2,6,6,3]{3,2,1,0} parameter(2)
  %k = f32[5,3,3,3]{3,2,1,0} parameter(3)
  %v = f32[4]{0} parameter(4)
  %dot = f32[4,2]{1,0} fusion(%x, %w), kind=kCustom, calls=%fused_dot, metadata={op_name="jit(step)/dot_general"}
  %gemm = (f32[4,2]{1,0}, s8[64]{0}) custom-call(%x, %w), custom_call_target="__cublas$gemm", \
backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}
  %conv = (f32[2,6,6,5]{3,2,1,0}, u8[0]{0}) custom-call(%h, %k), window={size=3x3 pad=1_1x1_1}, \
dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convForward"
  %y = f32[2,6,6,5]{3,2,1,0} get-tuple-element(%conv), index=0
  %back = (f32[2,6,6,3]{3,2,1,0}, u8[0]{0}) custom-call(%y, %k), window={size=3x3 pad=1_1x1_1}, \
dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convBackwardInput"
  %filter = (f32[5,3,3,3]{3,2,1,0}, u8[0]{0}) custom-call(%h, %y), window={size=3x3 pad=1_1x1_1}, \
dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convBackwardFilter"
  %init = (s32[], f32[4]{0}) tuple(%zero, %v)
  %loop = (s32[], f32[4]{0}) while(%init), condition=%cond, body=%body, \
backend_config={"known_trip_count":{"n":"7"}}
  %last = f32[4]{0} get-tuple-element(%loop), index=1
  ROOT %out = (f32[4,2]{1,0}, f32[4]{0}) tuple(%dot, %last)
}
"""
DOT, CONV = 2 * 4 * 8 * 2, 2 * (2 * 6 * 6 * 5) * (3 * 3 * 3)


def test_kernels_products_operations_and_bytes_are_those_of_the_text():
    found = kernels.counted(TEXT)
    assert found.kernels == 5 + 7
    assert found.products == 5
    assert found.flops == 2 * DOT + 3 * CONV
    h, k, y = 2 * 6 * 6 * 3, 5 * 3 * 3 * 3, 2 * 6 * 6 * 5
    dots = 2 * 4 * (4 * 8 + 8 * 2 + 4 * 2)  # without the room that cuBLAS works in
    assert found.moved == dots + 3 * 4 * (h + k + y) + 7 * 2 * 4 * 4


def test_a_name_makes_no_product_and_a_loop_of_unknown_length_is_refused():
    named = TEXT.replace('op_name="jit(step)/dot_general"', 'op_name="jit(matmul)/gemm"').replace(
        "dot(%a, %b)", "add(%a)"
    )
    assert kernels.counted(named).products == 4
    with pytest.raises(ValueError, match="A loop of unknown length"):
        kernels.counted(TEXT.replace("known_trip_count", "unknown"))


def test_a_compiled_product_has_the_operations_of_its_shapes():
    text = jax.jit(lambda x, w: jnp.tanh(x) @ w).lower(jnp.ones((8, 16)), jnp.ones((16, 4))).compile().as_text()
    assert kernels.counted(text).flops == 2 * 8 * 16 * 4


def test_a_step_is_counted_on_a_device_that_it_never_runs_on():
    workload = Workload(lambda rngs: MLP((4, 4, 1), 10, (32,), rngs=rngs), (4, 4, 1), batch=8)
    found = {rule: gpu_programs.count(workload, RULES[rule], jax.devices()[0]) for rule in (PLAIN, "FA", "DFA")}
    forward = 2 * 8 * (16 * 32 + 32 * 10)
    assert found[PLAIN]["flops"] == found["FA"]["flops"] == 2 * forward + 2 * 8 * 32 * 10
    assert found["FA"]["given"] - found[PLAIN]["given"] >= 4 * 32 * 10
    study = gpu_programs.report({"tiny": found})
    assert [row[0] for row in study.tables[0].rows] == ["", PLAIN, "FA", "DFA"]
    assert study.tables[0].rows[1][5] == "1.00"


def test_without_a_compiler_for_a_gpu_one_is_told_what_to_install(monkeypatch):
    def missing(**_):
        raise NotImplementedError("topology not implemented for cuda")

    monkeypatch.setattr(h100.topologies, "get_topology_desc", missing)
    with pytest.raises(ValueError, match=r"pip install '.\[cuda\]', and on a machine without a GPU set JAX_PLATFORMS"):
        h100.device()
