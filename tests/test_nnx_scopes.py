"""Parts of an nnx model have the scopes of their attributes; its classes stay the user's."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import shardkit as sk
from shardkit.report import count_flops


class Plain(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(4, 8, rngs=rngs)
        self.down = nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, x):
        return self.down(self.up(x))


class Block(Plain):
    def __call__(self, x):
        return x + super().__call__(x)


class Net(nnx.Module):
    def __init__(self, rngs):
        self.first = Plain(rngs)
        self.blocks = nnx.List([Block(rngs), Block(rngs)])
        self.stacked = nnx.vmap(Block, in_axes=0)(rngs.split(3))

    def __call__(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        layers = nnx.scan(nnx.remat(lambda layer, y: layer(y)), in_axes=(0, nnx.Carry),
                          out_axes=nnx.Carry)  # fmt: skip
        return layers(self.stacked, x)


def trace(loss=lambda module, batch: jnp.sum(module(batch))):
    model = sk.from_nnx(Net, loss)
    params = jax.eval_shape(model.init, jax.random.key(0))
    shapes = params, jnp.ones((2, 4)), jax.random.key(0)
    return jax.make_jaxpr(model.loss_fn.train)(*shapes)


def test_each_part_has_the_scope_of_its_attribute():
    one = 2 * 2 * 4 * 8
    expected = {
        **{f"first/{part}": one for part in ("up", "down")},
        **{f"blocks_{n}/{part}": one for n in (0, 1) for part in ("up", "down")},
        **{f"stacked/{part}": 3 * one for part in ("up", "down")},
    }
    assert {scope: n for (scope, _), n in count_flops(trace()).by_scope.items()} == expected


def test_classes_are_as_they_were_also_after_an_error():
    of = (Plain, Block, Net, nnx.Linear)
    before = [(one.__call__, "__call__" in vars(one)) for one in of]

    def fails(module, batch):
        module(batch)
        raise ZeroDivisionError

    trace()
    with pytest.raises(ZeroDivisionError):
        trace(fails)
    assert [(one.__call__, "__call__" in vars(one)) for one in of] == before


def test_a_class_that_calls_its_base_is_in_one_scope():
    stacks = {str(eqn.source_info.name_stack) for eqn in trace().eqns}
    assert {"blocks_0", "blocks_0/up", "blocks_1/down"} <= stacks
    assert not any("blocks_0/blocks_0" in stack for stack in stacks)
