"""The example workflows: written as graphs here, as files for ComfyUI's page by ``python -m tools.comfyui.workflows``.

ComfyUI has two forms of a graph. Its page loads and saves workflows: boxes with places on a canvas, and the values of
their widgets in the order in which the page shows them. Its executor takes prompts: for each node, class and inputs by
name. The page turns the first into the second; `as_prompt` does the same here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[2] / "integrations" / "comfyui" / "example_workflows"
#: Inputs that the page shows as widgets; a combo's type is its list of choices.
_WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
#: Widgets beside which the page shows another one: what becomes of the value after a run.
_SEEDS = ("seed", "noise_seed")

PROMPT = 'a ceramic mug with the words "ERNIE" on it, on a wooden table, soft morning light'
_LOAD = {
    "model": "baidu/ERNIE-Image-Turbo",
    "preset": "auto",
    "memory": "auto",
    "transformer": "the model's own",
    "dtype": "auto",
    "prompt_enhancer": True,
}
_DRAW = {
    "prompt": PROMPT,
    "negative_prompt": "",
    "steps": 0,
    "guidance": -1.0,
    "seed": 42,
    "pictures": 1,
    "enhance_prompt": True,
}
_SIZE = {"width": 1024, "height": 1024}
_JOB = {
    "batch_mode": "csv",
    "input_file": "products.csv",
    "output_dir": "products",
    "naming_pattern": "{sku}_{index}.png",
    "batch_size": 4,
    "max_concurrent": 2,
}


def _node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def _save(source: str) -> dict[str, Any]:
    return _node("SaveImage", images=[source, 0], filename_prefix="ernie_accel")


#: Name of the file -> its graph, in the form that the executor takes.
PROMPTS: dict[str, dict[str, dict[str, Any]]] = {
    "load_single_file": {
        "1": _node("ErnieAccelLoad", **_LOAD | {"transformer": "ernie-image-turbo-fp8_scaled.safetensors"}),
        "2": _node("ErnieAccelTextToImage", pipe=["1", 0], **_DRAW, **_SIZE),
        "3": _save("2"),
    },
    "lora": {
        "1": _node("ErnieAccelLora", lora="style.safetensors", scale=0.8),
        "2": _node("ErnieAccelLoad", **_LOAD, loras=["1", 0]),
        "3": _node("ErnieAccelTextToImage", pipe=["2", 0], **_DRAW, **_SIZE),
        "4": _save("3"),
    },
    "text_to_image": {
        "1": _node("ErnieAccelLoad", **_LOAD),
        "2": _node("ErnieAccelTextToImage", pipe=["1", 0], **_DRAW, **_SIZE),
        "3": _save("2"),
    },
    "image_to_image": {
        "1": _node("ErnieAccelLoad", **_LOAD),
        "2": _node("LoadImage", image="example.png"),
        "3": _node("ErnieAccelImageToImage", pipe=["1", 0], image=["2", 0], strength=0.3, **_DRAW),
        "4": _save("3"),
    },
    "batch": {
        "1": _node("ErnieAccelLoad", **_LOAD),
        "2": _node("ErnieAccelBatch", pipe=["1", 0], job=json.dumps(_JOB, indent=2)),
    },
    "evaluate": {
        "1": _node("ErnieAccelLoad", **_LOAD),
        "2": _node(
            "ErnieAccelEvaluate",
            pipe=["1", 0],
            baseline="none",
            prompts=PROMPT,
            **_SIZE,
            **{name: _DRAW[name] for name in ("steps", "guidance", "seed")},
            min_psnr_db=0.0,
        ),
        "3": _node("PreviewImage", images=["2", 0]),
    },
}


def inputs_of(cls: Any) -> dict[str, tuple[Any, ...]]:
    """Return the inputs of a node class by name, in the order in which the page shows them."""
    types = cls.INPUT_TYPES()
    return {**types.get("required", {}), **types.get("optional", {})}


def _is_widget(spec: tuple[Any, ...]) -> bool:
    return isinstance(spec[0], list) or spec[0] in _WIDGETS


def as_workflow(prompt: Mapping[str, Mapping[str, Any]], classes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the form that ComfyUI's page loads."""
    nodes, links = [], []
    outgoing: dict[tuple[str, int], list[int]] = {}
    for target, node in prompt.items():
        sockets = [name for name, spec in inputs_of(classes[node["class_type"]]).items() if not _is_widget(spec)]
        for slot, name in enumerate(sockets):
            if name in node["inputs"]:
                source, output = node["inputs"][name]
                kind = classes[prompt[source]["class_type"]].RETURN_TYPES[output]
                links.append([len(links) + 1, int(source), output, int(target), slot, kind])
                outgoing.setdefault((source, output), []).append(len(links))
    for order, (number, node) in enumerate(prompt.items()):
        cls = classes[node["class_type"]]
        sockets = [(name, spec[0]) for name, spec in inputs_of(cls).items() if not _is_widget(spec)]
        linked = {link[4]: link[0] for link in links if link[3] == int(number)}
        values: list[Any] = []
        for name, spec in inputs_of(cls).items():
            if _is_widget(spec):
                values.append(node["inputs"][name])
                if name in _SEEDS:
                    values.append("fixed")
        names = getattr(cls, "RETURN_NAMES", cls.RETURN_TYPES)
        nodes.append(
            {
                "id": int(number),
                "type": node["class_type"],
                "pos": [40 + 440 * order, 80],
                "size": [400, 120 + 40 * len(values)],
                "flags": {},
                "order": order,
                "mode": 0,
                "inputs": [{"name": n, "type": t, "link": linked.get(slot)} for slot, (n, t) in enumerate(sockets)],
                "outputs": [
                    {"name": n, "type": t, "links": outgoing.get((number, slot), []), "slot_index": slot}
                    for slot, (n, t) in enumerate(zip(names, cls.RETURN_TYPES, strict=True))
                ],
                "properties": {"Node name for S&R": node["class_type"]},
                "widgets_values": values,
            }
        )
    return {
        "last_node_id": max(map(int, prompt)),
        "last_link_id": len(links),
        "nodes": nodes,
        "links": links,
        "groups": [],
        "config": {},
        "extra": {},
        "version": 0.4,
    }


def as_prompt(workflow: Mapping[str, Any], classes: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the form that ComfyUI's executor takes, as its page makes it of a workflow."""
    sources = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    prompt: dict[str, dict[str, Any]] = {}
    for node in workflow["nodes"]:
        inputs: dict[str, Any] = {}
        values = iter(node["widgets_values"])
        for name, spec in inputs_of(classes[node["type"]]).items():
            if _is_widget(spec):
                inputs[name] = next(values)
                if name in _SEEDS:
                    next(values)
        inputs |= {each["name"]: sources[each["link"]] for each in node["inputs"] if each["link"] is not None}
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


def for_small(
    prompt: Mapping[str, Mapping[str, Any]], model: str = "embedded", side: int = 128
) -> dict[str, dict[str, Any]]:
    """Return a graph that draws with a small model, in two steps, so that a CPU does it in a second."""
    text = "a large red circle in the center"
    small: dict[str, Any] = {
        "model": model,
        "preset": "exact",
        "memory": "none",
        "width": side,
        "height": side,
        "steps": 2,
        "guidance": 1.0,
        "prompt": text,
        "prompts": text,
        "enhance_prompt": False,
        "strength": 0.6,
    }
    changed: dict[str, dict[str, Any]] = {}
    for number, node in prompt.items():
        inputs = {name: small.get(name, value) for name, value in node["inputs"].items()}
        if "job" in inputs:
            sizes = {"width": side, "height": side, "steps": 2, "guidance": 1.0}
            inputs["job"] = json.dumps(json.loads(inputs["job"]) | sizes)
        changed[number] = {"class_type": node["class_type"], "inputs": inputs}
    return changed


def main() -> None:
    """Write the files. The nodes of ComfyUI's own that the examples use are known by what they take and give."""
    from tests.comfyui_stand_in import OwnNodes, load_nodes

    classes = {**OwnNodes, **load_nodes().NODE_CLASS_MAPPINGS}
    FOLDER.mkdir(exist_ok=True)
    for name, prompt in PROMPTS.items():
        text = json.dumps(as_workflow(prompt, classes), indent=2, ensure_ascii=False) + "\n"
        (FOLDER / f"{name}.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
