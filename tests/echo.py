"""What a worker serves in tests: it imports nothing, and breaks its process in every way."""

import ctypes
import os
import signal
import time


def hang(*_):
    while True:
        time.sleep(1)


def fault(*_):
    ctypes.string_at(0)


def be_killed(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def leave(*_):
    os._exit(3)


BREAKS = {"hang": hang, "fault": fault, "killed": be_killed, "exit": leave}


class Echo:
    """Knows how often it was asked."""

    def __init__(self, first):
        self.count = first

    def add(self, value):
        self.count += value
        return self.count

    def fail(self):
        raise ValueError("one\ntwo")

    def misbehave(self, how):
        BREAKS[how]()

    def ruin(self):
        self.add = None
        raise RuntimeError("a bad address")

    def ruined(self):
        return self.add is None
