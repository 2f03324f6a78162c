# SPDX-License-Identifier: Apache-2.0
"""Precision maps: which widths which block is asked for, and their files."""
