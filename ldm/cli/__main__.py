"""`python -m ldm.cli`, for torchrun."""

from ldm.cli import main

main()
