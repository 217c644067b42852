"""Graphs and checkpoints that are not what a bundle needs are refused before, or while, they are first run."""

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from service import uploads
from service.bundle.files import write_bundle
from service.errors import BundleInvalid
from service.vetting import MAX_CHECKPOINT_HEADER_BYTES, MAX_NODES, check_checkpoint, check_graph, vet

pytestmark = pytest.mark.anyio


def test_the_bundled_avatar_passes() -> None:
    folder = Path(__file__).parents[2] / "avatars" / "open"
    for path in folder.glob("*.onnx"):
        check_graph(path.name, path.read_bytes())
    check_checkpoint(folder / "checkpoint.safetensors")


def test_a_good_bundle_passes(bundle_dir: Path) -> None:
    vet(bundle_dir / "tiny")


def external(model: ModelProto, location: str, tensor: TensorProto | None = None) -> None:
    tensor = model.graph.initializer[0] if tensor is None else tensor
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)


def constant_of_file(model: ModelProto) -> None:
    tensor = numpy_helper.from_array(np.zeros(4, np.float32), "hidden")
    external(model, "../../etc/passwd", tensor)
    model.graph.node.append(helper.make_node("Constant", [], ["hidden"], value=tensor))


def sparse_of_file(model: ModelProto) -> None:
    values = numpy_helper.from_array(np.zeros(1, np.float32), "sparse")
    external(model, "../../etc/passwd", values)
    sparse = helper.make_sparse_tensor(values, numpy_helper.from_array(np.zeros(1, np.int64), "i"), [4])
    model.graph.node.append(helper.make_node("Constant", [], ["hidden"], sparse_value=sparse))


def function(model: ModelProto) -> None:
    node = helper.make_node("Identity", ["a"], ["b"])
    model.functions.append(helper.make_function("own", "Own", ["a"], ["b"], [node], model.opset_import))


def subgraph(model: ModelProto) -> None:
    body = helper.make_graph([], "body", [], [])
    model.graph.node.append(helper.make_node("Identity", ["unit"], ["copy"], body=body))


def branch(model: ModelProto, node: onnx.NodeProto, initializer: TensorProto | None = None) -> None:
    """An `If` whose branches are this node, as the two forms of a network are joined."""
    output = helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, None)
    body = helper.make_graph([node], "branch", [], [output], [] if initializer is None else [initializer])
    model.graph.initializer.append(numpy_helper.from_array(np.array(False), "choice"))
    model.graph.node.append(helper.make_node("If", ["choice"], ["chosen"], then_branch=body, else_branch=body))


def file_in_a_branch(model: ModelProto) -> None:
    tensor = numpy_helper.from_array(np.zeros(4, np.float32), "hidden")
    external(model, "../../etc/passwd", tensor)
    branch(model, helper.make_node("Identity", ["hidden"], ["shown"]), tensor)


def chance_in_a_branch(model: ModelProto) -> None:
    branch(model, helper.make_node("RandomNormalLike", ["unit"], ["shown"]))


def nodes_in_branches(model: ModelProto) -> None:
    branch(model, helper.make_node("Identity", ["unit"], ["shown"]))
    for attribute in model.graph.node[-1].attribute:
        attribute.g.node.extend([attribute.g.node[0]] * (MAX_NODES // 2))


def test_branches_are_read(make_graph: Any) -> None:
    model = onnx.load_from_string(make_graph())
    branch(model, helper.make_node("Identity", ["unit"], ["shown"]))
    check_graph("repose.onnx", model.SerializeToString())


def sparse_initializer(model: ModelProto) -> None:
    values = numpy_helper.from_array(np.zeros(1, np.float32), "sparse")
    indices = numpy_helper.from_array(np.zeros(1, np.int64), "i")
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [4]))


def add(operator: str, domain: str = "") -> Callable[[ModelProto], Any]:
    return lambda model: model.graph.node.append(helper.make_node(operator, ["unit"], ["more"], domain=domain))


GRAPH_FAULTS: dict[str, tuple[Callable[[ModelProto], Any], str]] = {
    "external data": (lambda m: external(m, "../../etc/passwd"), "outside the file"),
    "external data beside it": (lambda m: external(m, "checkpoint.safetensors"), "outside the file"),
    "external data in a node": (constant_of_file, "outside the file"),
    "external data in a sparse node": (sparse_of_file, "outside the file"),
    "sparse initializer": (sparse_initializer, "sparse"),
    "loop": (add("Loop"), "operator ':Loop' is not on the list"),
    "chance": (add("RandomNormalLike"), "operator"),
    "a graph within": (subgraph, "graphs within Identity"),
    "external data in a branch": (file_in_a_branch, "outside the file"),
    "chance in a branch": (chance_in_a_branch, "operator ':RandomNormalLike'"),
    "too many nodes in branches": (nodes_in_branches, "nodes"),
    "own operator": (add("Identity", "evil"), "operator 'evil:Identity'"),
    "own operators' domain": (lambda m: m.opset_import.add(domain="evil", version=1), "expected ai.onnx"),
    "old operators": (lambda m: setattr(m.opset_import[0], "version", 11), "expected ai.onnx"),
    "operators of the future": (lambda m: setattr(m.opset_import[0], "version", 99), "expected ai.onnx"),
    "functions": (function, "functions"),
    "too many nodes": (lambda m: [add("Identity")(m) for _ in range(MAX_NODES)], "nodes"),
    "no nodes": (lambda m: m.graph.ClearField("node"), "not a valid ONNX graph"),
    "cycle": (lambda m: m.graph.node.reverse(), "not a valid ONNX graph"),
}


@pytest.mark.parametrize("fault", GRAPH_FAULTS)
def test_fault_10_graphs_that_reach_out_are_refused(make_graph: Any, fault: str) -> None:
    model = onnx.load_from_string(make_graph())
    check_graph("repose.onnx", model.SerializeToString())
    change, message = GRAPH_FAULTS[fault]
    change(model)
    with pytest.raises(BundleInvalid, match=message):
        check_graph("repose.onnx", model.SerializeToString())


@pytest.mark.parametrize("data", [b"", b"not a graph", b"\x80\x04.", b"\xff" * 1000])
def test_fault_10_what_is_no_graph_is_refused(data: bytes) -> None:
    with pytest.raises(BundleInvalid):
        check_graph("repose.onnx", data)


def safetensors_file(header: dict[str, Any] | bytes, data: bytes, size: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + data


def tensor(start: int, end: int) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [(end - start) // 4], "data_offsets": [start, end]}


CHECKPOINTS = {
    "empty": b"",
    "a pickle": b"\x80\x04.",
    "huge header": safetensors_file(b"{}", b"", 1 << 62),
    "header above the limit": safetensors_file(b"{}" + b" " * MAX_CHECKPOINT_HEADER_BYTES, b""),
    "header beyond the file": safetensors_file(b"{}", b"", 1000),
    "overlap": safetensors_file({"a": tensor(0, 8), "b": tensor(4, 12)}, bytes(12)),
    "gap": safetensors_file({"a": tensor(0, 8), "b": tensor(12, 16)}, bytes(16)),
    "beyond the file": safetensors_file({"a": tensor(0, 80)}, bytes(8)),
    "size and shape disagree": safetensors_file({"a": tensor(0, 8) | {"shape": [1 << 40]}}, bytes(8)),
    "no JSON": safetensors_file(b"{" * 100, b""),
}


@pytest.mark.parametrize("fault", CHECKPOINTS)
def test_fault_11_checkpoints_that_lie_are_refused(tmp_path: Path, fault: str) -> None:
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(safetensors_file({"a": tensor(0, 8), "b": tensor(8, 16)}, bytes(16)))
    check_checkpoint(path)
    path.write_bytes(CHECKPOINTS[fault])
    with pytest.raises(BundleInvalid, match="checkpoint"):
        check_checkpoint(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda parts, graph: {"repose_onnx": graph(output="surface")}, "graph's outputs are"),
        (lambda parts, graph: {"repose_onnx": graph(scale=np.nan)}, "not finite"),
        (lambda parts, graph: {"checkpoint": b"\x80\x04."}, "checkpoint"),
    ],
)
def test_bundles_whose_parts_do_not_fit_are_refused(
    tmp_path: Path, bundle_parts: Any, make_graph: Any, change: Any, message: str
) -> None:
    write_bundle(tmp_path / "tiny", avatar_id="tiny", **bundle_parts | change(bundle_parts, make_graph))
    with pytest.raises(BundleInvalid, match=message):
        vet(tmp_path / "tiny")


async def test_vetting_happens_elsewhere(bundle_dir: Path, tmp_path: Path, bundle_parts: Any) -> None:
    await uploads.vet(bundle_dir / "tiny")
    write_bundle(tmp_path / "tiny", avatar_id="tiny", **bundle_parts | {"checkpoint": b"\x80\x04."})
    with pytest.raises(BundleInvalid, match="checkpoint"):
        await uploads.vet(tmp_path / "tiny")


@pytest.mark.parametrize("script", ["kill -SEGV $$", "echo no JSON", "exit 3"])
async def test_a_crash_while_vetting_is_a_refusal(
    bundle_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str
) -> None:
    crashing = tmp_path / "python"
    crashing.write_text(f"#!/bin/sh\n{script}\n")
    crashing.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(crashing))
    with pytest.raises(BundleInvalid, match="crashes"):
        await uploads.vet(bundle_dir / "tiny")


async def test_vetting_that_does_not_end_is_a_refusal(
    bundle_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    endless = tmp_path / "python"
    endless.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\nexec sleep 60\n")
    endless.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(endless))
    monkeypatch.setattr(uploads, "MAX_VETTING_S", 1)
    with pytest.raises(BundleInvalid, match="does not come to an end"):
        await uploads.vet(bundle_dir / "tiny")
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_a_graph_that_takes_all_memory_takes_that_of_its_own_process_only(
    tmp_path: Path, bundle_parts: Any, make_graph: Any
) -> None:
    model = onnx.load_from_string(make_graph())
    size = numpy_helper.from_array(np.array([1 << 42], np.int64), "terabytes")
    model.graph.initializer.append(size)
    model.graph.node.insert(0, helper.make_node("ConstantOfShape", ["terabytes"], ["much"]))
    model.graph.node.insert(1, helper.make_node("ReduceMax", ["much"], ["one_of_it"], keepdims=0))
    last = model.graph.node[-1]
    last.output[0] = "almost"
    model.graph.node.append(helper.make_node("Add", ["almost", "one_of_it"], ["vertices"]))
    write_bundle(tmp_path / "tiny", avatar_id="tiny", **bundle_parts | {"repose_onnx": model.SerializeToString()})
    command = [sys.executable, "-m", "service.vetting", str(tmp_path / "tiny")]
    ended = subprocess.run(command, capture_output=True, timeout=100, check=False)
    assert ended.returncode != 0 or "refused" in json.loads(ended.stdout)


def test_refusals_leave_the_bundle_as_it_is(bundle_dir: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bundle_dir / "tiny", tmp_path / "tiny"))
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    vet(copy)
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before
