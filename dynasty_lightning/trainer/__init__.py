# SPDX-License-Identifier: Apache-2.0
"""Inside a Lightning Trainer: plugin, callback, analysis."""
