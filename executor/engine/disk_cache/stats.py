"""What a cache on disk has done since its start."""

from dataclasses import dataclass

from executor.engine.totals import Totals


@dataclass(frozen=True, slots=True)
class DiskCacheStats(Totals):
    """Of one rank's cache; all 0 where there is none."""

    num_media_queries: int = 0  # media that prompts needed and that were not in memory
    num_media_hits: int = 0
    read_bytes: int = 0
    written_bytes: int = 0
    stored_bytes: int = 0  # below the root now, as far as this process knows
    num_damaged: int = 0
    num_dropped: int = 0  # entries that were not written
