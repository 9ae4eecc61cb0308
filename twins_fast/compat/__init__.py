"""The calls that other codebases for adversarial training make, at this package's speed (docs/drop-in.md).

A module for each codebase, of the names and signatures that it has; none of them needs the other package installed.
"""
