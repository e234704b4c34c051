"""Other tiles for a case, compiled beside the shipped ones: how the tables in `fastbert_kernels.tiles` are chosen."""

from fastbert.tuning.neighbours import neighbours
from fastbert_kernels.catalogue import Tiles

from .cases import Case, launch_tiles


def alternatives(case: Case, target: str) -> list[Tiles]:
    """The shipped tiles of a case, and their neighbours."""
    shipped = launch_tiles(case, target)
    return [shipped, *neighbours(case.launch, target, shipped)]
