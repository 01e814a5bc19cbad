from .stream import CTRBatch as CTRBatch
from .stream import CTRData as CTRData
from .stream import CTRStream as CTRStream
from .synthetic import SyntheticConfig as SyntheticConfig
from .synthetic import SyntheticCTR as SyntheticCTR
from .synthetic import expected_auc as expected_auc
from .synthetic import synthetic as synthetic
