# SPDX-License-Identifier: Apache-2.0
"""Policies to compare with."""
