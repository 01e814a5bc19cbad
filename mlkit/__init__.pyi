from . import coresets as coresets
from . import data as data
from . import models as models

__version__: str
