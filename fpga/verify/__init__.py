# SPDX-License-Identifier: Apache-2.0
"""Recorded jobs, and the comparison of a device with the reference."""
