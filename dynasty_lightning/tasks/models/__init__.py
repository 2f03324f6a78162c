# SPDX-License-Identifier: Apache-2.0
"""Small networks for the demo, the studies and the benchmarks, and the LightningModules that train
them.
"""

from .chartransformer import CharTransformer as CharTransformer
from .classifier import Classifier as Classifier
from .language import LanguageModel as LanguageModel
from .mlp import multilayer_perceptron as multilayer_perceptron
from .mobilenet import MobileNetV2 as MobileNetV2
from .networks import MODELS as MODELS
from .networks import build_model as build_model
from .resnet import CifarResNet as CifarResNet
from .resnet import ResNet18 as ResNet18
from .vgg import VggSmall as VggSmall
from .vit import VisionTransformer as VisionTransformer
