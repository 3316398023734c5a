"""Imported by stages that compute in a few large operations, before anything that loads torch: see dit/commands/_threads.py.

Training's operations are small: it takes processes of one thread (stages/processes.py).
"""

from __future__ import annotations

from dit.commands._threads import sleep_while_waiting

sleep_while_waiting()
