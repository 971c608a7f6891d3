"""python -m fpsim: the command line, as torchrun starts it."""

from fpsim.cli import main

main()
