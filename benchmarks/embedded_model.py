"""Claim: the embedded model draws what it is asked. On 1,000 unseen prompts, 8 steps, float32: at least 95 %
of objects.

    python benchmarks/embedded_model.py                       # all figures; minutes on a GPU
    python benchmarks/embedded_model.py --prompts 100 --requests 40 --steps 8 --device cpu    # under a minute

Every prompt has its own noise, drawn on the CPU, so a shorter run draws a prefix of the longer one's
pictures.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from tools.embedded_model.evaluate import describe, evaluate, summary

from ernie_accel.demo import load
from ernie_accel.embedded import MODEL_FOLDER


def main() -> None:
    """Measure the stored model and print, or write, the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--requests", type=int, default=500, help="short prompts for the prompt enhancer")
    parser.add_argument("--steps", type=int, nargs="+", default=[8, 4, 20])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    pipe = load().to(options.device)
    pipe.set_progress_bar_config(disable=True)
    batch_size = 64 if options.device.startswith("cuda") else 16
    figures = evaluate(pipe, options.prompts, options.requests, options.steps, batch_size)
    print(summary(figures))
    if options.out is not None:
        steps = " ".join(map(str, options.steps))
        chosen = f"--prompts {options.prompts} --requests {options.requests} --steps {steps}"
        record = {"command": f"python benchmarks/embedded_model.py {chosen}", **describe(pipe, MODEL_FOLDER)}
        text = json.dumps(record | {"figures": figures}, indent=1, ensure_ascii=False)
        options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
