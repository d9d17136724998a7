# SPDX-License-Identifier: Apache-2.0
"""The compiling process: `python -m vgw.loader DIRECTORY NAME TYPE`, see vgw.loader.compiler."""

import sys

from vgw.loader.compiler import main

sys.exit(main(sys.argv[1:]))
