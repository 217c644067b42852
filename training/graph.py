"""ONNX graphs as files: several forms of one network in one of them, and as few bytes as that takes."""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from service.bundle.manifest import PLAIN, SKINNING_WEIGHTS

LARGE = 4096
"""Values of a constant from which its size matters."""


def joined(plain: onnx.ModelProto, fast: onnx.ModelProto, given: onnx.ModelProto | None = None) -> onnx.ModelProto:
    """One model with the inputs and outputs of its forms, which are equal, and the optional input `plain`, by default
    false.

    Large constants of the same content are stored once, outside of all branches.

    Args:
        given: a form with the input `skinning_weights` more, which is then optional, and runs when it is not empty.
    """
    shared: dict[str, TensorProto] = {}
    nodes, defaults = [], [numpy_helper.from_array(np.array(False), PLAIN)]
    inputs = [*fast.graph.input, helper.make_tensor_value_info(PLAIN, TensorProto.BOOL, [])]
    other = _branch(fast.graph, "fast", shared)
    if given is not None:
        bones = next(dim.dim_value for dim in given.graph.input[-1].type.tensor_type.shape.dim if dim.dim_value)
        inputs.append(helper.make_tensor_value_info(SKINNING_WEIGHTS, TensorProto.FLOAT, ["W", bones]))
        defaults.append(numpy_helper.from_array(np.zeros((0, bones), np.float32), SKINNING_WEIGHTS))
        zero = numpy_helper.from_array(np.array(0), "nothing")
        nodes += [
            helper.make_node("Size", [SKINNING_WEIGHTS], ["given/size"]),
            helper.make_node("Greater", ["given/size", zero.name], ["given"]),
        ]
        defaults.append(zero)
        outputs = [value.name for value in fast.graph.output]
        choice = _choice("given", _branch(given.graph, "given", shared), other, [f"either/{name}" for name in outputs])
        other = helper.make_graph([choice], "unless plain", [], _open_outputs(fast.graph, choice.output))
    nodes.append(_choice(PLAIN, _branch(plain.graph, "plain", shared), other, [o.name for o in fast.graph.output]))
    graph = helper.make_graph(nodes, "repose", inputs, list(fast.graph.output), [*defaults, *shared.values()])
    model = helper.make_model(graph, opset_imports=list(fast.opset_import), ir_version=fast.ir_version)
    onnx.checker.check_model(model)
    return model


def _choice(flag: str, then: onnx.GraphProto, other: onnx.GraphProto, outputs: list[str]) -> onnx.NodeProto:
    """`then` where the flag is true, else `other`."""
    return helper.make_node("If", [flag], outputs, name=f"if {flag}", then_branch=then, else_branch=other)


def compact(model: onnx.ModelProto) -> None:
    """Store large constants in fewer bytes where that loses nothing; ONNX Runtime widens them once, at load."""
    kinds: dict[Any, tuple[tuple[Any, ...], int]] = {
        np.dtype(np.float32): ((np.float16,), TensorProto.FLOAT),
        np.dtype(np.int64): ((np.uint16, np.int32), TensorProto.INT64),
    }
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor)
        narrower, wide = kinds.get(values.dtype, ((), 0))
        fitting = [kind for kind in narrower if np.array_equal(values.astype(kind), values)]
        if values.size < LARGE or not fitting:
            continue
        name = tensor.name
        tensor.CopyFrom(numpy_helper.from_array(values.astype(fitting[0]), f"{name}.narrow"))
        model.graph.node.insert(0, helper.make_node("Cast", [f"{name}.narrow"], [name], to=wide))


def _branch(graph: onnx.GraphProto, prefix: str, shared: dict[str, TensorProto]) -> onnx.GraphProto:
    """The graph as a branch of `If`: inputs and large constants come from outside, all other names are its own."""
    names = {tensor.name: tensor.name for tensor in graph.input} | {"": ""}  # an omitted input has no name
    own = []
    for tensor in graph.initializer:
        content = numpy_helper.to_array(tensor)
        if content.size >= LARGE:
            key = hashlib.sha256(f"{content.dtype}{content.shape}".encode() + content.tobytes()).hexdigest()[:16]
            names[tensor.name] = key
            shared[key] = numpy_helper.from_array(content, key)
        else:
            names[tensor.name] = f"{prefix}/{tensor.name}"
            own.append(numpy_helper.from_array(content, names[tensor.name]))
    nodes = []
    for node in graph.node:
        # The exporter notes where in the source each node came from: a megabyte of paths that serve nobody.
        del node.metadata_props[:]
        names |= {name: f"{prefix}/{name}" for name in node.output if name}
        copied = onnx.NodeProto()
        copied.CopyFrom(node)
        copied.name = f"{prefix}/{node.name}"
        copied.input[:] = [names[name] for name in node.input]
        copied.output[:] = [names[name] for name in node.output]
        nodes.append(copied)
    return helper.make_graph(nodes, prefix, [], _open_outputs(graph, [names[o.name] for o in graph.output]), own)


def _open_outputs(graph: onnx.GraphProto, names: Sequence[str]) -> list[onnx.ValueInfoProto]:
    """The graph's outputs by other names, of any shape."""
    return [
        helper.make_tensor_value_info(name, output.type.tensor_type.elem_type, None)
        for name, output in zip(names, graph.output, strict=True)
    ]
