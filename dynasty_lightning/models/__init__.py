# SPDX-License-Identifier: Apache-2.0
"""Small networks for the demo, the studies and the benchmarks, and the LightningModule that trains them."""

from .classifier import Classifier as Classifier
from .networks import MODELS as MODELS
from .networks import CifarResNet as CifarResNet
from .networks import ResNet18 as ResNet18
from .networks import build_model as build_model
from .networks import multilayer_perceptron as multilayer_perceptron
from .vit import VisionTransformer as VisionTransformer
