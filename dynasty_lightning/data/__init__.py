# SPDX-License-Identifier: Apache-2.0
"""Data sets as LightningDataModules over tensors in memory. Nothing is downloaded."""

from .module import DATASETS as DATASETS
from .module import TensorDataModule as TensorDataModule
from .module import load_data as load_data
