from .fiited.config import FIITEDConfig as FIITEDConfig
from .fiited.store import DynamicEmbeddingStore as DynamicEmbeddingStore
from .fiited.tables import TableSpec as TableSpec
from .memory import MemoryReport as MemoryReport
