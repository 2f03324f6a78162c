# SPDX-License-Identifier: Apache-2.0
"""Grids of runs: configured, trained, recorded, compared."""
