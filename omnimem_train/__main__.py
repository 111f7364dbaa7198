"""`python -m omnimem_train`, also for launchers: `accelerate launch -m omnimem_train train ...`."""

import sys

from omnimem_train.cli import main

sys.exit(main())
