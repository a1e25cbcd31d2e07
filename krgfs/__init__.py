"""krgfs: checkpoint, restart and migration of processes as files."""

VERSION = "0.1.0"
