# SPDX-License-Identifier: Apache-2.0
"""Tables of fields that files are checked against: those of `fpga.fields`, which has to stand
alone.
"""

from fpga.fields import Field as Field
from fpga.fields import check_fields as check_fields
from fpga.fields import is_whole as is_whole
from fpga.fields import matching as matching
from fpga.fields import number as number
from fpga.fields import one_of as one_of
from fpga.fields import shown as shown
from fpga.fields import whole as whole
