"""The words of the charts in Chinese; a word that is not in the list ends the generating, as in docs/cards_zh.py."""

from __future__ import annotations

import re

from docs.cards_zh import said

#: What stands in a chart as it is: figures with their units, names of files, transforms and options.
AS_IT_IS = re.compile(
    r"benchmarks/results/[\w*.]+|-?[\d.,]+(?: (?:ms|s|GB|GiB|MB|%))?(?:, [\d.]+ ms)?|\d+/\d+"
    r"|[A-Z][A-Za-z]*(?:\([^)]*\))?|[a-z0-9_-]+(?: by [a-z]+)?|SDNQ \w+|docs/\w+\.md"
)
PHRASES = {
    # cards
    "Predicted device memory, GiB": "预测的显存，GiB",
    "Predicted device memory of ERNIE-Image-Turbo, GiB": "预测 ERNIE-Image-Turbo 需要的显存，GiB",
    "weights": "权重",
    "computing": "计算",
    "graphs, allocator": "CUDA 图、分配器",
    "may be used": "可用显存",
    "by ernie-accel plan, 1024x1024 px": "由 ernie-accel plan 得出，1024x1024 px",
    "Weights in host memory, GB": "内存里的权重，GB",
    "{} in float32": "{}，float32",
    "{} in bfloat16": "{}，bfloat16",
    "{} in bfloat16, without the enhancer": "{}，bfloat16，不含增强器",
    "by the published configurations": "根据公开的配置",
    "preset {} on {}": "预设 {}，{}",
    "{} on {}": "{}，{}",
    # performance
    "ERNIE-Image on an H200, ms per step at 1024x1024 px": "ERNIE-Image，H200，1024x1024 px，每步毫秒数",
    "Z-Image-Turbo on an H200, ms per step at 1024x1024 px": "Z-Image-Turbo，H200，1024x1024 px，每步毫秒数",
    "NewBie-image with guidance on an H200, ms per step at 1024x1024 px": (
        "NewBie-image，带引导，H200，1024x1024 px，每步毫秒数"
    ),
    "stock diffusers, bf16": "原版 diffusers，bf16",
    "with compile_repeated_blocks": "加上 compile_repeated_blocks",
    "torchao fp8, compiled": "torchao fp8，编译",
    "preset {}": "预设 {}",
    "preset {}, in an earlier run": "预设 {}，先前的一次运行",
    "Beside the denoiser on an H200, ms": "去噪之外的部分，H200，毫秒",
    "8 prompts encoded: the pipeline's loop": "编码 8 条提示词：管线自己的循环",
    "BatchPromptEncoding and RewriteTextEncoder": "BatchPromptEncoding 和 RewriteTextEncoder",
    "VAE decode: stock": "VAE 解码：原版",
    "Other libraries on an H200, ms per step at 1024x1024 px": "其他库，H200，1024x1024 px，每步毫秒数",
    "bitsandbytes nf4, weights only": "bitsandbytes nf4，只量化权重",
    # memory, batches, quantization
    "A picture on an H200 under a cap of memory, s": "限制显存的 H200 画一张图，秒",
    "stock, no cap: enhancer off": "原版，不限制：关闭增强器",
    "stock, no cap: enhancer on": "原版，不限制：开启增强器",
    "capped at {} GB: enhancer off": "限制为 {} GB：关闭增强器",
    "capped at {} GB: enhancer on": "限制为 {} GB：开启增强器",
    "enhancer off": "关闭增强器",
    "enhancer on": "开启增强器",
    "Pictures per minute on an H200, 512 px, 8 steps": "H200 每分钟图片数，512 px，8 步",
    "stock pipe, one by one": "原版管线，逐张",
    "batch, preset {}": "批量，预设 {}",
    "A full-size block on an H200: bytes, and ms compiled": "一个全尺寸模块，H200：字节数，以及编译后的毫秒数",
    # LoRAs, schedulers, diffusers' tests
    "Diffusers' own tests that pass on stock, by request": "diffusers 自带的测试，按请求：原版上通过的",
    "pass with the request too": "有请求时也通过",
    "lost": "失败",
    "by nox -s diffusers": "由 nox -s diffusers 得出",
    "What a LoRA adds to a step of turbo-fp8 on an H200": "H200 上 LoRA 使 turbo-fp8 的一步增加多少",
    "attention, rank {}": "注意力，秩 {}",
    "all layers, rank {}": "所有层，秩 {}",
    "second run": "第二次运行",
    "Order of convergence, measured": "实测的收敛阶数",
    "{}: weak order": "{}：弱阶",
    "by tests/test_scheduler_solvers.py": "由 tests/test_scheduler_solvers.py 测得",
}


def in_chinese(words: str) -> str:
    """Return the words of a chart in Chinese.

    Raises:
        SystemExit: They have no translation.
    """
    if words in PHRASES:
        return PHRASES[words]
    if not AS_IT_IS.fullmatch(words):
        return said(words, dict(sorted(PHRASES.items(), key=lambda each: -len(each[0]))))  # the most exact one first
    return words.replace(", ", "，").replace(" by ", "，")
