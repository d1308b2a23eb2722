"""`python -m stickyproxy` is the same as `stickyproxy`."""

from stickyproxy.cli import main

if __name__ == "__main__":
    main(prog_name="stickyproxy")
