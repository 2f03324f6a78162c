# SPDX-License-Identifier: Apache-2.0
"""Files that are whole or not there, and read only if they are what was written: those of
`fpga.files`, which has to stand alone.
"""

from fpga.archives import parse_array as parse_array
from fpga.archives import parse_arrays as parse_arrays
from fpga.files import DamagedFile as DamagedFile
from fpga.files import cache_folder as cache_folder
from fpga.files import check_seal as check_seal
from fpga.files import read_bounded as read_bounded
from fpga.files import read_sealed as read_sealed
from fpga.files import remove_leftovers as remove_leftovers
from fpga.files import unsealed as unsealed
from fpga.files import write_atomically as write_atomically
from fpga.records import DIGEST_FIELD as DIGEST_FIELD
from fpga.records import MOST_JSON_BYTES as MOST_JSON_BYTES
from fpga.records import check_record as check_record
from fpga.records import parse_json as parse_json
from fpga.records import read_json as read_json
from fpga.records import record_digest as record_digest
from fpga.records import seal_record as seal_record
from fpga.records import without_digest as without_digest
