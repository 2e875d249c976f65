"""Run `gem-kernels` as `python -m gem`; a command named `gem` would clash with RubyGems."""

import sys

from gem.cli import main

sys.exit(main())
