from .examples import Examples as Examples
from .examples import TensorExamples as TensorExamples
from .lightning import ClassificationDataModule as ClassificationDataModule
from .offline import data_root as data_root
from .offline import require as require
from .spec import DataSpec as DataSpec
