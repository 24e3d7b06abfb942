"""The reader of HLO text: trips, groups, scopes, and every trap that once lost bytes."""

import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardkit.report import read_ledger
from shardkit.report.hlo._groups import read_groups, read_pairs, span_of_groups, span_of_pairs
from shardkit.report.hlo._hlo import parse, parse_shapes
from shardkit.report.hlo._readers import nearest_maker
from shardkit.report.hlo._scope import phase_of, scope_of
from shardkit.report.hlo._trips import TripCounts

DATA = pathlib.Path(__file__).parent / "data"

HEAD = "HloModule m, is_scheduled=true, num_partitions=4\n\n"
ADD = """%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %s = f32[] add(%a, %b)
}

"""


def test_instructions_that_span_lines_end_nothing():
    text = (
        HEAD
        + ADD
        + """ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0:T(128)} parameter(0)
  %kernel = (f32[8]{0:T(128)}, f32[2,8]{1,0:T(2,128)(2,1)S(1)}) custom-call(%x), """
        + """custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
  "block": {"q": 512
}}, metadata={op_name="jit(f)/kernel"}}, backend_config={"body":"a } b \\" = c(
}
"}
  %y = f32[8]{0} get-tuple-element(%kernel), index=0
  ROOT %r = f32[8]{0} all-reduce(%y), replica_groups={{0,1},{2,3}}, to_apply=%add
}
"""
    )
    module = parse(text)
    assert module.problems == ()
    assert list(module.computations["main"].instructions) == ["x", "kernel", "y", "r"]
    assert [str(s) for s in module.computations["main"].instructions["kernel"].shapes] == [
        "f32[8]",
        "f32[2,8]",
    ]


def test_operands_with_and_without_their_types_are_the_same():
    for operand in ("%x", "f32[8]{0:T(8,128)(2,1)} %x", "/*index=0*/%x"):
        text = f"ENTRY %e (x: f32[8]) -> f32[8] {{\n  ROOT %r = f32[8]{{0}} copy({operand})\n}}\n"
        assert parse(text).computations["e"].root.operands == ("x",)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("ENTRY %e () -> f32[] {\n  ROOT %c = f32[] constant(1)\n", "ends inside computation e"),
        ("ENTRY %e () -> f32[] {\n  ROOT %c = f32[] const", "computation e: cannot read"),
        ("ENTRY %e () -> f32[] {\n  %c = f32[2]{0} all-reduce(%a,", "ends inside '%c ="),
        ("%e () -> f32[] {\n  ROOT %c = f32[] constant(1)\n}\n", "no ENTRY"),
        ("ENTRY %e () -> f32[] {\n  what is this\n}\n", "cannot read 'what is this'"),
    ],
)
def test_text_that_cannot_be_read_is_reported(text, problem):
    assert any(problem in found for found in parse(text).problems)


def test_sizes_of_odd_dtypes():
    shapes = parse_shapes("(s4[3], pred[5], f8e4m3fn[4], c64[2], f32[<=8], u32[])")
    assert [shape.nbytes for shape in shapes] == [2, 5, 4, 16, 32, 4]


@st.composite
def _meshes(draw):
    sizes = draw(st.lists(st.sampled_from([1, 2, 3, 4]), min_size=1, max_size=4))
    names = [f"a{i}" for i in range(len(sizes))]
    chosen = draw(st.lists(st.sampled_from(names), unique=True))
    return list(zip(names, sizes, strict=True)), sorted(chosen)


@given(_meshes())
def test_three_forms_of_groups_agree(case):
    mesh, chosen = case
    sizes = [size for _, size in mesh]
    inside = [i for i, (name, _) in enumerate(mesh) if name in chosen]
    outside = [i for i in range(len(mesh)) if i not in inside]
    group = math.prod(sizes[i] for i in inside)
    order = [*outside, *inside]
    grid = np.arange(math.prod(sizes)).reshape(sizes).transpose(order).reshape(-1, group)
    forms = [
        "{" + ",".join("{" + ",".join(map(str, row)) + "}" for row in grid) + "}",
        f"[{len(grid)},{group}]<=[{','.join(map(str, sizes))}]T({','.join(map(str, order))})",
        "mesh["
        + ",".join(f"'{n}'={s}" for n, s in mesh)
        + "] {"
        + ",".join(f"'{n}'" for n in chosen)
        + "}",
    ]
    expected = tuple(name for name, size in mesh if name in chosen and size > 1)
    for form in forms:
        groups = read_groups(form, math.prod(sizes))
        assert [g.tolist() for g in groups] == grid.tolist()
        assert span_of_groups(groups, mesh).axes == expected
        assert span_of_groups(groups, mesh).size == group
        assert span_of_groups(groups, mesh).full_axes


MESH = [("data", 2), ("tensor", 4)]


def test_groups_of_part_of_an_axis_are_not_whole():
    for form in ("{{0,1},{2,3},{4,5},{6,7}}", "mesh['x'=2,'y'=4] {'y':(2)2}"):
        span = span_of_groups(read_groups(form, 8), MESH)
        assert (span.axes, span.size, span.full_axes) == (("tensor",), 2, False)
    # Four devices that are no product of axes: a diagonal.
    assert not span_of_groups([np.array([0, 5]), np.array([1, 4])], MESH).full_axes


def test_meshes_with_their_own_device_order():
    swapped = "mesh['x'=4,'y'=2], device_ids=([2,4]T(1,0)) {'y'}"
    assert span_of_groups(read_groups(swapped, 8), MESH).axes == ("data",)
    listed = "mesh['x'=2,'y'=2], device_ids=(0,2,1,3) {'y'}"
    assert [g.tolist() for g in read_groups(listed, 4)] == [[0, 2], [1, 3]]
    assert read_groups("{}", 4)[0].tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="unknown form: 'sparse"):
        read_groups("sparse<0,1>", 2)
    with pytest.raises(ValueError, match="device 9 is outside of mesh"):
        span_of_groups([np.array([0, 9])], MESH)


def test_permutations_move_along_axes():
    ring = read_pairs("{{0,1},{1,2},{2,3},{3,0},{4,5},{5,6},{6,7},{7,4}}")
    assert span_of_pairs(ring, MESH).axes == ("tensor",)
    assert span_of_pairs(read_pairs("{{0,4},{4,0}}"), MESH).axes == ("data",)
    assert span_of_pairs(read_pairs("{{0,0},{1,1}}"), MESH).axes == ()


@pytest.mark.parametrize("step", [1, 2, -1])
@pytest.mark.parametrize("fused", [False, True])
def test_trips_without_known_trip_count(step, fused):
    start, bound, direction = (0, 7, "LT") if step > 0 else (7, 0, "GT")
    compare = f"compare(%i.c, %n), direction={direction}"
    condition = f"  ROOT %lt = pred[] {compare}\n"
    inner = ""
    if fused:
        inner = f"%less (i.c: s32[], n: s32[]) -> pred[] {{\n  %i.c = s32[] parameter(0)\n  %n = s32[] parameter(1)\n  ROOT %lt = pred[] {compare}\n}}\n"  # noqa: E501
        condition = "  ROOT %f = pred[] fusion(%i.c, %n), kind=kLoop, calls=%less\n"
    text = f"""{inner}
%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {{
  %p = (s32[], f32[4]{{0}}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[4]{{0}} get-tuple-element(%p), index=1
  %one = s32[] constant({step})
  %k = s32[] copy(%i)
  %next = s32[] add(%one, %k)
  ROOT %t = (s32[], f32[4]{{0}}) tuple(%next, %x)
}}
%cond (p.c: (s32[], f32[4])) -> pred[] {{
  %p.c = (s32[], f32[4]{{0}}) parameter(0)
  %i.c = s32[] get-tuple-element(%p.c), index=0
  %n = s32[] constant({bound})
{condition}}}
ENTRY %main (x: f32[4]) -> (s32[], f32[4]) {{
  %x = f32[4]{{0}} parameter(0)
  %zero = s32[] constant({start})
  %init = (s32[], f32[4]{{0}}) tuple(%zero, %x)
  ROOT %w = (s32[], f32[4]{{0}}) while(%init), condition=%cond, body=%body
}}
"""
    trips = -(-7 // abs(step))
    assert TripCounts(parse(text)).trips("main", "w") == trips
    assert (
        TripCounts(parse(text.replace("add(%one, %k)", "multiply(%one, %k)"))).trips("main", "w")
        is None
    )
    assert (
        TripCounts(parse(text.replace(f"constant({start})", "parameter(1)"))).trips("main", "w")
        is None
    )


def test_derived_trips_equal_the_printed_ones():
    """Loops whose printed count is taken away are derived to the same count."""

    def inner(c, x):
        return jax.lax.fori_loop(0, 5, lambda i, c: jnp.sin(c) * x + i, c), None

    def nested(x, xs):
        return jax.lax.scan(lambda c, x: (jax.lax.scan(inner, c, xs)[0] + x, None), x, xs)[0]

    text = jax.jit(jax.grad(nested)).lower(1.0, jnp.ones(6)).compile().as_text()
    module, blind = parse(text), parse(text.replace("known_trip_count", "secret"))
    loops = [
        (computation.name, instruction.name)
        for computation in module.computations.values()
        for instruction in computation.instructions.values()
        if instruction.opcode == "while"
    ]
    assert len(loops) >= 4
    counts = [TripCounts(module).trips(*loop) for loop in loops]
    assert set(counts) == {5, 6}
    assert [TripCounts(blind).trips(*loop) for loop in loops] == counts


BODY = "while/body/closed_call"


@pytest.mark.parametrize(
    ("op_name", "phase", "scope"),
    [
        (f"jit(f)/jvp(loss)/{BODY}/attention/bld,dhk->blhk/dot_general", "forward", "attention"),
        (f"jit(f)/transpose(jvp(loss))/{BODY}/checkpoint/mlp/jit(silu)/mul", "backward", "mlp"),
        (f"jit(f)/transpose(jvp(loss))/{BODY}/rematted_computation/mlp/dot", "recompute", "mlp"),
        ("jit(f)/transpose(jvp(Decoder))/layers/up/dot_general", "backward", "Decoder/layers/up"),
        ("jit(f)/vmap(jvp(loss))/mlp/dot_general", "forward", "mlp"),
        ("jit(f)/jvp()/add;jit(step)/jvp()/mul", "forward", ""),
        ("jit(f)/update/mul", "update", ""),
        ("", "other", ""),
    ],
)
def test_phase_and_scope(op_name, phase, scope):
    assert (phase_of(op_name), scope_of(op_name)) == (phase, scope)


def damaged(rest, mesh=(("a", 2),), header="HloModule m, num_partitions=2\n"):
    text = f"{header}ENTRY %main (x: f32[4]) -> f32[4] {{\n  %x = f32[4]{{0}} parameter(0)\n{rest}"
    return read_ledger(text, mesh).problems


@pytest.mark.parametrize(
    ("rest", "problem"),
    [
        ("  ROOT %y = ", "cannot read 'ROOT %y ='"),
        ("  ROOT %y = f32[4] collective-permute(%x), channel_id=1\n}\n", "source_target_pairs"),
        ("  ROOT %y = f32[4] all-to-all(%x), replica_groups={{0,1},{}}\n}\n", "an empty group"),
        ("  ROOT %y = f32[4] all-scatter(%x), channel_id=1\n}\n", "an unknown kind of collective"),
        (
            '  ROOT %y = f32[4] custom-call(%x), custom_call_target="__nccl_all_reduce"\n}\n',
            "custom-call y: an unknown kind of collective",
        ),
        (
            "  %z = foo[64] bitcast(%x)\n"
            "  ROOT %y = foo[64] all-reduce(%z), replica_groups={{0,1}}, channel_id=1\n}\n",
            "foo[64] has an unknown element type",
        ),
    ],
)
def test_what_cannot_be_read_is_a_problem_and_no_crash(rest, problem):
    assert any(problem in one for one in damaged(rest))


def test_a_program_for_another_mesh_or_without_its_first_line_is_told():
    whole = "  ROOT %y = f32[4] all-reduce(%x), replica_groups={}, channel_id=1\n}\n"
    assert not damaged(whole)
    assert damaged(whole, mesh=(("a", 4),)) == ("the program is for 2 devices, the mesh has 4",)
    assert "the text has no HloModule line" in damaged(whole, header="")


def test_each_array_of_a_combined_collective_has_its_own_maker():
    text = """HloModule combined

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

ENTRY %main (p: f32[4], q: f32[8]) -> f32[8] {
  %p = f32[4] parameter(0)
  %q = f32[8] parameter(1)
  %a = f32[4] negate(%p), metadata={op_name="first"}
  %b = f32[8] negate(%q), metadata={op_name="second"}
  %both = (f32[4], f32[8]) all-reduce(%a, %b), to_apply=%add, metadata={op_name="first;second"}
  %one = f32[8] get-tuple-element(%both), index=1
  ROOT %copy = f32[8] copy(%one)
}
"""
    module = parse(text)
    here = module.computations[module.entry]

    def tell(instruction, _):
        return None if instruction.opcode == "get-tuple-element" else instruction.op_name or None

    assert nearest_maker(module, here, "copy", tell) == "second"
