# SPDX-License-Identifier: Apache-2.0
"""Decides widths: statistics in, map out."""
