"""Meshing the instances of one class of one crop: one block and one file per object.

On disk, under ``output``::

    {id}.ply             a mesh, written in one step (or {id}.obj, or with an info file {id} and {id}:0 or {id}.index)
    meshes.csv           `COLUMNS`, one row per mesh; written when all meshes are complete
    task.json            the task
    .done-*, .boxes, .objects, .meshes   while it is made: done-maps, and results that later stages read
"""

from __future__ import annotations

import re
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from connectomics.errors import InputError, WriteError, unknown_name
from connectomics.geometry import Index, VoxelGrid
from connectomics.io.artifacts import put_aside
from connectomics.io.multiscale import Multiscale
from connectomics.io.place import place, remove_tree
from connectomics.io.replacing import not_ours
from connectomics.io.tables import ROWS, Column, read_columns, remove_unfinished, table
from connectomics.io.write import write_file
from connectomics.morphology.block_sums import BLOCK, NO_PAIRS, BlockSums, compact, sum_blocks
from connectomics.morphology.label_volume import LabelVolume
from connectomics.morphology.mesh_files import check_format, file_name, write_info, write_levels, write_mesh
from connectomics.morphology.mesh_levels import surface_levels
from connectomics.morphology.mesh_surface import LEAST_VERTICES, SPAN, mesh_object, world_mesh
from connectomics.tasks import BlockTask, Cost
from connectomics.tasks.block_task import TASK_FILE, BlockWorker
from connectomics.tasks.blocks import BlockFiles, Lattice, done_file

BOXES, MESHES = "boxes", "meshes"
TABLE_FILE = "meshes.csv"
COLUMNS = (
    Column("id", "id"),
    Column("vertices", "count"),
    Column("faces", "count"),
    Column("volume_nm3", "number", "nm3"),
    Column("area_nm2", "number", "nm2"),
    Column("stride_voxels", "count", "voxels"),
    Column("file", "text"),
)
#: What mesh writes into its folder.
_OURS = re.compile(rf"\..*|{re.escape(TASK_FILE)}|{re.escape(TABLE_FILE)}|info|\d+(\.ply|\.obj|\.index|:0)?")
_EDGES = tuple(f"{end}_{axis}_nm" for end in ("begin", "end") for axis in "zyx")


@dataclass(frozen=True, kw_only=True)
class MeshTask(BlockTask):
    """Meshes of the objects of one label volume.

    Attributes:
        labels: the label volume. class_name: its class.
        output: folder of the meshes.
        table: CSV or Parquet with the columns ``id`` and ``begin_z_nm .. end_x_nm``, the boxes of the objects. If it
            is "", a first pass over the labels finds them, ``block_shape`` voxels (z y x) at once.
        ids: only these objects; (): all.
        file_format: see `connectomics.morphology.mesh_files.FORMATS`.
        simplify, max_error_nm, max_vertices: see `connectomics.morphology.mesh_surface.mesh_object`.
    """

    kind: ClassVar[str] = "mesh"
    places: ClassVar[frozenset[str]] = frozenset({"labels", "output", "table"})

    labels: LabelVolume
    class_name: str
    output: str
    table: str = ""
    ids: tuple[int, ...] = ()
    file_format: str = "ply"
    simplify: int = 1
    max_error_nm: float | None = None
    max_vertices: int = 20_000_000
    block_shape: Index = BLOCK

    def __post_init__(self) -> None:
        check_format(self.file_format)
        if self.simplify < 1 or not (self.max_error_nm is None or self.max_error_nm > 0):
            raise InputError(
                f"simplify must be 1 or more and max_error_nm above 0, got {self.simplify} and {self.max_error_nm}"
            )
        if self.file_format == "multilod" and self.simplify != 1:
            raise InputError("multilod has levels of detail instead of simplification; leave simplify (--simplify) out")
        if self.max_vertices < LEAST_VERTICES:
            raise InputError(f"max_vertices must be at least {LEAST_VERTICES}, got {self.max_vertices}")

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "volume": self.labels.name}

    def made_from(self) -> dict[str, str]:
        return {"labels": self.labels.stamp}

    @property
    def name(self) -> str:
        return f"{self.labels.dataset}/{self.labels.crop}/{self.class_name}"

    @property
    def folder(self) -> Path:
        return place(self.output)

    @property
    def stages(self) -> tuple[str, ...]:
        return (MESHES,) if self.table or self.labels.semantic else (BOXES, MESHES)

    def check(self, *, overwrite: bool = False) -> bool:
        try:
            import zmesh  # noqa: F401
        except ImportError as error:
            raise InputError(
                "meshes need zmesh, which is not installed; run pip install 'connectomics-cellmap[mesh]'"
            ) from error
        if self.ids and BOXES not in self.stages:
            self._objects()  # an unknown ID is reported before anything is written
        file = self.folder / TASK_FILE
        if not file.exists():
            if self.folder.is_dir() and any(self.folder.iterdir()):
                raise not_ours(self.folder, "mesh")
            return True
        for foreign in (p for p in (self.folder.iterdir() if overwrite else ()) if not _OURS.fullmatch(p.name)):
            raise not_ours(foreign, "mesh")
        if not overwrite and (difference := self.difference(file)):
            raise WriteError(
                f"{self.output} holds meshes {difference}; overwrite them (--overwrite), or choose another output "
                "folder"
            )
        return overwrite or not (self.folder / TABLE_FILE).exists()

    def claim(self, *, overwrite: bool = False) -> None:
        if overwrite and self.folder.exists():
            (self.folder / TABLE_FILE).unlink(missing_ok=True)  # on S3 a kill may leave a part, which is not finished
            put_aside(self.folder)
        self.go_on()

    def prepare(self, stage: str) -> None:
        self.labels.check_unchanged()
        if stage == MESHES:
            write_info(self.folder, self.file_format)
            if not (self._chosen.folder / "0").exists():
                ids, boxes = self._objects()
                self._chosen.save(0, {"ids": ids, "boxes": boxes})

    def blocks(self, stage: str) -> int:
        return len(self.lattice) if stage == BOXES else len(self.objects()[0])

    def open_worker(self, stage: str, device: str) -> AbstractContextManager[_Boxes | _Meshes]:
        return nullcontext(_Boxes(self) if stage == BOXES else _Meshes(self))

    def finish(self) -> None:
        ids, _ = self.objects()
        with table(self.folder / TABLE_FILE, COLUMNS) as out:
            for begin in range(0, len(ids), ROWS):
                some = ids[begin : begin + ROWS]
                stored = b"".join(self.row_file(begin + n).read_bytes() for n in range(len(some)))
                rows = np.frombuffer(stored, "<f8").reshape(-1, 5)
                files = [file_name(label, self.file_format) for label in some.tolist()]
                names = (column.name for column in COLUMNS[1:-1])
                out.write({"id": some, **dict(zip(names, rows.T, strict=True)), "file": files})
        self.clean()

    def clean(self) -> None:
        """Remove what is only needed while the meshes are made; safe to repeat after a run was killed."""
        remove_unfinished(self.folder)
        for folder in (".boxes", ".objects", ".meshes"):
            remove_tree(self.folder / folder)
        for stage in self.stages:
            done_file(self.folder, stage).unlink(missing_ok=True)

    def relocated(self, folder: Path) -> Self:
        return replace(self, output=str(folder / self.folder.name))

    def cost(self, stage: str) -> Cost | None:
        if stage == BOXES:
            voxels = int(np.prod([min(n, b) for n, b in zip(self.labels.shape, self.block_shape, strict=True)]))
            return Cost(read=8 * voxels, written=1 << 20, memory=20 * voxels)
        span = (SPAN + 1) ** 3
        return Cost(read=8 * span, written=24 * self.max_vertices, memory=12 * span + 150 * self.max_vertices)

    def objects(self) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        """Return IDs (n,) and boxes (n, 6; voxels, both ends inside) of the objects to mesh, in block order."""
        stored = self._chosen.load(0)
        return stored["ids"], stored["boxes"]

    @property
    def boxes(self) -> BlockFiles:
        """The boxes of the objects in each block, as `BlockSums`."""
        return BlockFiles(self.folder / ".boxes")

    def row_file(self, number: int) -> Path:
        """Return where the numbers of a mesh's row are stored (5 float64), from its vertices to its stride."""
        return self.folder / ".meshes" / str(number)

    @property
    def lattice(self) -> Lattice:
        """The blocks of the first pass."""
        return Lattice(self.labels.shape, self.block_shape)

    @property
    def _chosen(self) -> BlockFiles:
        return BlockFiles(self.folder / ".objects")

    def _objects(self) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        if self.labels.semantic:
            whole = [0, 0, 0, *(n - 1 for n in self.labels.shape)]
            about = Multiscale.open(self.labels.location).attrs.get("connectomics", {})
            n = 0 if about.get("objects") == 0 else 1
            ids, boxes = np.ones(n, np.uint64), np.array([whole] * n, np.int64).reshape(-1, 6)
        elif self.table:
            ids, boxes = _boxes_of_table(place(self.table), Multiscale.open(self.labels.location).levels[0].grid)
        else:
            parts = list(sum_blocks(len(self.lattice), lambda n: BlockSums.of(self.boxes.load(n)), {"boxes": 6}))
            ids = np.concatenate([np.zeros(0, np.uint64), *(part.ids for part in parts)])
            boxes = np.concatenate([np.zeros((0, 6), np.int64), *(part.tables["boxes"] for part in parts)])
        if not self.ids:
            return ids, boxes
        chosen, rows, _ = np.intersect1d(ids, np.asarray(self.ids, np.uint64), return_indices=True)
        for label in self.ids:
            if label not in chosen:
                raise unknown_name("object", str(label), map(str, ids[:1000].tolist()), self.labels.location)
        return ids[rows], boxes[rows]


def _boxes_of_table(path: Path, grid: VoxelGrid) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """IDs and boxes (voxels, both ends inside) from an instance table in nm; `InputError` if outside the volume."""
    columns = read_columns(path, ("id", *_EDGES))
    edges = np.column_stack([columns[name] for name in _EDGES]).astype(np.float64)
    low = np.rint(grid.to_index(edges[:, :3]) + 0.5).astype(np.int64)
    high = np.rint(grid.to_index(edges[:, 3:]) - 0.5).astype(np.int64)
    if (low < 0).any() or (high >= grid.shape).any() or (high < low).any():
        raise InputError(f"{path} has boxes outside the labels ({grid}): it is of other labels; decode them again")
    return columns["id"].astype(np.uint64), np.hstack([low, high])


class _Boxes(BlockWorker):
    """Finds the bounding boxes of the objects in a block."""

    def __init__(self, task: MeshTask) -> None:
        self._task, self._source = task, Multiscale.open(task.labels.location)

    def do(self, number: int) -> None:
        from scipy.ndimage import find_objects

        begin, shape = self._task.lattice.region(number)
        stored, _ = self._source.read_level(0, begin, shape, absent_is_missing=False)
        labels, ids = compact(stored, semantic=False)
        found = find_objects(labels.view(np.int32), len(ids))
        inner = [[*(s.start for s in box), *(s.stop - 1 for s in box)] for box in found]
        boxes = np.array(inner, np.int64).reshape(-1, 6) + np.array([*begin, *begin])
        self._task.boxes.save(number, BlockSums(ids, {"boxes": boxes}, NO_PAIRS).arrays)


class _Meshes(BlockWorker):
    """Makes the meshes of objects."""

    def __init__(self, task: MeshTask) -> None:
        self._task, self._source = task, Multiscale.open(task.labels.location)
        self._ids, self._boxes = task.objects()

    def do(self, number: int) -> None:
        task, label = self._task, int(self._ids[number])
        what = self._source, label, self._boxes[number].tolist()
        semantic, most = task.labels.semantic, task.max_vertices
        if task.file_format == "multilod":
            grid, levels = self._source.levels[0].grid, surface_levels(*what, semantic=semantic, max_vertices=most)
            write_levels(task.folder, label, levels, grid)
            mesh = world_mesh(grid, levels[0].corners, levels[0].faces, levels[0].stride)
        else:
            how: dict[str, Any] = {"simplify": task.simplify, "max_error_nm": task.max_error_nm}
            mesh = mesh_object(*what, semantic=semantic, max_vertices=most, **how)
            write_mesh(task.folder, label, mesh, task.file_format)
        row = [len(mesh.vertices), len(mesh.faces), mesh.volume, mesh.area, mesh.stride]
        write_file(task.row_file(number), np.array(row, "<f8").tobytes())
