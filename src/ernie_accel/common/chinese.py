"""The command line's messages in Chinese, by their English templates; the terms are those of docs/glossary.md."""

# Chinese has punctuation of its own

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

CATALOGUE: Mapping[str, str] = MappingProxyType(
    {
        # Plans and reports
        "Plan: {title} for {pipe} ({family}) on {machine}": "计划：{title}，用于 {pipe}（{family}），在 {machine} 上",
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
        "attention in {precision} by cuDNN where no backend is chosen": "未选后端处由 cuDNN 计算 {precision} 注意力",
        "attention in {precision} by cuDNN": "由 cuDNN 计算 {precision} 注意力",
        "attention by torch, planned anew for each prompt length: {reason}": (
            "注意力由 torch 计算，每种提示词长度都要重新准备：{reason}"
        ),
        "attention in bf16": "注意力用 bf16",
        "{first}: {second}": "{first}：{second}",
        "cuDNN's own attention needs CUDA compute capability >= 9.0": "cuDNN 自带的注意力要求 CUDA 计算能力 >= 9.0",
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
        "the fused kernels call cuDNN themselves, with the lengths of prompts instead of a mask": (
            "融合内核自行调用 cuDNN，用提示词长度代替掩码"
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
        "no CUDA ({device})": "没有 CUDA（{device}）",
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
        "{first} and {last}": "{first} 和 {last}",
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
