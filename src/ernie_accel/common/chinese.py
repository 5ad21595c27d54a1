"""The command line's messages in Chinese, by their English templates; the terms are those of docs/glossary.md."""

# Chinese has punctuation of its own

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

CATALOGUE: Mapping[str, str] = MappingProxyType(
    {
        # Plans and reports
        "Plan: {title} for {pipe} ({family}) on {machine}": "计划：{title}，用于 {pipe}（{family}），设备 {machine}",
        "of no known family": "未知家族",
        "preset {name!r}": "预设 {name!r}",
        "nothing": "无变换",
        "{count} CPU cores": "{count} 个 CPU 核",
        "capability {major}.{minor}": "计算能力 {major}.{minor}",
        "{machine}, which is not supported yet": "{machine}，尚不支持",
        "{machine}; {idle} are not supported yet": "{machine}；尚不支持 {idle}",
        "First undoes {undone}. The rows describe the pipe as it is now, and are planned again then.": (
            "先撤销 {undone}。下面各行描述的是管线的现状，撤销后会重新计划。"
        ),
        "#": "#",
        "transform": "变换",
        "effect": "影响",
        "what would change": "将改变什么",
        "weights": "权重",
        "status": "状态",
        "what changed, or why not": "改变了什么，或为何没有",
        "ms": "毫秒",
        "exact": "逐位一致",
        "rounding": "舍入误差",
        "lossy": "有损",
        "resamples": "另一张图",
        "{effect}, >= {floor:g} dB": "{effect}，>= {floor:g} dB",
        "{count} in {root}": "{root} 中 {count} 处",
        "in place already": "已经就位",
        "cannot: see below": "无法运行：见下文",
        "nothing to do: {note}": "无需改动：{note}",
        "{first}; {second}": "{first}；{second}",
        "your own torch.compile of {names} stays, and compiles it again": (
            "您自己对 {names} 的 torch.compile 保留，并会重新编译"
        ),
        "your own torch.compile of {names} is taken off until restore(pipe), which gives it back; Compile() and "
        "CompileVae() compile what this makes": (
            "您自己对 {names} 的 torch.compile 会取下，由 restore(pipe) 还原；"
            "改动后的部分可用 Compile() 和 CompileVae() 编译"
        ),
        "{number}: cannot: {reason}": "{number}：无法运行：{reason}",
        "Overall effect: {effect}.": "总体影响：{effect}。",
        "Report: {title} on {pipe}, {machine}, {versions}": "报告：{title}，用于 {pipe}，{machine}，{versions}",
        "applied": "已应用",
        "interrupted": "已中断",
        "nothing to do": "无需改动",
        "skipped": "已跳过",
        "; {count} left out": "；略过 {count} 处",
        "{number}: left out {names}: {reason}": "{number}：略过 {names}：{reason}",
        "{number}: cannot be undone: {reason}": "{number}：无法撤销：{reason}",
        # Notes of transforms
        "the first picture compiles": "画第一张图时编译",
        "all weights have this layout and alignment already": "所有权重已是这种布局和对齐",
        "all weights are {dtype} already": "所有权重已是 {dtype}",
        "{size} of weights on the device": "设备上有 {size} 权重",
        "{size} of weights on the device at a time": "设备上同一时间有 {size} 权重",
        "the kernels cannot run here: {reasons}": "内核在此无法运行：{reasons}",
        "the blocks run on the kernels already": "模块已在内核上运行",
        "keeps {size} of originals in host memory for restore()": "原始权重 {size} 留在内存中，供 restore() 使用",
        "attention in {precision} by the lengths of prompts where no backend is chosen": (
            "未选后端处按提示词长度计算 {precision} 注意力"
        ),
        "attention in {precision} by the lengths of prompts": "按提示词长度计算 {precision} 注意力",
        "attention by torch, planned anew for each prompt length: {reason}": (
            "注意力由 torch 计算，每种提示词长度都要重新准备：{reason}"
        ),
        "attention in bf16": "注意力用 bf16",
        "{first}: {second}": "{first}：{second}",
        "attention by the lengths of prompts needs CUDA compute capability >= 9.0": (
            "按提示词长度计算注意力要求 CUDA 计算能力 >= 9.0"
        ),
        "the kernels take bfloat16 weights, found {found}: add CastDtype('bfloat16')": (
            "内核只接受 bfloat16 权重，现为 {found}：请加上 CastDtype('bfloat16')"
        ),
        "the blocks run on fused kernels, which need no compiling": "模块在融合内核上运行，不需要编译",
        "the blocks are compiled already": "模块已编译",
        "the pipe's own defaults are these": "管线的默认值已是如此",
        "errors of calls that run out of memory": "显存不足时的报错",
        "it builds on rewritten blocks, and there are none for {name} {whose}": (
            "它需要改写过的模块，而 {name} {whose}没有"
        ),
        "yet": "尚",
        "for {model}": "的 {model} ",
        "{name}: no rewritten blocks {whose}": "{name} {whose}没有改写过的模块",
        "CUDA graphs need a CUDA device; this is {device}": "CUDA 图需要 CUDA 设备，而这是 {device}",
        "the stock forward cannot be captured: add RewriteBlocks()": "原版 forward 无法捕获：请加上 RewriteBlocks()",
        "the transformer's forward is captured already": "transformer 的 forward 已捕获",
        "nothing says that {name} calls its transformer for each half of guidance": (
            "未声明 {name} 为引导的两半分别调用 transformer"
        ),
        "it builds on rewritten blocks: add RewriteBlocks()": "它需要改写过的模块：请加上 RewriteBlocks()",
        "both halves of guidance are one batch already": "引导的两半已合为一批",
        "where prompt and negative prompt have equally many tokens: others would need a mask": (
            "限于提示词与负面提示词 token 数相同时：否则需要掩码"
        ),
        "guidance two calls -> one batch": "引导：两次调用 -> 一批",
        "the blocks are rewritten already": "模块已改写",
        "the pipe is on {device} already": "管线已在 {device} 上",
        "{component}: {count} of {all} blocks ({size}) streamed at every step": (
            "{component}：{all} 个模块中有 {count} 个（{size}）每步都从内存取"
        ),
        "{component}: {size} fetched when its turn comes": "{component}：{size} 轮到时从内存取",
        "all weights stay on {device}": "所有权重都留在 {device} 上",
        "the decoder is compiled already": "解码器已编译",
        "the fused kernels attend themselves, with the lengths of prompts instead of a mask": (
            "融合内核自行计算注意力，用提示词长度代替掩码"
        ),
        "attention runs on {name!r} already": "注意力已由 {name!r} 计算",
        "{pipe} is not known to read them on the host": "不清楚 {pipe} 是否从内存读取它们",
        "the device is cpu, so they are there already": "设备是 cpu，它们已在内存中",
        "they are kept there already": "它们已留在内存中",
        "scheduler.timesteps device -> host": "scheduler.timesteps 显存 -> 内存",
        "{pipe} encodes the prompts of a call together already": "{pipe} 已把一次调用的提示词一起编码",
        "{method} all texts -> each once": "{method} 编码所有文本 -> 相同的只编码一次",
        "encode_prompt one by one -> batched": "encode_prompt 逐条 -> 成批",
        "{layer} run -> skipped": "{layer} 运行 -> 跳过",
        "this {pipe} has no prompt enhancer": "此 {pipe} 没有提示词增强器",
        "{method} one by one -> batched, by seed": "{method} 逐条 -> 成批，按随机种子",
        "{model} generate -> static cache": "{model} 生成 -> 静态缓存",
        "this {pipe} has no text encoder that is known here": "此 {pipe} 没有已知的文本编码器",
        "the text encoder's forward is rewritten already": "文本编码器的 forward 已改写",
        "{package} is not installed: pip install 'ernie-accel[{extra}]'": (
            "未安装 {package}：pip install 'ernie-accel[{extra}]'"
        ),
        "{what} needs CUDA compute capability >= {need}; this device has no CUDA ({device})": (
            "{what} 要求 CUDA 计算能力 >= {need}；此设备（{device}）没有 CUDA"
        ),
        "{what} needs CUDA compute capability >= {need}; this device has {have}": (
            "{what} 要求 CUDA 计算能力 >= {need}；此设备为 {have}"
        ),
        "triton is not installed (it comes with CUDA builds of torch): pip install triton": (
            "未安装 triton（随 CUDA 版 torch 提供）：pip install triton"
        ),
        "the layers are {scheme} already": "这些层已是 {scheme}",
        " on its way to {device}": "，在移往 {device} 途中",
        "{scheme}{where}": "{scheme}{where}",
        " and {count} more": "，另有 {count} 个",
        "{count} {why}: {names}{more}": "{count} 个{why}：{names}{more}",
        " ({reasons})": "（{reasons}）",
        "leaves {count} of {total} linear layers as they are{because}": (
            "{total} 个线性层中有 {count} 个保持原样{because}"
        ),
        "faster only when compiled: add Compile()": "只有编译后才更快：请加上 Compile()",
        "kept precise in {family}": "在 {family} 中保持精度",
        "kept precise: outside blocks, or modulates": "保持精度（在模块之外，或用于调制）",
        # Memory
        "Memory for {call}: {needed}{budget}: {verdict}": "显存（{call}）：需要 {needed}{budget}：{verdict}",
        "{pictures} of {width}x{height}, {tokens} tokens{guided}": (
            "{pictures}，{width}x{height}，{tokens} 个 token{guided}"
        ),
        "a picture": "一张图",
        "{count} pictures": "{count} 张图",
        ", with guidance": "，有引导",
        " of {budget} it may use": "，可用 {budget}",
        "fits": "放得下",
        "does NOT fit": "放不下",
        "stage": "阶段",
        "computing": "计算",
        "in use": "占用",
        "unknown": "未知",
        "enhance": "增强",
        "encode": "编码",
        "denoise": "去噪",
        "decode": "解码",
        "Peak in use {peak}, and {spare} for graphs and the allocator.": (
            "占用峰值 {peak}，另有 {spare} 用于 CUDA 图和分配器。"
        ),
        "Host memory for what is not on the device: {host}.": "不在设备上的部分占用内存：{host}。",
        "The smallest budget that works: memory='{least}' (--memory {least}).": (
            "可行的最小显存预算：memory='{least}'（--memory {least}）。"
        ),
        "everything stays on the device": "全部留在设备上",
        "{stays}: the preset moves it there as a whole": "{stays}：预设把它整个移过去",
        "the request says where the weights live": "请求指定了权重放在哪里",
        "weights within {size}, the rest fetched from the host in turn": "权重在 {size} 以内，其余轮流从内存取",
        "{size} come from the host for each picture{time}": "每张图从内存取 {size}{time}",
        ": {seconds:.2f} s of its link, at {rate:g} GB/s": "：占用总线 {seconds:.2f} s，速率 {rate:g} GB/s",
        "{names} in 8 bits ({scheme})": "{names} 用 8 位（{scheme}）",
        "{size} of unquantized weights wait in host memory for restore()": (
            "{size} 未量化的权重留在内存中，供 restore() 使用"
        ),
        "no unquantized weights wait in host memory: restore() cannot bring them back": (
            "内存中不留未量化的权重：restore() 无法还原它们"
        ),
        "other work on the card holds {held} of what it may use otherwise": "显卡上的其他任务占用了原本可用的 {held}",
        "pictures decoded in tiles{size}, as nothing else fits: their seams may show": (
            "图片分块{size}解码，否则放不下：可能看得出接缝"
        ),
        " of {pixels} pixels": "（{pixels} 像素）",
        "what {names} computes is not known of this pipeline: {size} are left for it": (
            "不清楚此管线的{names}阶段计算时要占用多少：为它留出 {size}"
        ),
        # Commands
        "For {model}:": "关于 {model}：",
        "ernie-accel {version} on {machine}": "ernie-accel {version}，设备 {machine}",
        "Models that can be planned for without a download:": "无需下载即可规划的模型：",
        "Presets for {model}:": "{model} 的预设：",
        "can run here": "可在此运行",
        "cannot run here": "不能在此运行",
        "  {name:18} {verdict}: {summary}": "  {name:18} {verdict}。{summary}",
        "  {first}: {second}": "  {first}：{second}",
        "Recommended on {machine}: preset {name!r}": "推荐用于 {machine}：预设 {name!r}",
        "Not:": "不选：",
        "not": "不选",
        "because": "原因",
        "Cannot apply {title}:": "无法应用{title}：",
        "Fix these, choose another preset, or pass on_unsupported='skip'.": (
            "请解决这些问题，换一个预设，或使用 on_unsupported='skip'。"
        ),
        "Fix these, or pass on_unsupported='skip'.": "请解决这些问题，或使用 on_unsupported='skip'。",
        "Fix these, or choose another preset.": "请解决这些问题，或换一个预设。",
        "Fix these.": "请解决这些问题。",
        "{first} and {second}": "{first} 和 {second}",
        "{first} or {second}": "{first} 或 {second}",
        "{first}, {second}": "{first}、{second}",
        "{device} ({facts})": "{device}（{facts}）",
        # Why a preset
        "{name} for this card: {why}.": "此显卡用 {name}：{why}。",
        "Bitwise the same pictures: only what cannot change a bit.": "图片逐位一致：只做不会改变任何一位的事。",
        "Few steps, compiled, in the precision the pipe came in: for CPUs; beside CastDtype('bfloat16') where it "
        "pays.": ("步数少，编译，精度与传入的管线相同：用于 CPU；更快时与 CastDtype('bfloat16') 同用。"),
        "Few steps in bfloat16, on fused kernels or compiled: for a distilled (Turbo) checkpoint on any recent card.": (
            "步数少，bfloat16，用融合内核或编译：用于较新显卡上的蒸馏（Turbo）检查点。"
        ),
        "Few steps in float16, compiled: for a distilled (Turbo) checkpoint on cards without bfloat16.": (
            "步数少，float16，编译：用于没有 bfloat16 的显卡上的蒸馏（Turbo）检查点。"
        ),
        "Few steps with fp8 linears on fused kernels: for a distilled (Turbo) checkpoint on capability 8.9 and "
        "above.": ("步数少，线性层用 fp8，用融合内核：用于计算能力 8.9 及以上的显卡上的蒸馏（Turbo）检查点。"),
        "Few steps with int8 linears, compiled: for a distilled (Turbo) checkpoint on capability 8.0 to 8.6.": (
            "步数少，线性层用 int8，编译：用于计算能力 8.0 到 8.6 的显卡上的蒸馏（Turbo）检查点。"
        ),
        "Few steps in bfloat16 on an Ascend NPU, with masks as it takes them: for a distilled (Turbo) checkpoint.": (
            "步数少，昇腾 NPU 上的 bfloat16，掩码按其要求的形式：用于蒸馏（Turbo）检查点。"
        ),
        "Few steps with nvfp4 linears, compiled: the fastest on capability 10.0 and above, at a visible cost.": (
            "步数少，线性层用 nvfp4，编译：计算能力 10.0 及以上的显卡上最快，代价是画质损失看得出来。"
        ),
        "Few steps with 4-bit weights (nf4), compiled: for memory and not for speed.": (
            "步数少，4 位权重（nf4），编译：为省显存，而不是为速度。"
        ),
        "The family's full steps and guidance in bfloat16, compiled: for a base (undistilled) checkpoint.": (
            "家族的完整步数和引导，bfloat16，编译：用于基础（未蒸馏的）检查点。"
        ),
        "The family's full steps and guidance with fp8 linears on fused kernels: for a base checkpoint.": (
            "家族的完整步数和引导，线性层用 fp8，用融合内核：用于基础检查点。"
        ),
        "The family's full steps and guidance with int8 linears, compiled: for a base checkpoint.": (
            "家族的完整步数和引导，线性层用 int8，编译：用于基础检查点。"
        ),
        "half the bytes of bf16, multiplied in fp8": "占用是 bf16 的一半，以 fp8 相乘",
        "half the bytes of bf16, multiplied in int8": "占用是 bf16 的一半，以 int8 相乘",
        "the checkpoint's own precision on tensor cores": "检查点自身的精度，由 Tensor Core 计算",
        "tensor cores of this generation know no bfloat16": "这一代的 Tensor Core 没有 bfloat16",
        "a quarter of the bytes: for memory and not for speed": "占用只有四分之一：为省显存，而不是为速度",
        "few CPUs have bfloat16 units; `ernie-accel demo` measures this one": (
            "很少有 CPU 带 bfloat16 单元；`ernie-accel demo` 可测量这一块"
        ),
        "nothing else can run": "其他预设都不能运行",
        "the pipe cannot run": "管线无法运行",
        "pass on_unsupported='skip', which leaves out {line}": "请使用 on_unsupported='skip'，它会略去 {line}",
        "does without {transform}: {reason}": "不用 {transform}：{reason}",
        "{family}'s guides sample with {samplers}: pass it beside the preset": (
            "{family} 的官方指南用 {samplers} 采样：请与预设一起传入"
        ),
        "pays on {devices}, and this is {device}": "适合 {devices}，而这是 {device}",
        "pays on CUDA compute capability {wanted}; this device has {found}": (
            "适合 CUDA 计算能力 {wanted}；此设备为 {found}"
        ),
        "{least} and above": "{least} 及以上",
        "{least} to {most}": "{least} 到 {most}",
        "about {size} of weights{computing} do not fit into {memory}": "约 {size} 权重{computing}，{memory} 放不下",
        " and about {size} for a call, graphs and the driver": "，加上调用、CUDA 图和驱动约 {size}",
        "{too_much}: leave the pipe on the CPU; optimize(pipe, preset=..., memory='auto') brings it to the "
        "device in the fastest way that fits": (
            "{too_much}：请把管线留在 CPU 上；optimize(pipe, preset=..., memory='auto') 会以放得下的最快方式把它"
            "送到设备上"
        ),
        "{too_much}: in bfloat16 they take half; load(..., prompt_enhancer=False) leaves the enhancer out": (
            "{too_much}：用 bfloat16 只占一半；load(..., prompt_enhancer=False) 不读入增强器"
        ),
        "has no bfloat16; nothing is published for this card": "没有 bfloat16；没有此显卡的公开数据",
        "has the memory for bf16; whether int8 is faster here nobody has published": (
            "显存放得下 bf16；int8 在此是否更快，没有公开数据"
        ),
        "the same architecture as the RTX 3090, where int8 takes 0.56 of the time": (
            "与 RTX 3090 架构相同，那里 int8 只需 0.56 倍的时间"
        ),
        "published: bf16 43 s, fp8 28.7 s, int8 14.4 s": "公开数据：bf16 43 s，fp8 28.7 s，int8 14.4 s",
        "published: bf16 12.4 s, fp8 12.7 s (no fp8 units), int8 7.0 s": (
            "公开数据：bf16 12.4 s，fp8 12.7 s（没有 fp8 单元），int8 7.0 s"
        ),
        "multiplies in fp8; nothing is published for this card": "以 fp8 相乘；没有此显卡的公开数据",
        "multiplies in fp8, and fetches blocks that do not fit while it computes, which takes longer by the "
        "published rates; nothing is published for this card": (
            "以 fp8 相乘，并在计算的同时取来放不下的模块，按公布的速率计算更费时；没有此显卡的公开数据"
        ),
        "measured on an H200: a step of the stock model takes 95 ms in fp8 and 134 ms in bf16, both compiled": (
            "在 H200 上实测：原版模型的一步，fp8 用 95 ms，bf16 用 134 ms，均经编译"
        ),
        "measured: a step of the stock model takes 95 ms in fp8 and 134 ms in bf16, both compiled": (
            "实测：原版模型的一步，fp8 用 95 ms，bf16 用 134 ms，均经编译"
        ),
        "masks as its kernels take them; no quantized kernels are known to work through diffusers here": (
            "掩码按其内核要求的形式；尚不知有哪些量化内核能在此通过 diffusers 运行"
        ),
        # Machines and packages
        "{package} is not installed: {fix}": "未安装 {package}：{fix}",
        "{package} is not installed (it comes with CUDA builds of torch): pip install {package}": (
            "未安装 {package}（随 CUDA 版 torch 提供）：pip install {package}"
        ),
        "torch.compile on the CPU needs a C++ compiler, and none of g++, clang++, c++ is on the PATH": (
            "CPU 上的 torch.compile 需要 C++ 编译器，而 PATH 中没有 g++、clang++ 或 c++"
        ),
        "torch.compile on CUDA needs triton: pip install triton": (
            "CUDA 上的 torch.compile 需要 triton：pip install triton"
        ),
        "{what} are not supported yet: nothing was tested or measured on them": (
            "尚不支持 {what}：没有做过任何测试或测量"
        ),
        "{device} devices": "{device} 设备",
        "AMD GPUs (ROCm)": "AMD GPU（ROCm）",
        "Apple GPUs (mps)": "Apple GPU（mps）",
        "Intel GPUs (xpu)": "Intel GPU（xpu）",
        "a card that is not in the table": "表中没有的显卡",
        # The pipe as it is
        "{pipe} has no component {name!r}; its modules are {modules}{hint}": (
            "{pipe} 没有组件 {name!r}；它的模型有 {modules}{hint}"
        ),
        ": write components={denoisers!r}": "：请写 components={denoisers!r}",
        "{names} stays as it is (components={components!r} takes it, too)": (
            "{names} 保持原样（components={components!r} 则包括它）"
        ),
        "stays as it is: a family's own blocks are those of its transformer": (
            "保持原样：家族自己的模块只是 transformer 的模块"
        ),
        "computes all of its steps: those of the transformer alone are cached": (
            "计算自己的所有步：只缓存 transformer 的步"
        ),
        "{pipe} is of no known family, and {why}": "{pipe} 属于未知家族，而{why}",
        "{name} is offloaded (its weights are on the meta device): cast before offloading": (
            "{name} 已卸载（权重在 meta 设备上）：请在卸载之前转换 dtype"
        ),
        "{name} stores its weights by layerwise casting, and casting would break its hooks": (
            "{name} 以逐层类型转换存放权重，再转换会破坏它的钩子"
        ),
        "{reason}: use 'float16'": "{reason}：请用 'float16'",
        "{name} has no weights at the moment: FreeAfterUse() on another pipe that shares it has freed them; "
        "restore that pipe first": (
            "{name} 此刻没有权重：与它共用组件的另一条管线上的 FreeAfterUse() 已把它们释放；请先还原那条管线"
        ),
        "{name} is shared with another pipe ({pipe}), for which it was changed by {done}: ernie_accel.restore "
        "that pipe first, or give this one a copy (copy.deepcopy)": (
            "{name} 与另一条管线（{pipe}）共用，并已为它由 {done} 改动：请先用 ernie_accel.restore 还原那条管线，"
            "或给这条一份副本（copy.deepcopy）"
        ),
        "{names}: weights were cast to float8 without scales (torch_dtype=torch.float8_...), and no kernel can "
        "run that. Load with torch_dtype=torch.bfloat16 and quantize instead: ernie_accel.optimize(pipe, "
        "preset='turbo-fp8'), or ernie_accel.Quantize('fp8') among your transforms": (
            "{names}：权重被转换成没有缩放系数的 float8（torch_dtype=torch.float8_...），没有内核能运行。请以 "
            "torch_dtype=torch.bfloat16 加载，再量化：ernie_accel.optimize(pipe, preset='turbo-fp8')，或在变换中"
            "加入 ernie_accel.Quantize('fp8')"
        ),
        "{transform} would have to be undone first: {reason}": "必须先撤销 {transform}：{reason}",
        "it was interrupted half-way, and {reason}": "它中途被打断，而且{reason}",
        "this pipe came out of a pickle, and its undo stayed behind": "此管线来自 pickle，撤销的办法没有一起保存",
        "this pipe is a copy; restore the pipe it was copied from": "此管线是副本；请还原它的原件",
        "loaded as it was saved: the folder does not hold the originals": "按保存的样子读入：文件夹里没有原件",
        "was compiled before": "此前已编译",
        # Adapters
        "an adapter is loaded that the kernels cannot take: {path}: {why}": "已加载内核不能用的适配器：{path}：{why}",
        "it has a {layer} of {module}, and the kernels add LoRAs only": "它有 {module} 的 {layer}，而内核只支持 LoRA",
        "it has a variant of LoRA, such as DoRA, and the kernels add plain ones only": (
            "它有 LoRA 的变体，例如 DoRA，而内核只支持普通的 LoRA"
        ),
        "it has a LoRA with a bias, which the kernels do not add": "它有带偏置的 LoRA，内核不支持",
        # The VAE
        "its forward was replaced (by offloading, for instance)": "它的 forward 已被替换（例如因卸载）",
        "it is a {kind}": "它是 {kind}",
        "is a {kind}": "是 {kind}",
        "{path} is a {kind}": "{path} 是 {kind}",
        "it ends with {reason}": "它的末端{reason}",
        "has {reason}": "{reason}",
        "a {norm} for a norm": "以 {norm} 为归一化",
        "a {activation} for an activation": "以 {activation} 为激活函数",
        "has quantized or adapted convolutions": "有量化过或带适配器的卷积",
        "has quantized or adapted layers": "有量化过或带适配器的层",
        "drops values out": "使用 dropout",
        "takes a time embedding": "需要时间嵌入",
        "resamples, or scales its output": "会重采样，或缩放输出",
        "computes with a {processor}": "由 {processor} 计算",
        "has other norms": "有其他归一化",
        "has no residual, or scales its output": "没有残差，或缩放输出",
        "does not interpolate and then convolve": "不是先插值再卷积",
        "does not only convolve": "不只是卷积",
        "has no convolution, or a quantized or adapted one": "没有卷积，或卷积经过量化或带适配器",
        "{pipe} has no vae.decoder": "{pipe} 没有 vae.decoder",
        "{pipe} has no component 'vae'": "{pipe} 没有组件 'vae'",
        "the {half} runs on the kernels already": "{half} 已在内核上运行",
        "the {half} is compiled already": "{half} 已编译",
        "not this {half}: {reason}": "不含此 {half}：{reason}",
        "{vae} cannot do {what}": "{vae} 不支持 {what}",
        "{vae} has no single tile size; leave tile_px out to use its own": (
            "{vae} 没有统一的分块大小；请不写 tile_px，使用它自己的"
        ),
        "{vae} does not say how many pixels a latent has; leave tile_px out": (
            "{vae} 没有说明一个潜变量对应多少像素；请不写 tile_px"
        ),
        "tile_px={tile_px} is not a multiple of the {factor} pixels of a latent: use {fits}": (
            "tile_px={tile_px} 不是一个潜变量的 {factor} 像素的倍数：请用 {fits}"
        ),
        "overlap={overlap:g} of a tile of {tile} latents is {overlapping:g} latents": (
            "每块 {tile} 个潜变量，overlap={overlap:g} 即 {overlapping:g} 个潜变量"
        ),
        "{found}, which is not whole, so that pictures would change their size: use overlap={whole:g}": (
            "{found}，不是整数，会改变图片的尺寸：请用 overlap={whole:g}"
        ),
        "the VAE has these settings already": "VAE 已是这些设置",
        # Rewriting, kernels, attention and graphs
        "cache={folder!r}: inductor's C++ compiler command breaks at the space in {place}; give another folder": (
            "cache={folder!r}：inductor 的 C++ 编译命令会在 {place} 的空格处断开；请换一个文件夹"
        ),
        "cache={folder!r}: {place} is a file; give a folder, which is made where it is missing": (
            "cache={folder!r}：{place} 是文件；请给出文件夹，没有时会创建"
        ),
        "cache={folder!r}: {place} cannot be written to; give another folder": (
            "cache={folder!r}：{place} 无法写入；请换一个文件夹"
        ),
        "RoPE covers {axes} of {head_dim} dimensions of a head; only full rotation is rewritten": (
            "RoPE 只覆盖注意力头 {head_dim} 维中的 {axes} 维；只能改写覆盖所有维的情形"
        ),
        "its rotary embedding changes with the length of the text": "它的旋转位置编码随文本长度改变",
        "its attention slides over {sliding_window} tokens": "它的注意力是 {sliding_window} 个 token 的滑动窗口",
        "its attention looks ahead, too": "它的注意力也看后面的 token",
        "its text encoder's language model is a {model}, not a {known}": (
            "它的文本编码器的语言模型是 {model}，不是 {known}"
        ),
        "the forward of its text encoder's language model was replaced already": (
            "它的文本编码器的语言模型的 forward 已被替换"
        ),
        "its embedding is a {embedding}, not a {scaled_embedding}": (
            "它的嵌入层是 {embedding}，不是 {scaled_embedding}"
        ),
        "its attention runs on sdpa, which ignores the cap of its scores": "它的注意力由 sdpa 计算，会忽略分数的上限",
        "its prompt enhancer is a {model}, not a Ministral3ForCausalLM": (
            "它的提示词增强器是 {model}，不是 Ministral3ForCausalLM"
        ),
        "its generation_config sets {name}={value!r}": "它的 generation_config 设置了 {name}={value!r}",
        "{name} builds a mask only for a batch that really pads": "{name} 只为确实有填充的批生成掩码",
        "it is no rewritten block": "它不是改写过的模块",
        "gradient checkpointing is on, and the rewritten blocks are for inference: switch it off": (
            "梯度检查点已打开，而改写过的模块只用于推理：请关闭它"
        ),
        "the attention has a processor of its own, {other}, which rewritten blocks would not call": (
            "注意力有自己的处理器 {other}，改写过的模块不会调用它"
        ),
        "its blocks have parts of code that is not known here: {part}": "它的模块含有这里不认识的代码：{part}",
        "the attention does not norm queries and keys, as rewritten blocks do": (
            "注意力不对 query 和 key 归一化，而改写过的模块会"
        ),
        "{name} is a {layer} (a LoRA, for instance), which has to stay a layer of its own": (
            "{name} 是 {layer}（例如 LoRA），必须保持独立的一层"
        ),
        "{name} has a bias or a quantized weight": "{name} 有偏置，或权重已量化",
        "blocks are rewritten family by family": "模块按家族逐一改写",
        "the transformer carries hooks already (offloading, layerwise casting): optimize first, then call "
        "enable_model_cpu_offload() and the like": (
            "transformer 已有钩子（卸载、逐层类型转换）：请先 optimize，再调用 enable_model_cpu_offload() 之类"
        ),
        "there are no fused kernels for {name} {whose}{instead}": "{name} {whose}没有融合内核{instead}",
        ": use Quantize('fp8') in its place": "：请改用 Quantize('fp8')",
        "it builds on the rewritten blocks: add RewriteBlocks()": "它需要改写过的模块：请加上 RewriteBlocks()",
        "the linear layers of the rewritten blocks stand apart: use RewriteBlocks(), with fuse=True": (
            "改写过的模块的线性层没有合并：请用 RewriteBlocks()，即 fuse=True"
        ),
        "fp8 attention goes with FuseKernels('fp8')": "fp8 注意力须与 FuseKernels('fp8') 同用",
        "it has a bias": "有偏置",
        "its weight is quantized already": "权重已量化",
        "its weight is quantized": "权重已量化",
        "its weight is {dtype}, not torch.bfloat16": "权重是 {dtype}，不是 torch.bfloat16",
        "its weight is {dtype}": "权重是 {dtype}",
        "its shape {rows} x {columns} is not a multiple of 16": "形状 {rows} x {columns} 不是 16 的倍数",
        "fp8 by fused kernels": "fp8（融合内核）",
        "keep_originals=False: the weights are gone": "keep_originals=False：原始权重已丢弃",
        "take another backend or scheme, or Compile(fullgraph=False)": (
            "请换一个后端或格式，或用 Compile(fullgraph=False)"
        ),
        "do without it, or take Compile(fullgraph=False)": "请不用它，或用 Compile(fullgraph=False)",
        "{path} has a DoRA, which torch.compile cannot trace in a full graph: {fix}": (
            "{path} 有 DoRA，torch.compile 无法在完整的图中追踪：{fix}"
        ),
        "merge it first (pipe.fuse_lora()), or take Compile(fullgraph=False)": (
            "请先合并（pipe.fuse_lora()），或用 Compile(fullgraph=False)"
        ),
        "{model} declares no repeated blocks to compile (_repeated_blocks)": (
            "{model} 没有声明可编译的重复模块（_repeated_blocks）"
        ),
        "{call} attaches hooks that torch.compile cannot trace in a full graph: {fix}": (
            "{call} 加上的钩子，torch.compile 无法在完整的图中追踪：{fix}"
        ),
        "what runs under autocast, here to {autocast}, is not captured": (
            "在 autocast（此处为 {autocast}）下运行的不会被捕获"
        ),
        "calls that take results of {names} are not captured": "带有 {names} 的结果的调用不会被捕获",
        "which masks can go is known family by family": "哪些掩码可以省去，因家族而异",
        "{pipe}: no block of its {denoisers} takes an attention mask": (
            "{pipe}：其 {denoisers} 没有接受注意力掩码的模块"
        ),
        "{own} expands its mask to [B, 1, S, S] itself: leave this out": (
            "{own} 自己会把掩码扩展为 [B, 1, S, S]：请去掉此变换"
        ),
        "{name} folds every mask to [B, 1, 1, S] itself, after which it cannot be expanded": (
            "{name} 自己会把掩码折叠为 [B, 1, 1, S]，此后无法再扩展"
        ),
        "only Ascend's kernels need this, and this is {device}": "只有昇腾的内核需要它，而这是 {device}",
        "torch's own choice for every call": "每次调用由 torch 自行选择",
        "cuDNN's, in torch": "torch 中的 cuDNN",
        "FlashAttention 2, in torch": "torch 中的 FlashAttention 2",
        "memory-efficient attention, in torch": "torch 中省显存的注意力",
        "plain products, in torch: slow, for reference": "torch 中的普通乘法：慢，仅供参照",
        "FlashAttention 3, Hopper only": "FlashAttention 3，仅限 Hopper",
        "SageAttention: queries and keys in int8, so it loses bits": "SageAttention：query 和 key 用 int8，因此有损",
        "xformers' memory-efficient attention": "xformers 的省显存注意力",
        "Ascend's fused attention": "昇腾的融合注意力",
        "build it from github.com/Dao-AILab/flash-attention, folder hopper": (
            "请从 github.com/Dao-AILab/flash-attention 的 hopper 文件夹构建"
        ),
        "pip install 'ernie-accel[npu]' on a machine with Ascend drivers": (
            "在装有昇腾驱动的机器上 pip install 'ernie-accel[npu]'"
        ),
        "auto takes {name!r} ({summary})": "auto 选用 {name!r}（{summary}）",
        "padded batches run on 'native', as this kernel takes no mask": "有填充的批用 'native'，因为此内核不接受掩码",
        "no attention of {pipe}'s denoiser goes through diffusers' dispatcher, so none can be given another backend": (
            "{pipe} 的去噪模型的注意力都不经过 diffusers 的调度，因此无法换用后端"
        ),
        "{name!r} runs on {devices}; this device is {device}": "{name!r} 在 {devices} 上运行；此设备是 {device}",
        "{name!r} is built for CUDA compute capability < {limit}; this device has {have}": (
            "{name!r} 只为 CUDA 计算能力 < {limit} 构建；此设备为 {have}"
        ),
        "{name!r} needs {package}, which is not installed: {fix}": "{name!r} 需要 {package}，但未安装：{fix}",
        "{name!r} computes in {wanted}; the transformer is {found}: add CastDtype('bfloat16')": (
            "{name!r} 以 {wanted} 计算；transformer 是 {found}：请加上 CastDtype('bfloat16')"
        ),
        "{name!r} takes heads of at most {most}; this transformer has {head_dim}": (
            "{name!r} 的注意力头最多 {most} 维；此 transformer 为 {head_dim}"
        ),
        "{name!r} takes no mask, and this transformer passes one in every call: add ElideMask()": (
            "{name!r} 不接受掩码，而此 transformer 每次调用都传入一个：请加上 ElideMask()"
        ),
        # Caching steps
        "steps are cached already": "步已在缓存",
        "computes one of {every} steps and forecasts the others": "每 {every} 步计算一步，其余由外推得到",
        "computes {computed} of {steps} steps and forecasts the others": (
            "{steps} 步中计算 {computed} 步，其余由外推得到"
        ),
        "computes the first block of every step, and the others where it changed by more than {threshold}": (
            "每一步都计算第一个模块，其变化超过 {threshold} 时才计算其余模块"
        ),
        "{note}; calls of fewer than {least_steps} steps compute all": "{note}；少于 {least_steps} 步的调用全部计算",
        "{note}; calls that run fewer than {least_steps} steps, at a strength below 1 too, compute all": (
            "{note}；实际少于 {least_steps} 步的调用（包括 strength 小于 1 时）全部计算"
        ),
        "{name} has no list {blocks!r} of two blocks or more, of which all but the first can rest": (
            "{name} 没有含两个以上模块的列表 {blocks!r}，无法只计算第一个"
        ),
        "a ControlNet adds to the output of single blocks, which a cache of blocks may skip: use backend='forecast'": (
            "ControlNet 会改变单个模块的输出，而缓存可能跳过这些模块：请用 backend='forecast'"
        ),
        "captured graphs replay all blocks, whatever a cache of blocks decides: leave CaptureGraphs out, or use "
        "backend='forecast'": (
            "捕获的 CUDA 图会重放所有模块，不管缓存如何决定：请去掉 CaptureGraphs，或用 backend='forecast'"
        ),
        "group offloading, which is on,": "已打开的分组卸载",
        "{grouped} fetches the next block while one runs, and some would not: use 'forecast'": (
            "{grouped}会在一个模块运行时取来下一个，而有些模块不会运行：请用 'forecast'"
        ),
        "which argument holds the prompts is known for each family": "哪个参数含有提示词，因家族而异",
        "{name} does not say which argument holds the prompts (Family.text_argument)": (
            "{name} 没有说明哪个参数含有提示词（Family.text_argument）"
        ),
        "{steps} steps are planned, and a cache pays from {least_steps} on: leave it out, or plan more, as in "
        "CallDefaults('quality')": (
            "计划为 {steps} 步，而缓存从 {least_steps} 步起才划算：请去掉它，或多画几步，例如 CallDefaults('quality')"
        ),
        "{noisy} adds noise at every step, so earlier outputs do not predict the next: use another": (
            "{noisy} 每步都加噪声，无法由前面的输出预测下一步：请换一个"
        ),
        "the scheduler ({name!r})": "调度器（{name!r}）",
        "the scheduler (stochastic_sampling=True)": "调度器（stochastic_sampling=True）",
        "{transformer} has a cache of diffusers or cache-dit: disable it first": (
            "{transformer} 已有 diffusers 或 cache-dit 的缓存：请先关闭"
        ),
        "cache-dit chooses an attention kernel of its own on an NPU: use another backend": (
            "cache-dit 在 NPU 上自行选择注意力内核：请换一个后端"
        ),
        # Prompts
        "this {pipe} has no text encoder or no tokenizer: nothing to encode": (
            "此 {pipe} 没有文本编码器或分词器：没有可编码的"
        ),
        "how this {pipe} encodes prompts with a {encoder} is not known here": (
            "不清楚此 {pipe} 怎样用 {encoder} 编码提示词"
        ),
        "keeps the embeddings of {count} prompts {where}": "在{where}保留 {count} 条提示词的嵌入",
        "in memory": "内存中",
        "in {folder}": " {folder} 中",
        "{model} is offloaded or cast layer by layer: Offload('model') or 'stages' go with this": (
            "{model} 被逐层卸载或转换：Offload('model') 或 'stages' 可与此同用"
        ),
        "text_encoder is offloaded or cast layer by layer: Offload('model') or 'stages' go with this": (
            "text_encoder 被逐层卸载或转换：Offload('model') 或 'stages' 可与此同用"
        ),
        "prompt tokens {most} -> {max_tokens}": "提示词 token {most} -> {max_tokens}",
        "prompts within the limit are not touched": "不超过上限的提示词不变",
        "{pipe} has no tokenizer (component 'tokenizer') to count with": (
            "{pipe} 没有可用来计数的分词器（组件 'tokenizer'）"
        ),
        "{pipe} has no encode_prompt that could be given shorter prompts": (
            "{pipe} 没有 encode_prompt，无法把缩短后的提示词交给它"
        ),
        "max_tokens={max_tokens} leaves nothing beside the tokenizer's {special} special tokens": (
            "max_tokens={max_tokens} 除了分词器的 {special} 个特殊 token，什么也容不下"
        ),
        "max_tokens={max_tokens}, but the tokenizer itself cuts at {most}: use at most {most}": (
            "max_tokens={max_tokens}，但分词器自己在 {most} 处截断：最多用 {most}"
        ),
        # Schedulers
        "{advice}; save_pretrained writes a stock FlowMatchEulerDiscreteScheduler{unseeded}: swap again after "
        "loading": (
            "{advice}；save_pretrained 写出的是原版 FlowMatchEulerDiscreteScheduler{unseeded}：加载后请再换一次"
        ),
        " (stochastic, unseeded)": "（随机，不受随机种子控制）",
        "needs a flow-matching pipeline (FlowMatchEulerDiscreteScheduler); it has {found}": (
            "需要流匹配管线（FlowMatchEulerDiscreteScheduler）；它用的是 {found}"
        ),
        "{pipe} gives each token a noise level of its own (per_token_timesteps), which only 'euler' knows": (
            "{pipe} 的每个 token 有自己的噪声水平（per_token_timesteps），只有 'euler' 支持"
        ),
        "its FlowMatchEulerDiscreteScheduler has invert_sigmas=True; solvers need falling sigmas": (
            "它的 FlowMatchEulerDiscreteScheduler 设了 invert_sigmas=True；求解器需要递减的 sigma"
        ),
        "its FlowMatchEulerDiscreteScheduler shifts by resolution (use_dynamic_shifting=True), so that shift="
        "{shift:g} would have no effect: leave it out": (
            "它的 FlowMatchEulerDiscreteScheduler 按分辨率 shift（use_dynamic_shifting=True），shift={shift:g} 不"
            "会起作用：请去掉"
        ),
        "scheduler.timestep_spacing stock -> {spacing}": "scheduler.timestep_spacing 原版 -> {spacing}",
        "the scheduler is {name!r} already, shift {shift:g}": "调度器已是 {name!r}，shift {shift:g}",
        "adds noise at every step, so it needs more steps than euler": "每步都加噪声，因此需要比 euler 更多的步数",
        "adds noise at every step, so it needs 20 or more steps": "每步都加噪声，因此需要 20 步或更多",
        "adds noise at every step; two evaluations per step: n steps cost 2n - 1": (
            "每步都加噪声；每步计算两次：n 步的代价是 2n - 1 次"
        ),
        "two evaluations per step: n steps cost 2n - 1": "每步计算两次：n 步的代价是 2n - 1 次",
        "only sound for distilled (few-step) checkpoints; others lose variance (contrast, texture)": (
            "只适合蒸馏（少步数）的检查点；其他检查点会损失方差（对比度、纹理）"
        ),
        "pays from about 20 steps on; at 8 it differs little from euler": "约 20 步起才划算；8 步时与 euler 相差无几",
        "pays from about 20 steps on; at 8 it differs little from euler, and dpmpp_2m is steadier": (
            "约 20 步起才划算；8 步时与 euler 相差无几，而 dpmpp_2m 更稳定"
        ),
        # Calls
        "{pipe} takes no argument {name!r}": "{pipe} 没有参数 {name!r}",
        "products float32 -> {dtype}": "乘法 float32 -> {dtype}",
        "the weights are {dtypes}: autocast is for float32 weights": "权重是 {dtypes}：autocast 用于 float32 权重",
        "writes its float32 padding tokens into results of autocast, of another dtype": (
            "把自己的 float32 填充 token 写入 autocast 的结果，而后者的 dtype 不同"
        ),
        "{name} is a {kind}, which {breaks}: use CastDtype({dtype!r})": (
            "{name} 是 {kind}，它{breaks}：请用 CastDtype({dtype!r})"
        ),
        "no {mode} settings are known for {name}": "不知道 {name} 的 {mode} 设置",
        "{unknown}: give values, as in CallDefaults(num_inference_steps=8, guidance_scale=1.0)": (
            "{unknown}：请给出值，例如 CallDefaults(num_inference_steps=8, guidance_scale=1.0)"
        ),
        "{name} has no {mode!r} settings; it has {modes}": "{name} 没有 {mode!r} 设置；它有 {modes}",
        "{has}: use CallDefaults({other!r}), or a preset whose name begins with {prefix!r}": (
            "{has}：请用 CallDefaults({other!r})，或名称以 {prefix!r} 开头的预设"
        ),
        "guidance_scale {guidance:g} is above {highest:g}, where a distilled checkpoint can draw a grid of 8 or "
        "16 px: lower it, or look at pictures with ernie_accel.fidelity.grid_score": (
            "guidance_scale {guidance:g} 高于 {highest:g}，蒸馏检查点可能画出 8 或 16 px 的网格：请调低，或用 "
            "ernie_accel.fidelity.grid_score 检查图片"
        ),
        "calls of {pipe} give the VAE pictures in {needs}, whatever its weights are in: leave it out with "
        "components={others!r}": (
            "{pipe} 的调用总是以 {needs} 把图片交给 VAE，不论其权重的 dtype：请用 components={others!r} 将它排除"
        ),
        "{pipe} cannot tell when a step ends (it takes no callback_on_step_end with latents, and has no scheduler "
        "that steps)": "{pipe} 无法告知一步何时结束（它没有带潜变量的参数 callback_on_step_end，也没有能迈步的调度器）",
        "adapter {name} of {count} layers": "适配器 {name}，{count} 层",
        "the LoRA counts {scale:g} times": "LoRA 的强度为 {scale:g} 倍",
        "{pipe} loads no LoRAs": "{pipe} 不能加载 LoRA",
        "peft is not installed: pip install peft": "未安装 peft：pip install peft",
        "{pipe} has an adapter {name!r} already: choose another adapter_name": (
            "{pipe} 已有适配器 {name!r}：请换一个 adapter_name"
        ),
        "layers quantized by {backends} take no LoRA: {fix}": "由 {backends} 量化的层不能加 LoRA：{fix}",
        "quantize with torchao, quanto or gguf, or load and fuse the LoRA first (pipe.fuse_lora())": (
            "请用 torchao、quanto 或 gguf 量化，或先加载并合并 LoRA（pipe.fuse_lora()）"
        ),
        "lora={lora!r} {found}: give the path of a file; {hub}": "lora={lora!r} {found}：请给出文件的路径；{hub}",
        "one on the Hub is downloaded first, with huggingface_hub.hf_hub_download(repo, file)": (
            "Hub 上的文件请先用 huggingface_hub.hf_hub_download(repo, file) 下载"
        ),
        "is no safetensors file": "不是 safetensors 文件",
        "does not exist": "不存在",
        "holds no LoRA": "里没有 LoRA",
        "holds {key}, which is no part of a LoRA that this pipeline loads": "里有 {key}，它不属于此管线能加载的 LoRA",
        "is a DoRA ({count} tensors of magnitudes), of which only a part would be loaded": (
            "是 DoRA（{count} 个幅值张量），只有一部分会被加载"
        ),
        "lora={lora!r} is of another architecture: {count} (the first is {first})": (
            "lora={lora!r} 属于另一种架构：{count}（第一个是 {first}）"
        ),
        "lora={lora!r} is of another architecture: {misfit}": "lora={lora!r} 属于另一种架构：{misfit}",
        "{count} of its {all} layers are not in this {pipe}": "它的 {all} 层中有 {count} 层不在此 {pipe} 里",
        "{count} of its {all} layers have another shape (the first: {first})": (
            "它的 {all} 层中有 {count} 层形状不同（第一个：{first}）"
        ),
        "{path} is {rows} x {columns}, and the LoRA for {lora_rows} x {lora_columns}": (
            "{path} 是 {rows} x {columns}，而 LoRA 用于 {lora_rows} x {lora_columns}"
        ),
        "{width}x{height}, batch {batch}{tokens}": "{width}x{height}，批大小 {batch}{tokens}",
        ", {tokens} tokens": "，{tokens} 个 token",
        "{steps} steps each": "各 {steps} 步",
        "{combination}: {ms:.0f} ms": "{combination}：{ms:.0f} ms",
        "prompts enhanced, batch {batch}: {ms:.0f} ms": "增强提示词，批大小 {batch}：{ms:.0f} ms",
        "{times}. Nothing to undo: compiled code goes with the undo of what compiled it": (
            "{times}。没有可撤销的：编译的代码随编译它的变换一起撤销"
        ),
        "nothing is compiled or captured on {device}: the first picture takes as long as the others": (
            "{device} 上没有要编译或捕获的：第一张图与其他图一样快"
        ),
        "{kind} takes no argument {name!r}, and a warm-up passes it": "{kind} 没有参数 {name!r}，而预热要传入它",
        "{kind} draws from {inputs} beside the prompt, and a warm-up has none: warm it up by a call of your own": (
            "除了提示词，{kind} 还需要 {inputs}，而预热没有：请自己调用一次来预热"
        ),
        "{kind} was loaded without text encoder or tokenizer, and a warm-up draws a prompt": (
            "{kind} 加载时没有文本编码器或分词器，而预热要画提示词"
        ),
        "FreeAfterUse('nowhere') allows one call, and a warm-up would be that one: use to='disk'": (
            "FreeAfterUse('nowhere') 只允许一次调用，预热会用掉它：请用 to='disk'"
        ),
        "{captured} of these pictures are captured, and {keeps_graphs} graphs are kept: use CaptureGraphs(keep="
        "{captured})": (
            "其中 {captured} 种图片会被捕获，而只保留 {keeps_graphs} 个 CUDA 图：请用 CaptureGraphs(keep={captured})"
        ),
        "{pipe} draws sizes divisible by {multiple}, got {width}x{height}: use {nearest_width}x{nearest_height}": (
            "{pipe} 的尺寸须是 {multiple} 的倍数，而给出的是 {width}x{height}：请用 {nearest_width}x{nearest_height}"
        ),
        "prompts are cut at {limit} tokens, so none has {length}: leave that length out": (
            "提示词在 {limit} 个 token 处截断，没有 {length} 个 token 的：请去掉这个长度"
        ),
        "the tokenizer of {pipe} cuts at {most} tokens, got {length}": (
            "{pipe} 的分词器在 {most} 个 token 处截断，而给出的是 {length}"
        ),
        "no prompt of exactly {length} tokens was found for the tokenizer of {pipe}, which adds {special} "
        "special tokens: take another length": (
            "没有找到恰好 {length} 个 token 的提示词（{pipe} 的分词器会加上 {special} 个特殊 token）：请换一个长度"
        ),
        # Weights
        "keeps weights that lose bits in host memory for restore()": (
            "会损失精度的权重，原件留在内存中，供 restore() 使用"
        ),
        "keep_originals=False: the bits that the cast dropped are gone": "keep_originals=False：转换丢弃的位无法恢复",
        "{name} is quantized ({path} as {how}), and its layers would still compute in the dtype they were made "
        "for: load it with that dtype, or leave it out with components={others!r}": (
            "{name} 已量化（{path} 为 {how}），它的层仍会以原来的 dtype 计算：请以所需的 dtype 加载，或用 "
            "components={others!r} 略过它"
        ),
        "{names}: channels-last weights pay only in a compiled model, and slow down any other": (
            "{names}：channels-last 的权重只有编译后才划算，否则会变慢"
        ),
        "channels_last names {name!r}, which is not among components={components!r}": (
            "channels_last 含有 {name!r}，它不在 components={components!r} 之中"
        ),
        "frees {size} while denoising; {then}": "去噪期间释放 {size}；{then}",
        "the next call that encodes a prompt reads them back": "下一次编码提示词的调用会读回它们",
        "the next call that encodes a prompt fails: encode all prompts in one call, or pass prompt_embeds": (
            "下一次编码提示词的调用会失败：请在一次调用中编码所有提示词，或传入 prompt_embeds"
        ),
        "to='nowhere': freed weights are gone": "to='nowhere'：释放的权重已丢弃",
        "{pipe} has none of {names}, whose first step shows that the prompts are encoded": (
            "{pipe} 没有 {names} 中的任何一个；要由它的第一步得知提示词已编码"
        ),
        "{pipe} has none of {names}": "{pipe} 没有 {names} 中的任何一个",
        "{pipe} has none of {names}: use 'model'": "{pipe} 没有 {names} 中的任何一个：请用 'model'",
        "{name} works while or after the picture is denoised: it cannot be freed before": (
            "{name} 在去噪期间或之后工作：不能在此之前释放"
        ),
        "{name} is quantized, and its weights cannot be written as plain tensors: to='nowhere'": (
            "{name} 已量化，权重不能写成普通张量：请用 to='nowhere'"
        ),
        "{name} is freed already, by FreeAfterUse() on another pipe that shares it: this pipe's calls free and "
        "fetch it, too, as long as the pipes share their denoiser; or restore that pipe first": (
            "{name} 已由共用它的另一条管线上的 FreeAfterUse() 释放：只要两条管线共用去噪模型，这条管线的调用也会"
            "释放并取回它；或请先还原那条管线"
        ),
        "{name} is offloaded already: use one of the two": "{name} 已卸载：两者请只用其一",
        "there is no {device!r} here: the device is {machine}": "此处没有 {device!r}：设备是 {machine}",
        "{names}: offloaded, and moved by that; call pipe.remove_all_hooks() first": (
            "{names}：已卸载，由卸载负责移动；请先调用 pipe.remove_all_hooks()"
        ),
        "{names}: offloaded already; call pipe.remove_all_hooks() first": (
            "{names}：已卸载；请先调用 pipe.remove_all_hooks()"
        ),
        "on the accelerator: {mode}": "在加速卡上：{mode}",
        "one component at a time; moving ERNIE-Image's transformer in costs a second or so a picture": (
            "每次一个组件；移入 ERNIE-Image 的 transformer，每张图约多用一秒"
        ),
        "one layer at a time; the least memory, and by far the slowest": "每次一层；显存最少，也远比其他方式慢",
        "a few blocks at a time (the next are loaded meanwhile if the device has streams), and the VAE": (
            "每次几个模块（设备有流时，同时读入后面的模块），以及 VAE"
        ),
        "the transformer and the VAE all the time, text encoder and prompt enhancer only while they work": (
            "transformer 和 VAE 始终在，文本编码器和提示词增强器只在工作时"
        ),
        "there is no accelerator to offload from: this device is cpu": "没有可卸载的加速卡：此设备是 cpu",
        "{pipe} does not say in which order its components work: use 'group'": (
            "{pipe} 没有说明组件的工作顺序：请用 'group'"
        ),
        "there is no device memory to keep weights in: this device is {device}{fix}": (
            "没有可放权重的显存：此设备是 {device}{fix}"
        ),
        "; for a pipe on the host, name the device: device='cuda'": "；管线在内存中时，请指定设备：device='cuda'",
        "{names}: freed by FreeAfterUse, which it replaces": "{names}：由 FreeAfterUse 释放，而此变换取代它",
        "the prompt encoders": "提示词编码器",
        "{pair} have weights in common, which cannot come for each in its turn": "{pair} 有共用的权重，无法轮流取来",
        "weights={weights} is too little: the least that works is {least} bytes": (
            "weights={weights} 太少：至少要 {least} 字节"
        ),
        # Quantization
        "{scheme} by {backend}{corrected}": "{scheme}（{backend}{corrected}）",
        " with a correction of rank {rank}": "，带秩为 {rank} 的校正",
        "another scheme": "另一种格式",
        "another scheme by {backend}": "另一种格式（{backend}）",
        "{scheme}; weights at {db:.1f} dB SQNR or better (least: {layer}{without})": (
            "{scheme}；权重的 SQNR 至少 {db:.1f} dB（最低：{layer}{without}）"
        ),
        "; {db:.1f} dB without the correction": "；不校正为 {db:.1f} dB",
        "the quantized weight of {path} was changed since (a LoRA fused into it?), and would be lost": (
            "{path} 的量化权重此后被改动（合并了 LoRA？），改动会丢失"
        ),
        "a LoRA is fused into {path}; unload or unfuse it first (pipe.unfuse_lora())": (
            "{path} 中合并了 LoRA；请先卸下或取消合并（pipe.unfuse_lora()）"
        ),
        "device={device!r} is not the device that was planned for, {machine}": (
            "device={device!r} 不是规划所用的设备 {machine}"
        ),
        "{transform} comes before, and {why}": "之前有 {transform}，而{why}",
        "{asked}: a layer of {backend} cannot carry one; leave it out, or use {able}": (
            "{asked}：{backend} 的层不能带校正；请去掉，或用 {able}"
        ),
        "{asked}: {layer} ({shape}) in {scheme} would take as much as unquantized, or more; {fix}": (
            "{asked}：{layer}（{shape}）以 {scheme} 存放，不比未量化的小；{fix}"
        ),
        "choose at most {most}, or exclude it": "最多选 {most}，或排除它",
        "leave it out, or exclude the layer": "请去掉，或排除该层",
        "{component}: no linear layer can be quantized: {left}": "{component}：没有可量化的线性层：{left}",
        "{component} is quantized in the same plan already ({name} as {stored_as})": (
            "{component} 在同一计划中已量化（{name} 为 {stored_as}）"
        ),
        "{component} is quantized already ({count} layers, {name} as {stored_as}): restore(pipe) first, or load "
        "the pipe unquantized": (
            "{component} 已量化（{count} 层，{name} 为 {stored_as}）：请先 restore(pipe)，或加载未量化的管线"
        ),
        "{name} has no {scheme}; it has {schemes}": "{name} 没有 {scheme}；它有 {schemes}",
        "{name} runs on {devices}, not on {device}": "{name} 在 {devices} 上运行，不在 {device} 上",
        "its {in_features} inputs are not a multiple of {inputs}": "输入维度 {in_features} 不是 {inputs} 的倍数",
        "its {out_features} outputs are not a multiple of {outputs}": "输出维度 {out_features} 不是 {outputs} 的倍数",
        "exclude: {pattern!r} matches no layer{meant}": "exclude：{pattern!r} 不匹配任何层{meant}",
        " from the start of its path, as {within!r}: write {pattern!r}": (
            "，因为要从路径开头匹配，例如 {within!r}：请写 {pattern!r}"
        ),
        ": leave it out, or look for the paths in named_modules()": "：请去掉，或在 named_modules() 中查找路径",
        "excluded": "已排除",
        "a LoRA adapter": "属于 LoRA 适配器",
        "it is a {layer}, whose owner may read the weight itself": "是 {layer}，其上层可能直接读取权重",
        "it shares its weight with another layer": "与另一层共用权重",
        "its weight is not loaded (meta device): quantize before offloading": (
            "权重尚未读入（meta 设备）：请在卸载之前量化"
        ),
        "layerwise casting changes the dtype of parameters inside the forward": (
            "逐层类型转换会在 forward 里改变参数的 dtype"
        ),
        "quanto's int4 in bfloat16 cannot be traced": "quanto 的 bfloat16 int4 无法追踪",
        "on CUDA quanto repacks {scheme} for kernels that it builds with nvcc at the first picture, and that "
        "torch.compile cannot trace": (
            "在 CUDA 上，quanto 会为内核重排 {scheme}；这些内核在画第一张图时用 nvcc 构建，torch.compile 无法追踪"
        ),
        "quanto unpacks int4 with a kernel that it builds at the first use, which needs a C++ compiler, and none "
        "is on the PATH": ("quanto 用首次使用时构建的内核解包 int4，这需要 C++ 编译器，而 PATH 中没有"),
        "tinygemm is made for single tokens: 4000 rows take 17 times as long as bfloat16; use nf4 instead": (
            "tinygemm 是为单个 token 设计的：4000 行所用的时间是 bfloat16 的 17 倍；请改用 nf4"
        ),
        "{scheme} starts from bfloat16 weights, and this is {dtype}: add CastDtype('bfloat16')": (
            "{scheme} 须从 bfloat16 权重开始，而这是 {dtype}：请加上 CastDtype('bfloat16')"
        ),
        "torchao's int8-weight-only, compiled on CUDA, takes 500 times as long as bfloat16": (
            "torchao 的 int8-weight-only 在 CUDA 上编译后，所用的时间是 bfloat16 的 500 倍"
        ),
        # The demo, and notes of commands
        "bfloat16 against float32 on this CPU, stock: {race}": "此 CPU 上 bfloat16 与 float32 之比，原版：{race}",
        "So the optimized pipeline runs in bfloat16, and stock stays in float32: {call}": (
            "因此优化后的管线用 bfloat16，原版仍用 float32：{call}"
        ),
        "Rendering on {machine} with {request}; the first optimized picture may compile ...": (
            "正在画图：设备 {machine}，用{request}；优化后的第一张图可能要编译……"
        ),
        "{title} without {names}, which cannot run here": "{title}，不含 {names}（不能在此运行）",
        "Measured in this run: {count} pairs of pictures, 128x128 px, {steps} steps; median, min, max:": (
            "本次实测：{count} 对图片，128x128 px，{steps} 步；中位数、最小、最大："
        ),
        "stock": "原版",
        "optimized": "优化后",
        "  ratio         {times}": "  比值          {times}",
        "  the first optimized picture took {seconds:.1f} s": "  优化后的第一张图用时 {seconds:.1f} s",
        "Contact sheet: {sheet}": "对比图：{sheet}",
        "The library is made for GPUs: figures for them are in docs/performance.md and the README.": (
            "本库为 GPU 而作：GPU 的数据见 docs/performance.md 和 README。"
        ),
        "{ratio:.2f} x  {verdict} (of the medians; quartiles of the pairs {low:.2f} to {high:.2f})": (
            "{ratio:.2f} x  {verdict}（中位数之比；逐对之比的四分位数 {low:.2f} 到 {high:.2f}）"
        ),
        "this machine is too busy to tell": "这台机器太忙，无法判断",
        "faster": "更快",
        "slower on this machine": "在这台机器上更慢",
        "no measurable difference": "没有可测的差别",
        "{verdict}: the median picture took {spread:.1f} times as long as the fastest one (alone, a machine "
        "stays below {limit:g}); run again when it is idle": (
            "{verdict}：中位数图片用时是最快一张的 {spread:.1f} 倍（空闲的机器低于 {limit:g}）；请在空闲时再运行"
        ),
        "no model is named, and the embedded demo model draws nothing but flat shapes ({reason}); name one: {how}": (
            "没有指定模型，而内置演示模型只会画平面图形（{reason}）；请指定模型：{how}"
        ),
        "it names no shape": "没有写明图形",
        "it does not know {word!r}": "它不认识 {word!r}",
        "demo model, shapes only": "演示模型，只画图形",
        "{option} has no effect: every row has a {name} of its own": "{option} 不起作用：每一行都有自己的 {name}",
        "the column 'prompt' has no effect: template makes the prompts; to use both, write {{prompt}} in it": (
            "列 'prompt' 不起作用：提示词由 template 生成；两者都要用，请在其中写 {{prompt}}"
        ),
        "the job would replace its own table, {name}; rename the table, or choose another output": (
            "任务会覆盖自己的表格 {name}；请给表格改名，或换一个输出文件夹"
        ),
        "nothing applied": "未应用任何变换",
        "applied before the failure": "失败之前已应用",
        # Masks
        "{transform} drops it": "{transform} 已省去它",
        "the rewritten blocks build a mask only for a batch that really pads": (
            "改写过的模块只为确实有填充的批生成掩码"
        ),
        # Batches
        "error: {text}": "错误：{text}",
        "note: {note}": "提示：{note}",
        "Model: the {model}; for other pictures name one: --model {real}": (
            "模型：{model}；要画别的图片请指定模型：--model {real}"
        ),
        "embedded demo model (draws flat shapes only)": "内置演示模型（只会画平面图形）",
        "{folder}, made with the {model}": "{folder}，由{model}制作",
        "{file}:{line}: left out: {problem}": "{file}:{line}：略过：{problem}",
        "failed: {error}": "失败：{error}",
        "{path} in {seconds:.1f} s, compilation included": "{path}，用时 {seconds:.1f} 秒，含编译",
        "Nothing to do, {count} rows were finished before: {where}": "无事可做，{count} 行此前已完成：{where}",
        "Not compiled: {reason} (--preset {preset})": "不编译：{reason}（--preset {preset}）",
        "{done} succeeded, {failed} failed{rest}, in {seconds:.1f} s: {where}": (
            "成功 {done} 张，失败 {failed} 张{rest}，用时 {seconds:.1f} 秒：{where}"
        ),
        ", {count} rejected": "，{count} 张未通过检查",
        ", {count} not begun": "，{count} 张尚未开始",
        ", {count} done before or not begun": "，{count} 张此前已完成或尚未开始",
        "Interrupted; run the same command again to resume.": "已中断；再运行同一条命令即可续跑。",
        "Finishing the batch under way; Ctrl-C again to stop at once.": (
            "正在完成当前这一批；再按一次 Ctrl-C 立即停止。"
        ),
        # Tables and folders
        "Cannot use {name}": "无法使用 {name}",
        "the rows": "这些行",
        "Cannot write to '{path}'": "无法写入 '{path}'",
        "Cannot resume the job in '{path}': it has changed": "无法续跑 '{path}' 中的任务：任务已改变",
        "{heading} (1 problem):": "{heading}（1 个问题）：",
        "{heading} ({count} problems):": "{heading}（{count} 个问题）：",
        "line {line}: ": "第 {line} 行：",
        "  ... and {count} more": "  ……另有 {count} 个",
        "Fix these and run again; nothing was rendered.": "请改正后重新运行；什么也没有画。",
        "No picture was left half-written.": "没有留下写了一半的图片。",
        "Change it back, choose another output, or allow overwriting: then what changed is made again.": (
            "请改回去、换一个输出文件夹，或允许覆盖：有改变的部分会重做。"
        ),
        "no model is named, and the embedded demo model draws nothing but flat shapes, such as 'a large red circle in "
        "the center on a cream background'; name a model (--model {model}), or see its shapes all the same "
        "(--demo-model)": (
            "没有指定模型，而内置演示模型只会画平面图形，例如 "
            "'a large red circle in the center on a cream background'；"
            "请指定模型（--model {model}），或仍要看它画的图形（--demo-model）"
        ),
        "{more:,} more prompts of {all:,} are like these": "共 {all:,} 条提示词，还有 {more:,} 条也是如此",
        "does not exist; check the path": "不存在；请检查路径",
        "is a folder; expected a file such as prompts.csv": "是文件夹；应为文件，例如 prompts.csv",
        "cannot be read: {reason}": "无法读取：{reason}",
        "has more than {most:,} bytes; split it": "超过 {most:,} 字节；请拆分",
        "is UTF-16, as Excel's 'Unicode Text' is; {fix}": "是 UTF-16，与 Excel 的“Unicode 文本”相同；{fix}",
        "is not UTF-8: byte 0x{byte:02X} at offset {offset}; {fix}": (
            "不是 UTF-8：偏移 {offset} 处的字节为 0x{byte:02X}；{fix}"
        ),
        "save it as UTF-8 (in Excel: 'CSV UTF-8') and run again": "请存为 UTF-8（Excel 中选“CSV UTF-8”）后重新运行",
        "has {count:,} characters; expected at most {most:,}": "有 {count:,} 个字符；最多 {most:,} 个",
        "has a NUL character; remove it": "含有 NUL 字符；请删除",
        "{name} {reason}": "{name} {reason}",
        'has no rows; add one per picture, such as {{"prompt": "a red mug"}}': (
            '没有行；请每张图片加一行，例如 {{"prompt": "a red mug"}}'
        ),
        "has a header and no rows; add one line per picture": "有表头而没有行；请每张图片加一行",
        "asks for more than {most:,} pictures; split the table": "要求的图片超过 {most:,} 张；请拆分表格",
        "has no 'prompt' column; found: {found}": "没有 'prompt' 列；现有的列：{found}",
        "{problem}. The separator looks like {separator}; expected {expected}: save the file with {mark}": (
            "{problem}。分隔符似乎是 {separator}，应为 {expected}：请以{mark}分隔保存"
        ),
        "tabs, or name it .csv": "制表符（或把文件改名为 .csv）",
        "commas": "逗号",
        "comma": "逗号",
        "tab": "制表符",
        "has {count} columns named {name}; rename or delete all but one": (
            "有 {count} 列都叫 {name}；请只留一列，其余改名或删除"
        ),
        "column {name} {reason}": "列 {name} {reason}",
        "column {name} would be ignored; {fix}, or, if it is a column of your own, name it in extra_columns "
        "(--extra-columns)": (
            "列 {name} 会被忽略；请{fix}；如果它是你自己的列，请写进 extra_columns（--extra-columns）"
        ),
        "rename it to {meant!r}": "改名为 {meant!r}",
        "delete it, beside {meant!r}": "删除它，因为已有 {meant!r}",
        "{reason}; delete it": "删除它（{reason}）",
        "the whole job has one sampler: choose it with --sampler": "整个任务只用一个采样器：用 --sampler 选择",
        "the text encoder is used as the model was trained with it": "文本编码器按模型训练时的方式使用",
        "write 'width' and 'height'": "请写 'width' 和 'height'",
        "column {column} has values but no name; {fix}": "第 {column} 列有值而没有列名；{fix}",
        "name it or delete it (pandas: to_csv(..., index=False))": "请命名或删除（pandas：to_csv(..., index=False)）",
        "is not valid CSV ({error}); {hint}": "不是有效的 CSV（{error}）；{hint}",
        'close every quote, and double a quote inside quotes: "a 5"" plate"': (
            '每个引号都要成对，引号内的引号写两遍："a 5"" plate"'
        ),
        "the separator looks like {found}, expected {expected!r}": "分隔符似乎是 {found}，应为 {expected!r}",
        "has {found} fields, the header has {expected}; {fix}": "有 {found} 个字段，表头有 {expected} 个；{fix}",
        'put quotes around a value with a {mark} in it: "red{delimiter} glossy"': (
            '请给含有{mark}的值加引号："red{delimiter} glossy"'
        ),
        "nothing is given for {missing}: add the value, or a {mark} for each empty one": (
            "没有给出 {missing}：请补上值，或为每个空值补一个{mark}"
        ),
        "prompt is empty; write what to draw, or delete the line": "prompt 为空；请写明要画什么，或删除该行",
        "{name} {found} is not a whole number; {fix}": "{name} {found} 不是整数；{fix}",
        "{name} {found} is not a number; {fix}": "{name} {found} 不是数字；{fix}",
        "{name} {found} is not within {low} to {high}; {fix}": "{name} {found} 不在 {low} 到 {high} 之间；{fix}",
        "write digits, e.g. 42, or leave it empty": "请写数字，例如 42，或留空",
        "write digits, e.g. 8, or leave it empty": "请写数字，例如 8，或留空",
        "write e.g. 4.0, or leave it empty": "请写例如 4.0，或留空",
        "write e.g. 0.3, or leave it empty": "请写例如 0.3，或留空",
        "write e.g. 0.8, or leave it empty": "请写例如 0.8，或留空",
        "write how many pictures, e.g. 4, or leave it empty": "请写图片张数，例如 4，或留空",
        "write pixels, e.g. {pixels}, or leave it empty": "请写像素数，例如 {pixels}，或留空",
        "seed {seed} leaves no room for {variants} variants; choose a smaller one": (
            "seed {seed} 之后容不下 {variants} 个变体；请选小一些的"
        ),
        "size": "尺寸",
        "width": "宽度",
        "height": "高度",
        "default {reason}": "默认值：{reason}",
        "{what} {given} is not made of multiples of {multiple} from {multiple} to {most}; the nearest valid {what} is "
        "{nearest}": (
            "{what} {given} 不是 {multiple} 到 {most} 之间 {multiple} 的倍数；最接近的有效{what}是 {nearest}"
        ),
        "{name} has no effect without image; name the picture, or leave it empty": (
            "没有 image 时 {name} 不起作用；请写明图片，或留空"
        ),
        "lora_scale has no effect without lora; name the file, or leave it empty": (
            "没有 lora 时 lora_scale 不起作用；请写明文件，或留空"
        ),
        "file name {name} (from {pattern})": "文件名 {name}（来自 {pattern}）",
        "{what} {reason}; change the value, or name pictures by another column": (
            "{what}{reason}；请改值，或用另一列命名图片"
        ),
        "{what} {reason}; change one, or name pictures by {unique}": (
            "{what}{reason}；请改其中之一，或用 {unique} 命名图片"
        ),
        "is taken by {by}": "已被{by}占用",
        "line {line}": "第 {line} 行",
        "row {row}, on the same line": "同一行的第 {row} 条",
        "{by} as {name}, the same name where letter case or Unicode form is ignored": (
            "{by}（写作 {name}，不计大小写和 Unicode 形式时是同一个名称）"
        ),
        "is {name} on line {line}, the same where letter case or Unicode form is ignored": (
            "在第 {line} 行写作 {name}，不计大小写和 Unicode 形式时两者相同"
        ),
        "folder {name} (from column {column}) {reason}; change the value": (
            "文件夹 {name}（来自列 {column}）{reason}；请改值"
        ),
        "folder {name} (from column {column}) {reason}; write both alike": (
            "文件夹 {name}（来自列 {column}）{reason}；请写成一样"
        ),
    }
)
