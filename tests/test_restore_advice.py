"""The fix that a failed restore prints, followed to the letter, keeps everything that matched."""

import random
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import shardkit as sk
from shardkit.checkpoint._advice import suggest_restore
from shardkit.checkpoint._manifest import SavedLeaf
from shardkit.checkpoint._rename import rename_path

LEAF, ARRAY = SavedLeaf((4,), "float32", "0" * 16), jax.ShapeDtypeStruct((4,), "float32")


def both(params):
    """Parameters and a moment of an optimizer, whose paths end alike."""
    return {"params": params, "mu": jax.tree.map(lambda x: x + 1, params)}


def arrays(*names, first=1.0, size=4):
    return {name: jnp.full((size,), first + i) for i, name in enumerate(names)}


def advice(folder, wanted):
    with pytest.raises(sk.errors.CheckpointError) as error:
        restore(folder, wanted)
    return [part for part in re.findall(r"restore\(\.\.\., (.*?)\)(?:, or|$)", str(error.value))]


def restore(folder, wanted, **options):
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return sk.Checkpointer(folder).restore(jax.eval_shape(lambda: wanted), one, **options).state


def followed(folder, wanted, code):
    """The state that the printed call returns; `step.init` gives zeros."""
    fresh = jax.tree.map(jnp.zeros_like, wanted)
    code = code.replace("step.init(key)", "fresh")
    return eval(f"restore(folder, wanted, {code})", {**globals(), **locals()})


CASES = {
    "a new layer": (both(arrays("a", "b")), both(arrays("a", "b", "new")), ["new"]),
    "a new subtree": (
        both({"a": arrays("w", "b")}),
        both({"a": arrays("w", "b"), "n": arrays("w", "b")}),
        ["n/w", "n/b"],
    ),
    "one leaf resized": (
        both(arrays("a", "b")),
        both({**arrays("a"), "b": jnp.ones(8)}),
        ["b"],
    ),
    "a layer less": (both(arrays("a", "b", "c")), both(arrays("a", "b")), []),
    "another optimizer": (
        {"params": arrays("a", "b"), "mu": arrays("a"), "nu": arrays("a")},
        {"params": arrays("a", "b"), "trace": {"deep": {"x": jnp.ones(9)}}},
        ["x"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_matched_is_kept(case, tmp_path):
    old, new, fresh = CASES[case]
    sk.Checkpointer(tmp_path).save(1, old)
    *_, partial = advice(tmp_path, new)
    back = followed(tmp_path, new, partial)
    for path, leaf in jax.tree_util.tree_leaves_with_path(back):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if any(name.endswith(end) for end in fresh):
            assert not np.asarray(leaf).any()
        else:
            np.testing.assert_array_equal(leaf, leaf_at(old, path))


def leaf_at(tree, path):
    for key in path:
        tree = tree[key.key]
    return tree


def test_leaves_with_new_names_are_offered_under_them(tmp_path):
    old = both({"dense": arrays("w", "b"), "head": arrays("w", size=3)})
    sk.Checkpointer(tmp_path).save(1, old)
    new = both({"Dense_0": arrays("w", "b"), "head": arrays("w", size=3), "added": jnp.ones(7)})
    rename, _ = advice(tmp_path, new)
    assert "rename={'**/dense/**': '**/Dense_0/**'}" in rename
    back = followed(tmp_path, new, rename)
    np.testing.assert_array_equal(back["mu"]["Dense_0"]["b"], old["mu"]["dense"]["b"])
    assert not np.asarray(back["params"]["added"]).any()


def test_many_leaves_with_new_names_are_a_few_patterns_found_at_once():
    """It took 20 s and 18 KB, one rule for each layer."""
    saved = {f"{t}/layer_{i}/w": LEAF for t in ("params", "mu") for i in range(300)}
    wanted = {path.replace("layer", "block"): ARRAY for path in saved}
    same = {f"params/{name}/w": LEAF for name in ("head", "layer_x")}
    began = time.process_time()
    text = suggest_restore({*saved, *wanted}, {**saved, **same}, {**wanted, **same})
    assert time.process_time() - began < 5
    assert "restore(..., rename={'**/layer_*/w': '**/block_*/w'})" not in text  # layer_x stays
    again = suggest_restore({*saved, *wanted}, saved | {"head": LEAF}, wanted | {"head": ARRAY})
    assert "restore(..., rename={'**/layer_*/w': '**/block_*/w'})" in again
    assert len(text) < 2000


def test_many_leaves_with_nothing_in_common_are_counted():
    names = ["".join(random.Random(i).choices("abcdefgh", k=12)) for i in range(90)]
    wanted = {name: ARRAY for name in names}
    text = suggest_restore(wanted, {"kept": LEAF}, {**wanted, "kept": ARRAY})
    assert text.count("'fresh'") == 12
    assert "fresh=step.init(key)) with 78 more leaves in partial" in text


def test_the_moments_of_another_trained_part_are_not_those_of_this_one(tmp_path):
    """Both parts are in the checkpoint and in the state; renamed moments would be wrong ones."""
    params, (one, other) = arrays("up", "down"), (arrays("up"), arrays("down"))
    with sk.Checkpointer(tmp_path) as saver:
        saver.save(1, {"params": params, "mu": one, "nu": one})
    wanted = {"params": params, "mu": other, "nu": other}
    calls = advice(tmp_path, wanted)
    assert not any("rename" in call for call in calls)
    found = followed(tmp_path, wanted, calls[0])
    np.testing.assert_array_equal(found["mu"]["down"], 0)
    np.testing.assert_array_equal(found["params"]["up"], params["up"])


@pytest.mark.parametrize(
    ("rename", "why"),
    [
        ({"param/a": "a"}, "matches no leaf of the checkpoint. Did you mean 'params/a'"),
        ({"params/**": "weights/*"}, "has other wildcards than 'weights/\\*'"),
        ({"params/a": "c", "params/b": "c"}, "params/b +is renamed to c, and so is params/a"),
        ({"params/a": "params/b"}, "params/b +is renamed to params/b, and so is params/a"),
    ],
)
def test_a_rename_that_cannot_be_is_told(rename, why, tmp_path):
    sk.Checkpointer(tmp_path).save(1, {"params": arrays("a", "b")})
    with pytest.raises(sk.errors.CheckpointError, match=why):
        restore(tmp_path, {"params": arrays("a", "b")}, rename=rename)


def test_wildcards_keep_what_they_matched():
    assert rename_path("a/b/c", {"**/b/**": "**/x/y/**"}) == "a/x/y/c"
    assert rename_path("layer_12/w", {"layer_*/*": "h*/weights_*"}) == "h12/weights_w"
    assert rename_path("a", {"b": "c"}) == "a"
