"""Files of samples as they are published, read at any record: JSON lines, JSON lists, tar archives, Parquet."""

from sphinxkit.data.sources.base import Record, Source
from sphinxkit.data.sources.files import index_data, open_source
from sphinxkit.data.sources.index import build_index

__all__ = ["Record", "Source", "build_index", "index_data", "open_source"]
