"""Paths, ordered rules and what is trained.

Catches: a search instead of a whole match, the last rule winning, a leaf that no rule takes, a rule that takes nothing,
layers of a stacked leaf numbered from one or along the wrong axis.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft import trees
from jaxft.errors import InputError

SHAPES = jax.tree.map(
  lambda s: jax.ShapeDtypeStruct(s, jnp.float32),
  dict(embed=dict(embedding=(11, 5)), encoder=dict(layers=dict(q=dict(kernel=(3, 5, 2, 7)), norm=dict(scale=(3, 5))))),
  is_leaf=lambda x: isinstance(x, tuple),
)
AXES = dict(
  embed=dict(embedding=("vocab", "embed")),
  encoder=dict(layers=dict(q=dict(kernel=("layers", "embed", "heads", "head_dim")), norm=dict(scale=("layers", None)))),
)
Q, NORM, EMBED = "encoder/layers/q/kernel", "encoder/layers/norm/scale", "embed/embedding"


def test_paths_there_and_back():
  flat = trees.flatten(SHAPES)
  assert set(flat) == {Q, NORM, EMBED} and trees.unflatten(flat) == SHAPES
  assert trees.map_with_path(lambda path, a, b: (path, b), SHAPES, AXES)["embed"]["embedding"] == (
    EMBED,
    ("vocab", "embed"),
  )
  assert trees.count(SHAPES) == 55 + 210 + 15 and trees.nbytes(SHAPES) == 4 * 280


def test_first_rule_wins_and_must_match_the_whole_name():
  flat = trees.flatten(trees.by_rules(((r"encoder/.*", 1), (r".*", 2)), SHAPES))
  assert flat == {Q: 1, NORM: 1, EMBED: 2}
  with pytest.raises(InputError, match="no rule matches embed/embedding"):
    trees.by_rules(((r"encoder/.*", 1), (r"embed", 2)), SHAPES)
  with pytest.raises(InputError, match="not a pair"):
    trees.by_rules(((r"(", 1),), SHAPES)


def test_layers_are_matched_one_by_one():
  flat = trees.flatten(trees.by_rules(((r"encoder/layers/1/.*", 0.5), (r".*norm.*", 0.5), (r".*", 2.0)), SHAPES, AXES))
  np.testing.assert_array_equal(flat[Q], np.array([2.0, 0.5, 2.0]).reshape(3, 1, 1, 1))
  assert flat[NORM] == 0.5 and flat[EMBED] == 2.0  # layers that agree stay one value


def test_rule_without_effect_is_an_error():
  with pytest.raises(InputError, match="encodr"):
    trees.trainable(((r"encodr/.*", False), (r".*", True)), SHAPES, AXES)
  with pytest.raises(InputError, match="freeze every"):
    trees.trainable(((r".*", False),), SHAPES, AXES)
  with pytest.raises(InputError, match="True"):
    trees.trainable(((r".*", 1),), SHAPES, AXES)


def test_split_and_merge():
  flags = trees.trainable(((r"embed/.*", False), (r"encoder/layers/[12]/q/.*", False), (r".*", True)), SHAPES, AXES)
  trained, frozen = trees.split_trainable(SHAPES, flags)
  assert set(trees.flatten(trained)) == {Q, NORM} and set(trees.flatten(frozen)) == {EMBED}
  np.testing.assert_array_equal(trees.flatten(flags)[Q].ravel(), [True, False, False])
  assert trees.merge(trained, frozen) == SHAPES


def test_differences():
  other = trees.unflatten(
    {
      Q: jax.ShapeDtypeStruct((3, 5, 2, 8), jnp.float32),
      "new/leaf": jax.ShapeDtypeStruct((), jnp.int32),
      NORM: jax.ShapeDtypeStruct((3, 5), jnp.float32),
    }
  )
  assert trees.differences(SHAPES, SHAPES) == []
  assert sorted(trees.differences(SHAPES, other)) == [
    f"differs: {Q} is float32[3, 5, 2, 8], expected float32[3, 5, 2, 7]",
    "missing: embed/embedding float32[11, 5]",
    "unexpected: new/leaf int32[]",
  ]
