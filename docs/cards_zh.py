"""Say in Chinese what docs/generate_cards.py has written in English: sentence by sentence, the figures as they are.

A sentence that is not in the list ends the generating, so that neither language can have what the other lacks.
"""

from __future__ import annotations

import re

#: English -> Chinese; `{}` stands for what is the same in both, in the same order or by its number.
SENTENCES = {
    # headings
    "# {} and {} GB": "# {} 和 {} GB",
    "# {} GB and more": "# {} GB 及以上",
    "# {} GB": "# {} GB",
    "# Ascend": "# 昇腾",
    "# CPU": "# CPU",
    "# Your card": "# 你的显卡",
    "## Predicted memory": "## 预测的显存 { #predicted-memory }",
    "## What to expect": "## 预期表现 { #what-to-expect }",
    "## Sources": "## 来源 { #sources }",
    "## Memory": "## 内存 { #memory }",
    # paragraphs of a size of card
    "For {}, and other cards with as much memory. ERNIE-Image-Turbo, with its prompt enhancer:": (
        "适用于 {}，以及显存相同的其他显卡。运行 ERNIE-Image-Turbo，包括提示词增强器："
    ),
    "Install the extra `torchao` with it: `pip install 'ernie-accel[torchao]'`.": (
        "请连同 `torchao` 一起安装：`pip install 'ernie-accel[torchao]'`。"
    ),
    "It needs Ascend's own build of torch: `pip install 'ernie-accel[npu]'`, on a machine with its drivers. The preset "
    "was tested on a stand-in for the device only; [Performance](../performance.md) says what is known.": (
        "需要昇腾自己的 torch 版本：在装有驱动的机器上运行 `pip install 'ernie-accel[npu]'`。"
        "这个预设只在设备的替身上测试过；已知的情况见[性能](../performance.md)。"
    ),
    "The model may also be a folder, for instance from ModelScope. Then nothing needs to be online: [where the model "
    "comes from](../tutorials/first-picture.md#where-the-model-comes-from).": (
        "模型也可以是一个文件夹，例如来自 ModelScope。这时完全不需要联网："
        "[模型从哪里来](../tutorials/first-picture.md#where-the-model-comes-from)。"
    ),
    "![Predicted device memory, in GiB, for each model and card]({})": "![各模型在各显卡上的预测显存，单位 GiB]({})",
    "![Predicted device memory of ERNIE-Image-Turbo on each card, in GiB]({})": (
        "![ERNIE-Image-Turbo 在各显卡上的预测显存，单位 GiB]({})"
    ),
    "![Weights of each model in each dtype, in GB]({})": "![各模型在各 dtype 下的权重，单位 GB]({})",
    "Nothing was run for these figures. `ernie-accel plan` works them out from the shapes of the published "
    "configurations, for one picture of 1024x1024 px, and does the same for your card and your sizes:": (
        "得出这些数据不需要运行模型。`ernie-accel plan` 根据公开配置里的形状，为一张 1024x1024 px 的图计算，"
        "对你的显卡和尺寸也一样："
    ),
    "One picture of ERNIE-Image-Turbo, 1024x1024 px, 8 steps, without the prompt enhancer:": (
        "用 ERNIE-Image-Turbo 画一张图，1024x1024 px，8 步，不用提示词增强器："
    ),
    "**At best** is a bound, not a forecast. It is the time of eight steps ({} TFLOP each in matrix products, {} in "
    "attention) at the card's published peak rates. An H200 sustains {} of its published peak in such products, so "
    "expect more.": (
        "**最快**是下限，不是预测。它是以显卡公布的峰值速率运行八步的时间"
        "（每步的矩阵乘法为 {} TFLOP，注意力为 {}）。H200 在这样的乘法上只能持续达到公布峰值的 {}，所以实际会更久。"
    ),
    "**Measured** on an H200 whose memory was capped at {} GB, with preset `turbo-fp8`: {} s a picture, where stock "
    "diffusers without a cap took {} s ({} x). With the prompt enhancer it was {} s against {} s. The peak in use was "
    "{} GiB, and {} GiB were predicted. A smaller card computes and fetches more slowly than an H200.": (
        "**实测**：在显存限制为 {} GB 的 H200 上，用预设 `turbo-fp8` 每张图 {} s，"
        "而不限制显存的原版 diffusers 为 {} s（{} 倍）。"
        "使用提示词增强器时为 {} s，原版为 {} s。峰值占用 {} GiB，预测为 {} GiB。"
        "更小的显卡，计算和取权重都比 H200 慢。"
    ),
    "**Measured** on an H200 with `ernie-accel[cudnn]`: {} ms a picture with preset `turbo-fp8`, where stock diffusers "
    "took {} ms. The first picture took {} s.": (
        "**实测**：在装有 `ernie-accel[cudnn]` 的 H200 上，用预设 `turbo-fp8` 每张图 {} ms，"
        "而原版 diffusers 为 {} ms。第一张图用时 {} s。"
    ),
    "Nothing was measured on these cards.": "这些显卡上没有实测数据。",
    "The [first picture](../performance.md#presets) takes seconds longer, because kernels are compiled.": (
        "[第一张图](../performance.md#presets)要多花几秒，因为要编译内核。"
    ),
    # the page of the CPU
    "A full-size model takes minutes a picture on a CPU. Use one if there is nothing else, or to try a script. "
    "ERNIE-Image-Turbo in bfloat16, without its prompt enhancer:": (
        "全尺寸的模型在 CPU 上画一张图要几分钟。只有在没有别的设备，或想试运行脚本时，才用 CPU。"
        "运行 ERNIE-Image-Turbo，bfloat16，不用提示词增强器："
    ),
    "Weights, by the published configurations. Computing needs some GB more.": (
        "权重的大小，根据公开的配置。计算还要多用几 GB。"
    ),
    '`dtype="bfloat16"` halves the bytes. Whether it is also faster depends on the CPU: `ernie-accel demo` measures '
    "that.": '`dtype="bfloat16"` 让字节数减半。是否也更快，取决于 CPU：`ernie-accel demo` 会测量。',
    "No full-size model was timed on a CPU. `torch.compile` needs a C++ compiler and takes [some "
    '40 s](../batch.md#compiling) at the first picture. Without a compiler, pass `on_unsupported="skip"`; the report '
    "says what was left out.": (
        "没有在 CPU 上给全尺寸的模型计过时。`torch.compile` 需要 C++ 编译器，"
        "画第一张图时要[约 40 s](../batch.md#compiling)。没有编译器时，请用 "
        '`on_unsupported="skip"`；报告会说明略去了什么。'
    ),
    "To see what the library does, run `ernie-accel demo`. It draws with [a small trained "
    "model](../embedded-model.md), in seconds.": (
        "想看看本库做什么，就运行 `ernie-accel demo`。它用[一个训练好的小模型](../embedded-model.md)画图，只要几秒。"
    ),
    # the page that leads to the others
    "The same lines run ERNIE-Image-Turbo on each of these, and bring the weights to the device in the fastest way "
    "that fits:": (
        "同样的几行代码，在下面每一种显卡上都能运行 ERNIE-Image-Turbo，并在放得下的办法里用最快的一种把权重送到设备上："
    ),
    "What they choose, and the device memory that ERNIE-Image-Turbo is predicted to need:": (
        "这几行代码会选哪个预设，以及预测 ERNIE-Image-Turbo 需要多少显存："
    ),
    '`ernie-accel recommend` says what fits the card that is here, and `ernie-accel recommend --device "RTX 3060"` '
    "what fits another. A card that is not in the library's table is described by its compute capability and memory: "
    "`--device cuda:8.9:16GiB`. [It fits](../memory.md) explains how the choice is made.": (
        '`ernie-accel recommend` 说明本机的显卡适合什么，`ernie-accel recommend --device "RTX 3060"` '
        "则说明另一块显卡。本库的表里没有的显卡，用计算能力和显存来描述："
        "`--device cuda:8.9:16GiB`。怎样选择，见[放得下](../memory.md)。"
    ),
}
#: The same for the cells of tables.
CELLS = {
    "model": "模型",
    "card": "显卡",
    "preset": "预设",
    "device memory": "显存",
    "may be used": "可用显存",
    "host memory": "内存",
    "how it fits": "放置方案",
    "at best": "最快",
    "published": "公布的数据",
    "why this preset": "为什么用这个预设",
    "figure": "数据",
    "source": "来源",
    "page": "页面",
    "cards": "显卡",
    "any machine": "任何机器",
    "bfloat16, without the enhancer": "bfloat16，不含增强器",
    "{} to {} GiB": "{} 到 {} GiB",
    "[{} and {} GB]({})": "[{} 和 {} GB]({})",
    "[{} GB and more]({})": "[{} GB 及以上]({})",
    "[Ascend]({})": "[昇腾]({})",
    "everything stays on the device": "全部留在设备上",
    "everything stays on the device: the preset moves it there as a whole": "全部留在设备上：预设把它整个移过去",
    "weights within {} GiB, the rest fetched from the host in turn": "权重在 {} GiB 以内，其余轮流从内存取",
    "{} and {} in {} bits ({})": "{} 和 {} 用 {} 位（{}）",
    "{} in {} bits ({})": "{} 用 {} 位（{}）",
    "the request says where the weights live": "请求指定了权重放在哪里",
    "{} GiB come from the host for each picture: {} s of its link, at {} GB/s": (
        "每张图从内存取 {} GiB：占用总线 {} s，速率 {} GB/s"
    ),
    "bf16 {} s, fp8 {} s (no fp8 units), int8 {} s": "bf16 {} s，fp8 {} s（没有 fp8 单元），int8 {} s",
    "bf16 {} s, fp8 {} s, int8 {} s": "bf16 {} s，fp8 {} s，int8 {} s",
    "by what is published": "依据公布的数据",
    "has the memory for bf16": "显存放得下 bf16",
    "whether int8 is faster here nobody has published": "int8 在这块显卡上是否更快，没有公布的数据",
    "has no bfloat16": "不支持 bfloat16",
    "multiplies in fp8": "能用 fp8 做乘法",
    "multiplies in fp8, and fetches blocks that do not fit while it computes, which takes longer by the published "
    "rates": "能用 fp8 做乘法，计算的同时取来放不下的模块；按公布的速率，取权重比计算更久",
    "nothing is published for this card": "这块显卡没有公布的数据",
    "masks as its kernels take them": "掩码采用其内核接受的形式",
    "no quantized kernels are known to work through diffusers here": "尚不知有可经 diffusers 使用的量化内核",
    "measured: a step of the stock model takes {} ms in fp8 and {} ms in bf16, both compiled": (
        "实测：原版模型的一步，fp8 为 {} ms，bf16 为 {} ms，都经过编译"
    ),
    "measured on an H200: a step of the stock model takes {} ms in fp8 and {} ms in bf16, both compiled": (
        "在 H200 上实测：原版模型的一步，fp8 为 {} ms，bf16 为 {} ms，都经过编译"
    ),
    "the same architecture as the RTX 3090, where int8 takes {} of the time": (
        "与 RTX 3090 架构相同，在后者上 int8 用时为 {} 倍"
    ),
    "device memory, host memory, what is chosen": "显存、内存、选择的方案",
    "`ernie-accel plan`, kept in `docs/cards/figures.json`": "`ernie-accel plan`，保存在 `docs/cards/figures.json`",
    "{}: memory": "{}：显存",
    "{}: rates": "{}：速率",
    "published by NVIDIA": "NVIDIA 公布",
    "usable memory: the least that out-of-memory messages of torch report": (
        "可用显存：torch 显存不足消息所报告的最小值"
    ),
    "NVIDIA's product page": "NVIDIA 产品页面",
    "rates by shaders and boost clock as the architecture's whitepaper has them ({})": (
        "速率按架构白皮书所载的着色器数和加速频率（{}）"
    ),
    "{}, an eighth, half of its rates with sparsity": "{}，取八分之一，再取其稀疏速率的一半",
    "{}, half of its rates with sparsity": "{}，取其稀疏速率的一半",
    "NVIDIA {} whitepaper": "NVIDIA {} 白皮书",
    "NVIDIA {} whitepaper, {}": "NVIDIA {} 白皮书，{}",
    "NVIDIA {} datasheet": "NVIDIA {} 数据手册",
    "NVIDIA {} datasheet, {}": "NVIDIA {} 数据手册，{}",
    "users of the 910B3, the slowest one with 64 GB, citing Huawei's forum": (
        "910B3（64 GB 的型号中最慢的一种）的用户，引自华为论坛"
    ),
    "int8 in doubt": "int8 存疑",
    "users of 910B3 servers": "910B3 服务器的用户",
    "Huawei has no data sheet of the chip": "华为没有这款芯片的数据手册",
    "TFLOP of a step, share of the peak": "一步的 TFLOP、峰值的占比",
    "published seconds": "公布的秒数",
    "the library's table of devices, `src/ernie_accel/core/hardware.py`": (
        "本库的设备表，`src/ernie_accel/core/hardware.py`"
    ),
    "measured under a cap": "限制显存后的实测",
}
#: Columns that hold nothing but phrases of the list; others may hold names and figures.
STRICT = {"how it fits", "why this preset"}
#: Columns of names, one after the other.
LISTS = {"cards", "preset"}
_BLOCK = re.compile(r"(^```\w*\n.*?^```$)", re.DOTALL | re.MULTILINE)


def in_chinese(page: str) -> str:
    """Return a page of docs/cards in Chinese.

    Raises:
        SystemExit: A sentence has no translation.
    """
    parts = _BLOCK.split(page)
    for i in range(0, len(parts), 2):
        parts[i] = "\n\n".join(map(_paragraph, parts[i].split("\n\n")))
    return "".join(parts)


def _paragraph(text: str) -> str:
    words = text.strip("\n")
    if not words or words.startswith(("<div", "</div")):
        return text
    chinese = _table(words.split("\n")) if words.startswith("|") else said(" ".join(words.split()), SENTENCES)
    return text.replace(words, chinese)


def _table(lines: list[str]) -> str:
    header = [cell.strip() for cell in lines[0].strip("|").split("|")]
    rows = []
    for line in lines:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if set(line) <= set("|-"):
            rows.append(line)
            continue
        strict = [name in STRICT and line is not lines[0] for name in header]
        chinese = [*map(_cell, cells, strict)]
        chinese = [
            each.replace(", ", "、") if name in LISTS else each for name, each in zip(header, chinese, strict=True)
        ]
        rows.append("| " + " | ".join(chinese) + " |")
    return "\n".join(rows)


def _cell(cell: str, strict: bool) -> str:
    phrases = cell.split("; ")
    chinese = [said(phrase, CELLS, strict) for phrase in phrases]
    return cell if chinese == phrases else "；".join(chinese)


def said(words: str, phrases: dict[str, str], strict: bool = True) -> str:
    """Return words in Chinese by a list of phrases; what the list lacks stays as it is.

    Raises:
        SystemExit: `strict`, and the list lacks them.
    """
    for english, chinese in phrases.items():
        pattern = re.escape(english).replace(r"\{\}", "(.+?)")
        if found := re.fullmatch(pattern, words):
            filled = chinese
            for each in found.groups():
                filled = filled.replace("{}", said(each, CELLS, strict=False).replace(", ", "、"), 1)
            return filled
    if strict:
        raise SystemExit(f"docs/cards_zh.py has no Chinese for: {words}")
    return words
