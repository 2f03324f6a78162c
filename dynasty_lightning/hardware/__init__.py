# SPDX-License-Identifier: Apache-2.0
"""Between the emulation and the core: operands, offload, programs, checks."""
