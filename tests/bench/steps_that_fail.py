"""Steps of a first contact that go wrong in every way, for `test_first_contact.py`; they import nothing heavy."""

import os
import time


def fails(contact):
    with contact.part("right"):
        pass
    with contact.part("wrong", shape="4 x 5") as found:
        found["seen"] = 7
        raise ValueError("not the same")
    with contact.part("after it") as found:
        found["text"] = "goes on"


def crashes(contact):
    with contact.part("before"):
        pass
    with contact.part("at the brink"):
        os.abort()


def hangs(contact):
    with contact.part("waits"):
        time.sleep(600)


def works(contact):
    with contact.part("fine"):
        pass
