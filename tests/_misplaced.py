"""Small steps with one misplaced declaration each, and what a report has to say of them."""

import dataclasses
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import PartitionSpec as P

import shardkit as sk

from ._misplaced_helper import pin

WIDTH = 128
HERE = pathlib.Path(__file__)
X = np.ones((64, WIDTH), "f")
SEQUENCES = np.ones((16, 32, WIDTH), "f")
TOKENS = np.zeros((64, 16), "i")


@dataclasses.dataclass
class Case:
    """A small step with one misplaced declaration, on the line that ends with `# <name>`."""

    loss: object
    params: dict
    rules: dict
    batch: object = dataclasses.field(default_factory=lambda: {"x": X})
    spec: object = P("data")
    activations: dict | None = None
    opt_state: object = None
    model_state: object = None
    declared_by: str = ""
    init: object = None
    finding: str = ""
    mesh: dict = dataclasses.field(default_factory=lambda: {"data": 2, "tensor": 4})
    later: str = ""  # of compilers after 0.10, where they send something else


def square(*names):
    return {name: (WIDTH, WIDTH) for name in names}


def constraint_on_the_wrong_dim(p, b, key):
    h = jnp.tanh(b["x"] @ p["w"])
    h = sk.nn.constrain(h, None, "batch")  # constraint_on_the_wrong_dim
    return jnp.mean(jnp.tanh(sk.nn.constrain(h, "batch", None)) ** 2)


def rule_that_splits_a_contraction(p, b, key):
    h = jnp.tanh(b["x"])
    h = h @ p["w"]  # rule_that_splits_a_contraction
    return jnp.mean(h**2)


def two_column_products(p, b, key):
    h = jnp.tanh(b["x"] @ p["a"])
    h = jnp.tanh(h @ p["b"])  # two_column_products
    return jnp.mean(h**2)


def nothing_after_attention(p, b, key):
    q = (b["x"] @ p["q"]).reshape(*b["x"].shape[:2], 8, -1)
    mixed = jax.nn.dot_product_attention(q, q, q)
    flat = mixed.reshape(b["x"].shape)
    return jnp.mean((flat @ p["out"]) ** 2)  # nothing_after_attention


def loss_that_gathers_logits(p, b, key):
    logits = b["x"] @ p["w"]
    logits = sk.nn.constrain(logits, "batch", None)  # loss_that_gathers_logits
    return jnp.mean(jax.nn.logsumexp(logits, -1) - logits[:, 0])


def sort_over_a_split_dim(p, b, key):
    h = jnp.tanh(b["x"] @ p["w"])
    h = jnp.sort(h, -1)  # sort_over_a_split_dim
    return jnp.mean(h[:, ::2] ** 2)


def batch_that_disagrees(p, b, key):
    h = jnp.tanh(b["x"]) * 2
    h = h @ p["w"]  # batch_that_disagrees
    return jnp.mean(h**2)


def table_split_by_rows(p, b, key):
    h = jnp.take(p["table"], b["tokens"], axis=0)  # table_split_by_rows
    return jnp.mean(h**2)


def shifted_rows(p, b, key):
    h = b["x"] @ p["w"]
    h = jnp.roll(h, 3, axis=0)  # shifted_rows
    return jnp.mean((h - b["x"]) ** 2)


def optimizer_on_another_layout(p, b, key):
    return jnp.mean((b["x"] @ p["w"]) ** 2)


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        up = nn.Dense(4 * WIDTH, use_bias=False, name="up")
        down = nn.Dense(WIDTH, use_bias=False, name="down")
        h = jnp.tanh(up(x))
        return down(h)  # linen_down


def linen_down(p, b, key):
    return jnp.mean(Mlp().apply({"params": p}, b["x"]) ** 2)


class Block(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, use_bias=False, rngs=rngs)

    def __call__(self, x):
        h = jnp.tanh(self.up(x))
        return self.down(h)  # nnx_down


BLOCK = nnx.split(nnx.eval_shape(lambda: Block(nnx.Rngs(0))), nnx.Param)


def nnx_down(p, b, key):
    block = nnx.merge(BLOCK[0], p)
    return jnp.mean(block(b["x"]) ** 2)


ROWS = {"batch": "data"}
CASES = {
    "constraint_on_the_wrong_dim": Case(
        constraint_on_the_wrong_dim,
        square("w"),
        {"w": sk.REPLICATED},
        activations=ROWS,
        declared_by="the constraint at",
        finding="gradient_gather",
    ),
    "rule_that_splits_a_contraction": Case(
        rule_that_splits_a_contraction, square("w"), {"w": P("tensor", None)}
    ),
    "two_column_products": Case(
        two_column_products,
        square("a", "b"),
        {"*": P(None, "tensor")},
        finding="split_contraction",
    ),
    "nothing_after_attention": Case(
        nothing_after_attention,
        square("q", "out"),
        {"q": P(None, "tensor"), "out": P(None, "tensor")},
        {"x": SEQUENCES},
        finding="split_contraction",
    ),
    "loss_that_gathers_logits": Case(
        loss_that_gathers_logits,
        {"w": (WIDTH, 1024)},
        {"w": P(None, "tensor")},
        activations=ROWS,
        declared_by="the constraint at",
        finding="parameter_gather",
    ),
    "sort_over_a_split_dim": Case(
        sort_over_a_split_dim,
        square("w"),
        {"w": P(None, "tensor")},
        finding="resharding",
    ),
    "batch_that_disagrees": Case(
        batch_that_disagrees,
        square("w"),
        {"w": P(None, "tensor")},
        spec=P("tensor"),
        finding="activation_gather",
    ),
    "table_split_by_rows": Case(
        table_split_by_rows,
        {"table": (1024, WIDTH)},
        {"table": P("tensor", None)},
        {"tokens": TOKENS},
    ),
    "shifted_rows": Case(shifted_rows, square("w"), {"w": P(None, "tensor")}),
    "optimizer_on_another_layout": Case(
        optimizer_on_another_layout,
        {"w": (WIDTH, 4 * WIDTH)},
        {"w": P(None, "tensor")},
        opt_state=sk.PathRules({"**/w": P("tensor", None), "**": sk.REPLICATED}),
        finding="resharding",
    ),
    "linen_down": Case(
        linen_down,
        {},
        {"up/kernel": P(None, "tensor"), "down/kernel": P(None, "tensor")},
        init=lambda key: Mlp().init(key, X)["params"],
        finding="split_contraction",
    ),
    "nnx_down": Case(
        nnx_down,
        {},
        {"**/kernel/**": P(None, "tensor")},
        init=lambda key: nnx.split(Block(nnx.Rngs(key)), nnx.Param)[1],
        finding="split_contraction",
    ),
}


# Of other kinds; most send more by what follows from the fault than at its line.


def constraint_in_a_scan_body(p, b, key):
    def layer(x, w):
        h = jnp.tanh(x @ w["up"])
        x = x + h @ w["down"]
        x = jax.lax.with_sharding_constraint(x, P(None, "data"))  # constraint_in_a_scan_body
        return x, None

    x, _ = jax.lax.scan(layer, b["x"], p)
    return jnp.mean(x**2)


def constraint_in_a_helper(p, b, key):
    h = jnp.tanh(b["x"] @ p["w"])
    return jnp.mean(jnp.tanh(pin(h)) ** 2)


class Norm(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(WIDTH, WIDTH, use_bias=False, rngs=rngs)
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.down = nnx.Linear(WIDTH, WIDTH, use_bias=False, rngs=rngs)

    def __call__(self, x):
        x = self.up(x)
        x = self.norm(x)  # scale_of_a_norm
        return self.down(x)


NORM = nnx.split(nnx.eval_shape(lambda: Norm(nnx.Rngs(0))), nnx.Param)


def scale_of_a_norm(p, b, key):
    return jnp.mean(nnx.merge(NORM[0], p)(b["x"]) ** 2)


def labels_of_another_layout(p, b, key):
    h = jnp.tanh(b["x"] @ p["w"])
    gap = h - b["y"]  # labels_of_another_layout
    return jnp.mean(gap**2)


def average_of_another_layout(p, b, key, state):
    average = {"w": 0.9 * state["w"] + 0.1 * p["w"]}  # average_of_another_layout
    return jnp.mean((b["x"] @ p["w"]) ** 2), {}, average


def heads_split_inside(p, b, key):
    q = jnp.einsum("btd,dhk->bthk", b["x"], p["q"])
    k = jnp.einsum("btd,dhk->bthk", b["x"], p["k"])
    scores = jnp.einsum("bthk,bshk->bhts", q, k)  # heads_split_inside
    return jnp.mean(jax.nn.softmax(scores) ** 2)


def tied_table_split_by_columns(p, b, key):
    x = jnp.take(p["table"], b["tokens"], axis=0)
    scores = x @ p["table"].T  # tied_table_split_by_columns
    return jnp.mean(jax.nn.logsumexp(scores, -1))


def cumulative_sum_over_a_split_dim(p, b, key):
    x = sk.nn.constrain(b["x"], "batch", "length", None)
    h = jnp.cumsum(x, axis=1)  # cumulative_sum_over_a_split_dim
    return jnp.mean(h**2) + jnp.mean(b["x"][:, 0] @ p["w"])


def rotated_halves(p, b, key):
    h = b["x"] @ p["w"]
    h = h + jnp.roll(h, WIDTH // 2, -1)  # rotated_halves
    return jnp.mean(h**2)


def constraint_under_a_checkpoint(p, b, key):
    @jax.checkpoint
    def layer(x, w):
        h = jnp.tanh(x @ w)
        return sk.nn.constrain(h, None, "batch")  # constraint_under_a_checkpoint

    x = layer(b["x"], p["a"])
    return jnp.mean((x @ p["b"]) ** 2)


def experts_taken_by_index(p, b, key):
    chosen = jnp.take(p["experts"], b["tokens"][:, 0], axis=0)  # experts_taken_by_index
    return jnp.mean(jnp.einsum("bd,bde->be", b["x"], chosen) ** 2)


class Convolutions(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = jnp.tanh(nn.Conv(64, (3, 3), use_bias=False, name="one")(x))
        x = nn.Conv(64, (3, 3), use_bias=False, name="two")(x)  # convolutions_by_columns
        return x


def convolutions_by_columns(p, b, key):
    return jnp.mean(Convolutions().apply({"params": p}, b["images"]) ** 2)


IMAGES = np.ones((16, 8, 8, 64), "f")


def vmapped_linear(p, b, key):
    import equinox as eqx

    one, two = (eqx.tree_at(lambda m: m.weight, LINEAR(), p[name]) for name in ("one", "two"))
    h = jnp.tanh(jax.vmap(one)(b["x"]))
    h = jax.vmap(two)(h)  # vmapped_linear
    return jnp.mean(h**2)


def LINEAR():
    import equinox as eqx

    return eqx.nn.Linear(WIDTH, WIDTH, use_bias=False, key=jax.random.key(0))


MATRICES = {"up": (4, WIDTH, 4 * WIDTH), "down": (4, 4 * WIDTH, WIDTH)}
STRANGERS = {
    "constraint_in_a_scan_body": Case(
        constraint_in_a_scan_body,
        MATRICES,
        {"up": P(None, None, "tensor"), "down": P(None, "tensor", None)},
        declared_by="the constraint at",
        finding="activation_gather",
    ),
    "constraint_in_a_helper": Case(
        constraint_in_a_helper,
        square("w"),
        {"w": P(None, "tensor")},
        declared_by="the constraint at",
        finding="parameter_gather",
    ),
    "scale_of_a_norm": Case(
        scale_of_a_norm,
        {},
        {"norm/scale/**": P("tensor"), "**": sk.REPLICATED},
        init=lambda key: nnx.split(Norm(nnx.Rngs(key)), nnx.Param)[1],
        finding="gradient_gather",
    ),
    "labels_of_another_layout": Case(
        labels_of_another_layout,
        square("w"),
        {"w": sk.REPLICATED},
        {"x": X, "y": X},
        sk.PathRules({"x": P("data"), "y": P(None, "tensor")}),
        finding="gradient_gather",
    ),
    "average_of_another_layout": Case(
        sk.Loss(average_of_another_layout, average_of_another_layout, stateful=True),
        square("w"),
        {"w": P(None, "tensor")},
        model_state=sk.PathRules({"w": P("tensor", None)}),
        init=lambda key: sk.Variables(
            {"w": jnp.ones((WIDTH, WIDTH))}, {"w": jnp.ones((WIDTH, WIDTH))}
        ),
        finding="resharding",
        later="parameter_gather",
    ),
    "heads_split_inside": Case(
        heads_split_inside,
        {"q": (WIDTH, 8, 16), "k": (WIDTH, 8, 16)},
        {"*": P(None, None, "tensor")},
        {"x": SEQUENCES},
        finding="split_contraction",
    ),
    "tied_table_split_by_columns": Case(
        tied_table_split_by_columns,
        {"table": (1024, WIDTH)},
        {"table": P(None, "tensor")},
        {"tokens": TOKENS},
        finding="split_contraction",
    ),
    "cumulative_sum_over_a_split_dim": Case(
        cumulative_sum_over_a_split_dim,
        square("w"),
        {"w": sk.REPLICATED},
        {"x": SEQUENCES},
        activations={"batch": "data", "length": "tensor"},
        finding="dim_gather",
    ),
    "rotated_halves": Case(rotated_halves, square("w"), {"w": P(None, "tensor")}, {"x": SEQUENCES}),
    "constraint_under_a_checkpoint": Case(
        constraint_under_a_checkpoint,
        square("a", "b"),
        {"*": sk.REPLICATED},
        activations=ROWS,
        declared_by="the constraint at",
        finding="gradient_gather",
    ),
    "experts_taken_by_index": Case(
        experts_taken_by_index,
        {"experts": (8, WIDTH, 64)},
        {"*": P("tensor", None, None)},
        {"tokens": TOKENS, "x": X},
    ),
    "convolutions_by_columns": Case(
        convolutions_by_columns,
        {},
        {"*/kernel": P(None, None, None, "tensor")},
        {"images": IMAGES},
        init=lambda key: Convolutions().init(key, IMAGES)["params"],
        finding="product_gather",
    ),
    "vmapped_linear": Case(
        vmapped_linear,
        square("one", "two"),
        {"*": P("tensor", None)},
        finding="split_contraction",
    ),
}


def declare(name, case=None):
    """The step of a case and its mesh, as a child process loads it."""
    case = case or (CASES | STRANGERS)[name]

    def init(key):
        is_shape = {"is_leaf": lambda shape: isinstance(shape, tuple)}
        return jax.tree.map(lambda shape: jax.random.normal(key, shape), case.params, **is_shape)

    strategy = sk.Strategy(
        params=sk.PathRules(case.rules, allow_unmatched=True),
        batch=case.spec,
        activations=sk.AxisRules(case.activations) if case.activations else None,
        opt_state=case.opt_state,
        **({"model_state": case.model_state} if case.model_state else {}),
    )
    spec = sk.StepSpec(
        loss_fn=case.loss,
        optimizer=optax.adam(1e-3),
        init=case.init or init,
        batch=case.batch,
        strategy=strategy,
    )
    return spec, sk.MeshSpec(**case.mesh)


def line_of(name):
    """File and number of the line that ends with the name of a case; None if there is none."""
    for file in HERE.parent.glob("_misplaced*.py"):
        for number, line in enumerate(file.read_text("utf-8").split("\n"), 1):
            if line.endswith(f"# {name}"):
                return str(file), number
    return None


def avoidable(report):
    """The line that sends the most besides gradients, which any data-parallel step reduces."""
    costs = {}
    for cost in report.by_source():
        sent = sum(
            part.bytes
            for part in cost.parts
            if "rows are split" not in "".join(end.declared_by for end in part.row.ends)
        )
        costs[cost.name] = (sent, cost)
    return max(costs.values(), key=lambda one: one[0])[1]
