import sys

from twins_fast.train.cli import main

sys.exit(main())
