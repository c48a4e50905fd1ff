"""Signals in real processes: what runs, what is said, and the exit code."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from krony.runtime.signals import Interrupt, Stopped, deferred, interruptible

MAIN = """
import os, signal, sys, time
from krony.runtime import signals
from krony.runtime.signals import Stopped, deferred, interruptible
signals.SETTLING = 0.5

def work():
    {work}

try:
    with interruptible(lambda: "the sentence"):
        work()
except Stopped as stopped:
    print(stopped.sentence, file=sys.stderr)
    raise
"""

SLEEP = """
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        time.sleep(0.1)
        print("tidied up")
"""

SAFE_POINTS = """
    with deferred() as stop:
        print("ready", flush=True)
        for step in range(6000):
            time.sleep(0.01)
            if stop:
                time.sleep(0.5)
                print("saved")
                stop.check()
                print("not reached")
"""


def started(work: str, **options) -> subprocess.Popen:
    code = MAIN.format(work=work.strip())
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", code], **pipes, **options)
    assert process.stdout.readline() == "ready\n", process.stderr.read()
    return process


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
@pytest.mark.parametrize(("work", "said"), [(SLEEP, "tidied up\n"), (SAFE_POINTS, "saved\n")])
def test_work_is_tidied_up_and_the_exit_code_says_the_signal(name, code, work, said):
    process = started(work)
    process.send_signal(getattr(signal, name))
    assert process.communicate() == (said, "the sentence\n")
    assert process.returncode == code


def test_the_signal_of_a_launcher_right_after_the_terminals_changes_nothing():
    """Under torchrun Ctrl-C reaches a process twice: as SIGINT from the terminal and as SIGTERM from torchrun."""
    for work, said in ((SLEEP, "tidied up\n"), (SAFE_POINTS, "saved\n")):
        process = started(work)
        process.send_signal(signal.SIGINT)
        time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.communicate() == (said, "the sentence\n")
        assert process.returncode == 130


@pytest.mark.parametrize(
    ("number", "said", "code"),
    [
        pytest.param(signal.SIGTERM, "saved\n", 143, id="a second SIGTERM waits"),
        pytest.param(signal.SIGINT, "", 130, id="a second Ctrl-C does not"),
    ],
)
def test_a_second_signal_while_work_is_being_saved(number, said, code):
    process = started(SAFE_POINTS.replace("time.sleep(0.5)", 'print("saving", flush=True); time.sleep(2)'))
    process.send_signal(number)
    assert process.stdout.readline() == "saving\n"
    time.sleep(0.8)
    process.send_signal(number)
    assert process.communicate()[0] == said and process.returncode == code


def test_what_is_ignored_stays_ignored():
    """As nohup does with SIGHUP."""
    process = started(SLEEP, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    process.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.3)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode == 143


def test_handlers_are_put_back_and_another_programs_are_left():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    with interruptible(str), deferred(), interruptible(str):
        assert signal.getsignal(signal.SIGTERM) not in before
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before
    seen = []
    signal.signal(signal.SIGTERM, lambda *_: seen.append(1))
    try:
        with interruptible(str):
            os.kill(os.getpid(), signal.SIGTERM)
        assert seen == [1]
    finally:
        signal.signal(signal.SIGTERM, before[1])


def test_the_innermost_block_says_the_sentence():
    with pytest.raises(Stopped) as stopped, interruptible(lambda: "outer"), interruptible(lambda: "inner"):
        os.kill(os.getpid(), signal.SIGTERM)
    assert (stopped.value.code, stopped.value.sentence) == (143, "inner")
    with pytest.raises(Stopped) as stopped, interruptible(lambda: "a plain one"):
        raise KeyboardInterrupt
    assert (stopped.value.code, stopped.value.sentence) == (130, "a plain one")


def test_an_error_on_the_way_to_the_safe_point_says_more_than_the_signal():
    with pytest.raises(ValueError, match="disk"), deferred():
        os.kill(os.getpid(), signal.SIGTERM)
        raise ValueError("the disk is full")
    with deferred() as stop:
        assert not stop  # forgotten with the block
    with pytest.raises(Interrupt), deferred():
        os.kill(os.getpid(), signal.SIGTERM)


def test_another_thread_works_as_without():
    seen = []

    def work():
        with interruptible(str), deferred() as stop:
            seen.append(bool(stop))
            stop.check()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]
