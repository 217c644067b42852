"""ONNX graphs as files: two forms of one network in one of them, and as few bytes as that takes."""

import hashlib
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from service.bundle.manifest import PLAIN

LARGE = 4096
"""Values of a constant from which its size matters."""


def joined(plain: onnx.ModelProto, fast: onnx.ModelProto) -> onnx.ModelProto:
    """One model with the inputs and outputs of both, which are equal, and the optional input `plain`, by default false.

    Large constants of the same content are stored once, outside of both branches.
    """
    shared: dict[str, TensorProto] = {}
    branches = {name: _branch(model.graph, name, shared) for name, model in (("plain", plain), ("fast", fast))}
    choice = helper.make_node("If", [PLAIN], [output.name for output in fast.graph.output], name="form")
    choice.attribute.append(helper.make_attribute("then_branch", branches["plain"]))
    choice.attribute.append(helper.make_attribute("else_branch", branches["fast"]))
    default = numpy_helper.from_array(np.array(False), PLAIN)
    flag = helper.make_tensor_value_info(PLAIN, TensorProto.BOOL, [])
    inputs, outputs = [*fast.graph.input, flag], list(fast.graph.output)
    graph = helper.make_graph([choice], "repose", inputs, outputs, [default, *shared.values()])
    model = helper.make_model(graph, opset_imports=list(fast.opset_import), ir_version=fast.ir_version)
    onnx.checker.check_model(model)
    return model


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
    outputs = [
        helper.make_tensor_value_info(names[output.name], output.type.tensor_type.elem_type, None)
        for output in graph.output
    ]
    return helper.make_graph(nodes, prefix, [], outputs, own)
