"""Propose what to annotate next: boxes that the network is unsure of and that are unlike what is annotated."""

from __future__ import annotations

import logging
import math
import secrets
import shlex
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from connectomics.cellmap.catalog import Catalog, Crop
from connectomics.cellmap.crop_table import CropTable
from connectomics.config import RunConfig
from connectomics.data.candidates import (
    METHODS,
    Area,
    Choice,
    Pool,
    annotated_boxes,
    choose_even,
    choose_random,
    choose_uncertain,
    has_content,
)
from connectomics.data.run_split import half_patch
from connectomics.data.splits import Split, entry_of, select_entries, trained_and_kept_out
from connectomics.decoding.parameters import decode_parameters
from connectomics.errors import InputError, WriteError, number_of, unknown_name
from connectomics.geometry import Index, VoxelGrid, index
from connectomics.inference.raw import Mask
from connectomics.inference.symmetry import symmetries, windows_seen
from connectomics.inference.windows import whole_index
from connectomics.io.formats.tiff import write_tiff
from connectomics.io.location import local_path
from connectomics.io.multiscale import Multiscale
from connectomics.io.replacing import not_ours, publish, unfinished_folder
from connectomics.lightning.model_package import split_of
from connectomics.pipeline import proposals as files
from connectomics.pipeline.decode import decode
from connectomics.pipeline.network_task import load_networks, network_and_config, ready
from connectomics.pipeline.predict import chosen_device, network_tasks, predict_cellmap_crops
from connectomics.pipeline.proposals import FORMATS, Proposal
from connectomics.pipeline.results import Probabilities
from connectomics.pipeline.runs import Run
from connectomics.pipeline.targets import Target, box_target, mask_of, predicted_classes
from connectomics.progress import Progress, named, silent

if TYPE_CHECKING:
    from connectomics.inference.uncertainty import Observer

log = logging.getLogger(__name__)

Placed = tuple[int, VoxelGrid]  # a box, and the number of its area

#: Views that are compared if there would be only one: flips of y and x.
_VIEWS = ("zyx", "zy-x", "z-yx", "z-y-x")


def propose(
    network: Run | str | Path | Sequence[str | Path],
    root: str | Path,
    *,
    out: str | Path,
    budget: int = 10,
    size: Sequence[int] = (1, 256, 256),
    method: str = "uncertainty",
    datasets: Sequence[str] | None = None,
    box: str | None = None,
    candidates: int = 400,
    seed: int = 0,
    file_format: str = "zarr",
    config: RunConfig | str | Path | None = None,
    overrides: Sequence[str] = (),
    device: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> list[Proposal]:
    """Rank boxes of raw by what their annotation would gain; write them with the prediction as labels to correct.

    Boxes never overlap each other or what is annotated, and keep half a patch from crops that validate or test.
    `connectomics.ingest` takes the corrected labels back (``proposals=out``).

    Args:
        network: a run, its folder, a checkpoint or a model package; several are an ensemble.
        root: data root.
        out: folder to make: ``proposals.csv``, ``proposals.html``, ``labels/``, and the run's split as ``split.yaml``.
        budget: number of boxes.
        size: of a box, voxels of the network, z y x.
        method: ``uncertainty`` times novelty (see `connectomics.data.candidates.choose_uncertain`), or to compare with:
            ``random``, ``even``.
        datasets: data sets to choose from; None: all that are not held out.
        box: ``DATASET:z0,y0,x0:z1,y1,x1``, nm.
        candidates: boxes to look at, at most.
        seed: of the candidates, and of ``random``.
        file_format: of the labels: ``zarr`` (OME-Zarr crops in the CellMap layout), or ``tiff`` stacks, with the raw.
        config, overrides, device: as for `predict`.
        overwrite: replace proposals of which none is done.
        progress: called for the boxes that are looked at, and for the blocks of the prediction.

    Returns:
        The proposals, the best first.

    Raises:
        InputError, UnknownNameError, MissingError: an option, the network, the data; or no box is free.
        WriteError: there is something else at ``out``, proposals without ``overwrite``, or a proposal that is done.
    """
    whole_index(list(size), "size", 1)
    chosen_size = index(size)
    for name, number, least in (("budget", budget, 1), ("candidates", candidates, 1), ("seed", seed, 0)):
        if number < least:
            raise InputError(f"{name} must be at least {least}, got {number}")
    for what, word, words in (("method", method, METHODS), ("format", file_format, FORMATS)):
        if word not in words:
            raise unknown_name(what, word, words)
    composed, paths = network_and_config(network, config, overrides)
    composed = replace(composed, dataset=replace(composed.dataset, data_root=str(root), datasets=None, crops=None))
    place, advance = require_place(local_path(out), overwrite), progress or silent
    search = Search(composed, paths, chosen_size, chosen_device(composed, device))
    rng = np.random.default_rng([seed, 0xAC71])
    areas = search.areas(datasets, box)
    free = search.candidates(areas, max(candidates, budget), rng)
    secret = secrets.token_urlsafe(16)  # of the links: who may read the folder may look
    chosen = search.choose(areas, free, method, budget, rng, advance)
    found = [replace(one, link=files.link_of(secret, one.rank)) for one in chosen]
    place.parent.mkdir(parents=True, exist_ok=True)
    with unfinished_folder(place) as partial:
        search.write(partial, found, file_format, advance)
        facts = {"data": str(root), "network": ", ".join(map(str, paths)), "method": method, "seed": seed}
        facts["links work during"] = shlex.join(["pytc", "view", str(root), "--proposals", str(place)])
        search.write_page(partial, found, {**facts, "boxes to choose from": len(free)})
        publish(partial, require_place(place, overwrite))
    return found


def require_place(place: Path, overwrite: bool) -> Path:
    """Return the folder to make; raise `WriteError` if what is there may not be replaced."""
    if not place.exists() or (place.is_dir() and not any(place.iterdir())):
        return place
    if not (place / files.TABLE).is_file():
        raise not_ours(place, "propose")
    if not overwrite:
        raise WriteError(f"{place} holds proposals already; choose another --out, or give --overwrite")
    if any(row.done for row in files.read_table(place)):
        raise WriteError(f"{place} holds annotations (done is yes), which are not replaced; choose another --out")
    return place


@dataclass(frozen=True)
class Search:
    """What all steps of a search share: configuration with its data root, checkpoints, box size (voxels), device."""

    config: RunConfig
    paths: Sequence[Path]
    size: Index
    device: str

    @property
    def classes(self) -> list[str]:
        """Classes of the labels."""
        return predicted_classes(self.config)

    # -- where boxes may lie -------------------------------------------------------------------------------------------
    def areas(self, datasets: Sequence[str] | None, box: str | None) -> list[Area]:
        """Return where boxes may lie in each data set; raises `InputError` if one that is asked for is held out."""
        data = self.config.dataset
        catalog = Catalog.open(data.data_root)
        target = None if box is None else box_target(self.config, box)
        if target is not None and datasets:
            raise InputError("--dataset and --box exclude each other; give one of them")
        asked = [target.dataset] if target is not None else list(datasets or [])
        held = data.held_out if data.split in ("dataset", "leave_one_out") else []
        for name in asked:
            catalog.location(name)
            if name in held:
                raise InputError(f"data set {name} is held out (dataset.held_out of the run); choose among the others")
        margin, areas, table = half_patch(self.config), list[Area](), list(CropTable.of_root(data.data_root))
        table += CropTable.resolve(data.crop_table) if data.crop_table is not None else []
        for name in (n for n in catalog.datasets if n not in held):
            crops = [catalog.crop(name, crop) for crop in catalog.crop_names(name)]
            crops = [crop for crop in crops if crop.labels]
            boxes = [crop.box for crop in self._validation(crops)]
            boxes += {entry.grid.box for entry in table if entry.dataset == name}
            raw = Multiscale.open(catalog.raw_location(name), catalog.options)
            mask = mask_of(catalog, name, self.config.inference.mask)
            inside = {} if mask is None else {"inside": Mask(mask, self.config.voxel_size).touches}
            part = raw.grid.box if target is None else next(iter(target.grids.values())).box
            box_or_none = part if not asked or name in asked else None
            areas.append(Area(name, raw, box_or_none, crops, [one.grow(margin) for one in boxes], **inside))
        if not areas:
            raise InputError(f"all data sets of {data.data_root} are held out; there is nothing to choose from")
        return areas

    def _splits(self) -> dict[str, Split]:
        """The splits of the networks by path, as far as they are known."""
        return {str(path): split for path in self.paths if (split := split_of(path))}

    def _validation(self, crops: Sequence[Crop]) -> list[Crop]:
        keys = {crop.key for crop in crops}
        return [held for split in self._splits().values() for held in select_entries(split.within(keys).val, crops)]

    def candidates(self, areas: Sequence[Area], most: int, rng: np.random.Generator) -> list[Placed]:
        """Return the candidates of all areas; raises `InputError` if there are none."""
        found, refused = list[Placed](), Counter[str]()
        asked = [(number, area) for number, area in enumerate(areas) if area.box is not None]
        for done, (number, area) in enumerate(asked):
            share = max(1, math.ceil((most - len(found)) / (len(asked) - done)))
            grids, why = area.candidates(self.size, self.config.voxel_size, self.classes, share, rng)
            found += [(number, grid) for grid in grids]
            refused += why
        if not found:
            reasons = ", ".join(f"{number} {why}" for why, number in refused.most_common()) or "none at all"
            shape, names = "x".join(map(str, self.size)), ", ".join(area.dataset for _, area in asked)
            raise InputError(
                f"no free box of {shape} voxels in {names} ({reasons}); choose a smaller --size, another --box, or "
                "fetch more raw"
            )
        return found

    # -- which boxes ---------------------------------------------------------------------------------------------------
    def choose(
        self, areas: Sequence[Area], flat: Sequence[Placed], method: str, budget: int, rng: Any, progress: Progress
    ) -> list[Proposal]:
        """Return the chosen candidates of ``flat`` with their places, names and reasons."""
        known = [(number, crop.box) for number, area in enumerate(areas) for crop in area.crops]
        reach = max(n * v for n, v in zip(self.config.window, self.config.voxel_size, strict=True))
        boxes, groups = [grid.box for _, grid in flat], np.array([number for number, _ in flat])
        pool = Pool(boxes, groups, [box for _, box in known], [number for number, _ in known], reach=reach)
        if method == "random":
            found = choose_random(pool, budget, rng)
        elif method == "even":
            found = choose_even(pool, budget)
        else:
            pool = self._observed(pool, areas, flat, rng, progress)
            found = choose_uncertain(pool, budget)
        if len(found) < budget:
            log.warning("asked for %s, but only %d could be placed", number_of(budget, "box"), len(found))
        decoding = self.config.decoding
        parameters = decode_parameters(self.classes, decoding.default, decoding.classes)
        kinds = {name: parameters[name].kind for name in self.classes}
        first, proposals = self._first_crop(), []
        for rank, choice in enumerate(found, start=1):
            number, grid = flat[choice.number]
            seen = float(pool.uncertainty[choice.number]) if len(pool.uncertainty) else math.nan
            place, why = (rank, areas[number].dataset, f"crop{first + rank - 1}", grid), _reason(method, choice, pool)
            proposals.append(Proposal(*place, why, choice.score, seen, choice.novelty, kinds))
        return proposals

    def _first_crop(self) -> int:
        """A number from which on no crop of the data root, and no test crop of its data sets, has one."""
        catalog = Catalog.open(self.config.dataset.data_root)
        taken = [int(name.removeprefix("crop")) for dataset in catalog.datasets for name in catalog.crop_names(dataset)]
        taken += [entry.crop for entry in CropTable.of_root(catalog.root) if entry.dataset in catalog.datasets]
        return max(taken, default=0) + 1

    def _observed(
        self, pool: Pool, areas: Sequence[Area], flat: Sequence[Placed], rng: Any, progress: Progress
    ) -> Pool:
        """The pool with what the networks say of the candidates ``flat``, and of boxes in annotated crops."""
        most = math.ceil(len(flat) / (4 * len(areas)))
        boxes = [
            (n, annotated_boxes(a.crops, self.size, self.config.voxel_size, most, rng)) for n, a in enumerate(areas)
        ]
        known = [(number, grid) for number, of in boxes for grid in of if has_content(areas[number].raw, grid)]
        looks, jobs = list[tuple[float, NDArray[np.float64]]](), [*flat, *known]
        with ExitStack() as stack:
            observers = self._observers(areas, dict(jobs), stack)
            for done, (number, grid) in enumerate(jobs, start=1):
                looks.append(observers[number].look(grid))
                progress(done, len(jobs), "looking at boxes")
        features, own = np.array([vector for _, vector in looks]), len(flat)
        uncertainty = np.array([seen for seen, _ in looks[:own]])
        return replace(pool, uncertainty=uncertainty, features=features[:own], annotated_features=features[own:])

    def _observers(
        self, areas: Sequence[Area], grids: Mapping[int, VoxelGrid], stack: ExitStack
    ) -> dict[int, Observer]:
        """What looks at boxes, as long as ``stack`` is open, by number of the area; ``grids``: any box of each area."""
        import torch

        from connectomics.inference.uncertainty import Bottleneck, Observer

        config, device, options = self.config, self.device, self.config.inference
        kind = "dropout" if options.uncertainty == "dropout" else "variance"
        # windows of another shape would cost a cube of raw for each section
        kept = windows_seen(symmetries(options.tta), config.window).get(config.window, ())
        views = list(map(str, kept))
        if len(self.paths) * len(views) < 2 and kind != "dropout":
            views = list(_VIEWS)
        looking = replace(options, uncertainty=kind, tta=views, compile=False)
        config = replace(config, inference=looking)
        networks = load_networks(self.paths, config)
        targets = [Target(areas[n].dataset, "look", dict.fromkeys(self.classes, grid)) for n, grid in grids.items()]
        tasks = network_tasks(config, networks, self.paths, "unused", targets, device)
        runs = stack.enter_context(ready(list(networks.values()), tasks[0], device))
        shapes = [tasks[0].window, *(shape for _, shape in tasks[0].inputs)]
        window = [torch.zeros(1, 1, *shape, device=device) for shape in shapes]
        bottlenecks = [Bottleneck(network, *window) for network in networks.values()]
        for bottleneck in bottlenecks:
            stack.callback(bottleneck.close)
        classes = len(config.dataset.classes)
        return {n: Observer(task, runs, bottlenecks, device, classes) for n, task in zip(grids, tasks, strict=True)}

    # -- what is written -----------------------------------------------------------------------------------------------
    def write(self, folder: Path, found: Sequence[Proposal], file_format: str, progress: Progress) -> None:
        """Write the table, the split, and the prediction of each box as labels."""
        targets = [Target(p.dataset, p.crop, dict.fromkeys(self.classes, p.grid)) for p in found]
        work = folder / "work"
        predict_cellmap_crops(
            None, self.config, self.paths, work / "probabilities", targets=targets, device=self.device,
            progress=named(progress, "predicting"),
        )  # fmt: skip
        probabilities = Probabilities(work / "probabilities", self.config)
        made = decode(probabilities, out=work / "labels", config=self.config, classes=self.classes)
        for proposal in found:
            labels = {}
            for name in self.classes:
                stored = made.array(name, proposal.crop, proposal.dataset)
                labels[name] = stored.read_level(0, (0, 0, 0), proposal.grid.shape, absent_is_missing=False)[0]
            files.write_labels(folder, proposal, labels, file_format)
            if file_format == "tiff":
                raw = self._raw(proposal)
                write_tiff(proposal.file(folder, "raw", file_format), raw, raw.dtype, proposal.grid)
        shutil.rmtree(work)
        files.write_table(folder / files.TABLE, found)
        if splits := self._splits():
            catalog = Catalog.open(self.config.dataset.data_root)
            crops = [catalog.crop(name, crop) for name in catalog.datasets for crop in catalog.crop_names(name)]
            train, val = (dict.fromkeys(map(entry_of, side)) for side in trained_and_kept_out(crops, splits))
            if not val:
                log.warning("no crop was held out by all networks, so %s has no validation crops", files.SPLIT)
            Split(tuple(train), tuple(val)).save(folder / files.SPLIT)

    def _raw(self, proposal: Proposal) -> NDArray[Any]:
        source = Multiscale.open(Catalog.open(self.config.dataset.data_root).raw_location(proposal.dataset))
        dtype = source.levels[0].dtype
        values = source.read_raw(proposal.grid)[0]
        return (np.rint(values) if dtype.kind in "iu" else values).astype(dtype)

    def write_page(self, folder: Path, found: Sequence[Proposal], facts: Mapping[str, Any]) -> None:
        """Write ``proposals.html``."""
        from connectomics.pages import page, proposals

        pictures = []
        for one in found:
            part = one.grid.crop((one.grid.shape[0] // 2, 0, 0), (1, *one.grid.shape[1:]))
            labels = {name: files.section_of(folder, one, name) for name in self.classes}
            raw = self._raw(replace(one, grid=part)).astype(np.float32)
            pictures.append(page.data_uri(proposals.section_picture(raw, labels, one.grid.voxel_size)))
        proposals.write_page(folder / "proposals.html", "What to annotate next", found, pictures, self.classes, facts)


def _reason(method: str, choice: Choice, pool: Pool) -> str:
    """Why a box was chosen, in words."""
    words = []
    if method == "uncertainty":
        above = (pool.uncertainty < pool.uncertainty[choice.number]).mean()
        words.append(f"more uncertain than {above:.0%} of the boxes")
    if not math.isnan(choice.novelty):
        words.append(f"{choice.novelty:.2g} standard deviations from annotated and chosen boxes")
    if choice.distance < math.inf:  # neither infinite nor NaN
        words.append(f"{choice.distance:.0f} nm from the nearest of its data set")
    return ", ".join(words) or ("drawn at random" if method == "random" else "in the middle of the data set")
