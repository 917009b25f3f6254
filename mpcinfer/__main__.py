"""`python -m mpcinfer`: the same as the command `mpcinfer`."""

from __future__ import annotations

from mpcinfer.cli import main

if __name__ == "__main__":
    main()
