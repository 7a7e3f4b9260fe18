"""`python -m certifl`: the command line."""

from __future__ import annotations

from certifl.cli import main

if __name__ == "__main__":
    main()
