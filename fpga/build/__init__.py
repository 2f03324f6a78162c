# SPDX-License-Identifier: Apache-2.0
"""From a configuration to what tools build: sources, compiler, pragma check, build folders."""
