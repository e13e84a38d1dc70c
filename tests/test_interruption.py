"""The first signal is noted, the second one ends the process, and the previous handlers are restored."""

import os
import signal
import threading

import pytest

from electra_fast.train import interruption


@pytest.mark.parametrize("number", interruption.NUMBERS)
def test_the_first_signal_is_noted_and_the_second_would_end_the_process(number):
    seen, before = [], signal.signal(number, signal.SIG_DFL)
    try:
        with interruption.noted(seen.append):
            os.kill(os.getpid(), number)
            assert seen == [number]
            assert signal.getsignal(number) is signal.SIG_DFL
        assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, before)


def test_nohup_keeps_sighup_ignored():
    seen, before = [], signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interruption.noted(seen.append):
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert seen == []
    finally:
        signal.signal(signal.SIGHUP, before)


def test_in_another_thread_the_handlers_stay_unchanged():
    before, found = signal.getsignal(signal.SIGTERM), []

    def run():
        with interruption.noted(found.append):
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [before]
