# SPDX-License-Identifier: Apache-2.0
"""Formats, rounding, quantization and block GEMMs: functions and frozen dataclasses on torch.
`docs/reference/numerics.md` is the specification.
"""
