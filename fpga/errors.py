# SPDX-License-Identifier: Apache-2.0
"""What can go wrong on a device or on the way to one."""


class DeviceError(RuntimeError):
    """A device reports that it could not do what it was asked; the message names the register's
    meaning.
    """


class DeviceTimeout(TimeoutError):
    """A device did not finish in time. It must be reset or opened anew."""


class CompileError(RuntimeError):
    """A compiler or vendor tool failed: command, folder and last lines.

    Args:
        command: as it was run.
        folder: where.
        output: everything the tool wrote; the message quotes its end.
    """

    def __init__(self, command: list[str], folder: str, output: str) -> None:
        self.command, self.folder, self.output = command, folder, output
        tail = "\n".join(output.strip().splitlines()[-30:])
        super().__init__(f"{' '.join(command)}\nin {folder} failed:\n{tail}")


class ToolMissing(RuntimeError):
    """A program that this step needs is not installed; the message says which package has it."""
