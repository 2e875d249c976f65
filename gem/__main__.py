"""`python -m gem` is `gem-kernels`: the bare name `gem` belongs to RubyGems."""

import sys

from gem.cli import main

sys.exit(main())
