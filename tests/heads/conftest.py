"""Lets the tests here import head_cases, which stands next to them."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
