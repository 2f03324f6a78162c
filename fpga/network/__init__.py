# SPDX-License-Identifier: Apache-2.0
"""Exported networks: their programs, and what runs and deploys them."""
