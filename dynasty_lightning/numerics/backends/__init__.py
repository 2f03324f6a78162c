# SPDX-License-Identifier: Apache-2.0
"""Who computes: kernels in C++, in Triton and in plain torch."""
