"""Callables like a pipeline, in a module of their own so that child processes can load them."""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import SimpleNamespace

from PIL import Image

from ernie_accel.batch.engines.prompts import PromptStage


class StepPipe:
    """Runs steps and calls back after each; the prompt says what goes wrong."""

    def __init__(self, scratch: str = "") -> None:
        self.scratch = scratch

    def __call__(self, prompt, generator, width=32, height=32, callback_on_step_end=None):
        if prompt == "crash":
            os._exit(7)
        if prompt == "crash once" and not Path(self.scratch, "crashed").exists():
            Path(self.scratch, "crashed").touch()
            os._exit(7)
        if prompt == "fail":
            raise LookupError("no such word")
        if prompt == "hang":
            time.sleep(60)
        for step in range(200 if prompt == "slow" else 2):
            time.sleep(0.01)
            if callback_on_step_end is not None:
                callback_on_step_end(self, step, 0, {})
        colour = (generator.initial_seed() % 256, 10, 20)
        picture = Image.new("RGB", (width, height), colour)
        picture.putpixel((0, 0), (os.getpid() % 256, 0, 0) if prompt == "pid" else (1, 2, 3))
        return SimpleNamespace(images=[picture])


def load_nothing():
    raise FileNotFoundError("no weights here")


def load_tiny_ernie():
    from tests.pipelines import tiny_ernie

    return tiny_ernie()


def load_ernie_that_hangs_on(prompt):
    """Return a pipeline whose text encoder never comes back from a batch with the prompt."""
    pipe = load_tiny_ernie()
    tokens = pipe.tokenizer(prompt)["input_ids"]
    forward = pipe.text_encoder.forward

    def hang_or_encode(*arguments, input_ids, **options):
        if any(row[: len(tokens)] == tokens for row in input_ids.tolist()):
            time.sleep(60)
        return forward(*arguments, input_ids=input_ids, **options)

    pipe.text_encoder.forward = hang_or_encode
    return pipe


def load_ernie_that_notes(scratch, crash_at=None, hang_at=None):
    """Return a pipeline with a prompt enhancer that notes its process, what it enhances and what it encodes, in files.

    The process that enhances the prompt `crash_at` ends, the first time; the one that enhances `hang_at` hangs.
    """
    from tests.pipelines import tiny_ernie

    pipe = tiny_ernie(enhancer=True)
    enhance, encode = PromptStage._enhance, PromptStage._encode

    def note(name, count):
        with Path(scratch, name).open("a") as file:
            file.write(f"{os.getpid()} {count}\n")

    def enhance_and_note(self, requests, expired):
        crashed = Path(scratch, "crashed")
        if any(request.prompt == crash_at for request in requests) and not crashed.exists():
            crashed.touch()
            os._exit(7)
        if any(request.prompt == hang_at for request in requests):
            Path(scratch, "hangs").touch()
            time.sleep(60)
        note("enhanced", len(requests))
        return enhance(self, requests, expired)

    def encode_and_note(self, texts):
        note("encoded", len(texts))
        return encode(self, texts)

    PromptStage._enhance, PromptStage._encode = enhance_and_note, encode_and_note  # in a process of its own
    return pipe
