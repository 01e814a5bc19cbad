from .features import extract_features as extract_features
from .lightning import Classifier as Classifier
from .resnet import resnet_cifar as resnet_cifar
from .small import CNN as CNN
from .small import MLP as MLP
