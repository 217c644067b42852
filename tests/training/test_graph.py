"""Two forms in one file: each runs when asked for, what they share is stored once, and nothing is lost."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from training.graph import compact, joined

WEIGHTS = np.arange(10_000, dtype=np.float32).reshape(100, 100) / 8  # exact in half precision up to 2048 / 8
PLACES = np.arange(5_000)[::-1] % 100


def model(factor: float) -> onnx.ModelProto:
    """vertices = (x W)[..., places] * factor; the names inside are the same in both."""
    nodes = [
        helper.make_node("MatMul", ["x", "weights"], ["product"], name="first"),
        helper.make_node("Gather", ["product", "places"], ["chosen"], axis=1, name="second"),
        helper.make_node("Mul", ["chosen", "factor"], ["vertices"], name="third"),
    ]
    constants = {"weights": WEIGHTS, "places": PLACES, "factor": np.array(factor, np.float32)}
    graph = helper.make_graph(
        nodes,
        "form",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["F", 100])],
        [helper.make_tensor_value_info("vertices", TensorProto.FLOAT, ["F", 5_000])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def run(made: onnx.ModelProto, **inputs: np.ndarray) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, inputs)[0])


@pytest.mark.parametrize("compacted", [False, True])
def test_the_fast_form_runs_unless_the_plain_one_is_asked_for(compacted: bool) -> None:
    made, x = joined(model(1.0), model(2.0)), np.eye(100, dtype=np.float32)[:3]
    if compacted:
        compact(made)
    expected = (x @ WEIGHTS)[:, PLACES]
    np.testing.assert_array_equal(run(made, x=x), 2 * expected)
    np.testing.assert_array_equal(run(made, x=x, plain=np.array(False)), 2 * expected)
    np.testing.assert_array_equal(run(made, x=x, plain=np.array(True)), expected)


def test_what_both_forms_hold_is_stored_once_and_small() -> None:
    single, both = model(1.0).ByteSize(), joined(model(1.0), model(2.0))
    assert both.ByteSize() < 1.05 * single
    before = both.ByteSize()
    compact(both)
    kinds = {tensor.data_type for tensor in both.graph.initializer}
    assert TensorProto.UINT16 in kinds  # the places; the weights would lose something
    assert TensorProto.FLOAT16 not in kinds
    assert both.ByteSize() < before - 6 * len(PLACES) + 1000
