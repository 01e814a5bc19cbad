from . import coresets as coresets
from . import data as data
from . import embeddings as embeddings
from . import federated as federated
from . import models as models
from . import serving as serving
from . import sparsity as sparsity
from .convert import convert as convert
from .convert import restore as restore

__version__: str
