# SPDX-License-Identifier: Apache-2.0
"""Small networks for the demo and the studies, and the LightningModule that trains them."""

from .classifier import Classifier as Classifier
from .networks import MODELS as MODELS
from .networks import CifarResNet as CifarResNet
from .networks import build_model as build_model
