"""`python -m fade …`: the command line, for launchers that start modules (`accelerate launch -m fade unlearn …`)."""

import sys

from fade.cli import main

if __name__ == "__main__":
    sys.exit(main())
