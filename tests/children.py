"""Processes that tests start: none outlives its test, and some hold still where they are to be
interrupted.
"""

import subprocess
import sys

RUNNING = []

# Before a program: it says "holds" once three answers are in its output file, and goes no further.
HOLDS_AFTER_THREE = """
import sys, time
from gptoss_jax.cli import answers
append = answers.Answers.append
def held(self, rows):
    append(self, rows)
    if len(self.places) >= 3:
        print("holds", flush=True)
        time.sleep(600)
answers.Answers.append = held
"""


def start(command, **options):
    """A Popen of text, ended after the test if that has not done so."""
    process = subprocess.Popen(command, text=True, **options)
    RUNNING.append(process)
    return process


def holding(program, *words, **options):
    """A program that has come to the place where it holds."""
    process = start([sys.executable, "-c", program, *words], stdout=subprocess.PIPE, **options)
    assert "holds\n" in iter(process.stdout.readline, ""), process.wait()
    return process


def end():
    """Ends all that run; pipes are closed too, which would fail a later test."""
    while RUNNING:
        with RUNNING.pop() as process:
            process.kill()
