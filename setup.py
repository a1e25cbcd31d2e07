"""What pyproject.toml cannot say: agent/keeper*.c are compiled to agent/krg-keeper.

The keeper is linked statically: it is the only process of krgfs that stays for as long as a user's
tree, and so neither an upgrade of the C library nor a lost mount may touch it, and it stays small.
"""

import os
import shlex
import subprocess

from setuptools import Command, Distribution, setup
from setuptools.command.build import build

SOURCES = ("agent/keeper.c", "agent/keeper_daemon.c", "agent/keeper_tree.c")
HEADER = "agent/keeper.h"
PROGRAM = "agent/krg-keeper"


def compile_keeper(program: str, *extra: str, root: str = "") -> None:
    """Compile the keeper to `program`, which is replaced in one step: running keepers keep theirs.

    `root` is the directory of this file, where it is not the current one.
    The environment's CC, CFLAGS and LDFLAGS are heeded. Raises SystemExit with a sentence.
    """
    part = f"{program}.part"
    sources = [os.path.join(root, each) for each in SOURCES]
    command = [
        *shlex.split(os.environ.get("CC", "cc")),
        *("-std=c11", "-D_GNU_SOURCE", "-Os", "-Wall", "-Wextra"),
        *shlex.split(os.environ.get("CFLAGS", "")),
        *extra,
        *("-static", "-s", "-o", part, *sources),
        *shlex.split(os.environ.get("LDFLAGS", "")),
    ]
    try:
        subprocess.run(command, check=True)
    except (OSError, subprocess.CalledProcessError) as exc:
        raise SystemExit(
            f"cannot build krg-keeper from {' '.join(sources)}: {exc}; krgfs needs a C compiler and"
            " the static C library (Debian: gcc libc6-dev; Fedora: gcc glibc-static; Alpine: gcc"
            " musl-dev linux-headers)"
        ) from None
    os.replace(part, program)


class BuildKeeper(Command):
    """Build krg-keeper: into the wheel, or beside its sources for an editable install."""

    description = "compile the keeper"
    user_options = []

    def initialize_options(self):
        self.build_lib = None
        self.editable_mode = False

    def finalize_options(self):
        self.set_undefined_options("build_py", ("build_lib", "build_lib"))

    def run(self):
        (program,) = self.get_outputs()
        os.makedirs(os.path.dirname(program), exist_ok=True)
        compile_keeper(program)

    def get_source_files(self):
        return [*SOURCES, HEADER]

    def get_outputs(self):
        return [PROGRAM if self.editable_mode else os.path.join(self.build_lib, PROGRAM)]

    def get_output_mapping(self):
        return {}


class Build(build):
    sub_commands = [*build.sub_commands, ("build_keeper", None)]


class MachineDistribution(Distribution):
    """A wheel with a program in it is for one kind of machine."""

    def has_ext_modules(self):
        return True


if __name__ == "__main__":
    setup(cmdclass={"build": Build, "build_keeper": BuildKeeper}, distclass=MachineDistribution)
