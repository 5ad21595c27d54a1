"""What the guides of Z-Image and NewBie-image recommend: each is one call, as docs/z-image-and-newbie.md writes it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import ernie_accel
from ernie_accel import BatchPromptEncoding, Context, TruncatePrompts
from ernie_accel.batch.input.newbie import structure_problems
from tests.pipelines import tiny_lumina2, tiny_newbie, tiny_z_image

PAGE = Path(__file__).parents[1] / "docs" / "z-image-and-newbie.md"
EXAMPLES = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
H100, T4, CPU = (Context.named(name) for name in ("h100", "t4", "cpu"))
LONG = "a big red circle on a small blue square on a red circle"
XML = "<character_1><n>1girl</n></character_1><general_tags><style>anime</style></general_tags>"


def wanted(code: str, monkeypatch: pytest.MonkeyPatch) -> tuple[tuple[Any, ...], str]:
    """Return the transforms and the preset that an example of the page asks for."""
    asked: list[Any] = []
    monkeypatch.setattr(ernie_accel, "optimize", lambda pipe, *transforms, preset: asked.append((transforms, preset)))
    exec(code[: code.index("images =")], {"pipe": None})
    monkeypatch.undo()
    return asked[0]  # type: ignore[no-any-return]


def shortened(pipe: Any) -> Any:
    """The tiny tokenizer takes 64 tokens, a tiny picture 16."""
    pipe.tokenizer.model_max_length = 512
    return pipe


def test_the_page_has_one_call_for_each_of_the_two() -> None:
    assert [code.count("optimize(") for code in EXAMPLES] == [1, 1]


def test_z_image_follows_its_guides_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    transforms, preset = wanted(EXAMPLES[0], monkeypatch)
    assert TruncatePrompts(480, keep="tail") in transforms
    assert ernie_accel.plan(shortened(tiny_z_image()), *transforms, preset=preset, context=H100).ok
    pipe = tiny_z_image()
    # Compiling takes half a minute on a CPU, and the tiny pipe has positions for 200 tokens.
    transforms = tuple(each for each in transforms if type(each).__name__ not in ("Compile", "TruncatePrompts"))
    transforms += (TruncatePrompts(16, keep="tail"),)
    kept = [each for each in ernie_accel.presets[preset].transforms if type(each).__name__ != "Compile"]
    names = {type(each) for each in transforms}
    ernie_accel.optimize(pipe, *transforms, *[each for each in kept if type(each) not in names], context=CPU)
    calls: list[Any] = []
    pipe.transformer.register_forward_pre_hook(lambda _, args: calls.append((len(args[0]), args[1][0].item())))
    long = " ".join([LONG] * 3)
    with pytest.warns(UserWarning, match="its beginning was cut to leave 16"):
        result = pipe(long, height=64, width=64, output_type="latent", generator=torch.Generator().manual_seed(0))
    assert [rows for rows, _ in calls] == [1] * 9  # nine steps, and no second half for guidance
    assert pipe.transformer.dtype == torch.bfloat16
    assert len(result.warnings) == 1
    sigmas = [1 - time for _, time in calls]
    ramp = [(sigmas[0] ** (1 / 7) + i / 8 * (sigmas[-1] ** (1 / 7) - sigmas[0] ** (1 / 7))) ** 7 for i in range(9)]
    assert sigmas == pytest.approx(ramp, abs=2e-3)  # Karras' spacing, from the first sigma to the last
    assert type(pipe.scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"


@pytest.mark.parametrize("make", [tiny_newbie, tiny_lumina2])
def test_newbie_follows_its_guides_in_one_call(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    transforms, preset = wanted(EXAMPLES[1], monkeypatch)
    assert ernie_accel.plan(make(), *transforms, preset=preset, context=H100).ok
    refused = str(ernie_accel.plan(make(), *transforms, preset=preset, context=T4))
    assert "bfloat16" in refused
    assert "use 'float16'" in refused
    pipe = make()
    names = {type(each).__name__ for each in transforms} | {"Compile"}
    kept = [each for each in ernie_accel.presets[preset].transforms if type(each).__name__ not in names]
    ernie_accel.optimize(pipe, *transforms, *kept, context=CPU)
    overflow, steps = [], []

    def nan_in_bfloat16(module: Any, args: Any, out: Any) -> Any:
        steps.append(module.dtype)
        if module.dtype == torch.bfloat16 and len(steps) == 3:
            overflow.append(len(steps))
            return (out[0] * float("nan"),)
        return None

    pipe.transformer.register_forward_hook(nan_in_bfloat16)
    arguments: dict[str, Any] = {"height": 64, "width": 64, "guidance_scale": 1.0, "max_sequence_length": 48}
    with pytest.warns(UserWarning, match="the call is made again in float32"):
        images = pipe([XML, XML], output_type="pt", **arguments).images
    assert overflow == [3]
    assert steps[3:] == [torch.float32] * 28
    assert torch.isfinite(images).all()
    assert pipe.transformer.dtype == torch.bfloat16
    assert BatchPromptEncoding(cache=1000) in transforms
    assert not structure_problems(XML)
    assert structure_problems(XML.replace("</n>", ""))
