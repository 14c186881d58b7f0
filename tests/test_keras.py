"""Keras 3 on torch: BatchNormalization becomes GroupNormalization, by formulas in NumPy; saved and loaded again."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import normswap
from normswap.errors import OptionError, PlanError

os.environ.setdefault("KERAS_BACKEND", "torch")
keras = pytest.importorskip("keras", reason="needs keras 3", exc_type=ImportError)
layers = keras.layers
to_group_norm = pytest.importorskip("normswap.keras").to_group_norm
pytestmark = pytest.mark.filterwarnings("ignore")


def settled(model: Any) -> Any:
    """With weights and statistics that show."""
    random = np.random.default_rng(0)
    for layer in model._flatten_layers():
        if isinstance(layer, layers.BatchNormalization):
            shape = layer.moving_mean.shape
            for variable in layer.weights:
                positive = variable is layer.moving_variance
                variable.assign(random.uniform(0.5, 2, shape) if positive else random.normal(size=shape))
    return model


def normalized(x: Any, groups: int) -> Any:
    """GroupNorm of channels-last arrays, before gamma and beta."""
    shaped = x.reshape(len(x), -1, groups, x.shape[-1] // groups)
    mean, var = shaped.mean((1, 3), keepdims=True), shaped.var((1, 3), keepdims=True)
    return ((shaped - mean) / np.sqrt(var + 1e-5)).reshape(x.shape)


def expected(model: Any, norm: str, before: str, x: Any, groups: int) -> Any:
    """What the new norm gives: the input by the old statistics, group-normalized, times gamma plus beta."""
    layer = model.get_layer(norm)
    given = keras.Model(model.inputs, model.get_layer(before).output).predict(x, verbose=0)
    values = {w.name: keras.ops.convert_to_numpy(w) for w in layer.weights}
    standard = (given - values["moving_mean"]) / np.sqrt(values["moving_variance"] + layer.epsilon)
    return normalized(standard, groups) * values.get("gamma", 1) + values.get("beta", 0)


def outputs(model: Any, x: Any) -> Any:
    return model.predict(x, verbose=0)


X = np.random.default_rng(1).normal(size=(3, 8, 8, 4)).astype("float32")
PRODUCERS = {
    "conv": lambda: layers.Conv2D(8, 3, name="before"),
    "without bias": lambda: layers.Conv2D(8, 3, use_bias=False, name="before"),
    "transposed": lambda: layers.Conv2DTranspose(8, 3, name="before"),
    "depthwise": lambda: layers.DepthwiseConv2D(3, depth_multiplier=2, name="before"),
    "separable": lambda: layers.SeparableConv2D(8, 3, name="before"),
    "dense": lambda: layers.Dense(8, name="before"),
    "with an activation": lambda: layers.Conv2D(8, 3, activation="relu", name="before"),
}


@pytest.mark.parametrize("kind", PRODUCERS)
@pytest.mark.parametrize("affine", [True, False])
def test_the_statistics_are_kept_and_the_groups_normalized(kind: str, affine: bool) -> None:
    norm = layers.BatchNormalization(name="norm", scale=affine, center=affine)
    model = settled(keras.Sequential([layers.Input((8, 8, 4)), PRODUCERS[kind](), norm]))
    made = to_group_norm(model, groups=2)
    np.testing.assert_allclose(outputs(made, X), expected(model, "norm", "before", X, 2), rtol=2e-3, atol=2e-4)
    assert isinstance(made.get_layer("norm"), layers.GroupNormalization) == (kind != "with an activation")


def branched() -> Any:
    inputs = keras.Input((8, 8, 4))
    x = layers.Conv2D(8, 1, name="read_twice")(inputs)
    y = layers.BatchNormalization(name="norm")(x)
    return settled(keras.Model(inputs, layers.Add(name="sum")([x, y])))


def test_a_layer_that_is_read_elsewhere_stays_and_the_statistics_go_into_a_layer_of_their_own() -> None:
    model = branched()
    made = to_group_norm(model, groups=4)
    x = keras.Model(model.inputs, model.get_layer("read_twice").output).predict(X, verbose=0)
    wanted = x + expected(model, "norm", "read_twice", X, 4)
    np.testing.assert_allclose(outputs(made, X), wanted, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("name", ["nested", "branched"])
def test_the_copy_is_saved_and_loaded_and_the_original_stays(name: str, tmp_path: Path) -> None:
    if name == "branched":
        model = branched()
    else:
        block = keras.Sequential([layers.Input((8, 8, 4)), layers.Conv2D(8, 3), layers.BatchNormalization()], name="b")
        inputs = keras.Input((8, 8, 4))
        model = settled(keras.Model(inputs, layers.ReLU()(block(inputs))))
    before = outputs(model, X)
    made = to_group_norm(model, groups=2)
    found = {type(layer) for layer in made._flatten_layers()}
    assert layers.GroupNormalization in found
    assert layers.BatchNormalization not in found
    np.testing.assert_array_equal(outputs(model, X), before)
    made.save(tmp_path / "made.keras")
    loaded = keras.models.load_model(tmp_path / "made.keras")
    np.testing.assert_allclose(outputs(loaded, X), outputs(made, X), rtol=1e-5, atol=1e-6)


def test_what_a_model_gives_out_beside_stays_what_it_is() -> None:
    inputs = keras.Input((8, 8, 4))
    x = layers.Conv2D(8, 1)(inputs)
    model = settled(keras.Model(inputs, [x, layers.BatchNormalization()(x)]))
    np.testing.assert_allclose(outputs(to_group_norm(model), X)[0], outputs(model, X)[0], rtol=1e-5, atol=1e-6)


def test_a_layer_that_is_used_twice_is_not_folded_into() -> None:
    inputs, shared, norm = keras.Input((8, 8, 4)), layers.Dense(4), layers.BatchNormalization(name="norm")
    model = settled(keras.Model(inputs, norm(layers.ReLU()(shared(shared(inputs))))))
    assert isinstance(to_group_norm(model, groups=2).get_layer("norm"), keras.Sequential)
    model = settled(keras.Model(inputs, norm(shared(shared(inputs)))))
    assert isinstance(to_group_norm(model, groups=2).get_layer("norm"), keras.Sequential)


def test_a_layer_with_lora_weights_is_not_folded_into() -> None:
    model = settled(keras.Sequential([layers.Input((4,)), layers.Dense(8), layers.BatchNormalization(name="norm")]))
    model.layers[0].enable_lora(2)
    assert isinstance(to_group_norm(model, groups=2).get_layer("norm"), keras.Sequential)


def test_channels_may_come_first() -> None:
    models = []
    for first in (True, False):
        shape, order = ((4, 8, 8), "channels_first") if first else ((8, 8, 4), "channels_last")
        norm = layers.BatchNormalization(axis=1 if first else -1, name="norm")
        models.append(keras.Sequential([layers.Input(shape), layers.Conv2D(8, 3, data_format=order), norm]))
    settled(models[0]).set_weights(settled(models[1]).get_weights())
    first, last = (to_group_norm(model, groups=2) for model in models)
    assert isinstance(first.get_layer("norm"), layers.GroupNormalization)
    given = outputs(first, np.moveaxis(X, -1, 1))
    np.testing.assert_allclose(np.moveaxis(given, 1, -1), outputs(last, X), rtol=1e-4, atol=1e-5)


def test_torch_s_way_names_this_one() -> None:
    with pytest.raises(PlanError, match="is a Keras model") as error:
        normswap.convert(branched(), "gn")
    assert "normswap.keras.to_group_norm(model)" in error.value.hint


def test_it_trains() -> None:
    model = settled(keras.Sequential([layers.Input((8, 8, 4)), layers.Conv2D(8, 3), layers.BatchNormalization()]))
    made = to_group_norm(model, channels_per_group=4)
    made.compile("sgd", "mse")
    first = made.train_on_batch(X, np.zeros((3, 6, 6, 8)))
    assert made.train_on_batch(X, np.zeros((3, 6, 6, 8))) < first


def test_all_layers_that_do_not_fit_are_told_at_once() -> None:
    model = keras.Sequential([layers.Input((8, 8, 4)), *(
        layer for i, width in enumerate((8, 6, 10)) for layer in
        (layers.Conv2D(width, 1), layers.BatchNormalization(name=f"norm{i}"))
    )])  # fmt: skip
    with pytest.raises(PlanError) as error:
        to_group_norm(model, groups=4)
    assert [problem.split()[0] for problem in error.value.problems] == ["norm1", "norm2"]
    assert to_group_norm(model, groups=4, indivisible="nearest").get_layer("norm1").groups == 3


def test_what_is_no_graph_of_keras_is_refused() -> None:
    for wrong in (3, keras.Sequential([layers.BatchNormalization()])):
        with pytest.raises(OptionError, match="expected a built Sequential or Functional Keras model"):
            to_group_norm(wrong)
    with pytest.raises(PlanError, match="no BatchNormalization"):
        to_group_norm(keras.Sequential([layers.Input((4,)), layers.Dense(3)]))
