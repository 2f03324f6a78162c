# SPDX-License-Identifier: Apache-2.0
"""Networks for hls4ml, with layers of the core."""
