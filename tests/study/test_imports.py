"""What a run loads."""

import subprocess
import sys

SMALL = "data='digits', model='mlp', epochs=1, batch_size=32, train_samples=64, seed=0"
CODE = f"""
import sys
from dynasty_lightning.study.config import RunConfig
from dynasty_lightning.study.run import train_one
record = train_one(RunConfig(method=sys.argv[1], {SMALL}))
assert record["status"] == "complete", record
print("dynasty_lightning.hardware" in sys.modules)
"""


def loads_hardware(method):
    answer = subprocess.run(
        [sys.executable, "-c", CODE, method], capture_output=True, text=True, check=True
    )
    return answer.stdout.strip() == "True"


def test_only_a_run_with_blocks_loads_hardware():
    assert not loads_hardware("float32")
    assert loads_hardware("uniform8")
