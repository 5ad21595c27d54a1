"""Run the example workflows through ComfyUI itself: ``python -m tools.comfyui.run PATH`` (a checkout of ComfyUI).

Headless, on the CPU, with the embedded model: its own loader imports the nodes, its own checks look at each graph, and
its own executor runs it. It needs ComfyUI's requirements beside this library's; no server is started, and nothing is
downloaded. ComfyUI's folders for models, input and output are in a temporary folder.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tools.comfyui.workflows import FOLDER, as_prompt, for_small

NODES = Path(__file__).parents[2] / "integrations" / "comfyui"


class _Server:
    """Receives the progress that the executor reports; ComfyUI's own server sends it to the page."""

    def __init__(self) -> None:
        self.client_id = "tools.comfyui"
        self.last_node_id: str | None = None
        self.last_prompt_id: str | None = None
        self.sent: list[tuple[Any, Any]] = []
        self.steps: list[tuple[float, float]] = []
        self.interrupt: Callable[[], None] | None = None

    def send_sync(self, event: Any, data: Any, sid: Any = None) -> None:
        self.sent.append((event, data))

    def show_progress(self, value: float, total: float, preview: Any = None, **_: Any) -> None:
        """Be the hook that ComfyUI's ``main`` sets for progress bars."""
        self.steps.append((value, total))
        if self.interrupt is not None:
            self.interrupt()


def run(comfyui: Path, root: Path) -> Iterator[str]:
    """Run all examples and what is done to their pipes, and yield a line about each.

    Raises:
        RuntimeError: One of them was refused, failed, or left something undone.
    """
    _prepare(root)  # first: ComfyUI has a package `tests`, too
    sys.argv = ["main.py", "--cpu", "--base-directory", str(root)]
    sys.path.insert(0, str(comfyui))
    os.chdir(comfyui)
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.model_management as management
    import comfy.utils
    import execution
    import nodes
    from comfyui_version import __version__

    if not asyncio.run(nodes.load_custom_node(str(NODES))):
        raise RuntimeError("ComfyUI did not load the nodes")
    ours = sum(name.startswith("ErnieAccel") for name in nodes.NODE_CLASS_MAPPINGS)
    yield f"ComfyUI {__version__} loaded {ours} nodes"
    server = _Server()
    comfy.utils.set_progress_bar_global_hook(server.show_progress)
    executor = execution.PromptExecutor(server)
    for path in sorted(FOLDER.glob("*.json")):
        workflow = json.loads(path.read_text(encoding="utf-8"))
        prompt = for_small(as_prompt(workflow, nodes.NODE_CLASS_MAPPINGS))
        yield f"{path.stem}: {_execute(execution, executor, server, path.stem, prompt)}"
    yield from _memory(execution, executor, server, management, nodes)
    yield from _interrupt(execution, executor, server, management, nodes)
    yield from _refusal(execution, nodes)


def _prepare(root: Path) -> None:
    from tests.test_batch_lora import write_lora
    from tests.test_comfyui import fill

    import ernie_accel.demo

    for name in ("input", "output", "temp", "models/diffusion_models", "models/loras"):
        (root / name).mkdir(parents=True, exist_ok=True)
    pipe = ernie_accel.demo.load(prompt_enhancer=False)
    fill(root, pipe)
    write_lora(root / "models" / "loras" / "style.safetensors", 1, pipe)


def _execute(execution: Any, executor: Any, server: _Server, name: str, prompt: dict[str, Any]) -> str:
    valid, error, outputs, node_errors = asyncio.run(execution.validate_prompt(name, prompt, None))
    if not valid:
        raise RuntimeError(f"{name} was refused: {error} {node_errors}")
    server.sent.clear()
    server.steps.clear()
    executor.execute(prompt, name, {"client_id": server.client_id}, outputs)
    if not executor.success:
        raise RuntimeError(f"{name} failed: {executor.status_messages[-1]}")
    shown = [data["output"] for event, data in server.sent if event == "executed" and data.get("output")]
    images = sum(len(each.get("images", ())) for each in shown)
    return f"{images} pictures shown, {len(server.steps)} steps of progress"


def _text_to_image(nodes: Any, **changes: Any) -> dict[str, Any]:
    workflow = json.loads((FOLDER / "text_to_image.json").read_text(encoding="utf-8"))
    prompt = for_small(as_prompt(workflow, nodes.NODE_CLASS_MAPPINGS))
    prompt["2"]["inputs"] |= changes
    return prompt


def _memory(execution: Any, executor: Any, server: _Server, management: Any, nodes: Any) -> Iterator[str]:
    _execute(execution, executor, server, "before", _text_to_image(nodes, seed=1))
    names = [type(each.model.model).__name__ for each in management.current_loaded_models]
    if names != ["ErnieAccelPipe"]:
        raise RuntimeError(f"ComfyUI knows of {names}; expected the pipe")
    management.unload_all_models()
    if management.current_loaded_models:
        raise RuntimeError("ComfyUI unloaded all models, and the pipe is still there")
    _execute(execution, executor, server, "after", _text_to_image(nodes, seed=2))
    yield "memory: listed, unloaded with all models, loaded again for the next picture"


def _interrupt(execution: Any, executor: Any, server: _Server, management: Any, nodes: Any) -> Iterator[str]:
    server.interrupt = management.interrupt_current_processing
    prompt = _text_to_image(nodes, seed=3, steps=8)
    server.steps.clear()
    executor.execute(prompt, "interrupted", {"client_id": server.client_id}, ["3"])
    server.interrupt = None
    if executor.success or executor.status_messages[-1][0] != "execution_interrupted":
        raise RuntimeError(f"the interrupt was ignored: {executor.status_messages[-1]}")
    if len(server.steps) != 1:
        raise RuntimeError(f"the interrupt came after the first step, and {len(server.steps)} were made")
    yield f"interrupt: ended within a step; afterwards {_execute(execution, executor, server, 'again', prompt)}"


def _refusal(execution: Any, nodes: Any) -> Iterator[str]:
    prompt = _text_to_image(nodes)
    prompt["1"]["inputs"]["model"] = "/etc"
    valid, _, _, node_errors = asyncio.run(execution.validate_prompt("refused", prompt, None))
    if valid:
        raise RuntimeError("a model outside ComfyUI's folders was accepted")
    (found,) = node_errors["1"]["errors"]
    yield f"refusal: {found['details']}"


def main() -> None:
    """Run them in a temporary folder."""
    if len(sys.argv) != 2 or not (Path(sys.argv[1]) / "execution.py").is_file():
        raise SystemExit("usage: python -m tools.comfyui.run PATH, the folder of a checkout of ComfyUI")
    with tempfile.TemporaryDirectory() as root:
        for line in run(Path(sys.argv[1]).resolve(), Path(root)):
            print(line, flush=True)


if __name__ == "__main__":
    main()
