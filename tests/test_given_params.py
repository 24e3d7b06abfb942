"""Pretrained parameters in the first state, and in every copy that the optimizer keeps of them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from optax import contrib
from rich.console import Console

import shardkit as sk

RNG = np.random.default_rng(0)
BATCH = {"x": RNG.normal(size=(16, 8)).astype(np.float32)}
GIVEN = {"up": {"w": RNG.normal(size=(8, 8)).astype(np.float32)}, "b": RNG.normal(size=8)}


def init(key):
    return {"up": {"w": jax.random.normal(key, (8, 8))}, "b": jnp.zeros(8)}


def loss_fn(params, batch, key):
    return jnp.mean((batch["x"] @ params["up"]["w"] + params["b"]) ** 2)


def compiled(optimizer):
    strategy = sk.Strategy(params=sk.shard_largest("fsdp", min_size=1), batch=P("fsdp"))
    mesh = sk.MeshSpec(fsdp=8).build()
    return sk.compile_step(loss_fn, optimizer, init=init, batch=BATCH, mesh=mesh, strategy=strategy)


def run_by_hand(optimizer, params, steps):
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    opt_state = optimizer.init(params)
    for _ in range(steps):
        gradients = jax.grad(loss_fn)(params, BATCH, None)
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        params = optax.apply_updates(params, updates)
    return params, opt_state


def average_of_params(decay):
    """The moving average of the parameters, as a transformation that changes no update."""

    def update(updates, average, params):
        average = jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, average, params)
        return updates, average

    return optax.GradientTransformation(lambda params: params, update)


COPIES = {
    "schedule_free": contrib.schedule_free(optax.sgd(0.1), 0.1),
    "average": optax.chain(optax.sgd(0.1), average_of_params(0.9)),
}


@pytest.fixture(
    scope="module", params=["schedule_free", pytest.param("average", marks=pytest.mark.slow)]
)
def optimizer_and_step(request):
    return COPIES[request.param], compiled(COPIES[request.param])


def test_copies_in_the_optimizer_start_from_them(optimizer_and_step):
    optimizer, step = optimizer_and_step
    state = step.init(jax.random.key(0), params=GIVEN)
    assert state.params["up"]["w"].addressable_shards[0].data.shape == (1, 8)
    for steps in (0, 2):
        expected = run_by_hand(optimizer, GIVEN, steps)
        for ours, theirs in zip(
            jax.tree.leaves((state.params, state.opt_state)),
            jax.tree.leaves(expected),
            strict=True,
        ):
            np.testing.assert_allclose(ours, theirs, atol=1e-5)
        for _ in range(2):
            state, _ = step(state, BATCH)


def test_arrays_of_the_user_stay(optimizer_and_step):
    _, step = optimizer_and_step
    placed = step.init(jax.random.key(0)).params
    on_one_device = jax.device_put(GIVEN["b"].astype(np.float32), jax.devices()[3])
    state = step.init(jax.random.key(0), params={"up": placed["up"], "b": on_one_device})
    step(state, BATCH)
    assert not placed["up"]["w"].is_deleted()
    assert not on_one_device.is_deleted()


def test_everything_that_does_not_fit_is_refused_together(optimizer_and_step):
    _, step = optimizer_and_step
    given = {"up": {"w": GIVEN["up"]["w"][:4], "extra": np.ones(2)}}
    with pytest.raises(sk.errors.StateError) as raised:
        step.init(jax.random.key(0), params=given)
    text = str(raised.value)
    assert "params/b f32[8]  is missing" in text
    assert "params/up/extra  is not part of this step's params" in text
    assert "params/up/w      is f32[4,8]; the step has f32[8,8]" in text
    assert "given['b'] = step.init(key).params['b']" in text
    with pytest.raises(sk.errors.StateError, match=r"is i32\[8\]; the step has f32\[8\]"):
        step.init(jax.random.key(0), params={**GIVEN, "b": np.ones(8, np.int32)})


def test_a_run_starts_from_them(tmp_path, optimizer_and_step):
    optimizer, step = optimizer_and_step
    config = sk.TrainConfig(steps=2, checkpoint_every=0)
    trainer = sk.Trainer(step, lambda i: BATCH, tmp_path / "run", config=config, params=GIVEN)
    params, _ = run_by_hand(optimizer, GIVEN, 2)
    np.testing.assert_allclose(trainer.run().params["up"]["w"], params["up"]["w"], atol=1e-5)


def test_given_parameters_are_not_drawn_too():
    step = compiled(optax.adam(0.1))
    functions = step._variants.declared
    whole, beside = (
        program.compiled.memory_analysis().output_size_in_bytes
        for program in (functions.init, functions.init_beside)
    )
    per_device = sum(
        x.addressable_shards[0].data.nbytes
        for x in jax.tree.leaves(step.init(jax.random.key(0)).params)
    )
    assert whole - beside >= per_device == 36
    drawn, given = (step.init(jax.random.key(0), params=p) for p in (None, GIVEN))
    assert jax.random.key_data(drawn.key).tolist() == jax.random.key_data(given.key).tolist()


def test_a_run_reads_its_weights_once_it_is_compiled_and_only_if_it_is_new(tmp_path):
    step, asked = compiled(optax.sgd(0.1)), []

    def read(compiled_step):
        asked.append(compiled_step)
        return GIVEN

    def trainer(steps, **options):
        config = sk.TrainConfig(steps=steps, checkpoint_every=1, check="off")
        options = {"load_params": read, "config": config, "console": Console(quiet=True)} | options
        return sk.Trainer(step, lambda i: BATCH, tmp_path / "run", **options)

    trainer(1).run()
    assert asked == [step]
    want, _ = run_by_hand(optax.sgd(0.1), GIVEN, 2)
    state = trainer(2, config=sk.TrainConfig(steps=2, resume=str(tmp_path / "run"))).run()
    assert asked == [step]  # the second one resumes
    np.testing.assert_allclose(state.params["up"]["w"], want["up"]["w"], rtol=1e-5)
    with pytest.raises(sk.errors.ConfigError, match="are given, and load_params= too"):
        trainer(1, params=GIVEN)
