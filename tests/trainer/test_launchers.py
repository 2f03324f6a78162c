# SPDX-License-Identifier: Apache-2.0
"""Scripts started as Lightning's guides say: by torchrun, on two hosts, and by a Trainer that
forks. What comes of it is what
`distributed_runs` gets without any launcher."""

import json
import os
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from .distributed_runs import run

pytestmark = [pytest.mark.gloo, pytest.mark.slow]

SCRIPT = str(Path(__file__).with_name("launched_script.py"))
HOSTS = ("10.77.0.1", "10.77.0.2")
_PATIENCE = 900  # for a script that hangs, on a machine that does other things, too


def outcomes(folder, ranks):
    """What all ranks left, without what depends on the launcher; the same for all."""
    results = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]
    places = [(r.pop("node"), r.pop("address")) for r in results]
    assert all(r == results[0] for r in results)
    return results[0], places


def environment(**more):
    lost = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK", "LOCAL_RANK", "NODE_RANK")
    kept = {key: value for key, value in os.environ.items() if key not in lost}
    return {**kept, "OMP_NUM_THREADS": "1", **more}


def test_torchrun_on_one_host(tmp_path):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        SCRIPT,
        str(tmp_path),
        "2",
        "1",
    ]
    env = environment(GLOO_SOCKET_IFNAME="lo")
    done = subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=_PATIENCE, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert outcomes(tmp_path, 2)[0] == run("even", 2)[0]["value"]


@contextmanager
def two_hosts():
    """Two network namespaces with a cable between them; their names."""
    names = [f"dynasty{os.getpid()}{end}" for end in "ab"]

    def ip(*arguments):
        return subprocess.run(["ip", *arguments], capture_output=True, text=True, check=True)

    with ExitStack() as stack:
        try:
            for name in names:
                ip("netns", "add", name)
                stack.callback(ip, "netns", "del", name)
            ip(
                "link",
                "add",
                "cable",
                "netns",
                names[0],
                "type",
                "veth",
                "peer",
                "name",
                "cable",
                "netns",
                names[1],
            )
            for name, address in zip(names, HOSTS, strict=True):
                ip("-n", name, "addr", "add", f"{address}/24", "dev", "cable")
                ip("-n", name, "link", "set", "cable", "up")
                ip("-n", name, "link", "set", "lo", "up")
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("needs root and network namespaces")
        yield names


def test_two_hosts_of_two_devices(tmp_path):
    """The script once on each host, told of the first one's address; each starts a process of its
    own for its second device.
    """
    with two_hosts() as hosts, ExitStack() as stack:
        nodes = []
        for node, host in enumerate(hosts):
            env = environment(
                MASTER_ADDR=HOSTS[0],
                MASTER_PORT="29500",
                NODE_RANK=str(node),
                GLOO_SOCKET_IFNAME="cable",
            )
            command = ["ip", "netns", "exec", host, sys.executable, SCRIPT, str(tmp_path), "2", "2"]
            nodes.append(
                subprocess.Popen(
                    command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
                )
            )
            stack.callback(nodes[-1].kill)
        said = [node.communicate(timeout=_PATIENCE)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said[0][-2000:] + said[1][-2000:]
    result, places = outcomes(tmp_path, 4)
    assert places == [(0, HOSTS[0]), (0, HOSTS[0]), (1, HOSTS[0]), (1, HOSTS[0])]
    assert result == run("even", 4)[0]["value"]


def test_processes_that_end_with_fit_say_that_map_and_figures_do():
    (result,) = run("forked", 1)
    assert (
        sum(
            "ddp_spawn, ddp_fork and ddp_notebook train in end with fit" in text
            for text in result["value"]["said"]
        )
        == 1
    )
    assert "has ended with their processes" in result["value"]["afterwards"]
