"""Facts of a model survive JAX's caches: jitted layers and scan bodies that live in a module.

JAX runs the Python of such a function once and uses its trace from then on. So each mark is tested
where it stands in a function that was traced before: by another program of the same step, by the
same step again, by a step with another policy or strategy, and outside of any step.
"""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.ad_checkpoint import checkpoint_name

import shardkit as sk
from shardkit._core.tracing import TraceContext, equations, record_fact, recorded_facts
from shardkit.nn._constrain import constrain_gradient
from shardkit.nn._manual_axis_rules import ManualAxisRules, use_manual_axis_rules
from shardkit.nn._overridable import Override, overridable, shard_mapped
from shardkit.nn._remat import defer_remat, parse_policy, use_policy
from shardkit.planner._trace import TracedModel
from shardkit.report import count_flops

S = sk.strategies
LAYERS, ROWS, LENGTH, WIDTH, HEADS = 2, 8, 8, 8, 2
BATCH = {
    name: np.random.default_rng(seed).standard_normal((ROWS, LENGTH, WIDTH), np.float32)
    for seed, name in enumerate("xy")
}
DIMS = ("batch", "length", "embed")


def init(key):
    def one(seed, *names, sizes):
        shape = tuple(sizes[name] for name in names)
        return sk.WithAxes(jax.random.normal(jax.random.fold_in(key, seed), shape) / 3, names)

    sizes = {"layers": LAYERS, "embed": WIDTH, "mlp": 2 * WIDTH, "experts": 4}
    return {
        "up": one(0, "layers", "embed", "mlp", sizes=sizes),
        "down": one(1, "layers", "mlp", "embed", sizes=sizes),
        "expert": one(2, "layers", "experts", "embed", "mlp", sizes=sizes),
    }


def mlp(w, x):
    h = sk.nn.constrain(x, *DIMS, into=("mlp",)) @ w["up"]
    return x + sk.nn.constrain(jnp.tanh(h) @ w["down"], *DIMS, partial=("mlp",))


def attention(w, x):
    q, k = jnp.split((mlp(w, x) @ w["up"]).reshape(*x.shape[:2], 2 * HEADS, -1), 2, 2)
    return x + sk.nn.attention(q, k, k).reshape(x.shape)


def experts(w, x):
    choice, share = sk.nn.route(x @ w["up"][:, :4], 2)
    own = {"up": w["expert"], "down": w["expert"].swapaxes(1, 2)}
    return x + sk.nn.experts(
        x, choice, share, own, lambda w, h, dot: dot(dot(h, w["up"]), w["down"])
    )


def weight(w, x):
    up, down = sk.nn.use_param(w["up"], "embed", "mlp"), sk.nn.use_param(w["down"], "mlp", "embed")
    return mlp({"up": up, "down": down}, x)


def turned(w, x):
    part = defer_remat(lambda x: jnp.tanh(x @ w["up"]) @ w["down"], "mix")
    return x + jnp.sin(checkpoint_name(part(jnp.cos(x)), "mix"))


def gradient(w, x):
    return mlp(w, constrain_gradient(x, DIMS))


def reductions(w, x):
    h = sk.nn.constrain(x, *DIMS, into=("mlp",)) @ w["up"]
    start = sk.nn.shard_offset("mlp", h.shape[-1])
    place = (start + jnp.arange(h.shape[-1])) / 10
    top = sk.nn.pmax(jax.lax.stop_gradient(h).max(-1), "mlp")
    share = sk.nn.psum((jnp.exp(h - top[..., None]) * place).sum(-1), "mlp")
    return x * share[..., None] / 10


def own_region(w, x):
    return x + overridable("square", lambda x: x**2)(mlp(w, x)) / 10


def own_part(w, x):
    return shard_mapped(jnp.tanh, (DIMS,), DIMS)(mlp(w, x))


@dataclasses.dataclass(frozen=True)
class Squared(Override):
    """Computes a square as a product."""

    def __call__(self, around, plain, x):
        return sk.nn.constrain(x * x, *DIMS)


LAYER = {
    "constrain": mlp,
    "attention": attention,
    "experts": experts,
    "weight": weight,
    "in_turn": turned,
    "constrain_gradient": gradient,
    "reductions": reductions,
    "region": own_region,
    "on_own_part": own_part,
    "remat": lambda w, x: sk.nn.remat(functools.partial(mlp, w))(x),
    "remat_in_turn": lambda w, x: sk.nn.remat(functools.partial(turned, w))(x),
}
JITTED = {mark: jax.jit(layer) for mark, layer in LAYER.items()}
BODY = {mark: lambda x, w, layer=layer: (layer(w, x), None) for mark, layer in LAYER.items()}
MARKED = {mark: sk.nn.remat(body, scanned=True) for mark, body in BODY.items()}


def jitted(mark, params, x):
    for number in range(LAYERS):
        x = JITTED[mark](jax.tree.map(lambda w, n=number: w[n], params), x)
    return x


def scanned(mark, params, x):
    return jax.lax.scan(BODY[mark], x, params)[0]


def rematted(mark, params, x):
    return jax.lax.scan(MARKED[mark], x, params)[0]


FORMS = {"jit": jitted, "scan": scanned, "remat": rematted}


def last(ends, x, batch):
    return jnp.mean((x - batch["y"]) ** 2)


def staged_layer(w, x, batch, key):
    return JITTED["constrain"](w, x)


@jax.jit
def staged(params, batch):
    return sk.nn.layer_stack(
        lambda ends, batch, key: batch["x"], staged_layer, last, {}, params, batch
    )


def loss_of(mark, form):
    if mark == "staged":
        return lambda params, batch, key: staged(params, batch)
    forward = functools.partial(FORMS[form], mark)
    return lambda params, batch, key: last({}, forward(params, batch["x"]), batch)


SQUARE = dataclasses.replace(S.data() | S.tensor(), overrides=(("square", Squared("data")),))
KEPT = S.fsdp(reshard_after_forward=False, min_size=1)
MESH = {"data": 2, "tensor": 2}
# Mark, mode, strategy, sizes of the mesh.
MARKS = {
    "constrain": ("constrain", "auto", S.data() | S.tensor(), MESH),
    "attention": ("attention", "auto", S.context(), {"context": 2}),
    "all_to_all": ("attention", "auto", S.context(attention="all_to_all"), {"context": 2}),
    "experts": ("experts", "auto", S.expert(), {"expert": 2}),
    "staged": ("staged", "auto", S.pipeline(micro_batches=2), {"pipe": 2}),
    "weight": ("weight", "auto", KEPT, {"fsdp": 2}),
    "in_turn": ("in_turn", "auto", S.data(), {"data": 2}),
    "constrain_gradient": ("constrain_gradient", "auto", S.data() | S.tensor(), MESH),
    "reductions": ("reductions", "auto", S.data() | S.tensor(), MESH),
    "region": ("region", "auto", SQUARE, MESH),
    "on_own_part": ("on_own_part", "auto", S.data() | S.tensor(), MESH),
    "remat": ("remat", "auto", S.data(), {"data": 2}),
    "remat_in_turn": ("remat_in_turn", "auto", S.data(), {"data": 2}),
    "constrain on shards": ("constrain", "shard_map", S.data() | S.tensor(), MESH),
    "weight on shards": ("weight", "shard_map", S.fsdp(min_size=1), {"fsdp": 2}),
    "kept on shards": ("weight", "shard_map", KEPT, {"fsdp": 2}),
    "reductions on shards": ("reductions", "shard_map", S.data() | S.tensor(), MESH),
    "remat on shards": ("remat", "shard_map", S.data() | S.tensor(), MESH),
    "in_turn on shards": ("remat_in_turn", "shard_map", S.data(), {"data": 2}),
}
FORMS_OF_ONE = [(form, remat) for form in ("jit", "scan") for remat in ("none", "full")]
FORMS_OF_ONE += [("remat", "save:mix"), ("remat", "full")]
# The others take as long as they are many, and find no more.
CALLED = "attention staged weight reductions remat constrain".split()
CALLED += ["in_turn on shards", "constrain on shards", "reductions on shards"]
QUICK = {(name, "jit", "none") for name in CALLED}
QUICK |= {
    ("experts", "scan", "none"),
    ("weight", "scan", "full"),
    ("remat on shards", "scan", "full"),
}


def all_cases():
    for row, (name, (mark, *_)) in enumerate(MARKS.items()):
        for column, (form, remat) in enumerate(FORMS_OF_ONE):
            slow = [] if (name, form, remat) in QUICK else [pytest.mark.slow]
            if slow and (row + column) % 5:
                slow.append(pytest.mark.exhaustive)
            whole = mark == "staged" and form != "jit"  # is no layer, and cannot be scanned over
            twice = mark.startswith("remat") and form == "remat"
            if not whole and not twice:
                yield pytest.param(name, form, remat, marks=slow)


def compiled(name, form, remat, loss=None):
    mark, mode, strategy, sizes = MARKS[name]
    return sk.compile_step(
        loss or loss_of(mark, form),
        optax.sgd(0.1),
        init=init,
        batch=BATCH,
        mesh=sk.MeshSpec(**sizes).build(devices=jax.devices()[: np.prod(list(sizes.values()))]),
        strategy=dataclasses.replace(strategy, remat=remat),
        mode=mode,
    )


def counted(step):
    flops = step.report().flops
    return flops.model, flops.recompute


@pytest.mark.parametrize(("name", "form", "remat"), [*all_cases()])
def test_a_function_that_jax_traced_before_keeps_every_fact(name, form, remat):
    first = compiled(name, form, remat)
    again = first.replace(strategy=first.strategy)
    assert counted(first) == counted(again)
    state = first.init(jax.random.key(0))
    found, grads = again.gradients(state, BATCH)
    loss = loss_of(MARKS[name][0], form)
    want, want_grads = jax.value_and_grad(loss)(jax.device_get(state.params), BATCH, None)
    for metrics in (found, again.evaluate(state, BATCH), first(state, BATCH)[1]):
        np.testing.assert_allclose(metrics["loss"], want, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(want_grads), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_remat_recomputes_each_marked_layer_once_in_every_step():
    whole, layers = (compiled("constrain", form, "full") for form in ("scan", "remat"))
    plain = compiled("constrain", "remat", "none")
    assert counted(plain)[1] == 0
    assert 0 < counted(layers)[1] <= counted(whole)[1]
    assert counted(layers.replace(strategy=layers.strategy)) == counted(layers)
    assert counted(plain.replace(strategy=layers.strategy)) == counted(layers)


@pytest.mark.slow
def test_a_jitted_model_is_verified():
    sizes = sk.MeshSpec(**MARKS["attention"][3])
    step = functools.partial(compiled, "attention", "jit", "full")
    sk.verify(lambda mesh: step().replace(mesh=mesh), [sizes], batches=[BATCH], steps=1).check()


@pytest.mark.parametrize(
    ("mark", "kind", "facts"),
    [
        ("attention", "attention", ((LENGTH, HEADS, HEADS),)),
        ("experts", "experts", ((4, False),)),
        ("staged", "layers", (LAYERS,)),
    ],
)
def test_a_plan_sees_the_marks_of_a_model_that_was_traced_before(mark, kind, facts):
    declared = compiled("constrain", "jit", "none").spec
    model = TracedModel.of(dataclasses.replace(declared, loss_fn=loss_of(mark, "jit")))
    for _ in range(2):
        assert getattr(model.regions(), kind) == facts
    assert not any("shardkit_record" in op.name for op in model.program("full", True).ops)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_a_region_that_a_jitted_model_lacks_is_still_an_error(remat):
    strategy = dataclasses.replace(S.context(), remat=remat)
    step = compiled("constrain", "jit", remat)
    mesh = sk.MeshSpec(context=2).build(devices=jax.devices()[:2])
    for _ in range(2):
        with pytest.raises(sk.errors.StepError, match=r"needs `sk.nn.attention`, but"):
            step.replace(strategy=strategy, mesh=mesh)


def test_a_callers_function_is_not_traced_again_after_other_policies_and_strategies():
    traces = []

    @jax.jit
    def own(w, x):
        traces.append(x)
        return sk.nn.remat(functools.partial(attention, w))(x)

    w = {name: np.asarray(x.value)[0] for name, x in init(jax.random.key(0)).items()}
    before = own(w, BATCH["x"])
    for name, policy_name in [("constrain", "none"), ("attention", "full"), ("weight", "dots")]:
        compiled(name, "remat", policy_name)
    assert np.array_equal(before, own(w, BATCH["x"]))
    assert len(traces) == 1


def test_marks_outside_of_a_step_are_plain_functions_also_after_a_step():
    w = {name: x.value[0] for name, x in init(jax.random.key(0)).items()}
    for mark, layer in JITTED.items():
        np.testing.assert_allclose(layer(w, BATCH["x"]), LAYER[mark](w, BATCH["x"]), atol=1e-5)
        assert "shardkit_record" not in str(jax.make_jaxpr(layer)(w, BATCH["x"]))


def test_the_source_drops_no_cache_and_makes_one_user_context():
    texts = [path.read_text() for path in pathlib.Path(sk.__file__).parent.rglob("*.py")]
    assert not any("clear_caches" in text for text in texts)
    assert sum(text.count("jax.make_user_context(") for text in texts) == 1


# What a trace depends on.


def test_a_context_is_part_of_the_key_of_traces_and_leaves_nothing_behind():
    context, other, traces = TraceContext[str]("one"), TraceContext[str]("other"), []

    @jax.jit
    def read(x):
        traces.append((context.value, other.value))
        return x + len(context.value or "")

    def body(x, _):
        return read(x), None

    def loop():
        return jax.lax.scan(body, 0.0, None, length=2)[0]

    assert (read(0.0), loop()) == (0, 0)
    with context.use("ab"):
        assert (read(0.0), loop()) == (2, 4)
        with other.use("c"), context.use("abc"):
            assert (read(0.0), loop()) == (3, 6)
        with pytest.raises(KeyError), context.use("x"):
            raise KeyError
        assert context.value == "ab"
        with context.use(None):
            assert (read(0.0), loop()) == (0, 0)
    with context.use("a" + "b"):
        assert read(0.0) == 2
    assert context.value is None
    assert (read(0.0), loop()) == (0, 0)
    assert traces == [(None, None), ("ab", None), ("abc", "c")]


@pytest.mark.slow
def test_equal_declarations_share_traces():
    traces = []

    @jax.jit
    def own(params, x):
        traces.append(x)
        return jitted("attention", params, x)

    for _ in range(2):
        compiled("attention", "jit", "save:mix", loss=lambda p, b, k: own(p, b["x"]).mean())
    # Under the policy alone, which says that no layer is marked, and in the step.
    assert len(traces) == 2


def test_meanings_of_names_on_one_mesh_do_not_share_traces():
    mesh = sk.MeshSpec(data=2, tensor=2).build(devices=jax.devices()[:4])
    sums = jax.jit(lambda x: sk.nn.psum(x, "mlp"))

    def over(*axes):
        def run(x):
            with use_manual_axis_rules(ManualAxisRules((("mlp", axes),))):
                return sums(x)

        specs = jax.sharding.PartitionSpec(axes)
        # Without types of what varies, arrays of both meanings are of one type.
        shards = {"mesh": mesh, "in_specs": specs, "out_specs": jax.sharding.PartitionSpec()}
        return jax.shard_map(run, check_vma=False, **shards)(np.arange(4.0, dtype=np.float32))

    assert over("data").tolist() == [2, 4]
    assert over("tensor").tolist() == [2, 4]
    assert over("data", "tensor").tolist() == [6]


# What is recorded in a program.


@jax.custom_vjp
def custom(x):
    return noted(x)


custom.defvjp(lambda x: (noted(x), None), lambda _, g: (g,))


@jax.jit
def noted(x):
    return record_fact({"sin": jnp.sin(x), "count": 3}, "noted", "sine", 1)["sin"]


def loop_of(x):
    return jax.lax.while_loop(lambda x: x[0] < 0, noted, x)


MESH_OF_2 = functools.cache(lambda: sk.MeshSpec(data=2).build(devices=jax.devices()[:2]))
INSIDE = {
    "jit": noted,
    "scan": lambda x: jax.lax.scan(lambda x, _: (noted(x), None), x, None, length=2)[0],
    "cond": lambda x: jax.lax.cond(x[0] > 0, noted, jnp.cos, x),
    "while": loop_of,
    "checkpoint": jax.checkpoint(noted),
    "custom_vjp": custom,
    "vmap": jax.vmap(noted),
    "grad": jax.grad(lambda x: noted(x).sum()),
    "grad of checkpoint": jax.grad(lambda x: jax.checkpoint(noted)(x).sum()),
    "grad of scan": jax.grad(lambda x: INSIDE["scan"](x).sum()),
    "shard_map": lambda x: jax.shard_map(
        noted,
        mesh=MESH_OF_2(),
        in_specs=jax.sharding.PartitionSpec("data"),
        out_specs=jax.sharding.PartitionSpec("data"),
    )(x),
}


@pytest.mark.parametrize("inside", INSIDE)
def test_a_fact_is_found_wherever_it_is_recorded(inside):
    x = np.ones(4, np.float32)
    for _ in range(2):
        jaxpr = jax.make_jaxpr(INSIDE[inside])(x).jaxpr
        assert recorded_facts(jaxpr, "noted") == (("sine", 1),)
        assert recorded_facts(jaxpr, "other") == ()
    assert np.isfinite(jax.jit(INSIDE[inside])(x)).all()


def test_the_layers_of_a_policy_are_told_from_other_checkpoints():
    named = parse_policy("save:mix")
    w = {name: x.value[0] for name, x in init(jax.random.key(0)).items()}

    def policies(layer):
        with use_policy(named):
            jaxpr = jax.make_jaxpr(layer)(w, BATCH["x"]).jaxpr
        return [eqn.params["policy"] for eqn in equations(jaxpr) if "policy" in eqn.params]

    assert policies(JITTED["remat"]) == [named]
    inner = policies(JITTED["in_turn"])
    assert len(inner) == 1
    assert inner[0] != named
    assert policies(JITTED["remat_in_turn"]) == [named, *inner]
    assert count_flops(jax.make_jaxpr(JITTED["remat"])(w, BATCH["x"])).recompute == 0
