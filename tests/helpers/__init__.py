"""What tests share: where things are, and real data that they skip without."""

from __future__ import annotations

import os
from pathlib import Path

REPO = Path(__file__).parent.parent.parent
SHARED = Path(os.environ.get("DIT_SHARED", REPO.parent / "shared"))
