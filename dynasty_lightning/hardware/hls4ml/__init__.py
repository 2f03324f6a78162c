# SPDX-License-Identifier: Apache-2.0
"""Networks for hls4ml, with layers of the core. hls4ml itself is optional: `types` and `network` do
without it.
"""

MISSING = "hls4ml is missing or cannot be imported: pip install 'dynasty-lightning[fpga]' ({error})"
