"""Plays a GLB as the glTF specification says, frame by frame: morph targets, then nodes and skin.  For tests."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.bundle.glb import BYTE, FLOAT, SIGNED_BYTE, read_array, read_chunks, read_view
from service.rotations import from_quaternions


class Player:
    """One mesh, at most one skin and one animation."""

    def __init__(self, data: bytes) -> None:
        self.document, self._binary = read_chunks(data)
        self.primitive: dict[str, Any] = self.document["meshes"][0]["primitives"][0]
        attributes = self.primitive["attributes"]
        self.base = self.array(attributes["POSITION"], "VEC3")
        self.targets = [self._target(target["POSITION"]) for target in self.primitive.get("targets", [])]
        self.joints, self.skin_weights, self.inverse = None, None, None
        if "skins" in self.document:
            skin = self.document["skins"][0]
            joints = read_array(self.document, self._binary, attributes["JOINTS_0"], BYTE, "VEC4")
            self.joints = np.array(skin["joints"])[joints]
            self.skin_weights = self.array(attributes["WEIGHTS_0"], "VEC4")
            self.inverse = dict(
                zip(skin["joints"], self.array(skin["inverseBindMatrices"], "MAT4").reshape(-1, 4, 4), strict=True)
            )
        animation = self.document["animations"][0]
        self.tracks = {
            (c["target"]["node"], c["target"]["path"]): self._track(animation["samplers"][c["sampler"]], c)
            for c in animation["channels"]
        }
        self.times = self.array(animation["samplers"][0]["input"], "SCALAR")

    def array(self, number: int, kind: str) -> NDArray[np.float32]:
        return read_array(self.document, self._binary, number, FLOAT, kind)

    def _target(self, number: int) -> NDArray[np.float32]:
        """(V, 3): floats, or normalised bytes in fours (KHR_mesh_quantization)."""
        accessor = self.document["accessors"][number]
        if accessor["componentType"] == FLOAT:
            return self.array(number, "VEC3")
        assert (accessor["componentType"], accessor["normalized"]) == (SIGNED_BYTE, True)
        assert self.document["bufferViews"][accessor["bufferView"]]["byteStride"] == 4
        values = np.frombuffer(read_view(self.document, self._binary, accessor["bufferView"]), np.int8).reshape(-1, 4)
        return np.maximum(values[:, :3] / np.float32(127), -1)

    def _track(self, sampler: dict[str, Any], channel: dict[str, Any]) -> NDArray[np.float32]:
        kind = {"rotation": "VEC4", "translation": "VEC3", "weights": "SCALAR"}[channel["target"]["path"]]
        values = self.array(sampler["output"], kind)
        return values.reshape(-1, len(self.targets)) if kind == "SCALAR" else values

    def vertices(self, frame: int) -> NDArray[np.float64]:
        """(V, 3) at a key frame."""
        points = self.base.astype(np.float64)
        weights = self.tracks.get((0, "weights"), np.zeros((frame + 1, len(self.targets))))[frame]
        for weight, target in zip(weights, self.targets, strict=True):
            points = points + float(weight) * target
        if self.joints is None:
            return points
        world: dict[int, NDArray[np.float64]] = {}
        for root in self.document["scenes"][0]["nodes"]:
            self._place(root, np.eye(4), frame, world)
        matrices = np.zeros((len(self.document["nodes"]), 4, 4))
        assert self.inverse is not None
        for node, inverse in self.inverse.items():
            matrices[node] = world[node] @ inverse.T  # stored column by column
        blended = np.einsum("vk,vkab->vab", self.skin_weights, matrices[self.joints])
        return np.einsum("vab,vb->va", blended[:, :3, :3], points) + blended[:, :3, 3]

    def _place(self, node: int, parent: NDArray[np.float64], frame: int, world: dict[int, Any]) -> None:
        record, local = self.document["nodes"][node], np.eye(4)
        turn = np.array(record.get("rotation", [0, 0, 0, 1.0]))
        shift = np.array(record.get("translation", [0, 0, 0.0]))
        if (node, "rotation") in self.tracks:
            turn = self.tracks[node, "rotation"][frame]
        if (node, "translation") in self.tracks:
            shift = self.tracks[node, "translation"][frame]
        local[:3, :3], local[:3, 3] = from_quaternions(turn[[3, 0, 1, 2]].astype(np.float64)), shift
        world[node] = parent @ local
        for child in record.get("children", []):
            self._place(child, world[node], frame, world)
