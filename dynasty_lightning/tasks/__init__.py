# SPDX-License-Identifier: Apache-2.0
"""Data sets and models by name, as the module and the data that a Trainer takes."""

from .tasks import TASK_DATA as TASK_DATA
from .tasks import TASK_MODELS as TASK_MODELS
from .tasks import TEXT_DATA as TEXT_DATA
from .tasks import TEXT_MODELS as TEXT_MODELS
from .tasks import Task as Task
from .tasks import build_task as build_task
from .tasks import check_decay as check_decay
from .tasks import check_pair as check_pair
