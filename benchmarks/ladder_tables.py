"""The ladder's results as markdown tables and as plots."""

from __future__ import annotations

from typing import Any

from ladder_families import MEASURED, verdicts

from ernie_accel.core.hardware import hardware_called

Result = dict[str, Any]
Row = dict[str, Any]


def text_of(result: Result) -> str:
    """Return the result file's text: what ran where, and its tables."""
    about = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines = [f"# {result['section'].capitalize()} on {result['device']}", "", f"`{result['command']}`", ""]
    lines += [f"{about}; commit {result['commit']}.", ""]
    if result["ceilings"]:
        peaks = _published(result["device"])
        rates = (f"{name} {value:.1f}{_share(value, peaks.get(name))}" for name, value in result["ceilings"].items())
        lines += [f"Ceilings: {', '.join(rates)}.", ""]
    return "\n".join(lines) + "\n" + tables(result) + "\n"


def _published(device: str) -> dict[str, float]:
    """Return what the vendor publishes of a device, by the names that the ceilings have."""
    row = hardware_called(device)
    rates = row.published() if row is not None else None
    known = rates.known() if rates is not None else {}
    return {{"bandwidth_tb_s": "copy_tb_s"}.get(name, name): value for name, value in known.items()}


def _share(value: float, peak: float | None) -> str:
    return "" if peak is None else f" ({value / peak:.0%} of the published {peak:g})"


def tables(result: Result) -> str:
    """Return the tables of a result of any section, then what failed."""
    made = {"ladder": _ladder, "sweep": _sweep, "peers": _peers, "parts": _parts, "fits": _fits}.get(
        result["section"], _family
    )(result)
    failed = [f"- {row['rung']}: {row['error']}" for row in result["rungs"] if "error" in row]
    failed += [f"- {row['rung']}, eager: {row['not_compiled']}" for row in result["rungs"] if "not_compiled" in row]
    return made + ("\n\nNot measured:\n\n" + "\n".join(failed) if failed else "")


def _ladder(result: Result) -> str:
    pixels, stock = result["pixels"], _row(result, "stock")
    head = ["rung", *(f"ms/step {px} px" for px in pixels), "x stock", "x roofline", "picture ms"]
    head += ["prompts of other lengths, ms", "first picture s"]
    lines = []
    for row in _measured(result):
        ms = row[f"ms_{pixels[0]}"]
        cells = [row["rung"], *(f"{row[f'ms_{px}']:.1f}" for px in pixels)]
        cells += [_ratio(stock and stock[f"ms_{pixels[0]}"], ms), _ratio(ms, _roofline(result, row["rung"]))]
        cells += [f"{row['picture_ms']:.0f}", _number(row.get("other_lengths_ms"), 0), f"{row['first_picture_s']:.1f}"]
        lines.append([*cells, f"{row['weight_gb']:.2f}", _number(row.get("peak_gb"), 1), f"{row['sqnr_db']:.1f}"])
    return _table([*head, "weights GB", "peak GB", "SQNR dB"], lines)


def _family(result: Result) -> str:
    rows = {row["rung"]: row for row in _measured(result)}
    stock: Row = rows.get("stock", {})
    large, small = result["pixels"]
    head = ["rung", "what", f"ms/step {large} px", f"{small} px", "x stock", f"x stock {small} px", "picture ms"]
    head += ["of a new length", "first picture s", "weights GB", "peak GB", "SQNR dB"]
    lines = [
        [
            *(name, row["what"], f"{row['ms_1024']:.1f}", f"{row['ms_512']:.1f}"),
            *(_ratio(stock.get("ms_1024"), row["ms_1024"]), _ratio(stock.get("ms_512"), row["ms_512"])),
            *(f"{row['picture_ms']:.0f}", f"{row['new_length_ms']:.0f}", f"{row['first_picture_s']:.1f}"),
            *(f"{row['weight_gb']:.2f}", _number(row["peak_gb"], 1), f"{row['sqnr_db']:.1f}"),
        ]
        for name, row in rows.items()
    ]
    judged = [
        [
            f"{each['rung']}, {each['column']}, of {each['of']}, {each['base']}",
            *(f"{each['reached']:.3f}", f"<= {each['target']}", "yes" if each["reached"] <= each["target"] else "no"),
        ]
        for each in verdicts(result["section"], rows)
    ]
    targets = _table(["target", "reached", "wanted", "met"], judged)
    return _table(head, lines) + ("\n\n" + targets if judged else "")


def _peers(result: Result) -> str:
    stock = _row(result, "stock")
    head = ["recipe", "what", "compiled", "ms/step", "ms/step in a picture", "x stock", "x roofline", "first call s"]
    head += ["weights GB", "peak GB", "SQNR dB", "SQNR dB after 8 steps"]
    lines = []
    for row in _measured(result):
        ms = row.get("ms") or row["picture_step_ms"]
        base = stock and (stock["ms"] if "ms" in row else stock["picture_step_ms"])
        roof = None if row["approximate"] else _roofline(result, row["rung"] + row["what"])
        lines.append(
            [
                *(row["rung"], row["what"], "yes" if row["compiled"] else "no"),
                *(_number(row.get("ms"), 1), _number(row["picture_step_ms"], 1), _ratio(base, ms), _ratio(ms, roof)),
                *(_number(row.get("first_call_s"), 1), f"{row['weight_gb']:.2f}", _number(row["peak_gb"], 1)),
                *(_number(row.get("sqnr_db"), 1), _number(row["latents_db"], 1)),
            ]
        )
    return _table(head, lines)


def _sweep(result: Result) -> str:
    rows = _measured(result)
    if not rows:
        return ""
    stock = _row(result, "stock")
    head = ["pixels", "batch", *(f"{row['rung']}, ms/image" for row in rows)]
    head += [f"x stock, {row['rung']}" for row in rows if row is not stock]
    lines = []
    for index, cell in enumerate(rows[0]["cells"]):
        found = [row["cells"][index].get("ms_per_image") for row in rows]
        base = stock and stock["cells"][index].get("ms_per_image")
        ratios = [_ratio(base, ms) for row, ms in zip(rows, found, strict=True) if row is not stock]
        place = f"{cell['width']} x {cell['height']}"
        lines.append([place, str(cell["batch"]), *(_number(ms, 1) for ms in found), *ratios])
    graphs = [
        [*(row["rung"], str(row["graphs"])), str(row["graphs_for_prompt_lengths"]), str(row["graphs_for_batches"])]
        for row in rows
    ]
    columns = ["rung", "graphs compiled by then", "more for other prompt lengths", "more for other batches"]
    return _table(head, lines) + "\n\n" + _table(columns, graphs)


def _parts(result: Result) -> str:
    head = ["part", "ms", "x stock", "ms/token", "first call s", "peak GB", "SQNR dB to stock"]
    exact = any("sqnr_db" in row for row in _measured(result))
    head += ["to float32"] * exact
    lines = []
    for row in _measured(result):
        base = next((r for r in _measured(result) if r["rung"] == f"{row['group']}: stock"), None)
        lines.append(
            [
                *(row["what"], f"{row['ms']:.1f}", _ratio(base and base["ms"], row["ms"])),
                *(_number(row.get("ms_per_token"), 2), f"{row['first_call_s']:.1f}", _number(row["peak_gb"], 1)),
                "bitwise" if row.get("is_stock") else _number(row.get("sqnr_to_stock_db"), 1),
                *[_number(row.get("sqnr_db"), 1)] * exact,
            ]
        )
    return _table(head, lines)


def _fits(result: Result) -> str:
    stock = _row(result, "stock")
    head = ["card", "enhancer off, s", "x stock", "on, s", "x stock", "placed s", "first s", "predicted peak GiB"]
    head += ["peak GiB", "off by", "reserved GiB", "host GiB", "bits"]
    lines = []
    for row in _measured(result):
        predicted, peak = row.get("predicted_peak_gib"), row["peak_gib"]
        cells = [row["rung"]]
        for name in ("off_s", "on_s"):
            cells += [f"{row[name]:.2f}", f"{row[name] / stock[name]:.2f}" if stock else "-"]
        cells += [_number(row.get("placed_s"), 1), f"{row['first_s']:.1f}", _number(predicted, 2), f"{peak:.2f}"]
        cells += [f"{predicted / peak - 1:+.1%}" if predicted and peak else "-", f"{row['reserved_gib']:.2f}"]
        lines.append([*cells, _number(row.get("host_gib"), 1), row.get("bits", "-")])
    return _table(head, lines)


def plot(result: Result) -> Any:
    """Return a figure of the result; needs matplotlib."""
    from matplotlib.figure import Figure

    rows = _measured(result)
    if result["section"] == "sweep":
        return _plot_sweep(result, rows)
    if result["section"] == "parts":
        groups = list(dict.fromkeys(row["group"] for row in rows))
        figure = Figure(figsize=(8, 0.5 * len(rows) + 1.2 * len(groups)), layout="constrained")
        sizes = [sum(row["group"] == group for row in rows) + 0.6 for group in groups]
        panels = figure.subplots(len(groups), height_ratios=sizes, squeeze=False)[:, 0]
        for axes, group in zip(panels, groups, strict=True):
            of_group = [row for row in rows if row["group"] == group]
            _bars(axes, [row["what"] for row in of_group], [row["ms"] for row in of_group], "ms")
        figure.suptitle(result["device"])
        return figure
    figure = Figure(figsize=(8, 0.4 * len(rows) + 1.2), layout="constrained")
    axes = figure.subplots()
    if result["section"] == "fits":
        _bars(axes, [row["rung"] for row in rows], [row["on_s"] for row in rows], "s a picture, enhancer on")
        axes.set_title(result["device"])
        return figure
    by_pixels = {"ladder": result["pixels"][0]} | dict.fromkeys(MEASURED, 1024)
    key = f"ms_{by_pixels[result['section']]}" if result["section"] in by_pixels else "ms"
    times = [row.get(key) or row["picture_step_ms"] for row in rows]
    names = [row["rung"] + (" (on average)" if row.get("approximate") else "") for row in rows]
    _bars(axes, names, times, f"ms/step, {result['pixels'][0]} px, {result['device']}")
    roof = result["ceilings"].get("roofline_bf16_ms"), result["ceilings"].get("roofline_fp8_ms")
    for ms, label, style in zip(roof, ("bf16 roofline", "fp8 roofline"), ("--", ":"), strict=True):
        if ms:
            axes.axvline(ms, color="black", linestyle=style, linewidth=1, label=label)
    if any(roof):
        axes.legend(loc="lower right")
    return figure


def _plot_sweep(result: Result, rows: list[Row]) -> Any:
    from matplotlib.figure import Figure

    sizes = list(dict.fromkeys((cell["width"], cell["height"]) for cell in rows[0]["cells"]))
    batched = [size for size in sizes if sum((c["width"], c["height"]) == size for c in rows[0]["cells"]) > 1]
    figure = Figure(figsize=(3.4 * (len(batched) + 2), 4.2), layout="constrained")
    panels = figure.subplots(1, len(batched) + 1, width_ratios=[*(1 for _ in batched), 2], squeeze=False)[0]
    for row in rows:
        cells = [cell for cell in row["cells"] if "ms" in cell]
        for axes, size in zip(panels, batched, strict=False):
            of_size = [cell for cell in cells if (cell["width"], cell["height"]) == size]
            axes.plot([c["batch"] for c in of_size], [c["ms_per_image"] for c in of_size], "o-", label=row["rung"])
            axes.set(title="{} x {}".format(*size), xlabel="batch", xticks=[c["batch"] for c in of_size])
        single = sorted((c["width"] * c["height"] / 1e6, c["ms"]) for c in cells if c["batch"] == 1)
        panels[-1].plot(*zip(*single, strict=True), "o-", label=row["rung"])
    panels[-1].set(title="batch 1, all sizes", xlabel="megapixels")
    panels[0].set_ylabel("ms/step and image")
    for axes in panels:
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    panels[-1].legend()
    figure.suptitle(result["device"])
    return figure


def _bars(axes: Any, names: list[str], values: list[float], label: str) -> None:
    over_the_roofs = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    axes.bar_label(axes.barh(names, values, color="#4477aa"), fmt="%.1f", padding=3, bbox=over_the_roofs)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel(label)
    axes.spines[["top", "right"]].set_visible(False)


def _measured(result: Result) -> list[Row]:
    return [row for row in result["rungs"] if "error" not in row]


def _row(result: Result, rung: str) -> Row | None:
    return next((row for row in _measured(result) if row["rung"] == rung), None)


def _roofline(result: Result, name: str) -> float | None:
    if "int" in name and "weights only" not in name:
        return None  # integers are multiplied at a rate that is not among the ceilings
    found: float | None = result["ceilings"].get("roofline_fp8_ms" if "fp8" in name else "roofline_bf16_ms")
    return found


def _ratio(slow: float | None, fast: float | None) -> str:
    return f"{slow / fast:.2f}" if slow and fast else "-"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _table(head: list[str], lines: list[list[str]]) -> str:
    made = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join([*made, *("| " + " | ".join(line) + " |" for line in lines)])
