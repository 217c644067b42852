"""Puts a clothed motion of Reposer into Blender: the mesh, its texture, and a Mesh Cache modifier with the motion.

In Blender: Scripting > Open > this file > Run, then File > Import > Reposer motion (.pc2.zip).  Or from a shell:

    blender --python clients/blender/import_reposer.py -- motion.pc2.zip [motion.abc | motion.usdc | motion.fbx]

`motion.pc2.zip` is what `reposer repose open poses.npz -o motion.pc2.zip` writes.  With a second name the scene is
exported for another program: Alembic and USD hold every frame; FBX holds the first one only.
"""

import sys
import zipfile
from pathlib import Path

import bpy
from bpy_extras.io_utils import ImportHelper


def import_motion(path):
    """Import one `.pc2.zip`; returns the object.  The frames are kept beside the zip, where the modifier reads them."""
    path = Path(path).resolve()
    folder = path.with_name(path.name.removesuffix(".zip") + ".files")
    with zipfile.ZipFile(path) as archive:
        expected = {"avatar.obj", "avatar.mtl", "motion.pc2", "fps.txt"}
        if not expected <= set(archive.namelist()):
            raise ValueError(f"{path.name} is not a .pc2.zip of Reposer")
        folder.mkdir(exist_ok=True)
        for name in expected | ({"texture.jpg"} & set(archive.namelist())):
            (folder / name).write_bytes(archive.read(name))
    # The importer keeps the order of the vertices, and turns the object, not its vertices, to z up.
    bpy.ops.wm.obj_import(filepath=str(folder / "avatar.obj"), forward_axis="NEGATIVE_Z", up_axis="Y")
    surface = bpy.context.selected_objects[0]
    surface.name = path.name.split(".")[0]
    header = (folder / "motion.pc2").read_bytes()[:32]
    points, frames = int.from_bytes(header[16:20], "little"), int.from_bytes(header[28:32], "little")
    if points != len(surface.data.vertices):
        raise ValueError(f"the motion has {points} points, the mesh {len(surface.data.vertices)} vertices")
    for polygon in surface.data.polygons:
        polygon.use_smooth = True
    cache = surface.modifiers.new("Reposer motion", "MESH_CACHE")
    cache.cache_format = "PC2"
    cache.filepath = str(folder / "motion.pc2")
    # The cache is in the mesh's own axes, which the object turns: nothing is turned here.
    cache.forward_axis, cache.up_axis = "POS_Y", "POS_Z"
    cache.frame_start = 1
    scene = bpy.context.scene
    fps = float((folder / "fps.txt").read_text())
    scene.render.fps = max(1, round(fps))
    scene.render.fps_base = scene.render.fps / fps
    scene.frame_start, scene.frame_end = 1, frames
    return surface


def export(path):
    """Write the scene as Alembic, USD or FBX, by the suffix."""
    path = Path(path).resolve()
    if path.suffix == ".abc":
        bpy.ops.wm.alembic_export(filepath=str(path), flatten=True)
    elif path.suffix in (".usd", ".usdc"):
        bpy.ops.wm.usd_export(filepath=str(path), export_animation=True)
    elif path.suffix == ".fbx":
        bpy.ops.export_scene.fbx(filepath=str(path), use_mesh_modifiers=True)
    else:
        raise ValueError(f"expected a name that ends with .abc, .usdc or .fbx, got {path.name}")


class ImportReposer(bpy.types.Operator, ImportHelper):
    """Import a clothed motion of Reposer."""

    bl_idname = "import_scene.reposer"
    bl_label = "Reposer motion (.pc2.zip)"
    filename_ext = ".zip"
    filter_glob: bpy.props.StringProperty(default="*.pc2.zip", options={"HIDDEN"})

    def execute(self, context):
        try:
            import_motion(self.filepath)
        except (ValueError, OSError, zipfile.BadZipFile) as error:
            self.report({"ERROR"}, str(error))
            return {"CANCELLED"}
        return {"FINISHED"}


def main():
    bpy.utils.register_class(ImportReposer)
    bpy.types.TOPBAR_MT_file_import.append(lambda menu, _: menu.layout.operator(ImportReposer.bl_idname))
    names = sys.argv[sys.argv.index("--") + 1 :] if "--" in sys.argv else []
    if names:
        import_motion(names[0])
    if len(names) > 1:
        export(names[1])


if __name__ == "__main__":
    main()
