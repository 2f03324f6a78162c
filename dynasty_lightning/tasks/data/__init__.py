# SPDX-License-Identifier: Apache-2.0
"""Data sets as LightningDataModules over arrays in memory. Nothing is downloaded."""

from .module import DATASETS as DATASETS
from .module import TensorDataModule as TensorDataModule
from .module import load_data as load_data
from .text import TextData as TextData
from .text import TextDataModule as TextDataModule
from .text import stdlib_docs as stdlib_docs
