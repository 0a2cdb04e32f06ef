"""Where patches have raw, and which raw chunks are missing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from connectomics.data.arrays import CropArrays
from connectomics.data.augmentation import PatchAugmentor
from connectomics.data.patch_reader import PatchReader
from connectomics.data.sampling import PatchRequest
from connectomics.data.volumes import CropVolume


@dataclass(frozen=True)
class RawShare:
    """``none``: share of an image's voxels without raw; ``zero``, ``one``: shares of the others at exactly 0 and 1."""

    none: float
    zero: float
    one: float

    @classmethod
    def of(cls, image: NDArray[np.float32], there: NDArray[np.bool_]) -> RawShare:
        """Measure an image; ``there``: where it has raw, of the same shape."""
        values = image[there]
        zero, one = ((values == end).sum() / max(1, values.size) for end in (0, 1))
        return cls((image.size - values.size) / image.size, float(zero), float(one))


@dataclass(frozen=True)
class MissingRaw:
    """Number of missing chunks of a crop's raw (with the context that patches can reach), and the ``first`` of them."""

    crop: str
    missing: int
    total: int
    first: str | None


class RawPresence(CropVolume):
    """A crop whose raw is white, without mirroring and filling: a patch of it is 0 exactly where there is no raw."""

    @classmethod
    def of(cls, volume: CropVolume) -> RawPresence:
        """Copy a crop; an open cache entry stays in use."""
        made = cls.__new__(cls)
        made.__setstate__(volume.__getstate__())
        return made

    def arrays(self, lo: Sequence[int], hi: Sequence[int]) -> CropArrays:
        """Return the crop's arrays of that part alone, with white as raw."""
        whole = self.plain_arrays(lo, hi)
        low = np.clip(np.subtract(lo, whole.raw_begin), 0, whole.raw.shape)
        high = np.clip(np.subtract(hi, whole.raw_begin), low, whole.raw.shape)
        part = tuple(slice(int(a), int(b)) for a, b in zip(low, high, strict=True))
        z, y, x = (int(b + a) for b, a in zip(whole.raw_begin, low, strict=True))
        return replace(
            whole,
            raw=np.full([s.stop - s.start for s in part], 255, np.uint8),
            raw_begin=(z, y, x),
            fill=0.0,
            inside=None if whole.inside is None else np.ascontiguousarray(whole.inside[part]),
        )


def where_raw_is(reader: PatchReader, request: PatchRequest) -> list[NDArray[np.bool_]] | None:
    """Return where each image of a patch has raw, bool (D, H, W): inside the volume, and in no missing chunk.

    The same request is read from a crop whose raw is white, so that 0 means no raw. None if a MONAI transform moves
    the patch after reading.
    """
    augmentor = reader.augmentor
    if augmentor is not None and augmentor.moves_labels:
        return None
    here = replace(request, index=0)
    further = [(shape, [RawPresence.of(at[request.index])]) for shape, at in reader.inputs]
    spatial = None if augmentor is None else PatchAugmentor(augmentor.spatial, None)
    volume = RawPresence.of(reader.volumes[request.index])
    white = PatchReader([volume], reader.shape, further, spatial, reader.min_known).read(here)
    return [image[0] > 0 for image in white.images]


def missing_raw(volume: CropVolume) -> MissingRaw:
    """Count the raw chunks of a crop with the context that patches can reach."""
    return MissingRaw(volume.crop.key, *volume.crop.raw_source.missing_chunks(volume.cached_raw_grid))
