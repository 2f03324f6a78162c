# SPDX-License-Identifier: Apache-2.0
"""Autograd operators and layers."""

from .attention import MultiheadAttention as MultiheadAttention
