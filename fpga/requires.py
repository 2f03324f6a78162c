# SPDX-License-Identifier: Apache-2.0
"""Which Python it takes: imported before all else, so that an older one reports it. Therefore
written as Python 3.6 was.
"""

import sys

if sys.version_info < (3, 10):  # noqa: UP036 - a copied folder has no pip that would look at requires-python
    found = f"{sys.version_info[0]}.{sys.version_info[1]}"
    raise ImportError(
        f"fpga needs Python 3.10 or later, and this is {found}: on a board, take PYNQ's image "
        f"3.0 or later"
    )
