from .fiited.callback import EmbeddingBudget as EmbeddingBudget
from .fiited.config import FIITEDConfig as FIITEDConfig
from .fiited.density import AutoDensity as AutoDensity
from .fiited.optimizer import FusedEmbeddingOptimizer as FusedEmbeddingOptimizer
from .fiited.optimizer import dynamic_stores as dynamic_stores
from .fiited.store import DynamicEmbeddingStore as DynamicEmbeddingStore
from .fiited.tables import TableSpec as TableSpec
from .memory import MemoryReport as MemoryReport
