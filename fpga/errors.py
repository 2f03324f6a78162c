# SPDX-License-Identifier: Apache-2.0
"""What can go wrong on a device, on the way to one, or with a file."""

__all__ = ["CompileError", "DamagedFile", "DeviceError", "DeviceTimeout", "ToolMissing"]


class DeviceError(RuntimeError):
    """A device reports that it could not do what it was asked; the message names the register's
    meaning.

    >>> from fpga import open_device
    >>> device = open_device("reference")
    >>> device.close()
    >>> device.run(None)
    Traceback (most recent call last):
    fpga.errors.DeviceError: this reference device is closed: open another with ...
    """


class DeviceTimeout(TimeoutError):
    """A device did not finish in time. It must be reset or opened anew.

    >>> raise DeviceTimeout("csim: the simulation did not end within 60 s")
    Traceback (most recent call last):
    fpga.errors.DeviceTimeout: csim: the simulation did not end within 60 s
    """


class CompileError(RuntimeError):
    """A compiler or vendor tool failed: command, folder and last lines.

    Args:
        command: as it was run.
        folder: where.
        output: everything the tool wrote; the message quotes its end.

    >>> from fpga.libraries import run
    >>> try:
    ...     run(["false"], seconds=60)
    ... except CompileError as error:
    ...     print(error.command, error.output)
    ['false'] it ended with exit status 1
    """

    def __init__(self, command: list[str], folder: str, output: str) -> None:
        self.command, self.folder, self.output = command, folder, output
        tail = "\n".join(output.strip().splitlines()[-30:])
        super().__init__(f"{' '.join(command)}\nin {folder} failed:\n{tail}")


class ToolMissing(RuntimeError):
    """A program that this step needs is not installed; the message names the package that has it.

    >>> import os
    >>> from unittest.mock import patch
    >>> from fpga.libraries import find_compiler
    >>> with patch.dict(os.environ, CXX="no-such-compiler"):
    ...     find_compiler()
    Traceback (most recent call last):
    fpga.errors.ToolMissing: no C++ compiler 'no-such-compiler' on PATH: install g++ ...
    """


class DamagedFile(ValueError):
    """A file that is not as it was written, or not of the form that it should have; the message
    names it.

    >>> from pathlib import Path
    >>> from fpga.files import read_sealed
    >>> _ = Path("cut.bin").write_bytes(b"no digest")
    >>> read_sealed("cut.bin")
    Traceback (most recent call last):
    fpga.errors.DamagedFile: cut.bin has no digest at its end: it was cut off, or an older ...
    """
