# SPDX-License-Identifier: Apache-2.0
"""What a step costs, from the integer widths that its blocks got. `docs/concepts/cost.md` states
what is counted.
"""
