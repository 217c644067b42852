"""Looks into an untrusted bundle, in a process of its own: `python -m service.vetting FOLDER`.

What parses the graph and runs it for the first time may crash, take all memory or never come back; then this process
does, and the service goes on.  Nothing is written but one line of JSON: {} or {"refused": "why"}.
"""

import contextlib
import json
import resource
import sys
from collections.abc import Iterable
from pathlib import Path

import onnx
from onnx import AttributeProto, GraphProto, TensorProto
from safetensors import SafetensorError, safe_open

from service.avatars import Avatar
from service.bundle.files import BundleError, read_bundle
from service.bundle.manifest import CHECKPOINT_FILE
from service.engine import OnnxEngine
from service.errors import AvatarServiceError, BundleInvalid

MAX_SECONDS = 120
MAX_MEMORY_BYTES = 8 << 30
MAX_NODES = 20_000
MAX_CHECKPOINT_HEADER_BYTES = 1 << 20
OPSETS = range(18, 25)
# No loops, no chance, no strings, no sequences: time and answer depend on the shapes and numbers alone.
_OPERATORS = """
Abs Acos Add And ArgMax ArgMin Asin Atan BatchNormalization BitShift Cast CastLike Ceil Clip Concat Constant
ConstantOfShape Conv Cos CumSum DequantizeLinear Div DynamicQuantizeLinear Einsum Elu Equal Erf Exp Expand
Flatten Floor Gather GatherElements GatherND Gelu Gemm Greater GreaterOrEqual GridSample Identity If
InstanceNormalization IsNaN LayerNormalization LeakyRelu Less LessOrEqual Log MatMul MatMulInteger Max Mean
Min Mod Mul Neg Not OneHot Or Pad Pow QuantizeLinear Range Reciprocal ReduceL1 ReduceL2 ReduceMax ReduceMean
ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu Reshape Round ScatterElements ScatterND Shape Sigmoid Sign
Sin Size Slice Softmax Softplus Split Sqrt Squeeze Sub Sum Tan Tanh Tile TopK Transpose Trilu Unsqueeze Where
Xor
"""
OPERATORS = frozenset(_OPERATORS.split())


def vet(folder: Path) -> None:
    """Look into the bundle in `folder`, and run its graph once.

    Raises:
        BundleInvalid: it is refused.
    """
    try:
        bundle = read_bundle(folder)
        for path in sorted(folder.glob("*.onnx")):
            check_graph(path.name, path.read_bytes())
        check_checkpoint(folder / CHECKPOINT_FILE)
        Avatar(bundle, OnnxEngine(bundle.repose_onnx, threads=1, cpu_only=True)).check(*bundle.meshes)
    except (BundleError, AvatarServiceError) as error:
        raise BundleInvalid(str(error)) from error


def check_graph(name: str, data: bytes) -> None:
    """Look at a graph before anything runs it.  Its inputs and outputs are for the engine to check.

    Raises:
        BundleInvalid: not ONNX, external data, operators or operator sets that are not on the list, too many nodes.
    """
    try:
        model = onnx.load_from_string(data)
        opsets = {opset.domain or "ai.onnx": opset.version for opset in model.opset_import}
        if set(opsets) != {"ai.onnx"} or opsets["ai.onnx"] not in OPSETS:
            raise BundleInvalid(f"{name}: expected ai.onnx {OPSETS[0]} to {OPSETS[-1]}, got {opsets}")
        if model.functions or model.training_info:
            raise BundleInvalid(f"{name}: functions and training are not read")
        _check_graph(name, model.graph, MAX_NODES)
        onnx.checker.check_model(model)
    except BundleInvalid:
        raise
    except Exception as error:  # the checker and protobuf raise many kinds
        raise BundleInvalid(f"{name} is not a valid ONNX graph") from error


def check_checkpoint(path: Path) -> None:
    """Look at the header of a safetensors file.

    Raises:
        BundleInvalid: too large a header, or tensors that overlap, leave gaps or lie outside the file.
    """
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
    if size > MAX_CHECKPOINT_HEADER_BYTES:
        raise BundleInvalid(
            f"{path.name}: expected a header of at most {MAX_CHECKPOINT_HEADER_BYTES} bytes, got {size}"
        )
    try:
        with safe_open(path, framework="numpy"):
            pass
    except (SafetensorError, ValueError) as error:
        raise BundleInvalid(f"{path.name} is not a safetensors file") from error


def _check_graph(name: str, graph: GraphProto, room: int) -> int:
    """Check a graph and the branches in it, of at most `room` nodes; returns how many there is room for then."""
    room -= len(graph.node)
    if room < 0:
        raise BundleInvalid(f"{name}: expected at most {MAX_NODES} nodes")
    if graph.sparse_initializer:
        raise BundleInvalid(f"{name}: sparse tensors are not read")
    _check_tensors(name, graph.initializer)
    for node in graph.node:
        if node.domain not in ("", "ai.onnx") or node.op_type not in OPERATORS:
            operator = f"{node.domain}:{node.op_type}"[:80]
            raise BundleInvalid(f"{name}: the operator {operator!r} is not on the list")
        for attribute in node.attribute:
            _check_tensors(name, (attribute.t, *attribute.tensors))
            for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                _check_tensors(name, (sparse.values, sparse.indices))
            if attribute.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS):
                if node.op_type != "If":
                    raise BundleInvalid(f"{name}: graphs within {node.op_type} are not read")
                for branch in (attribute.g, *attribute.graphs):
                    room = _check_graph(name, branch, room)
    return room


def _check_tensors(name: str, tensors: Iterable[TensorProto]) -> None:
    if any(tensor.data_location == TensorProto.EXTERNAL or tensor.external_data for tensor in tensors):
        raise BundleInvalid(f"{name}: data outside the file is not read")


def _main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (MAX_SECONDS, MAX_SECONDS))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError):  # where memory runs out earlier, this process goes first, not the service
        Path("/proc/self/oom_score_adj").write_text("1000")
    try:
        vet(Path(sys.argv[1]))
    except BundleInvalid as error:
        print(json.dumps({"refused": str(error)}))
    else:
        print("{}")


if __name__ == "__main__":
    _main()
