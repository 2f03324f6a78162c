# SPDX-License-Identifier: Apache-2.0
"""One process that trains, offloads and tears down for as long as wanted, and must not grow. A
short form is a test of the suite.
"""
